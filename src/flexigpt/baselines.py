"""Baselines that pruning is compared with: plain removal of blocks (ShortGPT)."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from flexigpt.architecture import config_with_blocks
from flexigpt.checkpoint import empty_model, move, names_of_blocks
from flexigpt.errors import InputError
from flexigpt.estimate import Estimate, Work, estimate
from flexigpt.fitting import HIDDEN_COPIES, Fits, fit_blocks
from flexigpt.progress import Timed, Track, silent
from flexigpt.record import Record, measure_both, new_record
from flexigpt.scoring import (
    DEFAULT_WINDOWS,
    CheckedSource,
    ScoringOptions,
    check_source,
    chosen,
    open_scored,
    pruned_or_count,
)
from flexigpt.selection import GREEDY_SCORES
from flexigpt.streaming import Assembly, StreamedModel


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
    assembly = _without(opened.source, blocks)
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


def expected(source: str, options: BaselineOptions) -> Estimate:
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


def remove_blocks(source: PreTrainedModel, blocks: Sequence[int]) -> PreTrainedModel:
    """The source without these blocks: an ordinary, shorter model of its own family that shares its tensors.

    Args:
        source: a source model.
        blocks: blocks to remove, from 0.

    Raises:
        InputError: a block that does not exist, or none that would stay.
    """
    return move(_without(StreamedModel(source), blocks).in_memory(), source.device)


def _without(source: StreamedModel, blocks: Sequence[int]) -> Assembly:
    depth = len(source)
    strange = sorted(set(blocks) - set(range(depth)))
    if strange or len(set(blocks)) >= depth:
        raise InputError(f"cannot remove blocks {sorted(blocks)} of 0 to {depth - 1}: name some of them, not all")
    kept = [block for block in range(depth) if block not in blocks]
    config = config_with_blocks(source.model.config, kept)
    config.dtype = source.model.dtype
    return Assembly(empty_model(config), source, names_of_blocks(source.model, kept))
