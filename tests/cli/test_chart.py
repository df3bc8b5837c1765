"""The sizes of a model while they are measured: a picture on a terminal, lines elsewhere."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import Run
from flexigpt.cli import console
from flexigpt.cli.chart import chart
from flexigpt.runtime.cache import CACHE_VARIABLE


def row(series: str, size: int, perplexity: float) -> dict[str, Any]:
    return {"series": series, "bytes": size * 10**6, "perplexity": perplexity}


def test_marks_lie_by_size_and_by_the_logarithm_of_perplexity() -> None:
    rows = [row("flexigpt prune", 60, 100.0), row("flexigpt prune", 80, 10.0), row("source", 100, 1.0)]
    *lines, axis, sizes, key = chart([*rows, row("plain removal, 8 bits", 100, 100.0)]).splitlines()
    start = axis.index("+") + 1
    places = {(line[start:].index(mark), n) for n, line in enumerate(lines) for mark in "osX" if mark in line[start:]}
    width, height = len(axis) - start, len(lines)
    middle = next(place for place in places if place[0] not in (0, width - 1))
    assert places == {(0, 0), (width - 1, 0), (width - 1, height - 1), middle}
    assert abs(middle[0] - width / 2) <= 1
    assert abs(middle[1] - height / 2) <= 1
    assert lines[0].split()[0] == "100.0"
    assert lines[-1].split()[0] == "1.0"
    assert sizes.split() == ["60.0", "MB", "100.0", "MB"]
    assert key.split("; ") == [" " * start + "o flexigpt prune, s source", "capitals: in 8 bits"]


def test_one_point_is_a_picture_too() -> None:
    assert " s" in chart([row("source", 100, 21.9)])


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What standard error shows, as a terminal of 100 columns and 30 lines; nothing is in the cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    shown = io.StringIO()
    found = Console(file=shown, force_terminal=True, width=100, height=30, legacy_windows=False)
    monkeypatch.setattr(console, "_console", lambda stderr=False: found if stderr else Console(soft_wrap=True))
    return shown


def asked(source: Path, text: Path, out: Path) -> tuple[object, ...]:
    texts = ("--calibration", text, "--perplexity", text)
    return ("frontier", source, out, "--sizes", 2, *texts, "--windows", 4, "--window-length", 64)


def test_on_a_terminal_the_picture_grows_point_by_point_above_the_bars(
    run: Run, tiny_source: Path, text: Path, tmp_path: Path, terminal: io.StringIO
) -> None:
    code, printed, _ = run(*asked(tiny_source, text, tmp_path / "out"))
    assert code == 0
    shown = terminal.getvalue()
    key, first = "o flexigpt prune, x plain removal, s source", "s source"
    assert shown.index(first) < shown.index(key), "the source is measured first"
    frames = shown.split(key)
    assert len(frames) > 3, "drawn again"
    assert "measuring perplexity" in frames[-1], "bars below it"
    assert key not in printed


def test_elsewhere_there_are_lines_alone(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    code, printed, errors = run(*asked(tiny_source, text, tmp_path / "out"))
    assert code == 0
    lines = errors.splitlines()
    assert next(line.partition(":")[0] for line in lines if ": perplexity" in line) == "100.0%"
    assert sum(": perplexity" in line for line in lines) == 3
    assert "s source" not in errors + printed
    assert "\x1b" not in errors + printed


def test_the_bars_of_the_last_stages_stay_in_sight(terminal: io.StringIO) -> None:
    with console.reporting(console.Verbosity.NORMAL) as track:
        track.draw("\n".join(["picture"] * 10))
        for number in range(40):
            list(track(range(1), f"stage {number}", 1))
    last = terminal.getvalue()[-4000:].split("picture")[-1]
    assert re.search(r"stage 39 .* 1/1", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last))
    assert "stage 20 " not in last
