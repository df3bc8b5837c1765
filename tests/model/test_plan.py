import json
from pathlib import Path
from typing import Any

import pytest

from flexigpt import InputError, Plan, Replica

GOOD: dict[str, Any] = {
    "format_version": 1,
    "num_blocks": 6,
    "replicas": [{"block": 2, "base": 1, "rank": 4}, {"block": 4, "base": 1, "rank": 4}],
}


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(GOOD))
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.to_dict() == GOOD
    assert plan.pruned == [2, 4]
    assert plan.kept == [0, 1, 3, 5]


def test_linears_without_a_rank_of_their_own_have_the_replicas() -> None:
    replica = Replica(block=1, base=0, rank=4, ranks={"mlp.up_proj": 9})
    assert (replica.rank_of("mlp.up_proj"), replica.rank_of("mlp.down_proj")) == (9, 4)
    assert replica.shown_rank() == "4 to 9"
    assert Replica(block=1, base=0, rank=4).shown_rank() == "4"


def test_replicas_are_in_the_order_of_their_blocks() -> None:
    rows = (Replica(block=4, base=0, rank=1), Replica(block=2, base=0, rank=1))
    assert Plan(num_blocks=6, replicas=rows).pruned == [2, 4]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"block": 6, "base": 1, "rank": 4}, "names block 6, but the model has blocks 0 to 5"),
        ({"block": 3, "base": -1, "rank": 4}, "names base -1"),
        ({"block": 3, "base": 3, "rank": 4}, "its own base"),
        ({"block": 3, "base": 4, "rank": 4}, "base 4, which is itself pruned: name a kept block, one of \\[0, 1, 5\\]"),
        ({"block": 4, "base": 1, "rank": 4}, "more than once"),
        ({"block": 3, "base": 1, "rank": 0}, "at least 1"),
        ({"block": 3, "base": 1}, "row 2 .* expected exactly base, block, rank"),
        ({"block": 3, "base": 1, "rank": 4, "rnk": 2}, "row 2"),
        ({"block": 3, "base": "1", "rank": 4}, "base = '1': expected a whole number"),
        ("3", "row 2"),
    ],
)
def test_a_bad_row_is_refused(row: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Plan.from_dict(GOOD | {"replicas": [*GOOD["replicas"], row]})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "expected exactly"),
        (GOOD | {"extra": 1}, "expected exactly"),
        (GOOD | {"format_version": 3}, "upgrade flexigpt"),
        (GOOD | {"format_version": 3, "sublayers": [], "more": 1}, "upgrade flexigpt"),
        (GOOD | {"format_version": 2}, "expected exactly .* sublayers"),
        (GOOD | {"sublayers": []}, "give it format_version 2"),
        (GOOD | {"format_version": 2, "sublayers": {}}, "no list"),
        (GOOD | {"replicas": {}}, "no list"),
        (GOOD | {"num_blocks": 6.5}, "whole number"),
    ],
)
def test_a_bad_plan_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Plan.from_dict(data)


def test_a_plan_in_which_a_name_stands_twice_is_refused(tmp_path: Path) -> None:
    row = '{"block": 1, "base": 0, "base": 2, "rank": 1}'
    (tmp_path / "plan.json").write_text(f'{{"format_version": 1, "num_blocks": 3, "replicas": [{row}]}}')
    with pytest.raises(InputError, match=r"plan\.json names base twice: leave one of them out"):
        Plan.read(tmp_path / "plan.json")


def test_a_plan_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json cannot be read"):
        Plan.read(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json is not JSON"):
        Plan.read(tmp_path / "broken.json")
