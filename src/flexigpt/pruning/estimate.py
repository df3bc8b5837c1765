"""What a run will write and hold in memory, said before it starts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from flexigpt.calibration import SourceStates, batch_tokens
from flexigpt.evaluation import LOGITS_BUDGET
from flexigpt.model import HELD_BYTES, Replica, find_architecture
from flexigpt.pruning.distances import BASE_DISTANCES
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import Asked, CheckedSource, Texts, Workspace
from flexigpt.replicas import hidden_copies
from flexigpt.runtime import Track, find_device, size_in_words, workers_of
from flexigpt.text import batch_size_for

# What libraries take that are loaded later, and what they keep of memory that was given back.
_LATER = 192 * 2**20

# Copies of the largest linear that factoring it or initialising its adapter holds, in bytes a number.
_FACTOR_BYTES = 28

# What is held of float32 numbers, in copies of the largest linear: while text goes through a block, beside the second
# moments of the widest inputs; then by a fit, or by taking units away, either of which holds those moments twice.
_SUM_LINEARS, _FIT_LINEARS, _UNITS_LINEARS = 3, 4, 3

# By how much a backward pass multiplies a block's activations; logits of a few windows with their gradients, in bytes.
_BACKWARD, _LOSS_BYTES = 3, 4 * 2**26

# Float32 tensors of the MLP's width that a block holds while it runs, in bytes a number.
_ACTIVATIONS = 6 * 4

# Copies of the hidden states that a calibration leaves in the cache to go on from, while one replaces the other.
_SAVED = 2

# Copies of logits in float32 that perplexity holds, in bytes a number.
_LOGITS_BYTES = 4 * 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes at most, if nothing that it needs is in the cache.

    Attributes:
        written: bytes of the checkpoint.
        scratch: bytes in the cache folder at a time.
        memory: bytes at the peak, mapped files included but for those of hidden states.
    """

    written: int
    scratch: int
    memory: int

    def line(self) -> str:
        """All of it in one line."""
        writes = [size_in_words(self.written)] if self.written else []
        writes += [f"{size_in_words(self.scratch)} of scratch files"] if self.scratch >= 1e6 else []
        wrote = f"writes {' and '.join(writes)}, " if writes else ""
        return f"{wrote}takes at most about {size_in_words(self.memory)} of memory"


Announce = Callable[[Estimate], None]


def open_announced(
    checked: CheckedSource[Asked],
    track: Track,
    announce: Announce | None,
    written: int,
    ranks: Sequence[int | Replica] = (),
) -> Workspace[Asked]:
    """Reads the texts, says what the run will take, and opens the weights.

    Args:
        checked: the source, and what is asked for.
        track: reports the progress of each stage.
        announce: is called once with what the run will take.
        written: parameters of the checkpoint.
        ranks: of the replicas to be made.
    """
    texts = checked.read()
    if announce is not None:
        announce(_estimate(checked, texts, written, ranks))
    return checked.open(texts, track)


def _estimate(checked: CheckedSource[Asked], texts: Texts, written: int, ranks: Sequence[int | Replica]) -> Estimate:
    """What that work takes, by arithmetic on top of what the process holds now."""
    shape, itemsize, options = checked.shape, checked.itemsize, checked.options
    largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
    widest = max(max(size) for size in shape.linears.values())
    vocabulary = checked.empty.config.get_text_config().vocab_size
    block = 2 * shape.block_parameters * itemsize
    in_float32 = _in_float32(shape.block_parameters, itemsize, 4 * largest)
    activations = _ACTIVATIONS * batch_tokens(checked.window_length, shape.block_parameters) * widest
    running, factors, factor_files, hidden_files, saved = in_float32 + activations, bool(ranks), 0, 0, 0
    if isinstance(options, PruneOptions):
        chooses = options.plan is None and not options.remove and not options.by_units
        moments, held = 4 * max(inputs for _, inputs in shape.linears.values()) ** 2, 0
        if options.calibrates:
            copies = hidden_copies(shape) if options.refit_kept else 1
            keeps = options.refit_kept and written and find_device(options.device).type == "cpu"
            if options.by_units and keeps:
                copies += SourceStates.copies(checked.depth) + 1
            elif options.by_units:
                copies = max(copies, checked.depth + 1)
            tokens = copies * texts.windows.numel()
            hidden = tokens * shape.hidden_size * itemsize
            saved = _SAVED * texts.windows.numel() * shape.hidden_size * itemsize
            hidden_files, held = (hidden, 0) if checked.needs_file(tokens) else (0, hidden)
        # One after the other: text goes through a block, its sums are put to use, the next.
        steps = [running]
        if options.refit_kept:
            steps += [running + moments + 4 * _SUM_LINEARS * largest, 2 * moments + 4 * _FIT_LINEARS * largest]
        if options.by_units:
            back = in_float32 + _BACKWARD * activations
            steps += [back + moments + 4 * _SUM_LINEARS * largest, 2 * moments + 4 * _UNITS_LINEARS * largest]
            steps += [_LOSS_BYTES + _in_float32(vocabulary * shape.hidden_size, itemsize, 0)]
        running = max(steps) + held
        if chooses and BASE_DISTANCES[options.base_distance].prepare is not None:
            factors = True
            pairs = checked.depth * checked.rank * 8
            factor_files = max(pairs * sum(size) for size in shape.linears.values())
    factoring = factors * workers_of(find_device(options.device)) * _FACTOR_BYTES * largest
    outside = (shape.parameters - checked.depth * shape.block_parameters) * itemsize
    measuring = 0
    if texts.text is not None:
        tokens, length = texts.text.ids.numel(), checked.window_length
        hidden = tokens * shape.hidden_size * itemsize
        batch = min(tokens, length * batch_size_for(length, vocabulary, LOGITS_BUDGET))
        in_file = checked.needs_file(tokens)
        hidden_files = max(hidden_files, hidden if in_file else 0)
        measuring = (
            in_float32 + _ACTIVATIONS * batch * widest + _LOGITS_BYTES * batch * vocabulary + (not in_file) * hidden
        )
    process = psutil.Process().memory_info().rss + _LATER
    return Estimate(
        written=written * itemsize,
        scratch=max(factor_files, hidden_files + max(saved, _kept_of(checked, written, ranks) * itemsize)),
        memory=process + outside + max(block + max(running, measuring), factoring),
    )


def _kept_of(checked: CheckedSource[Asked], written: int, ranks: Sequence[int | Replica]) -> int:
    """Parameters that the cache keeps until all are written: the replicas' own, and what is refitted."""
    shape, options = checked.shape, checked.options
    if not (written and isinstance(options, PruneOptions)):
        return 0
    kept = sum(shape.replica_parameters(rank) for rank in ranks)
    if options.refit_kept:
        roles = find_architecture(checked.empty.config).roles
        fitted = sum(math.prod(shape.linears[path]) for path in (roles.output, roles.down))
        kept += fitted * (checked.depth - len(ranks))
    return kept


def _in_float32(parameters: int, itemsize: int, at_least: int) -> int:
    """Bytes of weights in half precision that are also held in float32."""
    return max(min(HELD_BYTES, 4 * parameters), at_least) if itemsize < 4 else 0
