"""A model with the weights of its blocks' linears in 8 bits, quantised as they are read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flexigpt.model import parameter_bytes
from flexigpt.weights.sources import StreamedModel


def int8() -> Any:
    """How torchao is to store weights in 8 bits, a scale for each output.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - optional

    return Int8WeightOnlyConfig(set_inductor_config=False)


class EightBits(StreamedModel):
    """The same model as `quantize` would store it in 8 bits, a block in memory at a time.

    Args:
        model: a source or compact model, which must stay as it is while this one is used.

    Attributes:
        bytes: that it would store; as many as the model's own where it has no linear that can be quantised.

    Raises:
        ImportError: torchao is not installed.
    """

    def __init__(self, model: StreamedModel) -> None:
        super().__init__(model.model, self._quantised)
        self._unquantised, self._how = model, int8()
        modules = {f"{path}.weight": module for path, module in model.model.named_modules()}
        inside = {name: module for name, module in modules.items() if name.startswith(f"{self.prefix}.")}
        self._linears = {name for name, module in inside.items() if isinstance(module, nn.Linear)}
        sizes = (self._stored(name, values.to("meta")) for name, values in model.model.named_parameters())
        self.bytes = sum(map(parameter_bytes, sizes))

    def expect(self, block: int) -> None:
        """Says which block comes next, so that its parameters may be fetched meanwhile."""
        self._unquantised.expect(block)

    def _quantised(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._stored(name, values) for name, values in self._unquantised.tensors(names).items()}

    def _stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A parameter, in 8 bits if it is a linear's weight."""
        if name not in self._linears:
            return values
        from torchao.quantization import quantize_  # noqa: PLC0415 - optional

        outputs, inputs = values.shape
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(values, requires_grad=False)
        quantize_(linear, self._how)
        return linear.weight
