"""Where a model, source or compact, keeps its parts, and what it stores: every tensor counted once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexigpt.model.architecture import find_architecture
from flexigpt.model.configuration_flexigpt import FlexiGPTConfig
from flexigpt.model.modeling_flexigpt import FlexiGPTForCausalLM, NoSublayer, linear_size
from flexigpt.model.plan import ModelShape, Plan

# What an output norm is wrapped around lies so within the wrapper, and the norm's weight so.
INNER, OUTPUT_NORM = ".inner", ".output_norm.weight"

# What is a replica's own and trained: how the names of its tensors end, and the part that tables and figures show.
REPLICA_PARTS = {
    ".adapter_A": "replicas, adapters",
    ".adapter_B": "replicas, adapters",
    ".base_scale": "replicas, base scales",
    OUTPUT_NORM: "replicas, output norms",
}

# Path of the source's own architecture within a compact model.
SOURCE_PREFIX = "language_model."


def plan_of(config: PreTrainedConfig) -> Plan:
    """The plan of a compact model."""
    assert isinstance(config, FlexiGPTConfig)
    return Plan.of_rows(config.num_hidden_layers, config.replicas, list(config.sublayers))


def source_units(config: PreTrainedConfig) -> int | None:
    """How many hidden units an MLP of the source has, where the plan of a compact model narrows some."""
    assert isinstance(config, FlexiGPTConfig)
    return None if config.sublayer_paths is None else int(config.sublayer_paths["mlp"]["units"])


def sublayer_paths(source: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Where a source keeps attention and MLP, as a compact model's `sublayer_paths`; the meta device will do."""
    block, roles = layout_of(source).blocks[0], find_architecture(source.config).roles
    return {
        "attention": {"module": roles.output.rpartition(".")[0]},
        "mlp": {
            "module": roles.down.rpartition(".")[0],
            "inner": [path for path in dict.fromkeys((roles.gate, roles.up)) if path is not None],
            "outer": roles.down,
            "units": linear_size(block.get_submodule(roles.down))[1],
        },
    }


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a model keeps its blocks and their linears, and which blocks are replicas of which.

    Attributes:
        prefix: path of the list of blocks within the model.
        blocks: the logical blocks, in order.
        linears: paths of a block's linears within the block.
        bases: replica -> its base; empty for a source.
        ranks: replica -> rank of its adapters.
        returns_tuple: whether a block returns (hidden states, ...) instead of the hidden states alone.
        is_compact: whether it is a compact model, with or without replicas.
    """

    prefix: str
    blocks: nn.ModuleList
    linears: tuple[str, ...]
    bases: dict[int, int]
    ranks: dict[int, int]
    returns_tuple: bool
    is_compact: bool

    @property
    def kept(self) -> list[int]:
        """The blocks that have linears of their own."""
        return [block for block in range(len(self.blocks)) if block not in self.bases]

    def linears_of(self, block: int) -> list[str]:
        """Paths of a block's linears that are there: a sublayer that became another form has none."""
        modules = dict(self.blocks[block].named_modules())
        return [path for path in self.linears if hasattr(modules.get(path), "weight")]

    @property
    def groups(self) -> list[list[nn.Module]]:
        """The blocks, each base together with its replicas: what FSDP has to gather at once."""
        return [
            [self.blocks[base], *(self.blocks[block] for block, its in self.bases.items() if its == base)]
            for base in self.kept
        ]


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a source or compact model; the meta device will do.

    Raises:
        InputError: a source of a family that is not supported.
    """
    config = model.config
    is_compact = isinstance(model, FlexiGPTForCausalLM)
    architecture = find_architecture(config.text_config if is_compact else config)
    prefix = f"{SOURCE_PREFIX}{config.blocks}" if is_compact else architecture.blocks
    replicas = plan_of(config).replicas if is_compact else ()
    return Layout(
        prefix=prefix,
        blocks=cast(nn.ModuleList, model.get_submodule(prefix)),
        linears=tuple(config.linears) if is_compact else architecture.linears,
        bases={replica.block: replica.base for replica in replicas},
        ranks={replica.block: replica.rank for replica in replicas},
        returns_tuple=architecture.block_returns_tuple,
        is_compact=is_compact,
    )


def mlp_widths(model: PreTrainedModel) -> list[int]:
    """How many hidden units each block's MLP has; 0 where it is gone."""
    down = find_architecture(model.config.get_text_config()).roles.down
    modules = (dict(block.named_modules()) for block in layout_of(model).blocks)
    found = (its.get(f"{down}{INNER}", its.get(down)) for its in modules)  # an output norm may be around it
    return [0 if linear is None or isinstance(linear, NoSublayer) else linear_size(linear)[1] for linear in found]


def model_shape(model: PreTrainedModel, output_norm: bool = True) -> ModelShape:
    """The sizes that accounting needs, read off a source model; the meta device will do."""
    layout = layout_of(model)
    block = layout.blocks[0]
    return ModelShape(
        parameters=model.num_parameters(),
        block_parameters=sum(parameter.numel() for parameter in block.parameters()),
        linears={path: linear_size(block.get_submodule(path)) for path in layout.linears},
        hidden_size=model.config.hidden_size,
        num_output_norms=2 if output_norm else 0,
    )


def _numel(_: str, parameter: torch.Tensor) -> int:
    return parameter.numel()


def count_parts(model: PreTrainedModel, size: Callable[[str, torch.Tensor], int] = _numel) -> dict[str, int]:
    """Parameters of each part, or what else `size` makes of name and parameter; every parameter is in exactly one."""
    layout = layout_of(model)
    weights = {f"{path}.weight" for path in layout.linears}
    head = model.get_output_embeddings()
    outside = {id(p): "output head" for p in (head.parameters() if head else ())}
    outside |= {id(p): "embeddings" for p in model.get_input_embeddings().parameters()}
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{layout.prefix}."):
            part = outside.get(id(parameter), "outside the blocks, other")
        else:
            block, _, path = name.removeprefix(f"{layout.prefix}.").partition(".")
            rest = "replicas, norms and biases" if int(block) in layout.bases else "kept blocks, norms and biases"
            rest = "kept blocks, linears" if path in weights else rest
            part = next((part for end, part in REPLICA_PARTS.items() if path.endswith(end)), rest)
        parts[part] = parts.get(part, 0) + size(name, parameter)
    return parts


def count_blocks(model: PreTrainedModel) -> list[int]:
    """Parameters that each logical block stores; what a replica borrows counts in its base."""
    layout, counted = layout_of(model), set[int]()
    counts = [0] * len(layout.blocks)
    for number in sorted(range(len(counts)), key=lambda block: block in layout.bases):  # bases before their replicas
        for parameter in layout.blocks[number].parameters():
            counts[number] += parameter.numel() * (id(parameter) not in counted)
            counted.add(id(parameter))
    return counts


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the stored parameters, each counted once."""
    return sum(map(parameter_bytes, model.parameters()))


def parameter_bytes(parameter: torch.Tensor) -> int:
    """Bytes that a parameter stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(parameter))


def stored_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter consists of: of a quantised one its numbers, scales and what else decodes them."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # bitsandbytes
        return [parameter, *(t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor))]
    if hasattr(parameter, "tensor_data_names"):  # torchao
        names = (*parameter.tensor_data_names, *getattr(parameter, "optional_tensor_data_names", ()))
        return [getattr(parameter, name) for name in names if getattr(parameter, name) is not None]
    return [parameter]
