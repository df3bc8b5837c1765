"""The compact model in SGLang: see `flexigpt.serving.build`. Written against SGLang 0.5.23."""

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_parallel
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexigpt.serving.build import Server, build
from flexigpt.serving.parts import Devices

_SGLANG = Server(
    name="SGLang",
    families=frozenset(("llama", "mistral", "qwen2", "qwen3", "granite")),
    columns=(MergedColumnParallelLinear, QKVParallelLinear),
    rows=RowParallelLinear,
    missing=PPMissingLayer,
)


class FlexiGPTForCausalLM(nn.Module):
    """A compact model.

    Args:
        config: the compact model's.
        quant_config: the server's.

    Raises:
        ValueError: a family, a form or a setting that this cannot serve.
    """

    def __init__(self, config: Any, quant_config: Any = None) -> None:
        super().__init__()
        here = get_parallel()
        devices = Devices(here.tp_rank, here.tp_size, tensor_model_parallel_all_reduce)

        def make() -> nn.Module:
            source, _ = ModelRegistry.resolve_model_cls(
                MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]
            )
            return source(config=config.text_config)

        self.language_model = build(_SGLANG, config, quant_config is not None, devices, make)
        # SGLang asks it for the names of its arguments.
        self.forward = self.language_model.forward

    def __getattr__(self, name: str) -> Any:
        """All else that SGLang asks its models for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("language_model"), name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Names behind `language_model.` are the source's own, and those of the parts that are put in."""
        return self.language_model.load_weights(
            (name.removeprefix("language_model."), tensor) for name, tensor in weights
        )


EntryClass = FlexiGPTForCausalLM
