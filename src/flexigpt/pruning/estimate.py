"""What a run will write and hold in memory, said before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexigpt.model import Replica
from flexigpt.pruning.distances import BASE_DISTANCES
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import Asked, CheckedSource
from flexigpt.replicas import HIDDEN_COPIES
from flexigpt.runtime import find_device, workers_of

# Python, torch and transformers, with nothing loaded.
_LIBRARIES = 600 * 2**20

# Copies of the largest linear that factoring it or initialising its adapter holds, in bytes a number.
_FACTOR_BYTES = 28

# What a fit holds of float64 numbers: moments of the widest inputs, and copies of the largest linear; and by how much a
# backward pass multiplies a block's activations.
_FIT_MOMENTS, _FIT_LINEARS, _BACKWARD = 3, 6, 3

# Of the eigendecomposition of an n x n matrix in float64, beside it, in bytes a number.
_EIGEN_BYTES = 40

# Float32 tensors of the MLP's width that a block holds while it runs on one batch of 2048 tokens.
_ACTIVATIONS = 6 * 2048 * 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes at most, if nothing that it needs is in the cache, perplexities left out.

    Attributes:
        written: bytes of the checkpoint.
        scratch: bytes in the cache folder at a time.
        memory: bytes at the peak, file-backed ones included.
    """

    written: int
    scratch: int
    memory: int

    def line(self) -> str:
        """All of it in one line."""
        writes = [_size(self.written)] if self.written else []
        writes += [f"{_size(self.scratch)} of scratch files"] if self.scratch >= 1e6 else []
        wrote = f"writes {' and '.join(writes)}, " if writes else ""
        return f"{wrote}takes at most about {_size(self.memory)} of memory"


def estimate(checked: CheckedSource[Asked], written: int, ranks: Sequence[int | Replica]) -> Estimate:
    """What that work takes, by arithmetic.

    Args:
        checked: the source, and what is asked for.
        written: parameters of the checkpoint.
        ranks: of the replicas to be made.
    """
    shape, itemsize, options = checked.shape, checked.itemsize, checked.options
    largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
    widest = max(max(size) for size in shape.linears.values())
    inputs = [inputs for _, inputs in shape.linears.values()]
    running = 2 * shape.block_parameters * itemsize + 4 * largest + _ACTIVATIONS * widest
    scratch, factors = 0, bool(ranks)
    if isinstance(options, PruneOptions):
        chooses = options.plan is None and not options.remove
        distance = BASE_DISTANCES[options.base_distance]
        if options.calibrates:
            copies = HIDDEN_COPIES if options.fits else 1
            tokens = copies * options.windows * checked.window_length
            hidden = tokens * shape.hidden_size * itemsize
            scratch, running = (hidden, running) if checked.needs_file(tokens) else (0, running + hidden)
        if options.fits or (chooses and options.spread_rank):
            running += 8 * (_FIT_MOMENTS * max(inputs) ** 2 + _FIT_LINEARS * largest)
            running += (_BACKWARD - 1) * _ACTIVATIONS * widest
        if chooses and distance.calibrated:
            squares = [n * n for n in inputs]
            running += 8 * sum(squares) + max(_EIGEN_BYTES * max(squares), _FACTOR_BYTES * largest)
        if chooses and distance.prepare is not None:
            factors = True
            pairs = checked.depth * checked.rank * 8
            scratch = max(scratch, max(pairs * sum(size) for size in shape.linears.values()))
    factoring = factors * workers_of(find_device(options.device)) * _FACTOR_BYTES * largest
    outside = (shape.parameters - checked.depth * shape.block_parameters) * itemsize
    return Estimate(written=written * itemsize, scratch=scratch, memory=_LIBRARIES + outside + max(running, factoring))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
