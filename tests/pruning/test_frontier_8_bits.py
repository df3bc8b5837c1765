"""The ladder of sizes in 8 bits: what `quantize` stores and measures of the same models."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from conftest import Run
from flexigpt import FrontierOptions, PruneOptions, frontier
from flexigpt.pruning.frontier import _Ladder
from flexigpt.runtime import silent
from flexigpt.runtime.cache import CACHE_VARIABLE
from flexigpt.weights import EightBits, Source, without_blocks

pytest.importorskip("torchao")

# Of torchao's own modules and of its use of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

T = TypeVar("T")


@pytest.fixture
def short(example: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(single.read_text()[:3000])
    given = {"calibration": str(example / "calibration.jsonl"), "perplexity": str(text)}
    return {**given, "windows": 4, "window_length": 128}


def words(options: dict[str, Any]) -> list[object]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_every_row_is_what_quantize_stores_and_measures(
    run: Run, example: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    """Of the source, of what prune makes and of what plain removal leaves; table, page and the next step say so."""
    code, printed, told = run("frontier", example, tmp_path / "sizes", "--sizes", 2, *words(short))
    assert code == 0, told
    record = json.loads((tmp_path / "sizes" / "record.json").read_text())
    point = record["points"][1]
    measured = {"perplexity": short["perplexity"], "window_length": 128}
    removed = ["--remove", "--target-size", point["removed"]["parameters"]]
    for name, row, given in (
        ("source", record["source"], None),
        ("pruned", point, ["--target-size", point["parameters"]]),
        ("shorter", point["removed"], removed),
    ):
        model = example if given is None else tmp_path / name
        if given is not None:
            assert run("prune", example, model, *given, *words(short))[0] == 0
        out = tmp_path / f"{name}-8"
        code, _, errors = run("quantize", model, out, "--bits", 8, *words(measured))
        assert code == 0, errors
        expected = json.loads((out / "record.json").read_text())
        assert row["bytes"] == expected["unquantised"]["bytes"]
        assert row["int8"]["bytes"] == expected["quantised"]["bytes"]
        assert row["int8"]["perplexity"] == pytest.approx(expected["perplexity"]["quantised"]["perplexity"], rel=1e-4)
        assert row["int8"]["perplexity"] != row["perplexity"]
        assert f" {row['int8']['perplexity']:.2f}" in printed
    assert f"in 8 bits {point['int8']['perplexity']:.2f}" in told
    source = record["source"]["int8"]
    takes = f"takes {source['bytes'] / 1e6:.2f} MB, at perplexity {source['perplexity']:.2f}; pruned to"
    assert f"in 8 bits the source itself {takes}" in printed
    assert "quantise first, and prune to come below that" in printed
    knee = record["points"][record["knee"]]["int8"]
    assert printed.splitlines()[-1].startswith("flexigpt quantize OUT OUT-8 --bits 8")
    assert f"{knee['bytes'] / 1e6:.1f} MB, perplexity {knee['perplexity']:.2f}" in printed.splitlines()[-1]
    assert run("report", tmp_path / "sizes")[0] == 0
    page = (tmp_path / "sizes" / "report.html").read_text()
    assert "Quantise first: in 8 bits the source itself takes" in page
    assert "plain removal, 8 bits" in page


def test_a_killed_run_finds_them_again_and_a_run_from_before_torchao_is_not_taken_for_one(
    example: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, stages = FrontierOptions(sizes=2, **short), list[str]()

    def track(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        stages.append(stage)
        yield from items

    with monkeypatch.context() as before:
        before.setitem(sys.modules, "torchao.quantization", None)
        plain = frontier(str(example), options)
    assert "int8" not in str(plain)
    full = frontier(str(example), options)
    assert [point["perplexity"] for point in full["points"]] == [point["perplexity"] for point in plain["points"]]
    assert all("int8" in row for point in full["points"] for row in (point, point["removed"]))
    again = frontier(str(example), options, track)
    assert again["points"] == full["points"]
    assert again["source"] == full["source"]
    assert not stages, "everything is found again"


def test_the_blocks_are_as_they_were_afterwards(tiny_source: Path) -> None:
    """The plain model is still the plain model: the next size is made of it."""
    source = Source(str(tiny_source))
    shorter = without_blocks(source, [2])
    before = shorter.in_memory().state_dict()
    eight = EightBits(without_blocks(source, [2]))
    with eight.block(0) as block:
        assert "Int8Tensor" in type(next(block.parameters())).__name__
    assert next(eight.blocks[0].parameters()).device.type == "meta"
    after = without_blocks(source, [2]).in_memory().state_dict()
    assert all((after[name] == values).all() for name, values in before.items())


def test_what_only_looks_for_a_size_is_not_measured_in_8_bits(tiny_source: Path, short: dict[str, Any]) -> None:
    ladder = _Ladder(str(tiny_source), PruneOptions(ratio=0.5, **short), silent)
    assert "int8" not in ladder.source()
