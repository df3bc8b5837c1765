"""The names of vLLM 0.33 and SGLang 0.5.23 that our models use, with as little behind them as a tiny LLaMA needs.

Signatures, attributes and the loaders' ways are theirs; no GPU, no kernels. Devices are threads: each has its rank,
and sums wait for all. SGLang's linears leave their sums to the block.
"""

import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

_STACKED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
_STACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


class Devices:
    """Threads that stand for devices."""

    def __init__(self, size: int) -> None:
        self.size, self._local = size, threading.local()
        self._barrier, self._given = threading.Barrier(size), [torch.empty(0)] * size

    @property
    def rank(self) -> int:
        return getattr(self._local, "rank", 0)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self._given[self.rank] = x
        self._barrier.wait(20)
        summed = torch.stack(self._given).sum(0)
        self._barrier.wait(20)
        return summed

    def run(self, work: Callable[[], Any]) -> list[Any]:
        """What the work returns on each device."""
        made: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self._local.rank = rank
            made[rank] = work()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return made


def make_layers(devices: Devices, sums_in_block: bool) -> SimpleNamespace:
    """The server's linears for these devices."""

    class Columns(nn.Module):
        def __init__(self, input_size: int, sizes: list[int], bias: bool) -> None:
            super().__init__()
            self.input_size, self.tp_size, self.tp_rank, self.output_sizes = (
                input_size,
                devices.size,
                devices.rank,
                sizes,
            )
            rows = sum(sizes) // devices.size
            self.weight = nn.Parameter(torch.full((rows, input_size), torch.nan), requires_grad=False)
            self.bias = nn.Parameter(torch.full((rows,), torch.nan), requires_grad=False) if bias else None
            for parameter in self.parameters():
                parameter.weight_loader = self.load  # type: ignore[attr-defined]

        def load(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            shard = loaded.shard_id if shard is None else shard  # type: ignore[attr-defined]
            part = {"q": 0, "k": 1, "v": 2}.get(shard, shard)
            sizes = [size // self.tp_size for size in self.output_sizes]
            rank = self.tp_rank // (getattr(self, "num_kv_head_replicas", 1) if part else 1)
            parameter.data.split(sizes)[part].copy_(loaded.narrow(0, rank * sizes[part], sizes[part]))

        def forward(self, x: torch.Tensor) -> Any:
            return F.linear(x, self.weight, self.bias), None

    class MergedColumnParallelLinear(Columns):
        def __init__(
            self,
            input_size: int,
            output_sizes: list[int],
            bias: bool = True,
            *,
            quant_config: Any = None,
            prefix: str = "",
        ) -> None:
            super().__init__(input_size, output_sizes, bias)

    class QKVParallelLinear(Columns):
        def __init__(
            self,
            hidden_size: int,
            head_size: int,
            total_num_heads: int,
            total_num_kv_heads: int,
            bias: bool = True,
            *,
            prefix: str = "",
        ) -> None:
            self.num_kv_heads = max(1, total_num_kv_heads // devices.size)
            keys = self.num_kv_heads * devices.size * head_size
            super().__init__(hidden_size, [total_num_heads * head_size, keys, keys], bias)
            self.num_kv_head_replicas = max(1, devices.size // total_num_kv_heads)

    class RowParallelLinear(nn.Module):
        def __init__(self, input_size: int, output_size: int, bias: bool = True, *, prefix: str = "") -> None:
            super().__init__()
            self.tp_size, self.tp_rank, self.output_size = devices.size, devices.rank, output_size
            self.reduce_results = not sums_in_block
            self.input_size_per_partition = input_size // devices.size
            shape = (output_size, self.input_size_per_partition)
            self.weight = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
            self.weight.weight_loader = self.load  # type: ignore[attr-defined]
            self.bias = nn.Parameter(torch.full((output_size,), torch.nan), requires_grad=False) if bias else None

        def load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            size = self.input_size_per_partition
            parameter.data.copy_(loaded.narrow(1, self.tp_rank * size, size))

        def forward(self, x: torch.Tensor) -> Any:
            y = F.linear(x, self.weight, self.bias if self.tp_rank == 0 else None)
            return (devices.sum(y) if self.reduce_results else y), None

    return SimpleNamespace(
        MergedColumnParallelLinear=MergedColumnParallelLinear,
        QKVParallelLinear=QKVParallelLinear,
        RowParallelLinear=RowParallelLinear,
        summed=devices.sum if sums_in_block else lambda y: y,
    )


class Attention(nn.Module):
    """In place of the paged cache: one sequence at a time, whole."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class LlamaAttention(nn.Module):
    def __init__(self, cached: dict[str, Any], config: Any, layers: Any, devices: Devices, prefix: str) -> None:
        super().__init__()
        heads, keys, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        biased = config.attention_bias
        self.qkv_proj = layers.QKVParallelLinear(
            config.hidden_size, self.size, heads, keys, bias=biased, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = layers.RowParallelLinear(
            input_size=heads * self.size, output_size=config.hidden_size, bias=biased, prefix=f"{prefix}.o_proj"
        )
        self.attn = Attention()
        cached[f"{prefix}.attn"] = self.attn
        self.rotary, self.split = (
            LlamaRotaryEmbedding(config),
            [heads // devices.size, *2 * [max(1, keys // devices.size)]],
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(hidden_states)[0].view(len(hidden_states), -1, self.size).transpose(0, 1)
        q, k, v = (part[None] for part in qkv.split(self.split))
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(v, positions[None]))
        return self.o_proj(self.attn(q, k, v)[0].transpose(0, 1).flatten(1))[0]


class LlamaMLP(nn.Module):
    def __init__(self, config: Any, layers: Any, prefix: str) -> None:
        super().__init__()
        units = config.intermediate_size
        self.gate_up_proj = layers.MergedColumnParallelLinear(
            input_size=config.hidden_size,
            output_sizes=[units] * 2,
            bias=config.mlp_bias,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = layers.RowParallelLinear(
            input_size=units, output_size=config.hidden_size, bias=config.mlp_bias, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)[0]


class LlamaDecoderLayer(nn.Module):
    def __init__(self, cached: dict[str, Any], config: Any, layers: Any, devices: Devices, prefix: str) -> None:
        super().__init__()
        self.summed = layers.summed
        self.self_attn = LlamaAttention(cached, config, layers, devices, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(config, layers, f"{prefix}.mlp")
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(residual))
        residual = residual + self.summed(attended)
        return residual + self.summed(self.mlp(self.post_attention_layernorm(residual)))


class LlamaForCausalLM(nn.Module):
    def __init__(self, cached: dict[str, Any], config: Any, layers: Any, devices: Devices, prefix: str = "") -> None:
        super().__init__()
        self.make_empty_intermediate_tensors, self.hands_over_shards = None, not prefix
        names = [f"{prefix}.model.layers.{index}".lstrip(".") for index in range(config.num_hidden_layers)]
        blocks = [LlamaDecoderLayer(cached, config, layers, devices, name) for name in names]
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size)})
        self.model["layers"], self.model["norm"] = (
            nn.ModuleList(blocks),
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps),
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.model["embed_tokens"](input_ids)
        for block in self.model["layers"]:
            hidden = block(positions, hidden)
        return self.model["norm"](hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def load_weights(self, weights: Any) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            shards = []
            for theirs, (ours, shard) in _STACKED.items():
                if f".{theirs}." in name:
                    name, tensor.shard_id = name.replace(theirs, ours), shard
                    shards = [shard] if self.hands_over_shards else []
            if self.hands_over_shards:
                tensor = tensor.clone()  # nothing is written on it
            parameter = parameters[name]
            load = getattr(parameter, "weight_loader", lambda parameter, tensor: parameter.data.copy_(tensor))
            load(parameter, tensor, *shards)
            loaded.add(name)
        return loaded


def install(monkeypatch: pytest.MonkeyPatch, size: int = 1, server: str = "vLLM") -> Devices:
    """Puts the stub in the server's place, with so many devices; our modules are loaded anew with it."""
    devices = Devices(size)
    modules = _vllm(devices) if server == "vLLM" else _sglang(devices)
    for name, content in modules.items():
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
    for name in ("flexigpt.serving.vllm_model", "flexigpt.serving.sglang.sglang_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return devices


def _vllm(devices: Devices) -> dict[str, dict[str, Any]]:
    layers = make_layers(devices, sums_in_block=False)

    def init_vllm_registered_model(vllm_config: Any, *, hf_config: Any, prefix: str) -> nn.Module:
        cached = vllm_config.compilation_config.static_forward_context
        return LlamaForCausalLM(cached, hf_config, layers, devices, prefix)

    return {
        "vllm": {},
        "vllm.config": {"VllmConfig": object},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: devices.rank,
            "get_tensor_model_parallel_world_size": lambda: devices.size,
            "tensor_model_parallel_all_reduce": devices.sum,
        },
        "vllm.model_executor.layers.linear": vars(layers),
        "vllm.model_executor.models.interfaces": {"SupportsPP": object},
        "vllm.model_executor.models.utils": {
            "PPMissingLayer": type("PPMissingLayer", (nn.Identity,), {}),
            "init_vllm_registered_model": init_vllm_registered_model,
            "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        },
    }


def _sglang(devices: Devices) -> dict[str, dict[str, Any]]:
    layers = make_layers(devices, sums_in_block=True)

    def resolve_model_cls(architecture: str) -> tuple[Any, str]:
        assert architecture == "LlamaForCausalLM"
        return lambda config: LlamaForCausalLM({}, config, layers, devices), architecture

    return {
        "sglang": {},
        "sglang.srt.distributed": {"tensor_model_parallel_all_reduce": devices.sum},
        "sglang.srt.layers.linear": vars(layers),
        "sglang.srt.layers.utils": {"PPMissingLayer": type("PPMissingLayer", (nn.Identity,), {})},
        "sglang.srt.models.registry": {"ModelRegistry": SimpleNamespace(resolve_model_cls=resolve_model_cls)},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: SimpleNamespace(tp_rank=devices.rank, tp_size=devices.size)
        },
    }
