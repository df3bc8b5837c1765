"""What a run will write and hold in memory, said before it starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from flexigpt.evaluation import LOGITS_BUDGET
from flexigpt.model import Replica
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

# What a fit holds of float64 numbers: moments of the widest inputs, and copies of the largest linear.
_FIT_MOMENTS, _FIT_LINEARS = 2, 6

# What taking units away holds of them; by how much a backward pass multiplies a block's activations; and logits of a
# few windows with their gradients, in bytes.
_UNITS_MOMENTS, _UNITS_LINEARS, _BACKWARD, _LOSS_BYTES = 2, 3, 3, 4 * 2**26

# Float32 tensors of the MLP's width that a block holds while it runs, in bytes a number; tokens of a batch in
# calibration.
_ACTIVATIONS, _BATCH_TOKENS = 6 * 4, 2048

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
    inputs = [inputs for _, inputs in shape.linears.values()]
    block = 2 * shape.block_parameters * itemsize + 4 * largest
    running = block + _ACTIVATIONS * _BATCH_TOKENS * widest
    scratch, factors = 0, bool(ranks)
    if isinstance(options, PruneOptions):
        chooses = options.plan is None and not options.remove and not options.by_units
        if options.calibrates:
            copies = hidden_copies(shape) if options.refit_kept else 1
            copies = max(copies, checked.depth + 1) if options.by_units else copies
            tokens = copies * texts.windows.numel()
            hidden = tokens * shape.hidden_size * itemsize
            scratch, running = (hidden, running) if checked.needs_file(tokens) else (0, running + hidden)
        fitting = choosing = 0
        if options.refit_kept:
            fitting = 8 * (_FIT_MOMENTS * max(inputs) ** 2 + _FIT_LINEARS * largest)
        if options.by_units:
            choosing = (_BACKWARD - 1) * _ACTIVATIONS * _BATCH_TOKENS * widest + _LOSS_BYTES
            choosing += 8 * (_UNITS_MOMENTS * max(inputs) ** 2 + _UNITS_LINEARS * largest)
        running += max(fitting, choosing)  # one after the other
        if chooses and BASE_DISTANCES[options.base_distance].prepare is not None:
            factors = True
            pairs = checked.depth * checked.rank * 8
            scratch = max(scratch, max(pairs * sum(size) for size in shape.linears.values()))
    factoring = factors * workers_of(find_device(options.device)) * _FACTOR_BYTES * largest
    outside = (shape.parameters - checked.depth * shape.block_parameters) * itemsize
    measuring = 0
    if texts.text is not None:
        tokens, length = texts.text.ids.numel(), checked.window_length
        hidden = tokens * shape.hidden_size * itemsize
        vocabulary = checked.empty.config.get_text_config().vocab_size
        batch = min(tokens, length * batch_size_for(length, vocabulary, LOGITS_BUDGET))
        in_file = checked.needs_file(tokens)
        scratch = max(scratch, hidden if in_file else 0)
        measuring = block + _ACTIVATIONS * batch * widest + _LOGITS_BYTES * batch * vocabulary + (not in_file) * hidden
    held = psutil.Process().memory_info().rss + _LATER
    return Estimate(
        written=written * itemsize, scratch=scratch, memory=held + outside + max(running, factoring, measuring)
    )
