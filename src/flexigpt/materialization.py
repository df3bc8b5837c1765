"""A compact model with its replicas' weights folded: memory and speed of the source, but for the output norms."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexigpt.errors import InputError
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM, SharedLinear, linear_size

_PLAIN = (nn.Linear, Conv1D)
_HALF = (torch.bfloat16, torch.float16)


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


def sharing_copy(model: FlexiGPTForCausalLM) -> FlexiGPTForCausalLM:
    """Another model of the same tensors: what is exchanged in one of the two stays in the other."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


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
    wide = torch.float32 if base.weight.dtype in _HALF else torch.float64
    difference = linear.adapter_B.to(wide) @ linear.adapter_A.to(wide)
    scale = 1.0 if linear.base_scale is None else linear.base_scale.to(wide)
    weight = scale * base.weight.to(wide) + (difference.T if isinstance(base, Conv1D) else difference)
    outputs, inputs = linear_size(base)
    with torch.device("meta"):
        folded: Any = Conv1D(outputs, inputs) if isinstance(base, Conv1D) else nn.Linear(inputs, outputs, bias=False)
    folded.weight = nn.Parameter(weight.to(base.weight.dtype).contiguous(), base.weight.requires_grad)
    if linear.bias_difference is None:
        folded.bias = base.bias
    else:
        bias = scale * base.bias.to(wide) + linear.bias_difference.to(wide)
        folded.bias = nn.Parameter(bias.to(base.bias.dtype), base.bias.requires_grad)
    return cast(nn.Module, folded.train(linear.training))


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InputError(
        "a materialised model cannot be saved, for it would be no compact checkpoint: save the model before it is "
        "materialised, and materialise what from_pretrained opens"
    )
