"""The rank that is asked for: a share of the source, and ranks that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from flexigpt import InputError, PruneOptions, prune
from flexigpt.model import model_shape
from flexigpt.weights import load_model


def test_a_share_of_the_source_is_kept(tiny_source: Path) -> None:
    """And another rank would not be within it."""
    source = load_model(str(tiny_source))
    model, plan, record = prune(str(tiny_source), PruneOptions.paper(blocks=[2, 4], rank="3.5%"))
    adapters = sum(p.numel() for name, p in model.named_parameters() if "adapter_" in name)
    share, of_a_rank = 0.035 * source.num_parameters(), 2 * model_shape(source).adapter_parameters(1)
    assert share - of_a_rank < adapters <= share
    assert record["options"]["rank"] == plan.replicas[0].rank == int(share / of_a_rank)


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        ("100%", "--rank 100% cannot be used"),
        ("0.01%", r"--rank 0.01% is out of range for 1 replicas: give 0\.\d+% \(rank 1\) to \d\.\d+% \(rank 32\)"),
        ("90%", "out of range"),
    ],
)
def test_shares_that_cannot_be_are_refused(tiny_source: Path, rank: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prune(str(tiny_source), PruneOptions.paper(blocks=[2], rank=rank))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([4], "row 0 .* has ranks = .* expected a whole number for each"),
        ({"self_attn.q_proj": "4"}, "expected a whole number for each"),
        ({"self_attn.q_proj": 0}, "gives block 2 rank 0: a rank is at least 1"),
        ({"q_proj": 4}, "a rank for q_proj, which is not there: name linears of self_attn.q_proj"),
        ({"mlp.up_proj": 33}, r"rank 33 of block 2 is above the size of mlp.up_proj \(48 x 32\): .* up to 32"),
    ],
)
def test_ranks_of_a_plan_that_cannot_be_are_refused(tiny_source: Path, tmp_path: Path, given: Any, reason: str) -> None:
    row = {"block": 2, "base": 1, "rank": 4, "ranks": given}
    (tmp_path / "plan.json").write_text(json.dumps({"format_version": 1, "num_blocks": 6, "replicas": [row]}))
    with pytest.raises(InputError, match=reason):
        prune(str(tiny_source), PruneOptions.paper(plan=tmp_path / "plan.json"))
