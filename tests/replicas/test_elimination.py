"""Units that go: costs against least squares done anew for each set, and which go first."""

from itertools import combinations

import pytest
import torch

from flexigpt.replicas.elimination import eliminate, step_of

UNITS, OUTPUTS = 9, 7


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, second moment of correlated inputs, second moment of gradients."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(UNITS, UNITS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, UNITS, generator=generator, dtype=torch.float64) @ mixing
    gradients = torch.randn(400, OUTPUTS, generator=generator, dtype=torch.float64) * torch.arange(1, OUTPUTS + 1)
    weight = torch.randn(OUTPUTS, UNITS, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs / 400, gradients.T @ gradients / 400


def by_least_squares(weight: torch.Tensor, inputs: torch.Tensor, errors: torch.Tensor, kept: list[int]) -> float:
    """The cost with only these units, the weight refitted to them; all damped as `eliminate` does."""
    inputs = inputs + 1e-3 * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype)
    errors = errors + 1e-3 * errors.diagonal().mean() * torch.eye(len(errors), dtype=errors.dtype)
    refitted = torch.zeros_like(weight)
    if kept:
        refitted[:, kept] = weight @ inputs[:, kept] @ torch.linalg.inv(inputs[kept][:, kept])
    left = weight - refitted
    return torch.trace(errors @ left @ inputs @ left.T).item()


def test_costs_are_those_of_the_weight_refitted_to_the_units_that_are_left(
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    found = eliminate(*(values.clone() for values in problem))
    assert found.left.tolist() == list(range(UNITS, -1, -1))
    for left, cost in zip(found.left.tolist(), found.costs.tolist(), strict=True):
        assert cost == pytest.approx(by_least_squares(*problem, found.kept(left).tolist()), rel=1e-9, abs=1e-9)


def test_each_step_takes_the_unit_whose_loss_costs_least(
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    found = eliminate(*(values.clone() for values in problem))
    for left in range(UNITS, 0, -1):
        kept = found.kept(left).tolist()
        cheapest = min(combinations(kept, left - 1), key=lambda rest: by_least_squares(*problem, list(rest)))
        assert found.kept(left - 1).tolist() == list(cheapest)


def test_a_unit_that_another_can_say_goes_for_nothing() -> None:
    inputs = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[:, 2] = 2 * inputs[:, 0]
    found = eliminate(torch.ones(2, 3), inputs.T @ inputs / 100, torch.eye(2, dtype=torch.float64))
    assert found.order[0] in (0, 2)
    assert found.costs[1] < 0.01 * found.costs[2]


@pytest.mark.parametrize(("units", "step"), [(5, 1), (512, 8), (1536, 24), (11008, 168), (700, 8), (100, 1)])
def test_many_units_go_at_once_and_leave_multiples(units: int, step: int) -> None:
    assert step_of(units) == step


def test_after_the_first_step_what_is_left_is_a_multiple_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 700, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 700, generator=generator)
    found = eliminate(weight, inputs.T @ inputs / 2000, torch.eye(4, dtype=torch.float64))
    assert found.left[0] == 700
    assert not (found.left[1:] % 8).any()
    assert sorted(found.order.tolist()) == list(range(700))
    assert (found.costs.diff() >= 0).all()
