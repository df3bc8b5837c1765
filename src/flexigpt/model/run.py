"""bfloat16 and float16 on CPUs that are faster in float32: as hardware computes them, at that speed."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flexigpt.runtime import widened_rows

_HALF = (torch.bfloat16, torch.float16)

# Weights that are used again are held in float32 up to so many bytes.
HELD_BYTES = 2**30

# A quantised weight is of another type, and decodes itself.
_PLAIN = (torch.Tensor, nn.Parameter)


class Widened:
    """Weights in float32, kept for as long as this is, up to a gigabyte of them."""

    def __init__(self) -> None:
        self._left = HELD_BYTES
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """It in float32."""
        if id(weight) in self._held:
            return self._held[id(weight)][1]
        wide: torch.Tensor = _widened(weight)
        if wide is not weight and wide.nbytes <= self._left:
            self._left -= wide.nbytes
            self._held[id(weight)] = (weight, wide)  # no other has its number while it is here
        return wide


def fast_half(model: PreTrainedModel, widened: Widened | None = None) -> AbstractContextManager[Any]:
    """Within it a half-precision model on such a CPU multiplies in float32 and rounds each product once.

    So do the units of CPUs and GPUs that multiply bfloat16: they add up in float32. On any other machine, or for a
    float32 model, it does nothing.

    Args:
        model: the model.
        widened: where weights are kept in float32 that are used again, and do not change; None: each is held for the
            length of one product.
    """
    rows = _fast_from(model)
    return nullcontext() if rows is None else _InFloat32(rows, _widened if widened is None else widened)


def _fast_from(model: PreTrainedModel) -> int | None:
    """From so many rows on its products are faster in float32; None: never."""
    return widened_rows(model.dtype) if model.device.type == "cpu" else None


class _InFloat32(TorchFunctionMode):
    _PRODUCTS = frozenset(
        (
            F.linear,
            F.scaled_dot_product_attention,
            torch.addmm,
            torch.baddbmm,
            torch.bmm,
            torch.matmul,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
        )
    )

    def __init__(self, rows: int, widened: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._rows, self._weight = rows, widened

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function not in self._PRODUCTS or args[0].dtype not in _HALF or _rows(function, args) < self._rows:
            return function(*args, **kwargs)
        if function is F.linear and torch.is_grad_enabled() and len(args) == 3 and _is_fixed(args[1:]):
            return _Linear.apply(*args, self._weight)
        widened = {name: _widened(value) for name, value in kwargs.items()}
        given, *others = args
        if function is F.linear and others:
            others[0] = self._weight(others[0])
        return function(_widened(given), *map(_widened, others), **widened).to(given.dtype)


class _Linear(torch.autograd.Function):
    """A fixed weight's product, for whose gradient the weight is kept as it is: in float32 it is twice as large."""

    @staticmethod
    def forward(
        context: Any,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        widened: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        context.save_for_backward(weight)
        context.widened = widened
        return F.linear(given.float(), widened(weight), None if bias is None else bias.float()).to(given.dtype)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = context.saved_tensors
        return (gradients[0].float() @ context.widened(weight)).to(gradients[0].dtype), None, None, None


class _GradientAlone(torch.autograd.Function):
    """A product that is not computed: zeros, and back through it the gradient."""

    @staticmethod
    def forward(
        context: Any, given: torch.Tensor, weight: torch.Tensor, widened: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        context.save_for_backward(weight)
        context.widened = widened
        return given.new_zeros(*given.shape[:-1], len(weight))

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = context.saved_tensors
        wide = context.widened(weight)
        return (gradients[0].to(wide.dtype) @ wide).to(gradients[0].dtype), None, None


@contextmanager
def held_back(linear: nn.Linear, model: PreTrainedModel, widened: Widened) -> Iterator[None]:
    """Within it a linear with a fixed weight returns zeros without a product, but passes gradients back as ever.

    Args:
        linear: the linear.
        model: which it is part of.
        widened: as `fast_half` takes it.
    """
    rows = _fast_from(model)

    def forward(given: torch.Tensor) -> torch.Tensor:
        fast = rows is not None and _rows(F.linear, (given,)) >= rows
        return cast(
            torch.Tensor, _GradientAlone.apply(given, linear.weight, widened if fast else lambda weight: weight)
        )

    with replaced_forwards([linear], lambda *_: forward):
        yield


def _is_fixed(parameters: tuple[Any, ...]) -> bool:
    return all(one is None or (type(one) in _PLAIN and not one.requires_grad) for one in parameters)


def _rows(function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """That share what the other operand holds: all of a linear's, those of one head or batch of the others'."""
    if function is F.linear:
        return args[0].numel() // max(1, args[0].shape[-1])
    operand = args[1] if function in (torch.addmm, torch.baddbmm) else args[0]
    return operand.shape[-2] if operand.ndim > 1 else 1


def _widened(value: Any) -> Any:
    return value.float() if type(value) in _PLAIN and value.dtype in _HALF else value


@contextlib.contextmanager
def replaced_forwards(
    blocks: Iterable[nn.Module], forward_of: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within it blocks run another forward, while the model around them prepares what they are given.

    Args:
        blocks: whose forward is replaced.
        forward_of: (number among these blocks, its own forward) -> what it runs instead.
    """
    with contextlib.ExitStack() as undo:
        for index, block in enumerate(blocks):
            undo.callback(_restore, block, block.__dict__.get("forward"))  # offload hooks leave one there
            block.forward = forward_of(index, block.forward)
        yield


def _restore(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


# By path within the block: what a module was given, and what it returned.
Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]


def block_output(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, in some families with more."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watched(block: nn.Module, paths: Iterable[str]) -> Iterator[Seen]:
    """Within it modules note what they were last given and returned."""
    seen: Seen = {}

    def note(path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _, args, output: seen.update({path: (args[0], output)})

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(block.get_submodule(path).register_forward_hook(note(path)).remove)
        yield seen
