"""What a user sees of a model whose MLPs keep some of their hidden units: tables, inspect, the model card."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run
from families import CACHE, FAMILIES, NUM_BLOCKS, compact_of, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, InputError, Plan, Replica
from flexigpt.model import SublayerReplica
from flexigpt.record import inspect_model, plan_rows, read_recorded

MLP = SublayerReplica(block=0, sublayer="mlp", form="units", units=20)
GONE = tuple(SublayerReplica(block=2, sublayer=name, form="none") for name in ("attention", "mlp"))
PLAN = Plan(num_blocks=3, sublayers=(MLP, *GONE))
COSTS = {"attention": [0.5, 0.25, 1e-5], "mlp": [1.0, 2.0, 3.0]}


def test_the_plan_says_what_is_left_and_what_leaving_it_out_would_cost() -> None:
    rows = plan_rows(PLAN, {"sublayer_costs": COSTS, "mlp_units": 1536})
    assert rows.headings == ["block", "attention", "MLP", "attention's cost", "MLP's cost"]
    assert rows.rows == [
        ["0", "kept", "20 of 1,536 units", "0.5", "1"],
        ["1", "kept", "kept", "0.25", "2"],
        ["2", "gone", "gone", "1e-05", "3"],
    ]
    assert list(rows.dim) == [1]
    assert "second-order estimates" in rows.notes[0]


def test_what_was_not_measured_has_no_column() -> None:
    rows = plan_rows(PLAN, {})
    assert rows.headings == ["block", "attention", "MLP"]
    assert rows.rows[0] == ["0", "kept", "20 units"]
    assert not rows.notes


def test_a_plan_of_both_kinds_says_both() -> None:
    plan = Plan(num_blocks=3, replicas=(Replica(block=2, base=1, rank=4),), sublayers=(MLP,))
    rows = plan_rows(plan, {}, units=48)
    assert rows.headings == ["block", "attention", "MLP", "base", "stored"]
    assert rows.rows == [
        ["0", "kept", "20 of 48 units", "", "its own linears"],
        ["1", "kept", "kept", "", "its own linears"],
        ["2", "", "", "1", "adapters of rank 4"],
    ]


@pytest.fixture(scope="module")
def asked(text: Path) -> list[str]:
    given = ("--ratio", 0.5, "--calibration", text, "--windows", 4, "--window-length", 64)
    return [str(word) for word in given]


def cells(printed: str) -> list[list[str]]:
    """Of a table that was printed, the rows that begin with a number."""
    lines = [line.strip("│ ").split("│") for line in printed.splitlines() if re.match(r"│\s+\d", line)]
    return [[cell.strip() for cell in line] for line in lines]


def test_prune_plan_only_inspect_and_the_card_say_the_same(
    run: Run, tiny_source: Path, asked: list[str], tmp_path: Path
) -> None:
    code, planned, _ = run("prune", tiny_source, tmp_path / "plan", *asked, "--plan-only")
    assert code == 0
    code, pruned, _ = run("prune", tiny_source, tmp_path / "small", *asked)
    assert code == 0
    rows = cells(pruned)
    assert rows == cells(planned)
    record = json.loads((tmp_path / "small" / "record.json").read_text())
    assert [float(row[3]) for row in rows] == pytest.approx(record["sublayer_costs"]["attention"], rel=1e-2)
    plan = Plan.read(tmp_path / "plan" / "plan.json")
    left = {
        one.block: f"{one.units} of 48 units" if one.units else "gone"
        for one in plan.sublayers
        if one.sublayer == "mlp"
    }
    assert [row[2] for row in rows] == [left.get(block, "kept") for block in range(6)]
    _, inspected, _ = run("inspect", tmp_path / "small")
    assert cells(inspected)[-6:] == [row[:3] for row in rows]
    assert "base" not in inspected + pruned
    assert re.search(r"small \(compact llama, 6 blocks, float32\)", inspected)
    card = (tmp_path / "small" / "README.md").read_text()
    assert re.search(r"\d MLPs keep \d+% of their hidden units", card)
    assert "of their 48 hidden units MLPs keep" in card, "in the picture's alternative"
    assert "replica" not in card
    for row in rows:
        assert f"| {' | '.join(row)} |" in card
    recorded = read_recorded(tmp_path / "small")
    assert recorded.record["mlp_units"] == 48


def test_a_plan_that_was_given_says_what_it_costs(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(Plan(num_blocks=6, sublayers=(MLP,)).to_dict()))
    given = ("--plan", tmp_path / "plan.json", "--calibration", text, "--windows", 4, "--window-length", 64)
    code, printed, _ = run("prune", tiny_source, tmp_path / "small", *given)
    assert code == 0
    assert cells(printed)[0][:3] == ["0", "kept", "20 of 48 units"]
    assert "MLP's cost" in printed


def saved(family: str, folder: Path) -> tuple[FlexiGPTForCausalLM, str]:
    """A compact model, MLP 0 narrow, block 2 with nothing left; weights do not matter."""
    plan = Plan(num_blocks=NUM_BLOCKS, sublayers=PLAN.sublayers)
    model = compact_of(tiny_model(family), plan)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, torch.nn.Parameter(torch.zeros(parameter.shape)))
    model.save_pretrained(folder)
    return model.eval(), str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_counts_what_is_stored_and_what_the_cache_holds(family: str, tmp_path: Path) -> None:
    model, folder = saved(family, tmp_path)
    found: dict[str, Any] = inspect_model(folder)
    assert found["parameters"]["stored"] == found["parameters"]["effective"] == model.num_parameters()
    assert sum(part["parameters"] for part in found["parts"].values()) == model.num_parameters()
    ids = token_ids(1, 10)
    asked = {"max_new_tokens": 1, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **asked, eos_token_id=None)
    layers = (getattr(cached, CACHE, None) or cached.past_key_values).layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.get_seq_length())
    assert found["cache"] == {"blocks": 5, "share": 5 / 6, "bytes_per_token": held / 10}


def test_inspect_tells_the_cache_in_words(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    _, folder = saved("llama-gqa", tmp_path)
    _, printed, _ = run("inspect", folder)
    assert "key/value cache: 1,280 bytes a token, 83.3% of the source's, as 5 of 6 blocks have attention" in printed
    _, printed, _ = run("inspect", tiny_source)
    assert "key/value cache: 1,536 bytes a token\n" in printed


def test_costs_of_another_number_of_blocks_are_damage(tmp_path: Path) -> None:
    record = {"source_name": "a", "versions": {"flexigpt": "1"}, "options": {}, "sublayer_costs": COSTS}
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "plan.json").write_text(json.dumps(Plan(num_blocks=6, sublayers=(MLP,)).to_dict()))
    with pytest.raises(InputError, match="sublayer_costs of 3 blocks, and 6 blocks"):
        read_recorded(tmp_path)
