"""Against full SVDs."""

import numpy as np
import pytest
import torch

from flexigpt.replicas import LowRank, tail_norm, truncated_svd, unmended
from flexigpt.replicas.initialization import svd_adapter
from flexigpt.replicas.svd import exact_svd, krylov_svd
from textbook import naive_truncated, naive_unmended

SHAPES = [(48, 48), (64, 40), (40, 64), (96, 32)]


def matrix(shape: tuple[int, int], seed: int, decay: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(random, full_matrices=False)
    return (u * s * torch.arange(1, len(s) + 1) ** -decay) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 1.0, 4.0])
def test_truncated_svd_is_the_best_approximation(shape: tuple[int, int], decay: float) -> None:
    weight = matrix(shape, seed=0, decay=decay)
    measured = truncated_svd(weight, 8)
    torch.testing.assert_close(measured.matrix(), naive_truncated(weight, 8), rtol=0, atol=1e-9)
    torch.testing.assert_close(measured.values, torch.linalg.svdvals(weight)[:8], rtol=1e-9, atol=0)
    for factor in (measured.left, measured.right):
        torch.testing.assert_close(factor.T @ factor, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-10)


def test_truncated_svd_of_a_matrix_of_lower_rank() -> None:
    weight = naive_truncated(matrix((32, 48), seed=0), 3)
    measured = truncated_svd(weight, 8)
    torch.testing.assert_close(measured.matrix(), weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(measured.left.T @ measured.left, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-10)


def test_truncated_svd_at_full_rank_is_the_matrix() -> None:
    weight = matrix((32, 48), seed=0)
    torch.testing.assert_close(truncated_svd(weight, 32).matrix(), weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("related", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_unmended_equals_full_svds(shape: tuple[int, int], related: float, decay: float) -> None:
    first = matrix(shape, seed=0, decay=decay)
    second = related * first + (1 - related) * matrix(shape, seed=1, decay=decay)
    measured = unmended(truncated_svd(first, 8), truncated_svd(second, 8))
    torch.testing.assert_close(measured, naive_unmended(first, second, 8), rtol=1e-6, atol=0)


def test_nothing_is_unmended_between_equal_matrices() -> None:
    factors = truncated_svd(matrix((40, 64), seed=0), 8)
    assert unmended(factors, factors) < 1e-6 * factors.values.norm()


def test_unmended_is_symmetric_and_scales() -> None:
    first, second = truncated_svd(matrix((48, 48), 0), 8), truncated_svd(matrix((48, 48), 1), 8)
    torch.testing.assert_close(unmended(first, second), unmended(second, first))
    doubled = [LowRank(f.left, 2 * f.values, f.right) for f in (first, second)]
    torch.testing.assert_close(unmended(*doubled), 2 * unmended(first, second))


@pytest.mark.parametrize("shape", SHAPES)
def test_tail_norm_equals_the_residual_of_the_best_approximation(shape: tuple[int, int]) -> None:
    weight = matrix(shape, seed=3)
    torch.testing.assert_close(tail_norm(weight, 8), (weight - naive_truncated(weight, 8)).norm(), rtol=1e-9, atol=0)


RANK = 20
SIDE, LONG = 560, 600


def of_values(values: torch.Tensor, rows: int, seed: int = 0) -> torch.Tensor:
    """A (rows, len(values)) matrix of these singular values and random singular vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (left * values) @ right.T


def spiked_noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Noise and some directions above it: the spectrum of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    spikes = torch.zeros(columns, dtype=torch.float64)
    spikes[:40] = 4 * (rows**0.5 + columns**0.5) * torch.arange(1, 41) ** -0.7
    return noise + of_values(spikes, rows, seed + 1)


def levels(*pairs: tuple[int, float], size: int = SIDE) -> torch.Tensor:
    """Singular values: so many of each, then 1 for the rest."""
    values = torch.ones(size, dtype=torch.float64)
    start = 0
    for count, value in pairs:
        values[start : start + count] = value
        start += count
    return values


def power(exponent: float, size: int = SIDE) -> torch.Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** -exponent


HARD = {
    "power 0.3": power(0.3),
    "power 0.7": power(0.7),
    "power 1": power(1.0),
    "all equal": levels(),
    "flat at the cut": torch.cat((power(0.5)[:10], torch.full((40,), 0.3), 0.2 * power(0.2, SIDE - 50))).double(),
    "linear": torch.linspace(1, 0.01, SIDE, dtype=torch.float64),
    "one far above": levels((1, 10.0)),
    "rank just above the cut": torch.cat((torch.ones(30), torch.zeros(SIDE - 30))).double(),
    "step at the cut": levels((RANK, 1.5)),
    "step beside the cut": levels((RANK + 1, 1.5)),
    # More copies than a block is wide: a search from one block alone finds so many of them and no more.
    **{
        f"{count} copies, {value} x": levels((count, value))
        for count in (17, 19, 40, 120)
        for value in (1.01, 1.3, 3.0)
    },
    "copies under copies": levels((18, 5.0), (30, 4.0)),
}


def lost(weight: torch.Tensor, factors: LowRank) -> float:
    """|W - W^_r|_F over that of the best approximation, less 1."""
    rank = len(factors.values)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    best = np.sqrt(np.square(values[rank:]).sum())
    return float((weight.double() - factors.matrix()).norm()) / best - 1


@pytest.mark.parametrize("values", HARD.values(), ids=HARD.keys())
def test_search_never_returns_what_misses_the_tolerance(values: torch.Tensor) -> None:
    weight = of_values(values, rows=LONG)
    found = krylov_svd(weight, RANK)
    assert found is not None
    assert lost(weight, found) < 1e-4
    exact = torch.linalg.svdvals(weight)[:RANK]
    torch.testing.assert_close(found.values.square().sum(), exact.square().sum(), rtol=1e-4, atol=0)
    for factor in (found.left, found.right):
        torch.testing.assert_close(factor.T @ factor, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_search_keeps_the_tolerance_on_random_levels(seed: int) -> None:
    random = np.random.default_rng(seed)
    pairs = [(int(random.integers(1, 60)), float(1 + random.exponential(1.0))) for _ in range(4)]
    weight = of_values(levels(*pairs).sort(descending=True).values, rows=LONG, seed=seed)
    found = krylov_svd(weight, RANK)
    assert found is None or lost(weight, found) < 1e-4


SOFT = {
    "power 0.3": lambda seed: of_values(power(0.3), LONG, seed),
    "power 0.7": lambda seed: of_values(power(0.7), LONG, seed),
    "spiked noise": lambda seed: spiked_noise(LONG, SIDE, seed),
    "noise": lambda seed: torch.randn(LONG, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
}


@pytest.mark.parametrize("related", [0.0, 0.8])
@pytest.mark.parametrize("kind", SOFT)
def test_distances_and_adapters_are_within_a_thousandth(kind: str, related: float) -> None:
    first, other = SOFT[kind](0), SOFT[kind](10)
    second = related * first + (1 - related) * other
    found = [krylov_svd(w, RANK) for w in (first, second, first - second)]
    assert None not in found
    torch.testing.assert_close(unmended(*found[:2]), naive_unmended(first, second, RANK), rtol=1e-3, atol=0)
    assert lost(first - second, found[2]) < 1e-4


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(SIDE, LONG),
        of_values(levels((SIDE, 0.0)), LONG),
        of_values(torch.cat((torch.ones(10), torch.zeros(SIDE - 10))).double(), LONG),
        of_values(10.0 ** -torch.arange(SIDE, dtype=torch.float64), LONG),
    ],
    ids=["zero", "zero float64", "low rank", "condition beyond 1e300"],
)
def test_search_refuses_what_float32_cannot_resolve(weight: torch.Tensor) -> None:
    assert krylov_svd(weight, RANK) is None


@pytest.mark.parametrize("values", [torch.zeros(SIDE), levels((9, 2.0)) - 1, 0.5 ** torch.arange(SIDE)])
def test_large_matrices_that_the_search_refuses_are_factored_exactly(values: torch.Tensor) -> None:
    weight = of_values(values.double(), LONG)
    factors = truncated_svd(weight, 12)
    torch.testing.assert_close(factors.values, values.double()[:12], rtol=1e-9, atol=1e-9)
    for factor in (factors.left, factors.right):
        torch.testing.assert_close(factor.T @ factor, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(tail_norm(weight, 12), values[12:].double().norm(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [300, SIDE])
def test_large_matrices_of_large_rank_are_factored_exactly(rank: int) -> None:
    weight = of_values(power(0.5), LONG)
    torch.testing.assert_close(truncated_svd(weight, rank).matrix(), naive_truncated(weight, rank), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [False, True])
def test_large_weights_of_any_type_and_orientation(dtype: torch.dtype, wide: bool) -> None:
    weight = (0.02 * spiked_noise(LONG, SIDE)).to(dtype)
    weight = weight.T if wide else weight
    factors, again, exact = truncated_svd(weight, 32), truncated_svd(weight, 32), exact_svd(weight, 32)
    assert all(torch.equal(a, b) for a, b in zip(factors, again, strict=True)), "the same bits each time"
    assert {f.dtype for f in factors} == {torch.float64}
    assert factors.left.shape == (weight.shape[0], 32)
    assert factors.right.shape == (weight.shape[1], 32)
    assert not torch.equal(factors.values, exact.values), "found by the search"
    assert lost(weight, factors) < 1e-4
    tail = (weight.double() - exact.matrix()).norm()
    torch.testing.assert_close(tail_norm(weight, 32), tail, rtol=1e-4, atol=0)
    assert (factors.values[:-1] >= factors.values[1:]).all()


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_search_does_not_depend_on_scale(scale: float) -> None:
    weight = of_values(power(0.5), LONG)
    found, scaled = krylov_svd(weight, RANK), krylov_svd(scale * weight, RANK)
    assert found is not None
    assert scaled is not None
    torch.testing.assert_close(scaled.values / scale, found.values, rtol=1e-5, atol=0)


def test_an_adapter_of_large_weights_mends_as_much_as_the_best() -> None:
    pruned, base = 0.02 * spiked_noise(LONG, SIDE, seed=0), 0.02 * spiked_noise(LONG, SIDE, seed=5)
    adapter, back = svd_adapter(pruned, base, 32, torch.Generator())
    left = (pruned - base - back @ adapter).norm()
    best = (pruned - base - naive_truncated(pruned - base, 32)).norm()
    torch.testing.assert_close(left, best, rtol=1e-4, atol=0)
