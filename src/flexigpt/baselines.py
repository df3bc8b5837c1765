"""Baselines that pruning is compared with: plain removal of blocks (ShortGPT)."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from flexigpt.architecture import config_with_blocks, find_architecture, num_blocks
from flexigpt.checkpoint import all_tensors, empty_model, fill_model, move
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
    prefix = find_architecture(source.config).blocks
    new_names = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)}
    tensors = {}
    for name, tensor in all_tensors(source).items():
        if name.startswith(f"{prefix}."):
            own = f"{prefix}.{name[len(prefix) + 1 :].split('.')[0]}."
            if own not in new_names:
                continue
            name = new_names[own] + name[len(own) :]
        tensors[name] = tensor
    fill_model(shorter, tensors)
    shorter.generation_config = source.generation_config
    return move(shorter, source.device)
