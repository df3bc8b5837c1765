"""Models side by side: what is measured and shown, fidelity to a source, and a new metric."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Run
from flexigpt import EvalOptions, evaluate, report
from flexigpt.evaluation import METRICS
from flexigpt.evaluation.fidelity import measure_fidelity
from flexigpt.evaluation.metrics import Metric, Predictions
from flexigpt.record import evaluation_rows
from flexigpt.text import tokenize_text
from web_page import Page

SAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def compact(tiny_compact: Path, tmp_path: Path) -> Path:
    """A copy to record in."""
    return Path(shutil.copytree(tiny_compact, tmp_path / "compact"))


def test_models_stand_side_by_side_and_each_is_what_it_is_alone(
    tiny_source: Path, tiny_compact: Path, single: Path
) -> None:
    options = EvalOptions(perplexity=str(single), window_length=64)
    both = evaluate([str(tiny_compact), str(tiny_source)], options)
    assert [model["name"] for model in both["models"]] == [str(tiny_compact), str(tiny_source)]
    assert both["models"] == [evaluate(str(m), options)["models"][0] for m in (tiny_compact, tiny_source)]
    for model, folder in zip(both["models"], (tiny_compact, tiny_source), strict=True):
        stored = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        assert (model["parameters"], model["bytes"]) == (stored, 4 * stored)
    assert both["dtype"] == "float32"
    assert set(both["versions"]) == {"flexigpt", "torch", "transformers", "lm_eval", "datasets"}
    shown_rows = evaluation_rows(both)
    assert shown_rows.headings == ["", "compact", "source"]
    shown = {row[0]: row[2] for row in shown_rows.rows}["perplexity"]
    assert shown == f"{both['models'][1]['perplexity']['perplexity']:.4f}"
    json.dumps(both)


def test_another_model_has_another_revision(tiny_source: Path, tiny_compact: Path, single: Path) -> None:
    options = EvalOptions(perplexity=str(single), window_length=64)
    first, second = (model["revision"] for model in evaluate([str(tiny_source), str(tiny_compact)], options)["models"])
    assert first != second
    assert evaluate(str(tiny_source), options)["models"][0]["revision"] == first


def test_against_measures_fidelity_to_the_source(tiny_source: Path, tiny_compact: Path, single: Path, run: Run) -> None:
    arguments = (
        "eval",
        tiny_compact,
        tiny_source,
        "--perplexity",
        single,
        "--window-length",
        "64",
        "--against",
        tiny_source,
    )
    code, printed, _ = run(*arguments, "--json")
    assert code == 0
    compact, source = (model["fidelity"] for model in json.loads(printed)["models"])
    tokens = tokenize_text(str(single), AutoTokenizer.from_pretrained(tiny_source), window_length=64)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_compact, tiny_source)]
    expected = measure_fidelity(*models, tokens, window_length=64, against=str(tiny_source))
    assert compact == json.loads(json.dumps(expected))
    assert compact["divergence"] > 0
    assert (source["divergence"], source["agreement"]) == (pytest.approx(0, abs=1e-6), 1)
    printed = run(*arguments)[1]
    for shown in (
        f"{compact['divergence']:.4f}",
        f"{100 * compact['agreement']:.2f}",
        "100.00",
        "divergence from source",
    ):
        assert shown in printed


class AmongTheFirst(Metric):
    """A new metric, as a reader would write it: the share of tokens that the model ranked among its first ten."""

    heading, percent, digits, better = "in the first ten", True, 1, "higher"

    def add(self, seen: Predictions) -> None:
        self.total += (seen.logits[0].topk(10).indices == seen.targets[..., None]).sum().item()


def test_a_new_metric_is_a_class_and_a_line_of_metrics(
    run: Run, compact: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "in_first_ten", AmongTheFirst)
    asked = ("eval", compact, "--perplexity", single, "--window-length", "64")
    (entry,) = json.loads(run(*asked, "--json", "--record")[1])["models"]
    value = entry["perplexity"]["in_first_ten"]
    assert 0 < value < 1
    row = ["in the first ten, %", f"{100 * value:.1f}"]
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run(*asked)[1].splitlines()]
    assert row in printed
    assert f"| {' | '.join(row)} |\n" in (compact / "README.md").read_text()
    page = Page(report([compact], tmp_path / "report").read_text(encoding="utf-8"))
    assert row in page.tables["Models side by side"]
    assert "Lower is better: perplexity, bits per byte; higher is better: in the first ten." in page.prose
