"""A plan in words: for titles, and for those who do not see the picture."""

from flexigpt import Plan, Replica
from flexigpt.model import SublayerReplica, plan_in_words, plan_summary


def row(block: int, units: int | None = None, sublayer: str = "mlp") -> SublayerReplica:
    form = "units" if units else "none"
    return SublayerReplica(block=block, sublayer=sublayer, form=form, units=units)  # type: ignore[arg-type]


def test_sublayers_are_told_by_what_is_left() -> None:
    plan = Plan(num_blocks=6, sublayers=(row(0, 700), row(1, 1300), row(2), row(3, None, "attention"), row(4)))
    assert plan_summary(plan, 2000) == "2 MLPs keep 50% of their hidden units; 1 attention and 2 MLPs are gone"
    assert plan_in_words(plan, 2000) == (
        "The stack of 6 blocks: of their 2,000 hidden units MLPs keep 700 in block 0, 1,300 in block 1; block 3 lacks "
        "the attention; blocks 2, 4 lack the MLP."
    )
    one = Plan(num_blocks=6, sublayers=(row(0, 700),))
    assert plan_summary(one) == "1 MLP keeps 700 of its hidden units"
    assert plan_summary(Plan(num_blocks=6, sublayers=(row(2),))) == "1 MLP is gone"


def test_replicas_are_told_as_ever() -> None:
    replicas = tuple(Replica(block=block, base=1, rank=4) for block in (2, 4))
    plan = Plan(num_blocks=6, replicas=replicas)
    assert plan_summary(plan) == "2 of 6 blocks borrow another's linears"
    assert plan_in_words(plan) == "The stack of 6 blocks: blocks 2, 4 borrow the linears of block 1."
    assert plan_in_words(Plan(num_blocks=6)) == "The stack of 6 blocks: none is a replica."
    both = Plan(num_blocks=6, replicas=replicas, sublayers=(row(0, 12),))
    assert plan_summary(both, 48) == "2 of 6 blocks borrow another's linears; 1 MLP keeps 25% of its hidden units"
