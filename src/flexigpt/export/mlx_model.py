"""A compact model in mlx-lm: its own model of the source, with replicas in it. Travels with every MLX checkpoint.

Imports nothing but mlx and mlx-lm. As in the compact model, a replica's linear looks its base up when it runs: every
tensor is there once, quantised or not.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx import nn

# By the source's model type: mlx-lm's module for it.
MODULES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


class ModelArgs:
    """What mlx-lm reads of config.json: the source's own arguments, and what flexigpt adds."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.module = import_module(f"mlx_lm.models.{MODULES[settings['model_type']]}")
        self.source = self.module.ModelArgs.from_dict(settings)
        self.compact: dict[str, Any] = settings["flexigpt"]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "ModelArgs":
        """As mlx-lm calls it."""
        return cls(settings)


def Model(args: ModelArgs) -> Any:
    """mlx-lm's model of the source with what is shared, narrower or gone in its place."""
    model, compact = args.module.Model(args.source), args.compact
    for replica in compact["replicas"]:
        for path in compact["linears"]:
            base, name = _parent(model.layers[replica["base"]], path)
            own, _ = _parent(model.layers[replica["block"]], path)
            rank = (replica.get("ranks") or {}).get(path, replica["rank"])
            setattr(own, name, SharedLinear(base, name, rank, compact["base_scale"]))
        for path in compact["output_norms"]:
            own, name = _parent(model.layers[replica["block"]], path)
            setattr(own, name, NormedOutput(getattr(own, name), compact["output_norm_eps"]))
    for row in compact["sublayers"]:
        block = model.layers[row["block"]]
        if row["form"] == "none":
            name, gone = ("mlp", NoMLP) if row["sublayer"] == "mlp" else ("self_attn", NoAttention)
            setattr(block, name, gone())
            continue
        for name in ("gate_proj", "up_proj", "down_proj"):
            outputs, inputs = getattr(block.mlp, name).weight.shape
            size = (row["units"], outputs) if name == "down_proj" else (inputs, row["units"])
            setattr(block.mlp, name, nn.Linear(*size, bias="bias" in getattr(block.mlp, name)))
    return model


def _parent(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return getattr(block, parent), name


class SharedLinear(nn.Module):
    """y = [s] base(x) + (x A^T) B^T [+ bias difference]."""

    def __init__(self, parent: nn.Module, name: str, rank: int, scaled: bool) -> None:
        super().__init__()
        outputs, inputs = parent[name].weight.shape
        # In a closure: as an attribute it would be registered, and its weights there a second time.
        self.base = lambda x: parent[name](x)
        self.size = outputs
        self.adapter_A = mx.zeros((rank, inputs))
        self.adapter_B = mx.zeros((outputs, rank))
        if scaled:
            self.base_scale = mx.ones((1,))
        if "bias" in parent[name]:
            self.bias_difference = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        y = y * self.base_scale if "base_scale" in self else y
        y = y + (x @ self.adapter_A.T) @ self.adapter_B.T
        return y + self.bias_difference if "bias_difference" in self else y


class NormedOutput(nn.Module):
    """A replica's last linear, and its output norm."""

    def __init__(self, inner: SharedLinear, eps: float) -> None:
        super().__init__()
        self.inner = inner
        self.output_norm = nn.LayerNorm(inner.size, eps=eps, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.output_norm(self.inner(x))


class NoAttention(nn.Module):
    """In the place of an attention that is gone. Its cache counts the tokens, as that of any other block does."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is not None:
            empty = mx.zeros((x.shape[0], 1, x.shape[1], 1), x.dtype)
            cache.update_and_fetch(empty, empty)
        return mx.zeros_like(x)


class NoMLP(nn.Module):
    """In the place of an MLP that is gone."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.zeros_like(x)
