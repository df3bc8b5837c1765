"""What a model stores: parameters of each part, every tensor counted once."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from flexigpt.model.architecture import block_list, find_architecture
from flexigpt.model.build import plan_of
from flexigpt.model.modeling_flexigpt import FlexiGPTForCausalLM


def count_parts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of each part; every parameter is in exactly one."""
    if isinstance(model, FlexiGPTForCausalLM):
        blocks, linears = f"language_model.{model.config.blocks}.", model.config.linears
        pruned = set(plan_of(model.config).pruned)
    else:
        architecture = find_architecture(model.config)
        blocks, linears = f"{architecture.blocks}.", list(architecture.linears)
        pruned = set()
    weights = {f"{path}.weight" for path in linears}
    head = model.get_output_embeddings()
    outside = {id(p): "output head" for p in (head.parameters() if head else ())}
    outside |= {id(p): "embeddings" for p in model.get_input_embeddings().parameters()}
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(blocks):
            part = outside.get(id(parameter), "outside the blocks, other")
        else:
            block, _, path = name.removeprefix(blocks).partition(".")
            if int(block) not in pruned:
                part = "kept blocks, linears" if path in weights else "kept blocks, norms and biases"
            elif path.endswith((".adapter_A", ".adapter_B")):
                part = "replicas, adapters"
            elif path.endswith(".base_scale"):
                part = "replicas, base scales"
            elif path.endswith(".output_norm.weight"):
                part = "replicas, output norms"
            else:
                part = "replicas, norms and biases"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the stored parameters, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a model of either kind, compact or ordinary, keeps what recovery trains.

    Attributes:
        prefix: path of the list of blocks.
        blocks: the logical blocks, in order.
        linears: paths of a block's linears within the block.
        bases: replica -> its base.
        ranks: replica -> rank of its adapters.
    """

    prefix: str
    blocks: nn.ModuleList
    linears: tuple[str, ...]
    bases: dict[int, int]
    ranks: dict[int, int]

    @property
    def kept(self) -> list[int]:
        """The blocks that have linears of their own."""
        return [block for block in range(len(self.blocks)) if block not in self.bases]

    @property
    def groups(self) -> list[list[nn.Module]]:
        """The blocks, each base together with its replicas: what FSDP has to gather at once."""
        return [
            [self.blocks[base], *(self.blocks[block] for block, its in self.bases.items() if its == base)]
            for base in self.kept
        ]


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a compact or an ordinary model."""
    if isinstance(model, FlexiGPTForCausalLM):
        plan = plan_of(model.config)
        return Layout(
            prefix=f"language_model.{model.config.blocks}",
            blocks=model.block_list,
            linears=tuple(model.config.linears),
            bases={replica.block: replica.base for replica in plan.replicas},
            ranks={replica.block: replica.rank for replica in plan.replicas},
        )
    architecture = find_architecture(model.config)
    return Layout(
        prefix=architecture.blocks, blocks=block_list(model), linears=architecture.linears, bases={}, ranks={}
    )
