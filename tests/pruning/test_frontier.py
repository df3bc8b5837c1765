"""How small a model can go: the ladder of sizes, its knee, and the smallest model within a loss."""

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from transformers import AutoTokenizer

from flexigpt import FrontierOptions, PruneOptions, frontier, prune, remove
from flexigpt.evaluation import perplexity
from flexigpt.pruning import source as opened
from flexigpt.pruning.frontier import _Ladder, knee
from flexigpt.runtime import silent
from flexigpt.runtime.cache import CACHE_VARIABLE
from flexigpt.text import tokenize_text
from flexigpt.weights import Source

measuring = importlib.import_module("flexigpt.pruning.frontier")  # the room's own name is the function

T = TypeVar("T")
Run = Any


@pytest.fixture
def short(example: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options with a short text, and a cache of its own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    named = {"calibration": str(example / "calibration.jsonl"), "perplexity": str(single)}
    return {**named, "windows": 4, "window_length": 128}


class Killed(BaseException):
    pass


def test_each_size_is_what_prune_and_plain_removal_give_and_a_killed_run_finds_its_points_again(
    example: Path, short: dict[str, Any]
) -> None:
    """At the same stored parameters; the larger, the better."""
    options, stages = FrontierOptions(sizes=3, **short), list[str]()
    seen: list[tuple[float, int]] = []

    def killing(measured: dict[str, Any]) -> None:
        if measured["points"]:
            raise Killed

    def note(measured: dict[str, Any]) -> None:
        seen.append((measured["source"]["perplexity"], len(measured["points"])))

    def track(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        stages.append(stage)
        yield from items

    with pytest.raises(Killed):
        frontier(str(example), options, note=killing)
    record = frontier(str(example), options, track, note)
    points = record["points"]
    assert stages.count("fitting blocks") == 4  # of two sizes: what prune makes, and what removal leaves
    assert "measuring sensitivities" not in stages
    assert frontier(str(example), options)["points"] == points
    assert seen == [(record["source"]["perplexity"], number) for number in range(4)]
    assert [point["removed"]["blocks"] for point in points] == [1, 4, 7]
    total = record["source"]["parameters"]
    for point in points:
        assert 0 <= point["removed"]["parameters"] - point["parameters"] <= 0.002 * total
        assert point["share"] == point["parameters"] / total
        assert point["perplexity"] < point["removed"]["perplexity"]
    assert record["source"]["perplexity"] < points[0]["perplexity"] < points[1]["perplexity"] < points[2]["perplexity"]
    asked = PruneOptions(target_size=str(points[1]["removed"]["parameters"]), **short)
    assert prune(str(example), asked)[2]["perplexity"]["compact"]["perplexity"] == points[1]["perplexity"]
    _, blocks, shorter = remove(str(example), PruneOptions(target_size=asked.target_size, remove=True, **short))
    assert len(blocks) == 4
    assert shorter["perplexity"]["shorter"]["perplexity"] == points[1]["removed"]["perplexity"]


def test_a_long_text_is_measured_on_the_same_sample_for_every_row(
    tiny_source: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source and every size; what `--max-loss` looks for is measured on all of the text."""
    source = str(tiny_source)
    whole = tokenize_text(short["perplexity"], AutoTokenizer.from_pretrained(source), window_length=128)
    monkeypatch.setattr(measuring, "_TOKENS", 3 * 128)
    record = frontier(source, FrontierOptions(sizes=2, **short))
    assert record["measured"] == {"windows": 3, "there": whole.windows(128), "sizes": 2}
    assert whole.windows(128) > 3
    size = str(record["points"][0]["parameters"])
    made = Source(source), prune(source, PruneOptions(target_size=size, **short))[0]
    for model, row in zip(made, (record["source"], record["points"][0]), strict=True):
        found = perplexity(model, whole.sample(3, 128), window_length=128)["perplexity"]
        assert found == pytest.approx(row["perplexity"], rel=1e-4)
    assert _Ladder(source, PruneOptions(ratio=0.5, **short), silent).windows["windows"] == whole.windows(128)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([10, 11, 12, 40, 160], 2), ([10, 20, 40, 80, 160], 0), ([10, 80, 100, 120, 160], 0), ([10, 10.5, 200], 1)],
)
def test_the_knee_is_where_the_perplexity_begins_to_rise_fast(values: list[float], expected: int) -> None:
    """Of a straight line in the logarithm, and of one that rises at once, the first."""
    shares = [1 - number / 10 for number in range(len(values))]
    assert knee(list(zip(shares, values, strict=True))) == expected


def test_the_smallest_model_within_a_loss_is_found(example: Path, short: dict[str, Any]) -> None:
    """It keeps within it, and half a percent less would not."""
    model, _, record = prune(str(example), PruneOptions(max_loss="5%", **short))
    limit = 1.05 * record["perplexity"]["source"]["perplexity"]
    assert record["perplexity"]["compact"]["perplexity"] <= limit
    total = record["source"]["parameters"]
    smaller = prune(str(example), PruneOptions(target_size=str(model.num_parameters() - int(0.01 * total)), **short))
    assert smaller[2]["perplexity"]["compact"]["perplexity"] > limit


def test_a_size_measured_with_the_refit_is_not_taken_for_one_without(tiny_source: Path, short: dict[str, Any]) -> None:
    size = _Ladder(str(tiny_source), PruneOptions(ratio=0.5, **short), silent).workspace.shape.parameters * 9 // 10
    options = [PruneOptions(target_size=str(size), refit_kept=refit, **short) for refit in (True, False)]
    found = [_Ladder(str(tiny_source), one, silent).pruned(size)["perplexity"] for one in options]
    assert found == [prune(str(tiny_source), one)[2]["perplexity"]["compact"]["perplexity"] for one in options]
    assert found[0] != found[1]


def test_the_command_prints_the_sizes_and_what_makes_the_model_at_the_knee(
    run: Run, tiny_source: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    options = [word for name, value in short.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, printed, errors = run("frontier", tiny_source, tmp_path / "out", "--sizes", "2", *options)
    assert code == 0, errors
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    for point in record["points"]:
        assert f"{point['parameters']:,}" in printed
        assert f"{point['share']:.1%}: perplexity {point['perplexity']:.2f}" in errors
    command = printed.splitlines()[-1].split()
    assert command[:2] == ["flexigpt", "prune"]
    command[3] = str(tmp_path / "knee")
    assert run(*command[1:])[0] == 0
    made = json.loads((tmp_path / "knee" / "record.json").read_text())
    expected = record["points"][record["knee"]]
    assert made["perplexity"]["compact"]["perplexity"] == expected["perplexity"]
    assert run("frontier", tiny_source, tmp_path / "out", "--sizes", "2", *options)[0] == 2
    assert run("frontier", tiny_source, tmp_path / "out", "--sizes", "2", "--overwrite", *options)[0] == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--max-loss", "10%"], "--max-loss is measured on the text of --perplexity"),
        (["--max-loss", "10%", "--perplexity", "TEXT", "--preset", "paper"], "--max-loss is measured on"),
        (["--max-loss", "10", "--perplexity", "TEXT"], "--max-loss 10 cannot be used: give by how much"),
        (["--max-loss", "10%", "--ratio", "0.3", "--perplexity", "TEXT"], "give exactly one of"),
    ],
)
def test_a_loss_that_cannot_be_is_one_clear_line(
    run: Run, tiny_source: Path, text: Path, tmp_path: Path, words: list[str], line: str
) -> None:
    asked = [str(text) if word == "TEXT" else word for word in words]
    code, printed, errors = run("prune", tiny_source, tmp_path / "out", "--calibration", text, *asked)
    assert (code, printed) == (2, "")
    assert line in errors
    assert not (tmp_path / "out").exists()


def test_the_source_is_opened_and_the_texts_are_read_once_for_all_sizes(
    tiny_source: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counted(name: str) -> None:
        plain = getattr(opened, name)
        monkeypatch.setattr(opened, name, lambda *given, **named: (seen.append(name), plain(*given, **named))[1])

    for name in ("Source", "tokenize_text", "calibration_windows"):
        counted(name)
    record = frontier(str(tiny_source), FrontierOptions(sizes=3, **short))
    assert len(record["points"]) == 3
    assert sorted(seen) == ["Source", "calibration_windows", "tokenize_text"]
    assert record["stages"]["fitting blocks"] > 0, "what all sizes took"
