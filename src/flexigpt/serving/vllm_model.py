"""The compact model in vLLM: vLLM's own model of the source, with narrow, missing and shared parts in it.

Written against vLLM 0.33. Nothing of vLLM's is copied: its linears of a block are built smaller, or exchanged.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import PPMissingLayer, init_vllm_registered_model, maybe_prefix

from flexigpt.serving.vllm_layers import NormedOutput, NoSublayer, SharedColumns, SharedRows

# Those that vLLM has a model of its own for with the linears below.
_FAMILIES = frozenset(("llama", "mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3_text", "phi3"))
_BLOCKS = "model.layers"
# vLLM's linears of a block -> those of the checkpoint, in the order in which their outputs lie side by side.
_LINEARS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class FlexiGPTForCausalLM(nn.Module, SupportsPP):
    """A compact model.

    Args:
        vllm_config: of the server; its `hf_config` is the compact model's.
        prefix: of its modules' names.

    Raises:
        ValueError: a family, a form or a setting that this cannot serve.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        _check(config, vllm_config)
        prefix = maybe_prefix(prefix, "language_model")
        with _sized(_sizes(config, f"{prefix}.{_BLOCKS}")):
            self.language_model = init_vllm_registered_model(vllm_config, hf_config=config.text_config, prefix=prefix)
        layers: Any = self.language_model.get_submodule(_BLOCKS)
        for row in config.sublayers:
            if row["form"] == "none" and not isinstance(layers[row["block"]], PPMissingLayer):
                _remove(layers[row["block"]], config.sublayer_paths[row["sublayer"]]["module"], vllm_config)
        for row in config.replicas:
            if isinstance(layers[row["block"]], PPMissingLayer) and isinstance(layers[row["base"]], PPMissingLayer):
                continue
            _share(layers[row["block"]], layers[row["base"]], row, config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model.embed_input_ids(input_ids)

    def forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the source's own: ids and positions of all sequences in a row -> hidden states."""
        return self.language_model(input_ids, positions, *args, **kwargs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names behind `language_model.` are the source's own, and those of the parts that are put in above."""
        inner = ((name.removeprefix("language_model."), tensor) for name, tensor in weights)
        return {f"language_model.{name}" for name in self.language_model.load_weights(inner)}


def _check(config: Any, vllm_config: VllmConfig) -> None:
    """Raises ValueError for what this cannot serve."""
    way = "`flexigpt export --to stock` makes a model that vLLM serves as any other"
    family, linears = config.text_config.model_type, {name for names in _LINEARS.values() for name in names}
    if family not in _FAMILIES or (config.replicas and set(config.linears) != linears):
        raise ValueError(f"compact models of the family {family} in this form are not served by vLLM: {way}")
    if vllm_config.quant_config is not None:
        raise ValueError(f"compact models are served by vLLM unquantised only: {way}")
    devices = get_tensor_model_parallel_world_size()
    for row in config.sublayers:
        if row.get("units", 0) % devices:
            raise ValueError(
                f"the {row['units']} units of block {row['block']} cannot be split over {devices} devices: "
                "set --tensor-parallel-size to a divisor of every block's units"
            )


def _sizes(config: Any, blocks: str) -> dict[str, int]:
    """vLLM's linears that have not their source's size -> units of the MLP; 0: another module takes the place."""
    attention, mlp = tuple(_LINEARS)[:2], tuple(_LINEARS)[2:]
    sizes = {f"{blocks}.{row['block']}.{path}": 0 for row in config.replicas for path in _LINEARS}
    for row in config.sublayers:
        for path in attention if row["sublayer"] == "attention" else mlp:
            sizes[f"{blocks}.{row['block']}.{path}"] = row.get("units", 0)
    return sizes


@contextlib.contextmanager
def _sized(sizes: dict[str, int]) -> Iterator[None]:
    """Within it vLLM's linears of these names are built at these sizes: no memory is asked for what is pruned."""
    kinds: tuple[Any, ...] = (MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
    plain = [kind.__init__ for kind in kinds]

    def sized(init: Any, is_row: bool) -> Any:
        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(init).bind(self, *args, **kwargs)
            units, asked = sizes.get(given.arguments.get("prefix", "")), given.arguments
            if units == 0:
                asked["output_size" if is_row else "input_size" if "input_size" in asked else "hidden_size"] = 1
            elif units is not None and is_row:
                asked["input_size"] = units
            elif units is not None:
                asked["output_sizes"] = [units] * len(asked["output_sizes"])
            init(*given.args, **given.kwargs)

        return build

    try:
        for kind, init in zip(kinds, plain, strict=True):
            kind.__init__ = sized(init, kind is RowParallelLinear)
        yield
    finally:
        for kind, init in zip(kinds, plain, strict=True):
            kind.__init__ = init


def _remove(block: Any, path: str, vllm_config: VllmConfig) -> None:
    """Puts nothing in the place of a sublayer, and takes back its place in the key/value cache."""
    gone = set(block.get_submodule(path).modules())
    setattr(block, path, NoSublayer())
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    for name in [name for name, layer in layers.items() if layer in gone]:
        del layers[name]


def _share(block: Any, base: Any, row: dict[str, Any], config: Any) -> None:
    """Turns one block into a replica of another."""
    if isinstance(block, PPMissingLayer) or isinstance(base, PPMissingLayer):
        raise ValueError(
            f"block {row['block']} and its base {row['base']} are on two stages of the pipeline: "
            "leave out --pipeline-parallel-size"
        )
    for path, linears in _LINEARS.items():
        parent, name = path.split(".")
        ranks = [(row.get("ranks") or {}).get(linear, row["rank"]) for linear in linears]
        kind = SharedRows if len(linears) == 1 else SharedColumns
        shared = kind(base.get_submodule(path), ranks, config.base_scale)
        setattr(block.get_submodule(parent), name, shared)
    for path in config.output_norms:
        parent, _, name = path.rpartition(".")
        inner = block.get_submodule(path)
        normed = NormedOutput(inner, config.text_config.hidden_size, config.output_norm_eps)
        setattr(block.get_submodule(parent), name, normed)
