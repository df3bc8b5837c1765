"""One tiny random model for each row of ARCHITECTURES: the test table that grows with it."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flexigpt import FlexiGPTForCausalLM, Plan
from flexigpt.model import all_tensors, empty_compact, fill_model, layout_of
from flexigpt.replicas import ReplicaOptions, replica_tensors
from flexigpt.weights import StreamedModel, exchange_parameters, without_blocks

NUM_BLOCKS = 6
VOCABULARY = 96
# Every linear's smaller side is 32, so that a rank-32 adapter has full rank everywhere.
FULL_RANK = 32
# What the installed transformers calls the key/value cache, in `generate` as in `forward`.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

_ROPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_MHA = _ROPE | {"num_key_value_heads": 4, "head_dim": 8}
_WINDOWED = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)
_OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}

# name -> (model type, settings); several rows where a family has variants that matter here.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _MHA),
    "llama-gqa": ("llama", _ROPE),
    "llama-biases-tied": ("llama", _ROPE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", _ROPE | {"sliding_window": 16}),
    "qwen2": ("qwen2", _MHA | {"use_sliding_window": True, "sliding_window": 16, "layer_types": _WINDOWED}),
    "qwen3": ("qwen3", _ROPE),
    "granite": ("granite", _MHA | {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "gemma2": ("gemma2", _ROPE | {"sliding_window": 16, "layer_types": _WINDOWED, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", _ROPE | {"sliding_window": 16, "layer_types": _WINDOWED}),
    "olmo2": ("olmo2", _MHA),
    "phi3": ("phi3", _MHA | {"pad_token_id": 0, "sliding_window": None}),
    "opt-norm-before": ("opt", _OPT | {"do_layer_norm_before": True}),
    "opt-norm-after": ("opt", _OPT | {"do_layer_norm_before": False}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": NUM_BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": NUM_BLOCKS,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], NUM_BLOCKS // 2]],
            "window_size": 16,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_inner": 48, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 128}),
}

_ROTARY = {"rope_theta": 100.0, "original_max_position_embeddings": 32, "factor": 4.0}


def _rope(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, **_ROTARY, **more}}


_YARN, _LINEAR = _rope("yarn"), _rope("linear")
_LONG = _rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 4.0, 8.0])
_BY_TYPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}
_ONE_HEAD = {"num_key_value_heads": 1}

# The same with settings that few models have, most of which change what lies beyond 32 positions.
ODD_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("llama", _ROPE | _YARN),
    "llama-linear": ("llama", _MHA | _LINEAR),
    "llama-llama3": ("llama", _MHA | _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-dynamic": ("llama", _MHA | _rope("dynamic") | {"max_position_embeddings": 32}),
    "llama-one-key": ("llama", _ROPE | _ONE_HEAD),
    "mistral-one-key": ("mistral", _ROPE | _ONE_HEAD | {"sliding_window": None} | _LINEAR),
    "qwen2-tied": ("qwen2", _MHA | {"tie_word_embeddings": True} | _YARN),
    "qwen3-biases": ("qwen3", _ROPE | {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-windows": ("qwen3", _ROPE | {"use_sliding_window": True, "sliding_window": 16, "layer_types": _WINDOWED}),
    "granite-biases": ("granite", _ROPE | {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3}),
    "gemma2-uncapped": (
        "gemma2",
        _ROPE
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 64}
        | {"sliding_window": 16, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3_text-two-rotations": (
        "gemma3_text",
        _ROPE | _ONE_HEAD | _BY_TYPE | {"sliding_window": 16, "layer_types": _WINDOWED},
    ),
    "olmo2-gqa": ("olmo2", _MHA | {"num_key_value_heads": 2, "attention_bias": True} | _YARN),
    "phi3-longrope": (
        "phi3",
        _MHA | _ONE_HEAD | _LONG | {"pad_token_id": 0, "sliding_window": None, "original_max_position_embeddings": 32},
    ),
    "phi3-partial": ("phi3", _MHA | {"pad_token_id": 0, "sliding_window": 16, "partial_rotary_factor": 0.5}),
    "opt-projected": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-without-biases": ("opt", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "gpt_neox-sequential": (
        "gpt_neox",
        FAMILIES["gpt_neox"][1]
        | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}
        | _LINEAR,
    ),
    "gpt_neo-all-local": ("gpt_neo", FAMILIES["gpt_neo"][1] | {"attention_types": [[["local"], NUM_BLOCKS]]}),
    "gpt2-scaled": (
        "gpt2",
        FAMILIES["gpt2"][1] | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a tiny model of that family."""
    model_type, settings = (FAMILIES | ODD_SETTINGS)[family]
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return CONFIG_MAPPING[model_type](**({"vocab_size": VOCABULARY} | ends | settings))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights large enough that every block, bias and norm changes the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_ids(batch: int = 2, tokens: int = 24, seed: int = 1) -> torch.Tensor:
    """Random ids, (batch, tokens)."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a source or compact model, in order."""
    return layout_of(model).blocks


def remove_blocks(source: PreTrainedModel, blocks: Sequence[int]) -> PreTrainedModel:
    """The source without these blocks, as plain removal makes it, in memory."""
    return without_blocks(StreamedModel(source), blocks).in_memory()


def compact_of(
    source: PreTrainedModel,
    plan: Plan,
    output_norm: bool = True,
    source_blocks: Sequence[int] | None = None,
) -> FlexiGPTForCausalLM:
    """The compact model that shares the tensors of a source in memory; what is the replicas' own is on the meta device.

    Arguments are those of `empty_compact`.
    """
    model, taken = empty_compact(source, plan, output_norm, source_blocks)
    there = all_tensors(source)
    tensors: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, origin in taken.items():
        # What a repeated block keeps as its own (input norms, biases) must not share the memory of the first one's.
        tensors[name] = there[origin].clone() if origin in used else there[origin]
        used.add(origin)
    fill_model(model, tensors)
    model.generation_config = source.generation_config
    return model


@torch.no_grad()
def initialize_replicas(
    model: FlexiGPTForCausalLM,
    source: PreTrainedModel,
    plan: Plan,
    *,
    adapter_init: str,
    norm_init: float,
    seed: int,
    source_blocks: Sequence[int] | None = None,
) -> None:
    """Fills what is the replicas' own in a compact model in memory, as pruning does before kept blocks are refitted."""
    streamed = StreamedModel(source)
    start = ReplicaOptions(adapter_init=adapter_init, output_norm=norm_init, seed=seed)
    for replica in plan.replicas:
        block = model.block_list[replica.block]
        exchange_parameters(block, replica_tensors(block, streamed, replica, start, source_blocks))
