"""What a report draws and says of a model whose MLPs keep some of their hidden units."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_figures import bars, record, size, titles, write

from flexigpt import Plan, Replica, report
from flexigpt.model import SublayerReplica
from flexigpt.record import read_recorded
from flexigpt.report.drawing import to_svg
from flexigpt.report.figures import figures_of
from flexigpt.report.stack import plan_figure, plan_png
from web_page import Page

UNITS = 1000
COSTS = {"attention": [0.5, 0.25, 0.1, 1e-3], "mlp": [1.0, 2.0, 3.0, 1e-3]}


def plan_of(num_blocks: int) -> Plan:
    """Every other MLP with a quarter of its units; block 3 without attention and MLP."""
    rows = [
        SublayerReplica(block=block, sublayer="mlp", form="units", units=UNITS // 4)
        for block in range(0, num_blocks, 2)
    ]
    gone = [SublayerReplica(block=3, sublayer=name, form="none") for name in ("attention", "mlp")]
    return Plan(num_blocks=num_blocks, sublayers=(*rows, *gone))


def narrow_record(**more: Any) -> dict[str, Any]:
    """A record of pruning by units."""
    names = ("scores", "block_score", "distances", "base_distance", "adapter_spectra", "plain_removal")
    found = {name: value for name, value in record().items() if name not in names}
    return found | {"sublayer_costs": COSTS, "mlp_units": UNITS, "compact": size(600, {"embeddings": 600})} | more


@pytest.mark.parametrize("num_blocks", [4, 30, 80])
def test_each_block_is_as_wide_as_what_is_left_of_it(num_blocks: int) -> None:
    drawn = plan_figure(plan_of(num_blocks), units=UNITS)
    for block in range(num_blocks):
        for name, share in (("attention", block != 3), ("mlp", 0.25 if block % 2 == 0 else block != 3)):
            found = bars(drawn, f"{name}-{block}-")
            left, whole = (found[f"{name}-{block}-{part}"].get_width() for part in ("left", "whole"))
            assert left == pytest.approx(share * whole)
    assert titles(drawn) == f"{num_blocks // 2} MLPs keep 25% of their hidden units\n1 attention and 1 MLP are gone"
    assert "250 in block 0" in drawn.alt
    assert "block 3 lacks the attention; block 3 lacks the MLP" in drawn.alt
    assert to_svg(drawn).count(">250<") == num_blocks // 2
    picture = plan_png(plan_of(num_blocks), UNITS)
    assert len(picture) < 60_000
    assert Image.open(io.BytesIO(picture)).width > 400


def test_a_plan_of_both_kinds_has_arrows_and_bars() -> None:
    both = Plan(num_blocks=6, replicas=(Replica(block=5, base=1, rank=4),), sublayers=plan_of(4).sublayers)
    (axes,) = plan_figure(both, units=UNITS).figure.axes
    names = {str(patch.get_gid()) for patch in axes.patches}
    assert {"arrow-5-1", "block-5-replica", "mlp-0-left", "attention-1-whole"} <= names
    assert "mlp-5-left" not in names


def test_what_leaving_out_would_cost_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    drawn = figures_of(read_recorded(write(tmp_path / "narrow", narrow_record(), plan_of(4))))
    assert set(drawn) == {"blocks", "plan", "storage"}
    found = bars(drawn["blocks"], "cost-")
    assert set(found) == {
        f"cost-{name}-{block}-{'pruned' if block == 3 or (name == 'mlp' and block % 2 == 0) else 'kept'}"
        for name, costs in COSTS.items()
        for block, cost in enumerate(costs)
    }
    lengths = {name: bar.get_width() for name, bar in found.items()}
    halved = lengths["cost-attention-0-kept"] - lengths["cost-attention-1-kept"]
    assert halved > 0
    assert lengths["cost-mlp-1-kept"] < 1
    assert "cost of its attention, log" in drawn["blocks"].alt
    told = to_svg(drawn["blocks"])
    assert all(f">{cost:.3g}<" in told for costs in COSTS.values() for cost in costs)
    other = figures_of(read_recorded(write(tmp_path / "other", record(), plan_of(4))))
    assert not bars(other["blocks"], "cost-") if "blocks" in other else True


def test_the_page_leads_with_what_was_done_and_leaves_out_what_there_is_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "narrow", narrow_record(), plan_of(4))
    page = Page(report([folder]).read_text(encoding="utf-8"))
    done = "2 MLPs keep 25% of their hidden units; 1 attention and 1 MLP are gone."
    assert f"someone/model, compact: {done}" in page.prose
    headings = re.findall(r"<h2[^>]*>([^<]*)", page.text)
    assert headings == ["What became of each block", "What is stored", "Settings"]
    assert "adapter" not in page.prose
    assert "replica" not in page.prose
    assert page.column("What became of each block", "MLP") == [
        "250 of 1,000 units",
        "kept",
        "250 of 1,000 units",
        "gone",
    ]
    assert page.column("What became of each block", "MLP's cost") == ["1", "2", "3", "0.001"]


def test_a_plan_alone_is_said_to_be_one(tmp_path: Path) -> None:
    planned = {name: value for name, value in narrow_record().items() if name not in ("compared", "source", "compact")}
    page = Page(report([write(tmp_path / "plan", planned, plan_of(4))]).read_text(encoding="utf-8"))
    assert "A plan for someone/model: 2 MLPs keep 25% of their hidden units; 1 attention" in page.prose


def test_models_of_both_kinds_stand_side_by_side(tmp_path: Path) -> None:
    narrow = write(tmp_path / "narrow", narrow_record(), plan_of(4))
    replicas = Plan(num_blocks=8, replicas=tuple(Replica(block=i, base=i - 1, rank=4) for i in (3, 5)))
    other = write(tmp_path / "paper", record(), replicas)
    page = Page(report([narrow, other], tmp_path / "out").read_text(encoding="utf-8"))
    headings = re.findall(r"<h2[^>]*>([^<]*)", page.text)
    assert "paper: Why these bases" in headings
    assert "narrow: Why these bases" not in headings
