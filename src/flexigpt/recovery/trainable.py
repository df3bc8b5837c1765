"""What recovery trains: adapters and output norms of the replicas, LoRA on the kept blocks, or everything."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexigpt.model import REPLICA_PARTS, default_rank, layout_of, linear_size
from flexigpt.runtime import InputError

# How the names of what is a replica's own and trained end; its biases and input norms are the block's.
REPLICA_PARAMETERS = tuple(REPLICA_PARTS)


def _train_replicas(model: PreTrainedModel, lora_rank: int) -> None:
    model.requires_grad_(False)
    _train_own(model)


def _train_own(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(REPLICA_PARAMETERS):
            parameter.requires_grad_(True)


def _train_replicas_and_kept(model: PreTrainedModel, lora_rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - seconds of import that only this needs
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    most_ranks = _most_ranks(model)
    targets = list(most_ranks)
    # Scaled by 1, as alpha = rank makes it, whatever the rank; patterns are searched for at the end of names.
    narrow = {re.escape(path): most for path, most in most_ranks.items() if most < lora_rank}
    transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
    given: dict[str, Any] = {
        "r": lora_rank,
        "lora_alpha": lora_rank,
        "rank_pattern": narrow,
        "alpha_pattern": dict(narrow),
    }
    config = LoraConfig(**given, target_modules=targets, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast does it, without a detour through float32
    _train_own(model)


def _train_all(model: PreTrainedModel, lora_rank: int) -> None:
    model.requires_grad_(True)


# (model, rank of the LoRA on kept blocks) -> requires_grad of its parameters, in place.
TRAIN: dict[str, Callable[[PreTrainedModel, int], None]] = {
    "replicas+kept": _train_replicas_and_kept,
    "replicas": _train_replicas,
    "all": _train_all,
}

USES_LORA = {"replicas+kept"}


def prepare_training(model: PreTrainedModel, train: str, lora_rank: int, seed: int) -> None:
    """Marks what is trained, adds LoRA where it is asked for, and holds what is trained in float32.

    Right after it the model computes what it did before.

    Args:
        model: compact or ordinary.
        train: a key of TRAIN.
        lora_rank: rank of the LoRA on kept blocks, where there is one.
        seed: draws its random factors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        TRAIN[train](model, lora_rank)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge_lora(model: PreTrainedModel) -> None:
    """Adds the LoRA of the kept blocks to their weights and takes it off: nothing more is stored.

    Replicas look their base's linear up whenever they run, so they see the change.
    """
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())


def lora_rank_for(model: PreTrainedModel, rank: int | None) -> int:
    """The rank of the LoRA on kept blocks: as given; else the replicas', or hidden size / 16.

    A linear too narrow for it gets the rank that fits.

    Raises:
        InputError: a rank below 1 or above every linear's size.
    """
    layout = layout_of(model)
    most = max(_most_ranks(model).values())
    if rank is None:
        rank = max(layout.ranks.values(), default=default_rank(model.config.get_text_config().hidden_size))
        return min(rank, most)
    if not 1 <= rank <= most:
        raise InputError(f"a LoRA of rank {rank} does not fit the linears: give --lora-rank 1 to {most}")
    return rank


def _most_ranks(model: PreTrainedModel) -> dict[str, int]:
    """The smaller side of each linear of the kept blocks, by name."""
    layout = layout_of(model)
    paths = [f"{layout.prefix}.{block}.{path}" for block in layout.kept for path in layout.linears_of(block)]
    return {path: min(linear_size(model.get_submodule(path))) for path in paths}


def trained_in_words(train: str, lora_rank: int, replicas: bool) -> str:
    """What is trained of a model with replicas or without."""
    if train not in USES_LORA:
        return "every parameter" if train == "all" else "the replicas' own"
    return (
        f"the replicas' own, and LoRA of rank {lora_rank} on the kept blocks"
        if replicas
        else f"LoRA of rank {lora_rank}"
    )
