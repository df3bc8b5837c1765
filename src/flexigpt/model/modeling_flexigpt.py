"""The compact model. Travels with every checkpoint, so it imports nothing but torch and transformers.

A replica is a decoder layer of the source's own class: own layer index, cache slot, input norms and biases. Only its
linears are exchanged: each computes with the base's weight, to which it adds its own adapter. The base is looked up
when the layer runs and is not registered a second time, so every tensor exists once in the module tree and on disk.

A replica of a single sublayer (an attention or an MLP) needs no base: it is the MLP with fewer of its own hidden units,
or nothing.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from .configuration_flexigpt import FlexiGPTConfig

# What transformers calls the key/value cache: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str:
    """The name under which the forward of this model takes its key/value cache."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in known)


def linear_size(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear; GPT-2's `Conv1D` stores its weight transposed."""
    names = ("nf", "nx") if isinstance(linear, Conv1D) else ("out_features", "in_features")
    return int(getattr(linear, names[0])), int(getattr(linear, names[1]))


class SharedLinear(nn.Module):
    """A replica's linear: y = [s] base(x) + (x A^T) B^T [+ bias difference] (FlexiGPT, section 3.4).

    Args:
        base_parent: the module that holds the base's linear. The linear is looked up in it by name at each call:
            quantisers, PEFT and offload hooks exchange modules, and a reference to the linear would go stale.
        base_name: the linear's name in that module.
        rank: r, the adapter's rank.
        bias: whether the source's linear has a bias; the replica stores its own minus s times the base's.
        scaled: whether there is a scale s, one number; without it s is 1.
    """

    def __init__(self, base_parent: nn.Module, base_name: str, rank: int, bias: bool, scaled: bool = False) -> None:
        super().__init__()
        # Past nn.Module's registration: the base's tensors must appear once in state_dict() and parameters().
        self.__dict__["_base_parent"] = base_parent
        self._base_name = base_name
        self.out_features, self.in_features = linear_size(self.base)
        self.adapter_A = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.adapter_B = nn.Parameter(torch.zeros(self.out_features, rank))
        # One dimension: FSDP2 does not shard what has none.
        self.base_scale = nn.Parameter(torch.ones(1)) if scaled else None
        self.bias_difference = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    @property
    def base(self) -> nn.Module:
        """The base's linear, as it is now."""
        parent: nn.Module = self.__dict__["_base_parent"]
        return getattr(parent, self._base_name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = self.base(x)
        # Under autocast y is in half precision and the scale is not: what follows would carry float32.
        y = y if self.base_scale is None else y * self.base_scale.to(y.dtype)
        y = y + F.linear(F.linear(x, self.adapter_A), self.adapter_B)
        return y if self.bias_difference is None else y + self.bias_difference

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.adapter_A.shape[0]}"


class NormedOutput(nn.Module):
    """The last module of a replica's attention or MLP, followed by the replica's output norm (eq. 6)."""

    def __init__(self, inner: nn.Module, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.inner = inner
        self.output_norm = nn.LayerNorm(hidden_size, eps=eps, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., hidden_size)."""
        y = self.inner(x)
        # Under autocast a norm returns float32, and every block from here on would carry that.
        return self.output_norm(y).to(y.dtype)


class NoSublayer(nn.Module):
    """In the place of an attention or an MLP that is gone: it writes nothing to the residual stream.

    Args:
        is_attention: whether the block expects attention weights beside the output. There are none, nor anything in
            the key/value cache.
    """

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self._is_attention = is_attention

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """(..., hidden_size) -> zeros of that shape."""
        nothing = hidden_states * 0  # not torch.zeros: DDP waits for a gradient of the norm before it
        return (nothing, None) if self._is_attention else nothing


def unpacked_where_odd(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for a CPU where their shape does not allow it: it would fail.

    On CPUs that multiply bfloat16 it packs each weight when it is first used, and takes 32 rows and 64 columns at once.
    MLPs with fewer units may have any number of them.
    """
    linears: Any = model.modules()
    for module in linears:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            outputs, inputs = linear_size(module)
            module.support_avx512bf16_for_cpu = not (outputs % 32 or inputs % 64)


def resized(linear: nn.Module, outputs: int, inputs: int) -> nn.Module:
    """A new linear of the same class, (outputs, inputs) large, with a bias where this has one."""
    weight: Any = linear.weight
    with torch.device(weight.device):
        if isinstance(linear, Conv1D):
            return Conv1D(outputs, inputs).to(weight.dtype)
        return nn.Linear(inputs, outputs, bias=linear.bias is not None, dtype=weight.dtype)


class FlexiGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The source's architecture, built by transformers from its own configuration, with replicas in it."""

    config_class = FlexiGPTConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: FlexiGPTConfig) -> None:
        if config.text_config is None:
            raise ValueError("a compact model needs text_config, the source's configuration: it was given none")
        source_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        for flag in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
            object.__setattr__(self, flag, getattr(source_class, flag))
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self._cache_name = cache_name(self.language_model)
        # The source's own, which `generate` asks for its arguments too: Phi-3 begins its cache again where long
        # positions begin.
        self.__dict__["prepare_inputs_for_generation"] = self.language_model.prepare_inputs_for_generation
        for replica in config.replicas:
            self._share(**replica)
        for row in config.sublayers:
            self._shrink(**row)
        if config.replicas or config.sublayers:
            self.language_model.save_pretrained = _refuse_to_save
        self.post_init()

    @property
    def block_list(self) -> nn.ModuleList:
        """The logical blocks, in order."""
        return self.language_model.get_submodule(self.config.blocks)

    def _share(self, block: int, base: int, rank: int, ranks: dict[str, int] | None = None) -> None:
        """Turns one block into a replica of another."""
        for path in self.config.linears:
            base_parent, name = _parent(self.block_list[base], path)
            own_parent, _ = _parent(self.block_list[block], path)
            has_bias = getattr(own_parent, name).bias is not None
            own_rank = (ranks or {}).get(path, rank)
            setattr(own_parent, name, SharedLinear(base_parent, name, own_rank, has_bias, self.config.base_scale))
        for path in self.config.output_norms:
            parent, name = _parent(self.block_list[block], path)
            inner = getattr(parent, name)
            setattr(parent, name, NormedOutput(inner, self.config.text_config.hidden_size, self.config.output_norm_eps))

    def _shrink(self, block: int, sublayer: str, form: str, units: int = 0) -> None:
        """Turns one sublayer into a replica of itself."""
        paths, logical = self.config.sublayer_paths[sublayer], self.block_list[block]
        if form == "none":
            # Where a family has no module for the MLP (OPT), its last linear takes what the first was given.
            others = [] if paths["module"] else paths["inner"]
            for path in (*others, paths["module"] or paths["outer"]):
                parent, name = _parent(logical, path)
                setattr(parent, name, nn.Identity() if path in others else NoSublayer(sublayer == "attention"))
            return
        for path in (*paths["inner"], paths["outer"]):
            parent, name = _parent(logical, path)
            outputs, inputs = linear_size(getattr(parent, name))
            if path == paths["outer"]:
                inputs = units
            else:
                outputs = outputs // paths["units"] * units
            setattr(parent, name, resized(getattr(parent, name), outputs, inputs))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the source's own: (batch, tokens) ids -> (batch, tokens, vocabulary) logits, and the loss for labels.

        The key/value cache may be called `cache` or `past_key_values`, whichever name this transformers knows.

        Raises:
            ValueError: both of them.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing: give one of them")
        kwargs[self._cache_name] = past_key_values if cache is None else cache
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def train(self, mode: bool = True) -> "FlexiGPTForCausalLM":
        """nn.Module's own; `from_pretrained` ends with it, when quantised linears are in their places."""
        unpacked_where_odd(self)
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "language_model alone is no model of its class: it lacks weights, and would open with random ones in their "
        "place; call save_pretrained of the compact model around it"
    )


def _parent(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at `path` within a block, and that one's name."""
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name
