"""Figures, by what matplotlib was told to draw: nothing but what was recorded."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from flexigpt.model import Plan, Replica
from flexigpt.record import frontier_rows, read_recorded, verdict
from flexigpt.report.drawing import Drawn, colour, heat, number_ranges, to_svg
from flexigpt.report.figures import figures_of
from flexigpt.report.result_figures import frontier_figure, shared_figures
from flexigpt.report.stack import plan_figure, plan_png
from flexigpt.runtime import InputError

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


def told(figure: Drawn) -> str:
    return " ".join(titles(figure).split())


def test_each_block_is_a_bar_as_high_as_its_score_and_the_pruned_are_marked(drawn: dict[str, Drawn]) -> None:
    found = bars(drawn["blocks"], "score-")
    scores = record()["scores"]
    assert set(found) == {f"score-{block}-{'pruned' if block in (3, 5) else 'kept'}" for block in range(8)}
    longest = found["score-0-kept"].get_width()
    for name, bar in found.items():
        score = scores[int(name.split("-")[1])]
        assert bar.get_width() == pytest.approx(longest * min(score / (3 * sorted(scores)[4]), 1))
    shades = {name: bar.get_facecolor()[:3] for name, bar in found.items()}
    assert {name for name, shade in shades.items() if shade == to_rgb(colour("orange"))} == {
        "score-3-pruned",
        "score-5-pruned",
    }
    assert titles(drawn["blocks"]) == "The 2 blocks of least influence are pruned"
    assert ">9 (cut off)<" in to_svg(drawn["blocks"]), "a bar that is cut off tells its value"


def test_bytes_of_blocks_and_ranks_stand_beside_the_stack_row_by_row(tmp_path: Path) -> None:
    plan, measured = plan_for(8, (3, 5)), record()
    measured["source"] |= {"blocks": [100] * 8}
    measured["compact"] |= {"blocks": [10 if block in (3, 5) else 100 for block in range(8)]}
    drawn = figures_of(read_recorded(write(tmp_path, measured, plan)))
    stored = bars(drawn["blocks"], "stored-")
    assert stored["stored-3-pruned"].get_width() == pytest.approx(stored["stored-2-kept"].get_width() / 10)
    ranks = bars(drawn["blocks"], "rank-")
    assert [bool(bar.get_width()) for bar in ranks.values()] == [block in (3, 5) for block in range(8)]
    places = [
        (axes.get_position().y0, axes.get_position().y1)
        for name in ("plan", "blocks")
        for axes in drawn[name].figure.axes
    ]
    assert len(set(places)) == 1, "a block's row is as high on both"
    assert drawn["plan"].figure.get_size_inches()[1] == drawn["blocks"].figure.get_size_inches()[1]


def test_blocks_that_were_not_the_lowest_are_not_called_so(tmp_path: Path) -> None:
    drawn = figures_of(read_recorded(write(tmp_path, record(), plan_for(8, (1, 5)))))
    assert "least" not in titles(drawn["blocks"])


def test_distances_are_a_heat_map_of_pruned_block_by_candidate(drawn: dict[str, Drawn]) -> None:
    distances = record()["distances"]
    cells = bars(drawn["distances"], "cell-")
    assert set(cells) == {f"cell-{i}-{j}" for i, row in distances.items() for j in row}
    nearest = {f"cell-{i}-{min(row, key=row.__getitem__)}" for i, row in distances.items()}
    darkest = {name for name, cell in cells.items() if cell.get_facecolor()[:3] == to_rgb(heat(1))}
    assert nearest <= darkest
    assert cells["cell-3-7"].get_facecolor()[:3] == to_rgb(heat(0)), "the furthest of all, by its share of the nearest"
    (axes,) = drawn["distances"].figure.axes
    marked = {line.get_gid() for line in axes.lines}
    assert marked == {"marked-3-2", "marked-5-4"}
    assert "3 is nearest to 0; 5 is nearest to 0" in drawn["distances"].alt
    assert told(drawn["distances"]) == "2 of 2 pruned blocks borrow from the kept block next to them"


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


def test_what_adapters_mend_is_told_by_replica_and_by_rank(drawn: dict[str, Drawn]) -> None:
    by_replica, by_rank = drawn["adapters"].figure.axes[0], drawn["adapter-ranks"].figure.axes[0]
    assert set(bars(drawn["adapters"], "cell-")) == {
        f"cell-{i}-{name}" for i in (3, 5) for name in ("q_proj", "v_proj")
    }
    assert [text.get_text() for text in by_replica.texts] == ["50"] * 4
    assert [text.get_text() for text in by_rank.texts] == [f"{100 * share:.0f}" for share in SPECTRUM["mended"]] * 2
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


def test_small_parts_are_one_in_the_figure(tmp_path: Path) -> None:
    measured = record()
    measured["compact"]["parts"] = {"embeddings": 590, "replicas, output norms": 2, "replicas, base scales": 1}
    found = bars(figures_of(read_recorded(write(tmp_path, measured, plan_for(8, (3, 5)))))["storage"], "stored-1-")
    assert {name for name, bar in found.items() if bar.get_width()} == {"stored-1-embeddings", "stored-1-the-rest"}


def ladder(*in_8_bits: tuple[int, float]) -> dict[str, Any]:
    """The record of two sizes of a model of 1,000 bytes; in 8 bits: source, then both sizes, then plain removal."""

    def made(size: int, perplexity: float) -> dict[str, Any]:
        return {"parameters": size // 2, "bytes": size, "perplexity": perplexity}

    points = [made(900, 11.0), made(500, 30.0)]
    for point, perplexity in zip(points, (20.0, 90.0), strict=True):
        point |= {"share": point["bytes"] / 1000, "removed": made(point["bytes"], perplexity)}
    source = made(1000, 10.0)
    rows = (source, *points, *(point["removed"] for point in points))
    for row, (size, perplexity) in zip(rows, in_8_bits, strict=False):
        row["int8"] = {"bytes": size, "perplexity": perplexity}
    given = {"format": 1, "source_name": "someone/model", "versions": {"flexigpt": "1"}, "options": {}}
    return given | {"source": source, "points": points, "knee": 0, "text": "text.jsonl"}


def test_a_source_that_8_bits_make_smaller_and_better_is_said_to_come_first(tmp_path: Path) -> None:
    """In the page's first sentence, in the notes of the table, and as lines of their own; not where it is not so."""
    eights = [(600, 10.1), (540, 11.1), (300, 30.1), (540, 20.1), (300, 90.1)]
    read = read_recorded(write(tmp_path / "first", ladder(*eights), None))
    assert verdict(read) == (
        "Quantise first: in 8 bits the source itself takes 60% of the bytes, perplexity 10.0 \u2192 10.1; pruning "
        "alone, the knee is at 90% of the bytes, perplexity 10.0 \u2192 11.0"
    )
    rows = frontier_rows(read.record)
    assert [cell for row in rows.rows for cell in row[-2:]] == ["10.10", "", "11.10", "20.10", "30.10", "90.10"]
    assert "loss" in frontier_rows(ladder()).headings
    bars = [row[-1] for row in frontier_rows(ladder()).rows]
    assert bars[0] == ""
    assert 0 < len(bars[1]) < len(bars[2])
    assert "pruned to 90% it takes 0.00 MB, at perplexity 11.00: quantise first" in rows.notes[-1]
    lines: dict[str, list[int]] = {}
    for row in read.frontier:
        lines.setdefault(row["series"], []).append(row["bytes"])
    assert list(lines) == [*(names := ["flexigpt prune", "plain removal", "source"]), *(f"{n}, 8 bits" for n in names)]
    assert lines["flexigpt prune, 8 bits"] == [540, 300]
    figure = shared_figures([read])["frontier"].figure
    FigureCanvasAgg(figure).draw()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1, "seven names fit below it"
    for changed in ((950, 10.1), (600, 11.5)):  # larger than the knee's model, or worse
        other = read_recorded(write(tmp_path / f"{changed[0]}", ladder(changed, *eights[1:]), None))
        assert verdict(other).startswith("The knee is at 90% of the bytes")
        assert not any("quantise" in note for note in frontier_rows(other.record).notes)


def test_a_ladder_of_fewer_sizes_or_of_a_sample_of_the_text_says_so(tmp_path: Path) -> None:
    whole = ladder() | {"measured": {"windows": 484, "there": 484, "sizes": 2}}
    assert frontier_rows(whole).notes == frontier_rows(ladder()).notes, "an older record says nothing of it"
    less = ladder() | {"measured": {"windows": 256, "there": 1484, "sizes": 64}}
    notes = frontier_rows(read_recorded(write(tmp_path, less, None)).record).notes
    assert notes[0].startswith("perplexity on 256 of the 1,484 windows of text.jsonl, untrained")
    assert any(note.startswith("2 sizes, not the 64 asked for: each is that of a whole number of") for note in notes)


def test_a_ladder_without_its_knee_is_refused(tmp_path: Path) -> None:
    for change in ({"knee": 2}, {"knee": None}, {"text": None}, {"source": {"bytes": 1}}, {"measured": {"windows": 1}}):
        with pytest.raises(InputError, match="damaged"):
            read_recorded(write(tmp_path / "-".join(change), ladder() | change, None))


def test_names_below_a_heat_map_do_not_touch(tmp_path: Path) -> None:
    """Of 24 kept blocks, as many as SmolLM2 has left."""
    pruned = (13, 14, 15, 17, 25, 26)
    drawn = figures_of(read_recorded(write(tmp_path, record(30, pruned), plan_for(30, pruned))))["distances"]
    FigureCanvasAgg(drawn.figure).draw()
    boxes = [label.get_window_extent() for label in drawn.figure.axes[0].get_xticklabels()]
    assert len(boxes) == 24
    apart = drawn.figure.dpi / 72 * 1.5  # points
    assert all(one.x1 + apart < other.x0 for one, other in itertools.pairwise(boxes))


def test_the_frontier_is_a_line_for_each_series_with_the_chosen_size_marked(tmp_path: Path) -> None:
    rows = [(80, 12.0), (60, 30.0), (90, 11.0)]
    points = [{"series": "flexigpt", "bytes": n * 10**6, "perplexity": p, "chosen": n == 80} for n, p in rows]
    points += [{"series": "plain removal", "bytes": 80 * 10**6, "perplexity": 99.0}]
    points += [{"series": "source", "bytes": 10**8, "perplexity": 10.0}]
    (axes,) = frontier_figure(points).figure.axes
    lines = {line.get_gid(): list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_gid()}
    assert lines == {
        "frontier-0": [(60, 30.0), (80, 12.0), (90, 11.0)],
        "frontier-1": [(80, 99.0)],
        "frontier-2": [(100, 10.0)],
    }
    assert len({line.get_marker() for line in axes.lines if line.get_gid()}) == 3, "told apart without colour"
    (names,) = [[text.get_text().strip() for text in one.get_texts()] for one in axes.figure.legends]
    assert names == ["flexigpt", "plain removal", "source", "knee: 80 MB, 12.0"]
    assert "frontier" not in shared_figures([read_recorded(write(tmp_path / "model", record(), None))])
    read = read_recorded(write(tmp_path / "ladder", ladder(), None))
    assert "source" in shared_figures([read])["frontier"].alt
    assert verdict(read).startswith("The knee is at 90% of the bytes, perplexity 10.0 \u2192 11.0")


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
    one, two = shared_figures(models[:1]), shared_figures(models)
    assert told(one["recovery-perplexity"]) == "Held-out perplexity: 50.00 became 30.00"
    for drawn, count in ((one, 1), (two, 2)):
        assert {name for name in drawn if name.startswith("recovery")} == {
            f"recovery-{name}" for name in ("perplexity", "cross-entropy", "lr", "tokens-per-second")
        }
        held_out, loss = (drawn[f"recovery-{name}"].figure.axes[0].lines for name in ("perplexity", "cross-entropy"))
        assert [list(zip(*line.get_data(), strict=True)) for line in held_out] == [
            [(0, 50.0), (200, 40.0), (400, 30.0)]
        ] * count
        assert list(loss[0].get_ydata()) == [step["cross_entropy"] for step in history]
        assert len({line.get_linestyle() for line in held_out}) == count, "told apart without colour"
    assert "_b: 30.00" in to_svg(two["recovery-perplexity"]), "a name that matplotlib's legends would leave out"


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
    (zero, more) = drawn["positions"].figure.axes[0].lines
    assert set(zero.get_ydata()) == {0}
    assert list(more.get_ydata()) == [1.0, 1.0, 1.5]
    heights = {name: bar.get_height() for name, bar in bars(drawn["block-errors"], "error-").items()}
    assert heights == {"error-0-3": 0.5, "error-0-5": 0}
    assert ">inf<" in to_svg(drawn["block-errors"])


def test_ranges_of_blocks() -> None:
    assert number_ranges([7, 2, 3, 4, 9, 10]) == "2\u20134, 7, 9, 10"
