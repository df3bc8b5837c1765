"""Tables: what they say of a record, and how they are shown in a terminal, in Markdown and on a page."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexigpt import PruneOptions, prune
from flexigpt.record import Rows, cost_rows, find_in, notes, plan_rows

SIZE = {"parameters": 2000, "bytes": 8000}


def recovered(**more: Any) -> dict[str, Any]:
    """The least that a record of recovery holds."""
    return {
        "source_name": "someone/pruned",
        "versions": {"flexigpt": "1"},
        "options": {"data": "novels.jsonl"},
        "compared": ["before", "after"],
        "before": SIZE,
        "after": SIZE,
        "recovery": {"tokens": 12_345, "steps": 67, "train": "adapters"},
    } | more


PERPLEXITY: dict[str, Any] = {
    "text": "validation.jsonl",
    "before": {"perplexity": 40.0, "tokens": 900, "window_length": 64},
    "after": {"perplexity": 30.0, "tokens": 900, "window_length": 64},
}


def test_the_cost_of_training_stands_between_before_and_after() -> None:
    cost = cost_rows(recovered(perplexity=PERPLEXITY))
    assert cost.headings == ["", "before", "after", "of before"]
    assert cost.rows[0] == ["stored parameters", "2,000", "2,000", "100.0%"]
    assert cost.rows[-1] == ["perplexity", "40.00", "30.00", "75.0%"]
    assert len(cost_rows(recovered()).rows) == 2


@pytest.mark.parametrize("same", [True, False])
def test_what_was_trained_is_compared_with_its_source_too(same: bool) -> None:
    """Its perplexity stands there if it is that of the same text."""
    measured = {"perplexity": 20.0, "tokens": 900, "window_length": 64}
    text = "validation.jsonl" if same else "another.jsonl"
    pruning = recovered(compared=["source", "compact"], source={"parameters": 4000, "bytes": 16000}, compact=SIZE)
    pruning["perplexity"] = {"text": text, "source": measured, "compact": measured}
    cost = cost_rows(recovered(perplexity=PERPLEXITY, origin=recovered(origin=pruning)))
    assert cost.headings == ["", "source", "before", "after", "of source"]
    assert cost.rows[0] == ["stored parameters", "4,000", "2,000", "2,000", "50.0%"]
    assert cost.rows[-1] == ["perplexity", "20.00" if same else "", "40.00", "30.00", "150.0%" if same else ""]


def test_a_trained_models_notes_say_on_what_and_claim_no_lack_of_training() -> None:
    trained, measured = notes(recovered(perplexity=PERPLEXITY))
    assert trained == "trained adapters on 12,345 tokens of novels.jsonl in 67 steps"
    assert measured == "perplexity per token on 900 tokens of validation.jsonl, windows of 64 without overlap"


def test_a_rate_that_was_found_is_told() -> None:
    trials = [{"lr": lr, "loss": 2.0, "steps": 5} for lr in (4e-3, 2e-3, 1e-3)]
    record = recovered(options={"data": "novels.jsonl", "lr": 2e-3})
    record["recovery"] |= {"trials": trials}
    (trained,) = notes(record)
    assert trained.endswith("in 67 steps, --lr 0.002 the best of 3 tried")


def test_what_the_origins_origin_tells_is_found(tiny_source: Path, text: Path) -> None:
    """Training twice does not lose the scores by which the plan was made."""
    options = PruneOptions.paper(ratio=0.4, rank=4, calibration=str(text), window_length=64, windows=4)
    _, plan, pruning = prune(str(tiny_source), options)
    record = recovered(origin=recovered(origin=pruning))
    assert plan_rows(plan, record) == plan_rows(plan, pruning)
    assert "influence" in plan_rows(plan, record).headings
    assert notes(record)[0] == f"influence on 4 windows of 64 tokens of {text}"
    assert find_in(record, "compared") == ["before", "after"]
    assert find_in(record, "removed") is None


SHOWN = Rows(["", "a|b"], [["<one>", "[1]"], ["two", "2"]], notes=["all that there is"], marked=[(1, 1)])


def in_a_terminal(rows: Rows, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(rows.terminal())
    return console.file.getvalue()


def test_a_table_is_shown_as_it_is_in_every_form() -> None:
    printed = in_a_terminal(SHOWN)
    for cell in ("a|b", "<one>", "[1]"):
        assert cell in printed
    assert printed.endswith("\nall that there is\n")
    assert SHOWN.markdown() == ("|  | a\\|b |\n| --- | ---: |\n| <one> | [1] |\n| two | 2 |\n\nAll that there is.\n")
    page = SHOWN.html("Two & one")
    assert '<th scope="row">&lt;one&gt;</th><td>[1]</td>' in page
    assert '<th scope="row">two</th><td class="least">2</td>' in page
    assert "<caption>Two &amp; one</caption>" in page
    assert '<p class="caption">All that there is.</p>' in page


@pytest.mark.parametrize("columns", [3, 8])
def test_nothing_is_cut_off_in_a_narrow_terminal(columns: int) -> None:
    rows = Rows(["parameters in memory"] * columns, [["1,234,567,890"] * columns])
    printed = in_a_terminal(rows, width=80)
    assert printed.count("1,234,567,890") == columns
    assert printed.count("parameters") == columns
