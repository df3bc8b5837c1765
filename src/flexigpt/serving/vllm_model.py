"""The compact model in vLLM: see `build`. Written against vLLM 0.33."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import PPMissingLayer, init_vllm_registered_model, maybe_prefix

from flexigpt.serving.build import BLOCKS, Server, build
from flexigpt.serving.parts import Devices

_VLLM = Server(
    name="vLLM",
    families=frozenset(("llama", "mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3_text", "phi3")),
    columns=(MergedColumnParallelLinear, QKVParallelLinear),
    rows=RowParallelLinear,
    missing=PPMissingLayer,
)


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
        prefix = maybe_prefix(prefix, "language_model")

        def make() -> nn.Module:
            return init_vllm_registered_model(vllm_config, hf_config=config.text_config, prefix=prefix)

        count = get_tensor_model_parallel_world_size()
        devices = Devices(get_tensor_model_parallel_rank(), count, tensor_model_parallel_all_reduce)
        self.language_model = build(_VLLM, config, vllm_config.quant_config is not None, devices, make)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        # An attention that is gone has no place in the key/value cache.
        cached: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        there = set(self.language_model.modules())
        for name in [name for name in cached if name.startswith(f"{prefix}.{BLOCKS}") and cached[name] not in there]:
            del cached[name]

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
