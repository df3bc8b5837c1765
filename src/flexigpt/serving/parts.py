"""What stands in a server's model for what is gone or shared: a replica's parts, split over devices as its base is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_PARTS: dict[Any, int] = {"q": 0, "k": 1, "v": 2, 0: 0, 1: 1}


@dataclass(frozen=True)
class Devices:
    """Those that a linear is split over.

    Attributes:
        number: of this one.
        count: of all.
        sum: over all.
    """

    number: int
    count: int
    sum: Callable[[torch.Tensor], torch.Tensor]


class NoSublayer(nn.Module):
    """In the place of an attention or an MLP that is gone: it writes nothing to the residual stream."""

    def forward(self, *args: Any, hidden_states: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """Zeros of the shape of the hidden states, the last tensor where they are not named."""
        tensors = [given for given in args if isinstance(given, torch.Tensor)]
        return torch.zeros_like(tensors[-1] if hidden_states is None else hidden_states)


class NormedOutput(nn.Module):
    """A linear or norm of the server's, followed by a replica's output norm."""

    def __init__(self, inner: nn.Module, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.inner = inner
        self.output_norm = nn.LayerNorm(hidden_size, eps=eps, bias=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner module returns, the first of it normed."""
        made = self.inner(*args, **kwargs)
        if isinstance(made, tuple):
            return (self._normed(made[0]), *made[1:])
        return self._normed(made)

    def _normed(self, y: torch.Tensor) -> torch.Tensor:
        """A norm is of the whole sum: where the server sums up later, one device alone hands it on."""
        if not isinstance(self.inner, SharedRows) or self.inner.is_whole:
            normed: torch.Tensor = self.output_norm(y)
            return normed
        normed = self.output_norm(self.inner.devices.sum(y))
        return normed if self.inner.devices.number == 0 else torch.zeros_like(normed)


class _Shared(nn.Module):
    """A replica's linear: what the base's puts out, scaled or not, and an adapter's output beside it.

    Args:
        base: the server's linear of the base; held, but not registered a second time.
        devices: that it is split over.
        ranks: of the checkpoint's linears that this one computes side by side.
        sizes: of their outputs, on this device.
        inputs: on this device.
        scaled: whether the base's outputs are scaled, by one number for each linear.
    """

    is_whole = True  # what it puts out is no part of a sum over devices

    def __init__(
        self, base: Any, devices: Devices, ranks: Sequence[int], sizes: Sequence[int], inputs: int, scaled: bool
    ) -> None:
        super().__init__()
        # By this name SGLang knows that its kernels for plain linears do not suffice.
        self.__dict__["base_layer"] = base
        self.devices = devices
        self._rank, self._sizes = max(ranks), list(sizes)
        outputs = sum(sizes)
        # Lower ranks than the highest are filled up with zeros.
        self.adapter_A = self._made((len(sizes) * self._rank, inputs), self._load_A)
        self.adapter_B = self._made((outputs, self._rank), self._load_B)
        self.base_scale = self._made((len(sizes),), self._load_scale) if scaled else None
        has_bias = getattr(base, "bias", None) is not None
        self.bias_difference = self._made((outputs,), self._load_bias) if has_bias else None

    def forward(self, x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """(tokens, inputs) -> (tokens, outputs), and no bias to add to it."""
        y = self.__dict__["base_layer"](x)[0]
        if self.base_scale is not None:
            y = y * torch.cat([scale.expand(size) for scale, size in zip(self.base_scale, self._sizes, strict=True)])
        narrow = self._gathered(F.linear(x, self.adapter_A)).split(self._rank, dim=-1)
        wide = [F.linear(h, B) for h, B in zip(narrow, self.adapter_B.split(self._sizes), strict=True)]
        y = y + torch.cat(wide, dim=-1)
        adds_bias = self.bias_difference is not None and (self.is_whole or self.devices.number == 0)
        return (y + self.bias_difference if adds_bias else y), None

    def _gathered(self, narrow: torch.Tensor) -> torch.Tensor:
        """The adapter's inner values, of all inputs."""
        return narrow

    def _own_inputs(self, A: torch.Tensor) -> torch.Tensor:
        """This device's columns of an A."""
        return A

    def _own_outputs(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        """This device's rows of what has a row for each output."""
        return rows

    def _made(self, shape: tuple[int, ...], load: Callable[..., None]) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(shape), requires_grad=False)
        parameter.weight_loader = load  # type: ignore[attr-defined]  # servers' loaders ask for it
        return parameter

    def _load_A(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        first = _part(loaded, shard) * self._rank
        parameter.data[first : first + len(loaded)].copy_(self._own_inputs(loaded))

    def _load_B(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        part = _part(loaded, shard)
        rows = parameter.data.split(self._sizes)[part]
        rows[:, : loaded.shape[1]].copy_(self._own_outputs(loaded, part))

    def _load_scale(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        parameter.data[_part(loaded, shard)].copy_(loaded[0])

    def _load_bias(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        part = _part(loaded, shard)
        parameter.data.split(self._sizes)[part].copy_(self._own_outputs(loaded, part))


class SharedColumns(_Shared):
    """`qkv_proj` or `gate_up_proj`: outputs are split over devices, inputs are whole."""

    def __init__(self, base: Any, devices: Devices, ranks: Sequence[int], scaled: bool) -> None:
        sizes = [size // devices.count for size in base.output_sizes]
        super().__init__(base, devices, ranks, sizes, base.input_size, scaled)
        # Where there are more devices than heads of keys, several devices have the same one.
        self._sharing = getattr(base, "num_kv_head_replicas", 1)

    def _own_outputs(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        number = self.devices.number // (self._sharing if part else 1)
        return rows.narrow(0, number * self._sizes[part], self._sizes[part])


class SharedRows(_Shared):
    """`o_proj` or `down_proj`: inputs are split over devices, outputs are whole once they are summed up.

    Here, or by what comes next: as its base does.
    """

    def __init__(self, base: Any, devices: Devices, ranks: Sequence[int], scaled: bool) -> None:
        super().__init__(base, devices, ranks, [base.output_size], base.input_size_per_partition, scaled)
        self.is_whole = base.reduce_results or devices.count == 1

    def _gathered(self, narrow: torch.Tensor) -> torch.Tensor:
        return self.devices.sum(narrow) if self.is_whole and self.devices.count > 1 else narrow

    def _own_inputs(self, A: torch.Tensor) -> torch.Tensor:
        size = A.shape[1] // self.devices.count
        return A.narrow(1, self.devices.number * size, size)


def _part(loaded: torch.Tensor, shard: Any) -> int:
    """Which of the linears side by side: the server's loader writes it on the tensor, or hands it over."""
    return _PARTS[shard if shard is not None else getattr(loaded, "shard_id", 0)]
