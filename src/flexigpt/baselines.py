"""Baselines that pruning is compared with: plain removal of blocks (ShortGPT)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from flexigpt.architecture import block_list, config_with_blocks, num_blocks
from flexigpt.checkpoint import empty_model, fill_model, move, named_tensors
from flexigpt.errors import InputError
from flexigpt.fitting import Fits, fit_blocks
from flexigpt.progress import Track, silent
from flexigpt.record import Record, measure_both, new_record
from flexigpt.scoring import CheckedSource, ScoringOptions, check_source, chosen, open_scored, pruned_or_count


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
    started = time.perf_counter()
    checked, pruned = _check(source, options)
    opened = open_scored(source, options, checked.window_length, track)
    blocks = tuple(chosen(pruned, opened.scored))
    shorter = remove_blocks(opened.model, blocks)
    if options.refit_kept:
        assert opened.windows is not None
        left = iter(block_list(shorter))
        standing = [None if block in blocks else next(left) for block in range(checked.depth)]
        fit_blocks(opened.model, standing, opened.windows, Fits(kept=True), track=track)
    record = new_record(source, options, options.defaults(checked.window_length)) | opened.scored
    record["removed"] = {"blocks": list(blocks), "num_blocks": checked.depth, "source": source}
    record |= measure_both(
        {"source": opened.model, "shorter": shorter},
        opened.text,
        name=options.perplexity,
        window_length=checked.window_length,
        track=track,
    )
    return shorter, blocks, record | {"seconds": round(time.perf_counter() - started, 1)}


def expected_bytes(source: str, options: BaselineOptions) -> int:
    """Bytes of the weights that `baseline` with these options would have to store; no weight is read.

    Raises:
        InputError: what the source's configuration rules out.
    """
    checked, pruned = _check(source, options)
    num_removed = pruned if isinstance(pruned, int) else len(pruned)
    return checked.shape.removed_parameters(num_removed) * checked.itemsize


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
    depth = num_blocks(source.config)
    strange = sorted(set(blocks) - set(range(depth)))
    if strange or len(set(blocks)) >= depth:
        raise InputError(f"cannot remove blocks {sorted(blocks)} of 0 to {depth - 1}: name some of them, not all")
    kept = [block for block in range(depth) if block not in blocks]
    config = config_with_blocks(source.config, kept)
    config.dtype = source.dtype
    shorter = empty_model(config)
    fill_model(shorter, dict(named_tensors(source, kept)))
    shorter.generation_config = source.generation_config
    return move(shorter, source.device)
