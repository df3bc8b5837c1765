"""LoRA and (IA)3 of PEFT on the linears of replicas, by the usual names: `q_proj`, `down_proj` ...

Loaded once PEFT is. A replica's linear has no weight of its own that PEFT could add to; it has an adapter, to which a
LoRA can be appended.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Model, LoraModel
from peft.tuners.ia3.layer import Linear as Ia3Linear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from flexigpt.model.modeling_flexigpt import NoLinear, NormedOutput, NoSublayer, SharedLinear

_NOT_MERGED = (
    "(IA)3 scales the weight that it is merged into, and a replica's is its base's: keep the adapter beside the model "
    "(save_pretrained of the PEFT model), or train a LoRA, which can be merged"
)

# Values of LoraConfig.init_lora_weights that leave the linear's own weight as it is.
_INITS = (True, False, "gaussian", "eva")


class SharedLoraLinear(LoraLinear):
    """LoRA on a replica's linear. What it merges becomes part of the replica's adapter, whose rank grows by it."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None: they scale or split the weight, which is the base's."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _get_base_layer_device_and_dtype(self, base_layer: SharedLinear) -> tuple[torch.device, torch.dtype]:
        return base_layer.adapter_A.device, base_layer.adapter_A.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Appends the factors of adapters (default: the active ones) to those of the replica."""
        linear: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            inner: Any = self.lora_A[name].weight.data
            outer: Any = self.lora_B[name].weight.data * self.scaling[name]
            if safe_merge and not (torch.isfinite(inner).all() and torch.isfinite(outer).all()):
                raise ValueError(f"NaNs detected: the adapter {name} seems to be broken")
            _set_factors(linear, torch.cat((linear.adapter_A, inner)), torch.cat((linear.adapter_B, outer), 1))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes off what was appended, the last first."""
        linear: Any = self.get_base_layer()
        while self.merged_adapters:
            kept = len(linear.adapter_A) - self.r[self.merged_adapters.pop()]
            _set_factors(linear, linear.adapter_A[:kept], linear.adapter_B[:, :kept])


def _set_factors(linear: SharedLinear, inner: torch.Tensor, outer: torch.Tensor) -> None:
    for name, values in (("adapter_A", inner), ("adapter_B", outer)):
        before = getattr(linear, name)
        setattr(linear, name, nn.Parameter(values.detach().to(before.dtype).clone(), before.requires_grad))


class SharedIa3Linear(Ia3Linear):
    """(IA)3 on a replica's linear; it cannot be merged."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        linear: Any = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        stand_in = nn.Linear(1, 1).to(linear.adapter_A)  # PEFT asks its class, sizes, device and dtype
        stand_in.in_features, stand_in.out_features = linear.in_features, linear.out_features
        super().__init__(stand_in, adapter_name, **settings)
        self.base_layer = base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses."""
        raise ValueError(_NOT_MERGED)


def teach() -> None:
    """Lets PEFT find its way: from now on LoRA and (IA)3 know the modules of compact models, and others say no."""
    any_tuner: Any = BaseTuner
    any_tuner.inject_adapter = _saying(any_tuner.inject_adapter)
    tuners: tuple[Any, ...] = (LoraModel, IA3Model)
    for tuner in tuners:
        tuner._create_and_replace = _finding(tuner._create_and_replace)
        tuner._replace_module = _replacing(tuner._replace_module)
    tuner._create_new_module = staticmethod(_creating(tuner._create_new_module))
    tuner._check_merge_allowed = _checking(tuner._check_merge_allowed)


def _saying(stock: Callable[..., None]) -> Callable[..., None]:
    """PEFT's step that puts adapters of any kind on a model, which does not know replicas' linears."""

    def inject(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            stock(self, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if not any(kind.__name__ in str(error) for kind in (SharedLinear, NormedOutput)):
                raise
            raise ValueError(
                f"{type(self).__name__.removesuffix('Model')} cannot be put on a replica's linear, which has no weight "
                "of its own: train a LoRA or (IA)3, or name kept blocks alone by layers_to_transform"
            ) from error

    return inject


def _creating(stock: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """PEFT's step that makes the module of an (IA)3."""

    def create(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        linear = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(linear, SharedLinear):
            return stock(config, adapter_name, target, **kwargs)
        return SharedIa3Linear(target, adapter_name, config=config, is_feedforward=kwargs["is_feedforward"])

    return create


def _checking(stock: Callable[..., None]) -> Callable[..., None]:
    """PEFT's look at a model before it merges anything of an (IA)3 into it."""

    def check(self: Any) -> None:
        stock(self)
        if any(isinstance(module, SharedIa3Linear) for module in self.model.modules()):
            raise ValueError(_NOT_MERGED)

    return check


def _finding(stock: Callable[..., None]) -> Callable[..., None]:
    """PEFT's step that puts an adapter on the module of a name that it was asked for."""

    def create_and_replace(
        self: Any, config: Any, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, *a: Any, **k: Any
    ) -> None:
        if isinstance(target, NoLinear | NoSublayer):
            return  # nothing is there
        if isinstance(target, NormedOutput):
            target, name, parent = target.inner, "inner", target
        linear = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(linear, SharedLinear) and isinstance(self, LoraModel):
            if config.use_dora or config.lora_bias or config.init_lora_weights not in _INITS:
                given = {name: getattr(config, name) for name in ("use_dora", "lora_bias", "init_lora_weights")}
                raise ValueError(
                    "a replica's linear shares its weight and bias with its base, so that neither can be changed for "
                    f"it alone: {given} asks for it; leave that out, or name kept blocks alone by layers_to_transform"
                )
            config._register_custom_module({SharedLinear: SharedLoraLinear})
        stock(self, config, adapter_name, target, name, parent, *a, **k)

    return create_and_replace


def _replacing(stock: Callable[..., None]) -> Callable[..., None]:
    """PEFT's step that puts a module in another's place, and, where it is a plain one, that one's weight into it."""

    def replace_module(self: Any, parent: nn.Module, name: str, new: nn.Module, child: nn.Module) -> None:
        if isinstance(new, SharedLinear | SharedLoraLinear | SharedIa3Linear):
            setattr(parent, name, new)
        else:
            stock(self, parent, name, new, child)

    return replace_module
