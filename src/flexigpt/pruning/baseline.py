"""Baselines that pruning is compared with: plain removal of blocks (ShortGPT)."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from flexigpt.pruning.estimate import Estimate, Work, estimate
from flexigpt.pruning.options import DEFAULT_WINDOWS, ScoringOptions
from flexigpt.pruning.scores import GREEDY_SCORES
from flexigpt.pruning.source import CheckedSource, check_source, chosen, open_scored, pruned_or_count
from flexigpt.record import Record, measure_both, new_record
from flexigpt.replicas import HIDDEN_COPIES, Fits, fit_blocks
from flexigpt.runtime import Timed, Track, silent
from flexigpt.weights import Assembly, without_blocks


@dataclass(frozen=True, kw_only=True)
class BaselineOptions(ScoringOptions):
    """Which blocks to remove: the fields of `ScoringOptions`, so that they are those that `prune` would prune.

    With `target_size` they are fewer, since nothing is stored in a removed block's place.
    """


def baseline(
    source: str, options: BaselineOptions, track: Track = silent
) -> tuple[PreTrainedModel, tuple[int, ...], Record]:
    """Removes blocks of a source model and puts nothing in their place (ShortGPT).

    Args:
        source: folder or hub name of a source model.
        options: which blocks to remove.
        track: told of the progress of each stage.

    Returns:
        The shorter model, an ordinary one of the source's family; the removed blocks, ascending; and the record:
        everything measured on the way, JSON-ready.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    assembly, blocks, record = assemble_baseline(source, options, track)
    return assembly.in_memory(), blocks, record


def assemble_baseline(
    source: str, options: BaselineOptions, track: Track = silent
) -> tuple[Assembly, tuple[int, ...], Record]:
    """`baseline` with one block in memory at a time: the shorter model is assembled, for `write_checkpoint` to write.

    Arguments and errors are those of `baseline`.
    """
    timed = Timed(track)
    checked, pruned = _check(source, options)
    opened = open_scored(source, options, checked, pruned, timed)
    blocks = tuple(chosen(pruned, opened.scored))
    assembly = without_blocks(opened.source, blocks)
    if options.refit_kept:
        assert opened.windows is not None
        left = iter(range(len(assembly)))
        standing = [None if block in blocks else next(left) for block in range(checked.depth)]
        spill = checked.spill(opened.cache.folder, HIDDEN_COPIES * opened.windows.numel())
        fit_blocks(opened.source, assembly, standing, opened.windows, Fits(kept=True), spill=spill, track=timed)
    record = new_record(source, options, options.defaults(checked.window_length)) | opened.scored
    record["removed"] = {"blocks": list(blocks), "num_blocks": checked.depth, "source": source}
    record |= measure_both(
        {"source": opened.source, "shorter": assembly},
        opened.text,
        name=options.perplexity,
        window_length=checked.window_length,
        spill=opened.spill,
        cache=opened.cache,
        track=timed,
    )
    return assembly, blocks, record | {"stages": timed.seconds, "seconds": round(timed.total, 1)}


def expected_bytes(source: str, options: BaselineOptions) -> int:
    """Bytes of the weights that `baseline` with these options would have to store; no weight is read.

    Raises:
        InputError: what the source's configuration rules out.
    """
    checked, pruned = _check(source, options)
    num_removed = pruned if isinstance(pruned, int) else len(pruned)
    return checked.shape.removed_parameters(num_removed) * checked.itemsize


def expected_removal(source: str, options: BaselineOptions) -> Estimate:
    """What `baseline` with these options takes at most; no weight is read.

    Raises:
        InputError: what the source's configuration rules out.
    """
    checked, pruned = _check(source, options)
    num_removed = pruned if isinstance(pruned, int) else len(pruned)
    tokens = (options.windows or DEFAULT_WINDOWS) * checked.window_length if options.calibrates else 0
    written = checked.shape.removed_parameters(num_removed) * checked.itemsize
    removals = num_removed if options.block_score in GREEDY_SCORES else 0
    return estimate(checked, options, Work(tokens=tokens, removals=removals, written=written))


def _check(source: str, options: BaselineOptions) -> tuple[CheckedSource, Sequence[int] | int]:
    """The source, and the blocks to remove or, where their scores decide, how many."""
    checked = check_source(source, options)
    return checked, pruned_or_count(
        options, checked, lambda target: checked.shape.num_removed_for(target, checked.depth)
    )
