"""A compact model with its replicas' weights folded: memory and speed of the source, but for the output norms."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexigpt.model.architecture import find_architecture, num_blocks
from flexigpt.model.configuration_flexigpt import FlexiGPTConfig
from flexigpt.model.layout import INNER, SOURCE_PREFIX, layout_of, sublayer_paths
from flexigpt.model.modeling_flexigpt import FlexiGPTForCausalLM, SharedLinear, linear_size
from flexigpt.model.plan import Plan
from flexigpt.runtime import InputError

_PLAIN = (nn.Linear, Conv1D)


@torch.no_grad()
def materialize(model: PreTrainedModel) -> FlexiGPTForCausalLM:
    """Folds each replica's adapters into weights of its own, in place: W = s base's + B A, b = s base's + difference.

    Each sum is taken in float64 (for half precision in float32) and rounded once to the base's dtype. Afterwards a
    replica's linears are ordinary ones of the base's class, on its device, whose adapters are gone; output norms stay.
    One linear at a time, so that no second copy of the model is ever held.

    The model can be run, speculated with and measured as before. It cannot be saved: it would be read back wrongly, and
    it would not be compact.

    Args:
        model: a compact model.

    Returns:
        The same model.

    Raises:
        InputError: a model without shared linears, or whose bases are quantised, wrapped or on the meta device.
    """
    shared = list(_shared_linears(model))
    if not shared and isinstance(model, FlexiGPTForCausalLM):
        raise InputError("this compact model has no replicas, so there is nothing to materialise: use it as it is")
    if not shared or not isinstance(model, FlexiGPTForCausalLM):
        what = f"this {type(model).__name__} has no shared linears"
        raise InputError(
            f"{what}, so there is nothing to materialise: give a compact model as from_pretrained opens it"
        )
    for _, name, linear in shared:
        _check_foldable(name, linear)
    for parent, name, linear in shared:
        setattr(parent, name, _folded(linear))
    # Over the method of this one model: the class travels with checkpoints and knows nothing of this.
    model.__dict__["save_pretrained"] = _refuse_to_save
    return model


def _shared_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, SharedLinear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, SharedLinear):
                yield parent, name, child


def _check_foldable(name: str, linear: SharedLinear) -> None:
    base = linear.base
    weight: Any = getattr(base, "weight", None)
    if type(base) not in _PLAIN or type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        kind = f"{type(base).__module__}.{type(base).__name__} of {getattr(weight, 'dtype', 'no weight')}"
        raise InputError(
            f"the base of a replica's {name} is a {kind}, whose weight cannot be folded into: materialise the model "
            "before it is quantised, wrapped or sharded"
        )
    if weight.is_meta or linear.adapter_A.is_meta:
        raise InputError(
            f"the weights of a replica's {name} are on the meta device: load the model without offloading, then "
            "materialise it"
        )


def _folded(linear: SharedLinear) -> nn.Module:
    """The ordinary linear that computes what the shared one does."""
    base: Any = linear.base
    outputs, inputs = linear_size(base)
    with torch.device("meta"):
        folded: Any = Conv1D(outputs, inputs) if isinstance(base, Conv1D) else nn.Linear(inputs, outputs, bias=False)
    folded.weight = nn.Parameter(linear.weight.contiguous(), base.weight.requires_grad)
    folded.bias = base.bias if linear.bias is None else nn.Parameter(linear.bias, base.bias.requires_grad)
    return cast(nn.Module, folded.train(linear.training))


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InputError(
        "a materialised model cannot be saved, for it would be no compact checkpoint: save the model before it is "
        "materialised, and materialise what from_pretrained opens"
    )


def config_with_blocks(config: PreTrainedConfig, source_blocks: Sequence[int]) -> PreTrainedConfig:
    """The configuration of the model that consists of these blocks of the source, in this order; repeats allowed.

    Depth and per-block lists (such as `layer_types`) follow, so that what is built from it loads and generates.

    Raises:
        InputError: blocks that would compute something else in another place.
    """
    by_index = "scale_attn_by_inverse_layer_idx"
    if getattr(config, by_index, False) and list(source_blocks) != list(range(len(source_blocks))):
        raise InputError(f"blocks of this {config.model_type} depend on their place ({by_index}): none can be moved")
    settings = copy.deepcopy(config.to_dict())
    find_architecture(config).gather(settings, source_blocks)
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(source_blocks)
    for key in ("model_type", "transformers_version", "architectures"):
        settings.pop(key, None)
    shortened = type(config)(**settings)
    shortened.architectures = config.architectures
    return shortened


def config_with_width(config: PreTrainedConfig, width: int) -> PreTrainedConfig:
    """The configuration of the same model with MLPs of so many hidden units."""
    changed = copy.deepcopy(config)
    setattr(changed, find_architecture(config).width, width)
    return changed


def check_depth(plan: Plan, depth: int) -> None:
    """Raises InputError for a plan of another depth than the source's."""
    if plan.num_blocks != depth:
        raise InputError(
            f"the plan is for {plan.num_blocks} blocks, the model has {depth}: give a plan made for this model"
        )


def compact_config(
    config: PreTrainedConfig,
    plan: Plan,
    output_norm: bool = True,
    sublayer_paths: dict[str, dict[str, Any]] | None = None,
) -> FlexiGPTConfig:
    """The configuration of the compact model that a plan makes of a source.

    Raises:
        InputError: a plan of another depth than the source's.
    """
    check_depth(plan, num_blocks(config))
    architecture = find_architecture(config)
    return FlexiGPTConfig(
        text_config=config,
        replicas=plan.to_dict()["replicas"],
        blocks=architecture.blocks,
        linears=list(architecture.linears),
        output_norms=list(architecture.output_norms) if output_norm else [],
        sublayers=[one.to_dict() for one in plan.sublayers],
        sublayer_paths=sublayer_paths,
        dtype=config.dtype,
    )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A source or compact model of that configuration with parameters on the meta device: no memory, all shapes."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config_dtype(config))
    model.tie_weights()
    return model.eval()


def config_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights that a configuration names; float32 where it names none."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def all_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those buffers included that no checkpoint holds (such as rotary frequencies)."""
    return model.state_dict() | dict(model.named_buffers())


def fill_model(empty: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives an empty model these tensors (`all_tensors` of another), without a copy; others it keeps."""
    known = empty.state_dict().keys()
    empty.load_state_dict({name: t for name, t in tensors.items() if name in known}, strict=False, assign=True)
    for name, _ in list(empty.named_buffers()):
        if name in tensors:
            parent, _, last = name.rpartition(".")
            empty.get_submodule(parent)._buffers[last] = tensors[name]
    empty.tie_weights()


def _names_of_blocks(source: PreTrainedModel, source_blocks: Sequence[int]) -> dict[str, str]:
    """What the model that consists of these blocks of the source, repeats allowed, calls its tensors, buffers included.

    Returns:
        Name in that model -> name in the source.
    """
    prefix = f"{layout_of(source).prefix}."
    names: dict[str, str] = {}
    for name in all_tensors(source):
        if name.startswith(prefix):
            block, _, path = name.removeprefix(prefix).partition(".")
            names |= {f"{prefix}{i}.{path}": name for i, origin in enumerate(source_blocks) if origin == int(block)}
        else:
            names[name] = name
    return names


def empty_of_blocks(source: PreTrainedModel, blocks: Sequence[int]) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model of the source's own family that consists of these blocks of it, its parameters on the meta device.

    Returns:
        The model, and name in it -> name in the source, buffers included.
    """
    config = config_with_blocks(source.config, blocks)
    config.dtype = source.dtype
    return empty_model(config), _names_of_blocks(source, blocks)


def empty_compact(
    source: PreTrainedModel,
    plan: Plan,
    output_norm: bool = True,
    source_blocks: Sequence[int] | None = None,
) -> tuple[FlexiGPTForCausalLM, dict[str, str]]:
    """The compact model of a source, its parameters on the meta device, and which of the source's tensors it takes.

    Args:
        source: the source model; the meta device will do.
        plan: the plan of the compact model.
        output_norm: whether its replicas have output norms.
        source_blocks: the source's block behind each logical block; None: the same numbering.

    Returns:
        The model, and name in it -> name in the source, buffers included; what is missing is the replicas' own.
    """
    origins = range(num_blocks(source.config)) if source_blocks is None else source_blocks
    text_config = config_with_blocks(source.config, origins)
    text_config._name_or_path = ""  # where the source lay when it was pruned; the record says so
    text_config.dtype = source.dtype
    paths = sublayer_paths(source) if plan.sublayers else None
    model = cast(FlexiGPTForCausalLM, empty_model(compact_config(text_config, plan, output_norm, paths)))
    shapes = {name: tensor.shape for name, tensor in all_tensors(source).items()}
    names = {f"{SOURCE_PREFIX}{name}": origin for name, origin in _names_of_blocks(source, origins).items()}
    taken = {}
    for name, tensor in all_tensors(model).items():
        # A family's own norm that an output norm follows lies one level deeper in a replica.
        parent, _, last = name.rpartition(".")
        origin = names.get(f"{parent.removesuffix(INNER)}.{last}")
        if origin is not None and tensor.shape == shapes[origin]:  # a sublayer with fewer units has tensors of its own
            taken[name] = origin
    return model, taken
