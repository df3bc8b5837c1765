"""What recovery trains: adapters and output norms of the replicas, LoRA on the kept blocks, or everything."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexigpt.model import REPLICA_PARTS, Layout, default_rank, layout_of, linear_size
from flexigpt.runtime import InputError

# How the names of what is a replica's own and trained end; its biases and input norms are the block's.
REPLICA_PARAMETERS = tuple(REPLICA_PARTS)


def _train_replicas(model: PreTrainedModel, lora_rank: int) -> None:
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(REPLICA_PARAMETERS):
            parameter.requires_grad_(True)


def _train_replicas_and_kept(model: PreTrainedModel, lora_rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - seconds of import that only this needs
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    layout = layout_of(model)
    targets = [f"{layout.prefix}.{block}.{path}" for block in layout.kept for path in layout.linears]
    transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
    config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast does it, without a detour through float32
    for name, parameter in model.named_parameters():
        if name.endswith(REPLICA_PARAMETERS):
            parameter.requires_grad_(True)


def _train_all(model: PreTrainedModel, lora_rank: int) -> None:
    model.requires_grad_(True)


# (model, rank of the LoRA on kept blocks) -> requires_grad of its parameters, in place.
TRAIN: dict[str, Callable[[PreTrainedModel, int], None]] = {
    "replicas+kept": _train_replicas_and_kept,
    "replicas": _train_replicas,
    "all": _train_all,
}

USES_LORA = frozenset(("replicas+kept",))


def prepare_training(model: PreTrainedModel, train: str, lora_rank: int, seed: int) -> None:
    """Marks what is trained, adds LoRA where it is asked for, and holds what is trained in float32.

    Right after it the model computes what it did before.

    Args:
        model: compact or ordinary.
        train: a key of TRAIN.
        lora_rank: rank of the LoRA on kept blocks, where there is one.
        seed: draws its random factors.

    Raises:
        InputError: a model without replicas of which only the replicas are to be trained.
    """
    if train == "replicas" and not layout_of(model).bases:
        raise InputError("--train replicas trains nothing, since the model has no replicas: leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        TRAIN[train](model, lora_rank)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def by_owner(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: the replicas' own adapters, output norms and base scales, and all else."""
    trained = trained_parameters(model)
    own = [parameter for name, parameter in trained.items() if name.endswith(REPLICA_PARAMETERS)]
    return own, [parameter for name, parameter in trained.items() if not name.endswith(REPLICA_PARAMETERS)]


def first_trained_block(model: PreTrainedModel) -> int:
    """The first block of which something is trained: the backward pass ends there."""
    blocks = layout_of(model).blocks
    return next(i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))


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
    """The rank of the LoRA on kept blocks: as given, or that of the replicas' adapters, or hidden size / 16.

    Raises:
        InputError: a rank below 1 or above a linear's size.
    """
    layout = layout_of(model)
    if rank is None:
        return max(layout.ranks.values(), default=default_rank(model.config.get_text_config().hidden_size))
    most = min(min(linear_size(layout.blocks[layout.kept[0]].get_submodule(path))) for path in layout.linears)
    if not 1 <= rank <= most:
        raise InputError(f"a LoRA of rank {rank} does not fit the linears: give --lora-rank 1 to {most}")
    return rank


def matching_lora_rank(model: PreTrainedModel, compact: PreTrainedModel) -> int:
    """The rank at which LoRA on all blocks of `model` trains most nearly what recovery trains of `compact` by default.

    Both may be on the meta device.

    Raises:
        InputError: a model with replicas of its own, or a compact model without.
    """
    layout, other = layout_of(model), layout_of(compact)
    if layout.bases or not other.bases:
        raise InputError("--match is for a model without replicas, and names a compact model: give --lora-rank instead")
    trained = lora_rank_for(compact, None) * len(other.kept) * _sides(other)
    trained += sum(
        parameter.numel() for name, parameter in compact.named_parameters() if name.endswith(REPLICA_PARAMETERS)
    )
    return max(1, round(trained / (len(layout.kept) * _sides(layout))))


def _sides(layout: Layout) -> int:
    """Parameters that one rank of LoRA on a block's linears has."""
    block = layout.blocks[layout.kept[0]]
    return sum(sum(linear_size(block.get_submodule(path))) for path in layout.linears)


def training_flops(model: PreTrainedModel, window_length: int, draft: bool = False) -> int:
    """Floating-point operations of training on one token, by the usual count.

    A forward pass takes 2 for each weight that a token meets (a base's once more for each of its replicas) and, in each
    block, the causal half of attention's 4 x tokens x hidden size. A backward pass takes 2 again for each weight and
    twice attention's, from the head down to the first trained block, and 2 for each trained weight (a base's likewise).
    With a draft that is trained too, the kept blocks after the first replica and the head go through both once more.
    """
    layout, first = layout_of(model), first_trained_block(model)
    weights = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in layout.blocks]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2)
    for block, base in layout.bases.items():
        for path in layout.linears:
            again = [p for p in layout.blocks[base].get_submodule(path).parameters() if p.ndim == 2]
            weights[block] += sum(p.numel() for p in again)
            trained += sum(p.numel() for p in again if p.requires_grad)
    attention = 2 * window_length * model.config.get_text_config().hidden_size
    head = model.get_output_embeddings()
    outside = 0 if head is None else 2 * head.weight.numel()
    forward = outside + sum(2 * number + attention for number in weights)
    backward = outside + sum(2 * number + 2 * attention for number in weights[first:])
    if draft:
        after = [block for block in layout.kept if block > min(layout.bases)]
        forward += outside + sum(2 * weights[block] + attention for block in after)
        backward += outside + sum(2 * weights[block] + 2 * attention for block in after)
        again = [p for block in after for p in layout.blocks[block].parameters()]
        again += [] if head is None else [head.weight]
        trained += sum(p.numel() for p in again if p.requires_grad and p.ndim == 2)
    return forward + backward + 2 * trained
