"""Against full SVDs."""

import pytest
import torch

from flexigpt.factorization import LowRank, tail_norm, truncated_svd, unmended

SHAPES = [(48, 48), (64, 40), (40, 64), (96, 32)]


def matrix(shape: tuple[int, int], seed: int, decay: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(random, full_matrices=False)
    return (u * s * torch.arange(1, len(s) + 1) ** -decay) @ v


def naive_truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def naive_unmended(first: torch.Tensor, second: torch.Tensor, rank: int) -> torch.Tensor:
    """Equations 2 to 4, word for word: three full SVDs."""
    difference = naive_truncated(first, rank) - naive_truncated(second, rank)
    return (difference - naive_truncated(difference, rank)).norm()


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
