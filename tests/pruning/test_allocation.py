"""Where bytes are spent, against all combinations tried out."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from families import FAMILIES, NUM_BLOCKS, compact_of, tiny_model, token_ids
from flexigpt import InputError, Plan
from flexigpt.model import SublayerReplica
from flexigpt.pruning.allocation import Form, allocate, anchors


def curve(block: int, sizes: Sequence[int], costs: Sequence[float], kept: bool = True) -> list[Form]:
    """Forms of one MLP, fewest parameters first; the last one keeps all."""
    rows: list[SublayerReplica | None] = [
        SublayerReplica(block=block, sublayer="mlp", form="units", units=number + 1) for number in range(len(sizes))
    ]
    if kept:
        rows[-1] = None
    return [Form(size, cost, row) for size, cost, row in zip(sizes, costs, rows, strict=True)]


def chosen(forms: Sequence[Sequence[Form]], budget: int) -> tuple[int, float]:
    """Parameters and cost of what `allocate` chooses."""
    rows = {row.block: row for row in allocate(forms, budget)}
    picked = [next(form for form in of_one if form.row == rows.get(i)) for i, of_one in enumerate(forms)]
    return sum(form.parameters for form in picked), sum(form.cost for form in picked)


def least_cost(forms: Sequence[Sequence[Form]], budget: int) -> float:
    """Of all combinations within the budget."""
    combinations = itertools.product(*forms)
    return min(sum(f.cost for f in each) for each in combinations if sum(f.parameters for f in each) <= budget)


def convex(generator: torch.Generator, steps: int) -> list[float]:
    """Costs that fall by less with each step, to 0."""
    falls = torch.rand(steps, generator=generator).sort(descending=True).values
    return [*falls.flip(0).cumsum(0).flip(0).tolist(), 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_on_convex_curves_of_equal_steps_nothing_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    forms = [curve(i, [10 * step for step in range(5)], convex(generator, 4)) for i in range(4)]
    for budget in range(0, 165, 5):
        stored, cost = chosen(forms, budget)
        assert stored <= budget
        assert cost == pytest.approx(least_cost(forms, budget), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_on_any_curve_the_budget_holds_and_one_step_at_most_is_lost(seed: int) -> None:
    """Curves of other steps, that fall late or rise: the best combination may leave the hull."""
    generator = torch.Generator().manual_seed(seed)
    forms = []
    for i in range(4):
        sizes = torch.randint(1, 9, (5,), generator=generator).cumsum(0).tolist()
        forms.append(curve(i, sizes, [*torch.rand(4, generator=generator).tolist(), 0.0]))
    most = max(form.cost for of_one in forms for form in of_one)
    least, whole = (sum(of_one[end].parameters for of_one in forms) for end in (0, -1))
    for budget in range(least, whole + 3):
        stored, cost = chosen(forms, budget)
        assert stored <= budget
        assert least_cost(forms, budget) <= cost + 1e-6 <= least_cost(forms, budget) + most + 2e-6
    assert chosen(forms, whole) == (whole, 0.0)


def test_what_pays_most_for_its_size_is_kept() -> None:
    """The second sublayer costs more to lose and three times as much to keep."""
    forms = [curve(0, [0, 10], [1.0, 0.0]), curve(1, [0, 30], [2.0, 0.0])]
    assert [row.block for row in allocate(forms, 30)] == [1]
    assert [row.block for row in allocate(forms, 9)] == [0, 1]
    assert allocate(forms, 40) == []


def test_a_budget_below_what_has_to_stay_is_refused_with_both_numbers() -> None:
    forms = [curve(0, [7], [0.0]), curve(1, [0, 10], [1.0, 0.0])]
    assert [row.block for row in allocate(forms, 7)] == [1]
    for budget, left in ((6, "6"), (-5, "0")):
        with pytest.raises(InputError, match=rf"have to stay store 7 parameters, where {left} are left for them; give"):
            allocate(forms, budget)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_the_anchors_alone_a_model_still_decodes_with_its_cache(family: str) -> None:
    """The first block of each kind of attention stays, since transformers reads the cache's length off it."""
    source = tiny_model(family)
    gone = [block for block in range(NUM_BLOCKS) if block not in anchors(source.config)]
    assert len(gone) >= NUM_BLOCKS - 2
    rows = tuple(SublayerReplica(block=block, sublayer="attention", form="none") for block in gone)
    model = compact_of(source, Plan(num_blocks=NUM_BLOCKS, sublayers=rows)).eval()
    ids = token_ids(batch=1, tokens=20)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **asked), model.generate(ids, **asked, use_cache=False))
