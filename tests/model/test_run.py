"""Half precision on a CPU: near what float32 gives, rounded as hardware rounds."""

import pytest
import torch

from families import FAMILIES, tiny_model, token_ids
from flexigpt.model import Widened, fast_half, held_back
from flexigpt.model import run as half_precision

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPU, it counts as one without half-precision products."""
    monkeypatch.setattr(half_precision, "widened_rows", lambda dtype: 4 if dtype in HALF else None)


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_a_product_is_that_of_float32_rounded_once(without_kernels: None, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    x, weight = (torch.randn(8, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
    with fast_half(model):
        found = torch.nn.functional.linear(x, weight)
    assert found.dtype == dtype
    assert torch.equal(found, (x.double() @ weight.double().T).float().to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_as_near_to_float32_as_torchs_own(without_kernels: None, family: str) -> None:
    model, ids = tiny_model(family, torch.bfloat16), token_ids()
    exact = tiny_model(family, torch.bfloat16).double()(ids).logits
    plain = model(ids).logits
    with fast_half(model):
        fast = model(ids).logits
    assert fast.dtype == plain.dtype
    assert (fast - exact).norm() <= 1.3 * (plain - exact).norm()


def test_float32_is_left_alone(without_kernels: None) -> None:
    model, ids = tiny_model("llama"), token_ids()
    expected = model(ids).logits
    with fast_half(model):
        assert torch.equal(model(ids).logits, expected)


def test_a_cpu_with_kernels_computes_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "widened_rows", lambda dtype: None)
    model, ids = tiny_model("llama", torch.bfloat16), token_ids()
    expected = model(ids).logits
    with fast_half(model):
        assert torch.equal(model(ids).logits, expected)


def test_gradients_flow(without_kernels: None) -> None:
    model, ids = tiny_model("llama", torch.bfloat16), token_ids()
    with fast_half(model):
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_through_a_fixed_weight_is_that_of_float32_rounded_once(without_kernels: None, bias: bool) -> None:
    model = tiny_model("llama", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    given = torch.randn(8, 64, generator=generator).bfloat16().requires_grad_()
    wished = torch.randn(8, 32, generator=generator).bfloat16()
    saved: list[torch.Tensor] = []
    with fast_half(model), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = linear(given)
        (found,) = torch.autograd.grad(output, given, wished)
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
    assert torch.equal(found, (wished.double() @ linear.weight.double()).float().bfloat16())
    assert torch.equal(output, linear.double()(given.double()).float().bfloat16())


@torch.no_grad()
def test_weights_that_are_kept_in_float32_change_nothing(
    without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more are kept than memory is meant for."""
    monkeypatch.setattr(half_precision, "HELD_BYTES", 3 * 64 * 64 * 4)
    model, ids, widened = tiny_model("llama", torch.bfloat16), token_ids(), Widened()
    with fast_half(model):
        expected = model(ids).logits
    for _ in range(2):
        with fast_half(model, widened):
            assert torch.equal(model(ids).logits, expected)
    kept = sum(widened(p) is widened(p) for p in model.parameters() if p.ndim == 2)
    assert 0 < kept < sum(p.ndim == 2 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_linear_that_is_held_back_returns_zeros_and_the_gradient_it_would(
    without_kernels: None, dtype: torch.dtype
) -> None:
    model = tiny_model("llama", dtype)
    linear = torch.nn.Linear(64, 32, bias=True, dtype=dtype).requires_grad_(False)
    for rows in (2, 8):  # too few for float32, and enough
        given = torch.randn(1, rows, 64).to(dtype).requires_grad_()
        wished = torch.randn(1, rows, 32).to(dtype)
        with fast_half(model):
            (expected,) = torch.autograd.grad(linear(given), given, wished)
            with held_back(linear, model, Widened()):
                output = linear(given)
            (found,) = torch.autograd.grad(output, given, wished)
        assert output.shape == wished.shape
        assert not output.any()
        assert torch.equal(found, expected)
    assert linear(given).any()
