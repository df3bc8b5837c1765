"""The compact model. Travels with every checkpoint, so it imports nothing but torch and transformers.

A replica is a decoder layer of the source's own class: own layer index, cache slot, input norms and biases. Only its
linears are exchanged: each computes with the base's weight, to which it adds its own adapter. The base is looked up
when the layer runs and is not registered a second time, so every tensor exists once in the module tree and on disk.

A replica of a single sublayer (an attention or an MLP) needs no base: it is the MLP with fewer of its own hidden units,
or nothing.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from .configuration_flexigpt import FlexiGPTConfig

# What transformers calls the key/value cache: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


# Which of a replica's tensors are split, by the base's rule of tensor parallelism: along the outputs, or the inputs.
_SPLIT_LIKE_BASE = {
    "colwise": ("adapter_B", "bias_difference"),
    "packed_colwise": ("adapter_B", "bias_difference"),
    "rowwise": ("adapter_A",),
    "packed_rowwise": ("adapter_A",),
}


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
        base_path: where the linear lies in the model; its last part is its name in that module.
        rank: r, the adapter's rank.
        bias: whether the source's linear has a bias; the replica stores its own minus s times the base's.
        scaled: whether there is a scale s, one number; without it s is 1.
    """

    def __init__(self, base_parent: nn.Module, base_path: str, rank: int, bias: bool, scaled: bool = False) -> None:
        super().__init__()
        # Past nn.Module's registration: the base's tensors must appear once in state_dict() and parameters().
        self.__dict__["_base_parent"] = base_parent
        self._base_path = base_path
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
        base: nn.Module | None = getattr(parent, self._base_path.rpartition(".")[2], None)
        if base is None:  # no AttributeError: nn.Module would take it for one of `base` itself
            raise RuntimeError(f"a replica computes with {self._base_path}, which is not in the model any more")
        return base

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the ordinary linear that computes the same, the way round of the base's.

        It is computed, at the cost of a product: read it, for what is written to it is lost.

        Raises:
            AttributeError: the base is quantised, so that there is none.
        """
        weight: Any = self.base.weight
        if not weight.is_floating_point() or weight.numel() != self.out_features * self.in_features:
            raise AttributeError("the base is quantised")
        difference = self.adapter_B.to(_wide(weight)) @ self.adapter_A.to(_wide(weight))
        return self._added(weight, difference.T if isinstance(self.base, Conv1D) else difference)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of that linear; computed, too."""
        base: Any = self.base
        return None if self.bias_difference is None else self._added(base.bias, self.bias_difference)

    def _added(self, of_base: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """What the base's becomes, rounded once."""
        wide = _wide(of_base)
        scale = 1.0 if self.base_scale is None else self.base_scale.to(wide)
        return (scale * of_base.to(wide) + difference.to(wide)).to(of_base.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        base = self.base
        weight = getattr(base, "weight", None)
        # On several devices the base may lie elsewhere, and the hooks of its block are passed by: the input goes there.
        # Offloaded weights are on the meta device, until the base's own hook fetches them and moves the input itself.
        there = weight.device if isinstance(weight, torch.Tensor) and weight.device.type != "meta" else x.device
        y = base(x.to(there)).to(x.device)
        # Under autocast y is in half precision and the scale is not: what follows would carry float32.
        y = y if self.base_scale is None else y * self.base_scale.to(y.dtype)
        y = y + self._adapted(x)
        return y if self.bias_difference is None else y + _local(self.bias_difference)

    def _adapted(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's part; under tensor parallelism of this process's share of the inputs, or of the outputs."""
        a, b = self.adapter_A, self.adapter_B
        hidden = F.linear(x, _local(a))
        split = a if hasattr(a, "device_mesh") else b
        if hasattr(split, "device_mesh"):
            from torch.distributed.tensor import DTensor, Partial, Replicate  # noqa: PLC0415 - not in every build

            # Of some inputs the sum of all processes is wanted; of some outputs, on the way back, that of gradients.
            placed = DTensor.from_local(hidden, split.device_mesh, [Partial() if split is a else Replicate()])
            summed = placed.redistribute(placements=[Replicate()])
            hidden = summed.to_local(grad_placements=[Replicate() if split is a else Partial()])
        return F.linear(hidden, _local(b))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.adapter_A.shape[0]}"


def _wide(values: torch.Tensor) -> torch.dtype:
    """What sums of such values are taken in, to be rounded once."""
    return torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else torch.float64


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter."""
    given: Any = parameter
    return given.to_local() if hasattr(given, "device_mesh") else given


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


class NoLinear(nn.Identity):
    """In the place of an inner linear of an MLP that is gone, where a family has no module for the MLP."""


def right_on_cpus(model: nn.Module) -> None:
    """Has 4-bit linears of bitsandbytes compute what they hold on CPUs, whatever their shape.

    On CPUs that multiply bfloat16 it packs each weight when it is first used, and takes 32 rows and 64 columns at once:
    others fail. With AVX-512 it takes the scales of a wrong row where 16 divides the columns and 64 does not. MLPs with
    fewer units may have any number of them.
    """
    linears: Any = model.modules()
    for module in linears:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            outputs, inputs = linear_size(module)
            module.support_avx512bf16_for_cpu &= not (outputs % 32 or inputs % 64)
            if inputs % 64 and "forward" not in vars(module):  # hooks put theirs there, too
                module.forward = partial(_decoded_in_one_row, module)


def _decoded_in_one_row(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """A 4-bit linear's output. As one row the weight is decoded rightly: each scale is that of 64 numbers in turn."""
    if x.device.type != "cpu":
        return type(linear).forward(linear, x)
    weight, ops = linear.weight, torch.ops.bitsandbytes
    state = getattr(weight, "quant_state", None) or linear.quant_state
    scales = state.absmax
    if state.nested:
        outer = state.state2
        scales = (
            ops.dequantize_blockwise(scales, outer.absmax, outer.code, outer.blocksize, torch.float32) + state.offset
        )
    given = x.to(linear.compute_dtype or x.dtype)
    row = (1, state.shape.numel())
    decoded = ops.dequantize_4bit(weight.data, scales, state.blocksize, state.quant_type, row, given.dtype)
    bias = None if linear.bias is None else linear.bias.to(given.dtype)
    return F.linear(given, decoded.view(state.shape), bias).to(x.dtype)


def resized(linear: nn.Module, outputs: int, inputs: int) -> nn.Module:
    """A new linear of the same class, (outputs, inputs) large, with a bias where this has one."""
    weight: Any = linear.weight
    with torch.device(weight.device):
        if isinstance(linear, Conv1D):
            return Conv1D(outputs, inputs).to(weight.dtype)
        return nn.Linear(inputs, outputs, bias=linear.bias is not None, dtype=weight.dtype)


# What transformers asks of a class. Every family that is supported has all of it, but for Gemma 2, GPT-Neo and GPT-2,
# whose models say so themselves.
_ABILITIES = (
    *("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"),
    "_can_compile_fullgraph",
)

# What checkpoints hold of the heads of the other classes.
_HEADS: Any = (r"^language_model\.(lm_head|score)\.",)


class FlexiGPTPreTrainedModel(PreTrainedModel):
    """What the three classes share: the source's architecture, built by transformers, with replicas in it.

    The source's part is called `language_model` and has the names of a causal language model of the source's family,
    with or without a head, so that the classes open each other's checkpoints.
    """

    config_class = FlexiGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: FlexiGPTConfig) -> None:
        if config.text_config is None:
            raise ValueError("a compact model needs text_config, the source's configuration: it was given none")
        source_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        for ability in _ABILITIES:
            if getattr(source_class, ability) != getattr(type(self), ability):
                object.__setattr__(self, ability, getattr(source_class, ability))
        super().__init__(config)
        self._body = source_class.base_model_prefix
        self.language_model: Any = self._source_part(config.text_config, dtype=torch.get_default_dtype())
        self._cache_name = cache_name(self._whole)
        for replica in config.replicas:
            self._share(**replica)
        for row in config.sublayers:
            self._shrink(**row)
        if config.replicas or config.sublayers:
            for part in (self.language_model, self.model):
                part.__dict__["save_pretrained"] = _refuse_to_save
        self.post_init()

    def _source_part(self, config: PreTrainedConfig, **settings: Any) -> Any:
        """A new model of the source's family, with the head of this class."""
        raise NotImplementedError

    @property
    def model(self) -> PreTrainedModel:
        """The source's architecture below its head, replicas and all."""
        return getattr(self.language_model, self._body)

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
            base_path = f"language_model.{self.config.blocks}.{base}.{path}"
            setattr(own_parent, name, SharedLinear(base_parent, base_path, own_rank, has_bias, self.config.base_scale))
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
                setattr(parent, name, NoLinear() if path in others else NoSublayer(sublayer == "attention"))
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the source's own.

        The key/value cache may be called `cache` or `past_key_values`, whichever name this transformers knows.

        Raises:
            ValueError: both of them.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing: give one of them")
        kwargs[self._cache_name] = past_key_values if cache is None else cache
        if labels is not None:
            kwargs["labels"] = labels
        return self._whole(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @property
    def _whole(self) -> Any:
        """What runs: the source's part with its head, where there is one."""
        return self.language_model

    def train(self, mode: bool = True) -> "FlexiGPTPreTrainedModel":
        """nn.Module's own; `from_pretrained` ends with it, when quantised linears are in their places."""
        right_on_cpus(self)
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As every model's, with the names of all three classes, and the ranks that the adapters have by now."""
        classes = (FlexiGPTModel, FlexiGPTForCausalLM, FlexiGPTForSequenceClassification)
        self.config.auto_map = {one._auto_class: f"modeling_flexigpt.{one.__name__}" for one in classes}
        for row in self.config.replicas:
            self._note_ranks(row)
        if any("ranks" in row for row in self.config.replicas):
            self.config.format_version = max(self.config.format_version, 3)
        return super().save_pretrained(*args, **kwargs)

    def _note_ranks(self, row: dict[str, Any]) -> None:
        """Into a replica's row of the plan: PEFT appends to adapters what it merges."""
        before = {path: (row.get("ranks") or {}).get(path, row["rank"]) for path in self.config.linears}
        now = dict(before)
        for name, module in self.block_list[row["block"]].named_modules():
            if isinstance(module, SharedLinear):
                now[name.removesuffix(".base_layer").removesuffix(".inner")] = len(module.adapter_A)
        if now != before:
            row["rank"] = min(now.values())
            row["ranks"] = {path: rank for path, rank in now.items() if rank != row["rank"]}
            if not row["ranks"]:
                del row["ranks"]

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """The source's rules of tensor parallelism, module by module (transformers asks), and those of replicas.

        The base's rule splits inputs or outputs, and sums; its replicas follow by how their own tensors lie.
        """
        expanded: dict[str, str] = super()._expand_parallel_plan(plan)  # type: ignore[misc,unused-ignore]
        for path, module in self.named_modules():
            if isinstance(module, NormedOutput):
                expanded.pop(f"{path}.output_norm.weight", None)
                if path in expanded and isinstance(module.inner, SharedLinear):
                    expanded[f"{path}.inner"] = expanded[path]
            if not isinstance(module, SharedLinear | NormedOutput | NoSublayer | nn.Identity):
                continue
            style = expanded.pop(path, "")  # the rest is no linear, or computes with ones that have their rule
            for name, _ in module.named_parameters(recurse=False):
                expanded.pop(f"{path}.{name}", None)
                if name in _SPLIT_LIKE_BASE.get(style, ()):
                    expanded[f"{path}.{name}"] = style
        return expanded


class FlexiGPTModel(FlexiGPTPreTrainedModel):
    """Without a head: (batch, tokens) ids -> (batch, tokens, hidden size) hidden states."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = _HEADS

    def _source_part(self, config: PreTrainedConfig, **settings: Any) -> Any:
        part = nn.Module()
        part.add_module(self._body, AutoModel.from_config(config, **settings))
        return part

    @property
    def _whole(self) -> Any:
        return self.model


class FlexiGPTForCausalLM(FlexiGPTPreTrainedModel, GenerationMixin):
    """With the source's head: (batch, tokens) ids -> (batch, tokens, vocabulary) logits, and the loss for labels."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: FlexiGPTConfig) -> None:
        super().__init__(config)
        # The source's own, which `generate` asks for its arguments too: Phi-3 begins its cache again where long
        # positions begin.
        self.__dict__["prepare_inputs_for_generation"] = self.language_model.prepare_inputs_for_generation

    def _source_part(self, config: PreTrainedConfig, **settings: Any) -> Any:
        return AutoModelForCausalLM.from_config(config, **settings)

    def forward(  # the argument that `generate` looks for
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache,
            cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)


class FlexiGPTForSequenceClassification(FlexiGPTPreTrainedModel):
    """With a head that scores whole texts, fresh where the checkpoint has none: (batch, tokens) ids -> (batch, labels).

    Raises:
        ValueError: a source of a family for which transformers has no such head.
    """

    _auto_class = "AutoModelForSequenceClassification"
    _keys_to_ignore_on_load_unexpected = _HEADS

    def _source_part(self, config: PreTrainedConfig, **settings: Any) -> Any:
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(
                f"transformers has no sequence classification for {config.model_type}, the source of this compact "
                "model: open it with AutoModel and put a head of your own on its hidden states"
            )
        config.id2label, config.label2id = self.config.id2label, self.config.label2id
        config.problem_type = self.config.problem_type
        return AutoModelForSequenceClassification.from_config(config, **settings)


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "language_model alone is no model of its class: it lacks weights, and would open with random ones in their "
        "place; call save_pretrained of the compact model around it"
    )


def _parent(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at `path` within a block, and that one's name."""
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name
