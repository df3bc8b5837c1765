"""Figures, by what matplotlib was told to draw: nothing but what was recorded."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from flexigpt.model import Plan, Replica
from flexigpt.record import read_recorded
from flexigpt.report.drawing import PALETTE, Drawn, colour, plan_figure, plan_png, to_svg
from flexigpt.report.figures import figures_of, number_ranges
from flexigpt.report.result_figures import shared_figures

SPECTRUM = {"ranks": [1, 2, 4], "mended": [0.125, 0.25, 0.5]}
STEP = {"loss": 4.0, "cross_entropy": 4.0, "divergence": 0.0, "lr": 0.001, "tokens_per_second": 900.0}


def size(parameters: int, parts: dict[str, int]) -> dict[str, Any]:
    return {"parameters": parameters, "bytes": 2 * parameters, "parts": parts}


def record(num_blocks: int = 8, pruned: tuple[int, ...] = (3, 5)) -> dict[str, Any]:
    """A record of pruning with figures that are easy to tell apart."""
    kept = [block for block in range(num_blocks) if block not in pruned]
    distances = {i: {j: 10 * i + j for j in kept} for i in pruned}
    parts = {"embeddings": 300, "kept blocks, linears": 700}
    return {
        "format": 1,
        "source_name": "someone/model",
        "versions": {"flexigpt": "1"},
        "options": {},
        "block_score": "influence",
        "scores": [9.0] + [0.01 if block in pruned else 0.02 + block / 1000 for block in range(1, num_blocks)],
        "base_distance": "low-rank",
        "distances": distances,
        "adapter_spectra": {i: {"q_proj": SPECTRUM, "v_proj": SPECTRUM} for i in pruned},
        "compared": ["source", "compact"],
        "source": size(1000, parts),
        "compact": size(600, parts | {"kept blocks, linears": 250, "replicas, adapters": 50}),
        "plain_removal": {"parameters": 550},
    }


def plan_for(num_blocks: int, pruned: tuple[int, ...]) -> Plan:
    """Each pruned block borrows of the nearest kept block."""
    kept = [block for block in range(num_blocks) if block not in pruned]
    nearest = {block: min(kept, key=lambda j: abs(j - block)) for block in pruned}
    return Plan(num_blocks=num_blocks, replicas=tuple(Replica(block=i, base=j, rank=4) for i, j in nearest.items()))


def write(folder: Path, record: dict[str, Any], plan: Plan | None, evaluation: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))
    if plan is not None:
        (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, Drawn]:
    return figures_of(read_recorded(write(tmp_path, record(), plan_for(8, (3, 5)))))


def bars(figure: Drawn, beginning: str) -> dict[str, Rectangle]:
    patches = [patch for axes in figure.figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]
    return {str(patch.get_gid()): patch for patch in patches if str(patch.get_gid()).startswith(beginning)}


def titles(figure: Drawn) -> str:
    return figure.figure.get_suptitle()


def test_each_block_is_a_bar_as_high_as_its_score_and_the_pruned_are_marked(drawn: dict[str, Drawn]) -> None:
    found = bars(drawn["influence"], "score-")
    assert {name: bar.get_height() for name, bar in found.items()} == {
        f"score-{block}-{'pruned' if block in (3, 5) else 'kept'}": score
        for block, score in enumerate(record()["scores"])
    }
    shades = {name: bar.get_facecolor()[:3] for name, bar in found.items()}
    assert {name for name, shade in shades.items() if shade == to_rgb(colour("orange"))} == {
        "score-3-pruned",
        "score-5-pruned",
    }
    assert titles(drawn["influence"]) == "The 2 blocks of least influence are pruned"
    (axes,) = drawn["influence"].figure.axes
    assert "0 (9)" in axes.get_title("right"), "a bar that is cut off tells its value"


def test_blocks_that_were_not_the_lowest_are_not_called_so(tmp_path: Path) -> None:
    drawn = figures_of(read_recorded(write(tmp_path, record(), plan_for(8, (1, 5)))))
    assert "least" not in titles(drawn["influence"])


def test_distances_are_lines_by_candidate_and_by_how_far_it_stands(drawn: dict[str, Drawn]) -> None:
    distances = record()["distances"]
    by_index, by_gap = drawn["distances"].figure.axes
    assert by_index.get_title("left") == "low-rank distance, chose the bases"
    lines = [line for line in by_index.lines if line.get_marker() != "o"]
    assert [dict(zip(*line.get_data(), strict=True)) for line in lines] == list(distances.values())
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in by_index.lines if line.get_marker() == "o"]
    assert dots == [(2, distances[3][2]), (4, distances[5][4])]
    sides = [line for line in by_gap.lines if line.get_marker() != "o"]
    gaps = sorted(point for line in sides for point in zip(*line.get_data(), strict=True))
    assert gaps == sorted((abs(i - j), d) for i, candidates in distances.items() for j, d in candidates.items())
    assert [line.get_xdata()[0] for line in by_gap.lines if line.get_marker() == "o"] == [1, 1]


@pytest.mark.parametrize(("num_blocks", "step"), [(16, 4), (32, 4), (80, 3)])
def test_the_plan_has_an_arrow_from_each_replica_to_its_base(num_blocks: int, step: int) -> None:
    pruned = tuple(range(num_blocks // 2, num_blocks - 1, step))
    plan = plan_for(num_blocks, pruned)
    drawn = plan_figure(plan)
    (axes,) = drawn.figure.axes
    names = {str(patch.get_gid()) for patch in axes.patches}
    assert {name for name in names if name.startswith("arrow")} == {
        f"arrow-{replica.block}-{replica.base}" for replica in plan.replicas
    }
    assert {name for name in names if name.endswith("replica")} == {f"block-{block}-replica" for block in pruned}
    assert sum(name.startswith("block-") for name in names) == num_blocks
    svg = to_svg(drawn)
    for replica in plan.replicas:
        assert f">{replica.block}: uses {replica.base}<" in svg
    picture = plan_png(plan)
    assert len(picture) < 60_000
    assert Image.open(io.BytesIO(picture)).width > 400


def test_no_two_arrows_of_different_bases_run_in_one_lane() -> None:
    """Every base of an extended model in its own lane where they overlap."""
    plan = Plan(num_blocks=12, replicas=tuple(Replica(block=6 + i, base=i, rank=1) for i in range(6)))
    (axes,) = plan_figure(plan).figure.axes
    arrows = [patch for patch in axes.patches if str(patch.get_gid()).startswith("arrow")]
    assert len({max(x for x, _ in patch._path_original.vertices) for patch in arrows}) == 6


def test_adapters_are_drawn_by_rank(drawn: dict[str, Drawn]) -> None:
    lines = [line for axes in drawn["adapters"].figure.axes for line in axes.lines]
    named = {line.get_gid(): line for line in lines if str(line.get_gid()).startswith("mended")}
    assert set(named) == {f"mended-{block}-{linear}" for block in (3, 5) for linear in ("q_proj", "v_proj")}
    for line in named.values():
        assert (list(line.get_xdata()), list(line.get_ydata())) == (SPECTRUM["ranks"], SPECTRUM["mended"])
    assert "Rank-4 adapters mend 50%" in titles(drawn["adapters"])


def test_of_adapters_that_ignore_the_weights_nothing_is_drawn(tmp_path: Path) -> None:
    """As older versions fitted them to text."""
    older = record() | {"fitted": True}
    assert "adapters" not in figures_of(read_recorded(write(tmp_path, older, plan_for(8, (3, 5)))))


def test_parts_add_up_to_the_stored_bytes(drawn: dict[str, Drawn]) -> None:
    found = bars(drawn["storage"], "stored-")
    for row, expected in enumerate((2000, 1200)):
        widths = [bar.get_width() for name, bar in found.items() if name.startswith(f"stored-{row}-")]
        assert sum(widths) * 1e6 == pytest.approx(expected)
    adapters = found["stored-1-replicas-adapters"]
    assert (adapters.get_width() * 1e6, adapters.get_x() * 1e6) == pytest.approx((100, 1100))


def test_recovery_is_drawn_step_by_step_with_what_was_held_out(tmp_path: Path) -> None:
    history = [STEP | {"step": n, "tokens": 100 * n, "cross_entropy": 5 - n / 10} for n in range(1, 5)]
    history[1]["perplexity"] = 40.0
    measured = {"tokens": 900, "window_length": 64}
    trained = {
        "format": 1,
        "source_name": "out/pruned",
        "versions": {"flexigpt": "1"},
        "options": {"data": "t"},
        "compared": ["before", "after"],
        "before": size(600, {}),
        "after": size(600, {}),
        "perplexity": {
            "text": "t",
            "before": measured | {"perplexity": 50.0},
            "after": measured | {"perplexity": 30.0},
        },
        "recovery": {"tokens": 400, "steps": 4, "train": "adapters", "history": history},
        "origin": record(),
    }
    models = [read_recorded(write(tmp_path / name, trained, plan_for(8, (3, 5)))) for name in ("a", "_b")]
    one, two = shared_figures(models[:1])["recovery"], shared_figures(models)["recovery"]
    assert titles(one) == "Held-out perplexity went from 50.00 to 30.00 in recovery"
    for drawn, count in ((one, 1), (two, 2)):
        panels = {axes.get_title("left"): axes.lines for axes in drawn.figure.axes if axes.lines}
        assert not any("divergence" in title for title in panels)
        (held_out,) = (lines for title, lines in panels.items() if title == "held-out perplexity")
        assert [list(zip(*line.get_data(), strict=True)) for line in held_out] == [
            [(0, 50.0), (200, 40.0), (400, 30.0)]
        ] * count
        (loss,) = (lines for title, lines in panels.items() if title.startswith("training loss"))
        assert list(loss[0].get_ydata()) == [step["cross_entropy"] for step in history]
    assert "_b: 30.00" in to_svg(two), "a name that matplotlib's legends would leave out"


def test_fidelity_is_drawn_by_position_and_by_block(tmp_path: Path) -> None:
    positions = {"position": [0, 4, 8], "source": [3.0, 2.0, 1.0], "model": [4.0, 3.0, 2.5]}
    fidelity = {
        "against": "source",
        "tokens": 12,
        "divergence": 0.5,
        "agreement": 0.75,
        "positions": positions,
        "blocks": {"3": {"base": 2, "output": 0.5}, "5": {"base": 4, "output": float("inf")}},
    }
    versions = {"flexigpt": "1", "torch": "2", "transformers": "5"}
    models = [{"name": "model", "revision": None, "parameters": 600, "bytes": 1200, "fidelity": fidelity}]
    evaluation = {
        "format": 1,
        "versions": versions,
        "command": None,
        "device": "cpu",
        "dtype": "float32",
        "options": {},
        "models": models,
    }
    drawn = shared_figures([read_recorded(write(tmp_path, record(), plan_for(8, (3, 5)), evaluation))])
    source, model = drawn["positions"].figure.axes[0].lines
    assert list(source.get_ydata()) == positions["source"]
    assert list(model.get_ydata()) == positions["model"]
    heights = {name: bar.get_height() for name, bar in bars(drawn["block-errors"], "error-").items()}
    assert heights == {"error-0-3": 0.5, "error-0-5": 0}
    assert ">inf<" in to_svg(drawn["block-errors"])


def luminance(shade: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stand_out_from_the_page(theme: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what carries meaning in a figure."""
    shades = {name: pair[theme] for name, pair in PALETTE.items()}
    for name in ("ink", "muted", "blue"):
        assert contrast(shades[name], shades["paper"]) >= 4.5
    assert contrast(shades["ink"], shades["kept"]) >= 4.5
    for name in set(shades) - {"paper", "grid", "rest", "kept"}:
        assert contrast(shades[name], shades["paper"]) >= 3, name
    assert len({pair[0] for pair in PALETTE.values()}) == len(PALETTE), "an SVG tells them apart by their light shade"


def test_ranges_of_blocks() -> None:
    assert number_ranges([7, 2, 3, 4, 9, 10]) == "2\u20134, 7, 9, 10"
