"""Baselines that pruning is compared with: plain removal of blocks (ShortGPT)."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from flexigpt.architecture import config_with_blocks, num_blocks
from flexigpt.checkpoint import empty_model, fill_model, move, named_tensors
from flexigpt.errors import InputError


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
