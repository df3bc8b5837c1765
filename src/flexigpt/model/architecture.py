"""Where each model family keeps its blocks, linears and output projections. The only place that knows such paths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from flexigpt.runtime import InputError

ADDING_PAGE = "docs/architectures.md"


def _gather_layer_types(settings: dict[str, Any], source_blocks: Sequence[int]) -> None:
    if settings.get("layer_types") is not None:
        settings["layer_types"] = [settings["layer_types"][block] for block in source_blocks]


def _gather_attention_types(settings: dict[str, Any], source_blocks: Sequence[int]) -> None:
    layers = settings.pop("attention_layers")
    settings["attention_types"] = [[[layers[block] for block in source_blocks], 1]]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What the linears of a block compute.

    Attributes:
        query: path within the block of the linear that computes the queries. A linear that computes several roles is
            named for each of them; it computes them one after the other, in the order of these fields.
        key: the same for the keys.
        value: the same for the values.
        output: the linear that takes what the heads gathered.
        gate: the linear whose outputs the activation is applied to, where `up` is multiplied by them; None without.
        up: the linear that computes the MLP's units (times the gate, or before the activation).
        down: the linear that takes the units.
    """

    query: str
    key: str
    value: str
    output: str
    gate: str | None = None
    up: str
    down: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table.

    Attributes:
        blocks: path of the list of blocks within the causal language model.
        roles: paths of a block's linears within the block, by what they compute.
        sublayer_norms: paths within the block of the norms of what attention and MLP put out, where the family has such
            (Gemma, OLMo 2).
        width: the configuration's name for the number of hidden units of an MLP.
        gather: makes the per-block lists of a configuration those of the given blocks, in place.
        block_returns_tuple: whether a block returns (hidden states, ...) instead of the hidden states alone.
    """

    blocks: str
    roles: Roles
    sublayer_norms: tuple[str, str] | None = None
    width: str = "intermediate_size"
    gather: Callable[[dict[str, Any], Sequence[int]], None] = _gather_layer_types
    block_returns_tuple: bool = False

    @property
    def output_norms(self) -> tuple[str, str]:
        """Paths within the block of the modules that an output norm follows, the last before the residual addition.

        The output projections, or the sublayers' norms: before these, they would undo the output norm's scale.
        """
        return self.sublayer_norms or (self.roles.output, self.roles.down)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of a block's linears within the block, each once."""
        roles = self.roles
        paths = (roles.query, roles.key, roles.value, roles.output, roles.gate, roles.up, roles.down)
        return tuple(dict.fromkeys(path for path in paths if path is not None))


def _fused(qkv: str, output: str, up: str, down: str, gate: str | None = None) -> Roles:
    """Where one linear computes queries, keys and values."""
    return Roles(query=qkv, key=qkv, value=qkv, output=output, gate=gate, up=up, down=down)


_LLAMA_ROLES = Roles(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

_LLAMA = Architecture(blocks="model.layers", roles=_LLAMA_ROLES)

_SANDWICH = replace(_LLAMA, sublayer_norms=("post_attention_layernorm", "post_feedforward_layernorm"))

_PHI3 = _fused("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj")

_NEOX = _fused("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

# By the model type in the source's config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _SANDWICH,
    "phi3": Architecture(blocks="model.layers", roles=_PHI3),
    "opt": Architecture(
        blocks="model.decoder.layers",
        roles=replace(_LLAMA_ROLES, output="self_attn.out_proj", gate=None, up="fc1", down="fc2"),
        width="ffn_dim",
    ),
    "gpt_neox": Architecture(blocks="gpt_neox.layers", roles=_NEOX),
    "gpt_neo": Architecture(
        blocks="transformer.h",
        roles=Roles(
            query="attn.attention.q_proj",
            key="attn.attention.k_proj",
            value="attn.attention.v_proj",
            output="attn.attention.out_proj",
            up="mlp.c_fc",
            down="mlp.c_proj",
        ),
        gather=_gather_attention_types,
        block_returns_tuple=True,
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        roles=_fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        width="n_inner",
    ),
}

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_ATTENTION_TYPES = frozenset(("full_attention", "sliding_attention", "chunked_attention"))

_RECURRENT_SETTINGS = ("mamba_d_state", "ssm_state_size", "state_size", "lru_width", "attn_layer_period")


# What `quantize` writes by.
_QUANTISERS = ("torchao", "bitsandbytes")


def quantised_by(config: PreTrainedConfig) -> str | None:
    """The library that quantised a model, if it is one whose models can be run here: nothing can be made of them."""
    found = getattr(config, "quantization_config", None)
    settings = found if isinstance(found, dict) else {} if found is None else found.to_dict()
    method = settings.get("quant_method")
    return str(method) if method in _QUANTISERS else None


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The row of a source's model type.

    Raises:
        InputError: a compact model, a mixture of experts, a model that mixes attention with recurrent layers, or a
            type that is not in the table; each by name.
    """
    name = config.model_type
    if name == "flexigpt":
        raise InputError("the source is a compact model already: take the source model that it was made from")
    text_config = config.get_text_config()
    supported = f"supported are {', '.join(sorted(ARCHITECTURES))}"
    for setting in _EXPERT_COUNTS:
        if getattr(text_config, setting, None):
            raise InputError(
                f"{name} is a mixture of experts ({setting} = {getattr(text_config, setting)}), which flexigpt "
                f"cannot share: {supported}"
            )
    other_types = set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_TYPES
    recurrent = [setting for setting in _RECURRENT_SETTINGS if getattr(text_config, setting, None)]
    if other_types or recurrent:
        found = ", ".join(sorted(other_types) or recurrent)
        raise InputError(
            f"{name} has linear-attention or recurrent blocks ({found}), which flexigpt cannot share: {supported}"
        )
    if name not in ARCHITECTURES:
        raise InputError(f"model type {name} is not supported: {supported}; {ADDING_PAGE} says how to add one")
    if getattr(config, "quantization_config", None) and quantised_by(config) is None:
        raise InputError(
            "the source is quantised, and quantised weights have no difference to adapt: give it unquantised"
        )
    if getattr(config, "is_heterogeneous", False):
        raise InputError(f"this {name} has blocks of different shapes (per_layer_config), which cannot share linears")
    return ARCHITECTURES[name]


def num_blocks(config: PreTrainedConfig) -> int:
    """Blocks of a source model."""
    return int(config.num_hidden_layers)


def weight_matrix(linear: nn.Module) -> torch.Tensor:
    """The weight as (outputs, inputs); GPT-2's `Conv1D` stores it transposed."""
    weight = cast(torch.Tensor, linear.weight)
    return weight.T if isinstance(linear, Conv1D) else weight
