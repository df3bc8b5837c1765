"""Notebooks: the one in examples runs, and objects show themselves."""

import shutil
from pathlib import Path

import pytest

from flexigpt import Plan, Replica, bars
from flexigpt.record import Rows


def test_a_plan_shows_what_becomes_of_its_blocks() -> None:
    sublayers = [{"block": 3, "sublayer": "mlp", "form": "units", "units": 1200}]
    sublayers += [{"block": 2, "sublayer": "attention", "form": "none"}]
    units = Plan.of_rows(4, [], sublayers)._repr_html_()
    first, second = "<td>attention</td><td>gone</td>", "<td>mlp</td><td>1,200 units</td>"
    assert units.index(f"<tr><th>2</th>{first}</tr>") < units.index(f"<tr><th>3</th>{second}</tr>")
    replicas = Plan(num_blocks=4, replicas=(Replica(block=2, base=1, rank=8),))._repr_html_()
    assert "<tr><th>2</th><td>block</td><td>replica of 1, rank 8</td></tr>" in replicas


def test_tables_show_themselves_and_escape_what_they_hold() -> None:
    assert "<td>&lt;b&gt;</td>" in Rows(["model", "size"], [["a", "<b>"]])._repr_html_()


def test_bars_yield_their_items_and_name_the_stage(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(bars(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    shown = capfd.readouterr().err
    assert "letters" in shown
    assert "3/3" in shown


@pytest.mark.slow
def test_the_first_hour_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one document of the validation text."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.copytree(example.parent, tmp_path / "examples")
    validation = tmp_path / "examples" / "novel16" / "validation.jsonl"
    documents = validation.read_text(encoding="utf-8").splitlines(keepends=True)
    validation.write_text(min((row for row in documents if len(row) > 7000), key=len), encoding="utf-8")
    notebook = nbformat.read(tmp_path / "examples" / "first_hour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path / "examples"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert "<td>mlp</td>" in pages[0]
    assert any("stored parameters" in page for page in pages)
    assert any("perplexity" in page for page in pages)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert "It was a dark" in outputs[-1]["text"]
