"""Blocks chosen one after the other by perplexity, against removing them from the whole model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Run
from families import tiny_model, token_ids
from flexigpt import BaselineOptions, InputError, PruneOptions, plan_only, prune
from flexigpt.pruning import expected_removal as expected
from flexigpt.pruning.scores import remove_greedily
from flexigpt.replicas import ADAPTER_INITS, Fits, fit_blocks
from flexigpt.runtime import Cache
from flexigpt.text import calibration_windows
from flexigpt.weights import Source, StreamedModel, load_model, load_tokenizer, remove_blocks
from killing import Killed, KillingTrack


def perplexity_without(model: PreTrainedModel, blocks: list[int], windows: torch.Tensor) -> float:
    """Of the shorter model, which computes all windows at once."""
    shorter = remove_blocks(model, blocks) if blocks else model
    with torch.no_grad():
        logits = shorter(input_ids=windows).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def naive(model: PreTrainedModel, windows: torch.Tensor, count: int, depth: int) -> tuple[list[int], list[float]]:
    order: list[int] = []
    found = [0.0] * depth
    for _ in range(count):
        for block in set(range(depth)) - set(order):
            found[block] = perplexity_without(model, [*order, block], windows)
        order.append(min(set(range(depth)) - set(order), key=lambda block: found[block]))
    return order, found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_choice_is_that_of_removing_blocks_from_the_whole_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    blocks = StreamedModel(model)
    windows = token_ids(batch=5)
    order, perplexities = naive(model, windows, 2, len(blocks))
    for spill in (None, tmp_path):
        done = remove_greedily(blocks, windows, 2, cache=Cache(tmp_path / str(spill is None)), key="", spill=spill)
        assert done.order == order
        assert done.perplexities == pytest.approx(perplexities, rel=1e-4)


def test_a_killed_run_goes_on_and_more_blocks_cost_only_what_is_new(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    whole = remove_greedily(Source(str(tiny_source)), windows, 3, cache=Cache(tmp_path / "whole"), key="")
    remove_greedily(Source(str(tiny_source)), windows, 2, cache=Cache(tmp_path / "parts"), key="")
    ran: list[int] = []
    block_of = StreamedModel.block
    monkeypatch.setattr(StreamedModel, "block", lambda self, index: ran.append(index) or block_of(self, index))
    source = Source(str(tiny_source))
    assert remove_greedily(source, windows, 3, cache=Cache(tmp_path / "parts"), key="") == whole
    assert len(ran) == len(source) - 2


def test_both_commands_prune_by_it_and_say_in_which_order(
    run: Run, tiny_source: Path, text: Path, tmp_path: Path
) -> None:
    calibrated = ["--calibration", text, "--window-length", 16, "--windows", 40, "--ratio", 0.4]
    records = {}
    for command, more in (("prune", ["--rank", 3]), ("baseline", [])):
        out = tmp_path / command
        code, printed, _ = run(command, tiny_source, out, *calibrated, "--block-score", "removal-perplexity", *more)
        assert code == 0, printed
        assert "removal-perplexity on the first 32 of 40 windows" in printed
        records[command] = json.loads((out / "record.json").read_text())
    order = records["prune"]["pruning_order"]
    assert records["baseline"]["pruning_order"] == order
    assert records["baseline"]["removed"]["blocks"] == sorted(order)
    assert {int(block) for block in records["prune"]["distances"]} == set(order)
    AutoModelForCausalLM.from_pretrained(tmp_path / "prune")
    for folder in ("prune", "baseline"):
        assert run("report", tmp_path / folder, "--out", tmp_path / f"report-{folder}")[0] == 0


def test_replicas_are_judged_as_pruning_would_make_them(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    """Every candidate of both steps fitted by itself to the first half of the windows; perplexity of the second."""
    shared = {"rank": 3, "dtype": "float32", "cache": tmp_path / "cache"}
    fitted = {"adapter_init": "activation", "norm_init": "fitted", "window_length": 32}
    options = PruneOptions(
        ratio=0.4, calibration=str(text), windows=12, block_score="replacement-perplexity", **shared, **fitted
    )
    _, plan, record = prune(str(tiny_source), options)
    tokenizer = load_tokenizer(str(tiny_source))
    windows = calibration_windows(str(text), tokenizer, windows=12, window_length=32, seed=0)
    order: list[int] = []
    for _ in plan.replicas:
        found = {}
        for block in set(range(plan.num_blocks)) - set(order):
            compact, _, _ = prune(str(tiny_source), PruneOptions(blocks=[*order, block], **shared))
            source = StreamedModel(load_model(str(tiny_source), "float32"))
            fits = Fits(adapter=ADAPTER_INITS["activation"].fit, norms=True)
            fit_blocks(source, StreamedModel(compact), range(plan.num_blocks), windows[:6], fits)
            found[block] = perplexity_without(compact, [], windows[6:])
        order.append(min(found, key=lambda block: found[block]))
    assert record["pruning_order"] == order
    assert plan.pruned == sorted(order)
    assert {block: record["scores"][block] for block in found} == pytest.approx(found, rel=1e-3)


def test_replacement_needs_two_windows_and_replicas(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    given = ["--ratio", 0.4, "--calibration", text, "--window-length", 64, "--block-score", "replacement-perplexity"]
    code, _, errors = run("prune", tiny_source, tmp_path / "out", *given, "--windows", 1)
    assert code == 2
    assert "give --windows 2" in errors
    code, _, errors = run("baseline", tiny_source, tmp_path / "out", *given, "--windows", 2)
    assert code == 2
    assert "is unknown: give influence, angular, relative-magnitude, removal-perplexity" in errors


def test_it_is_refused_where_the_blocks_are_named(text: Path) -> None:
    with pytest.raises(InputError, match="--block-score has no effect"):
        PruneOptions(blocks=[1], calibration=str(text), block_score="removal-perplexity")


def test_its_time_is_told(tiny_source: Path, text: Path) -> None:
    settings = {"ratio": 0.4, "calibration": str(text), "window_length": 64, "windows": 8}
    told = [
        expected(str(tiny_source), BaselineOptions(**settings, block_score=s))
        for s in ("influence", "removal-perplexity")
    ]
    assert told[1].seconds > 3 * told[0].seconds


def test_presets_set_what_is_not_given(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    calibrated = ["--calibration", text, "--window-length", 32, "--windows", 8, "--rank", 3]
    fitted = ["--adapter-init", "block-output", "--spread-rank", "--no-output-norm", "--base-scale", "--refit-kept"]

    def pruned(name: str, *options: object) -> tuple[bytes, dict[str, Any]]:
        out = tmp_path / name
        code, _, errors = run("prune", tiny_source, out, *calibrated, *options)
        assert code == 0, errors
        return (out / "model.safetensors").read_bytes(), json.loads((out / "record.json").read_text())

    weights, record = pruned("preset", "--ratio", 0.4, "--preset", "thorough")
    assert record["block_score"] == "replacement-perplexity"
    spelled_out = pruned("same", "--ratio", 0.4, *fitted, "--block-score", "replacement-perplexity")
    assert weights == spelled_out[0]
    given = pruned("given", "--ratio", 0.4, "--preset", "thorough", "--block-score", "influence", "--no-refit-kept")
    assert given[1]["block_score"] == "influence"
    assert given[0] == pruned("paper", "--ratio", 0.4, "--preset", "paper", *fitted[:5])[0]
    assert pruned("named", "--blocks", "1", "--preset", "thorough")[0] == pruned("named2", "--blocks", "1", *fitted)[0]
    assert pruned("default", "--blocks", "1")[0] == pruned("asked", "--blocks", "1", "--preset", "fitted")[0]
    with_norms = pruned("norms", "--blocks", "1", "--norm-init", "fitted")
    assert with_norms[0] == pruned("norms2", "--blocks", "1", *fitted[:3], *fitted[4:], "--norm-init", "fitted")[0]


def test_a_preset_that_is_unknown_or_idle_is_refused(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    given = ["--ratio", 0.4, "--calibration", text, "--window-length", 32, "--windows", 8]
    assert (
        "--preset best is unknown: give paper, fitted, thorough"
        in run("prune", tiny_source, tmp_path / "out", *given, "--preset", "best")[2]
    )
    all_given = [
        "--block-score",
        "angular",
        "--adapter-init",
        "svd",
        "--output-norm",
        "--no-base-scale",
        "--no-refit-kept",
        "--no-spread-rank",
    ]
    code, _, errors = run("prune", tiny_source, tmp_path / "out", *given, "--preset", "thorough", *all_given)
    assert code == 2
    assert "--preset thorough has no effect" in errors


def test_a_plan_of_the_thorough_preset_can_be_applied(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    calibrated = ["--calibration", text, "--window-length", 32, "--windows", 8]
    plan = tmp_path / "plan"
    code, _, errors = run(
        *("prune", tiny_source, plan, "--plan-only", "--ratio", 0.4, "--rank", 3, "--preset", "thorough", *calibrated)
    )
    assert code == 0, errors
    applied = ("--plan", plan / "plan.json", "--preset", "thorough", *calibrated)
    at_once = ("--ratio", 0.4, "--rank", 3, "--preset", "thorough", *calibrated)
    scored = ("--ratio", 0.4, "--preset", "thorough", "--block-score", "influence", "--plan-only", *calibrated)
    code, _, errors = run("prune", tiny_source, tmp_path / "spread", *scored)
    assert code == 0, errors
    scored = (*scored, "--no-spread-rank")
    code, _, errors = run("prune", tiny_source, tmp_path / "scored", *scored)
    assert code == 2
    assert "--preset thorough has no effect" in errors
    for name, options in (("applied", applied), ("at-once", at_once)):
        code, _, errors = run("prune", tiny_source, tmp_path / name, *options)
        assert code == 0, errors
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("applied", "at-once"))
    assert one == other


@pytest.mark.parametrize("dies_at", [3, 8])
def test_a_killed_choice_of_replicas_comes_to_the_same(
    tiny_source: Path, text: Path, tmp_path: Path, dies_at: int
) -> None:
    """In either step."""

    def settings(cache: str) -> PruneOptions:
        calibrated = {"calibration": str(text), "window_length": 32, "windows": 4, "rank": 3}
        return PruneOptions(ratio=0.4, block_score="replacement-perplexity", cache=tmp_path / cache, **calibrated)

    whole, _ = plan_only(str(tiny_source), settings("whole"))
    with pytest.raises(Killed):
        plan_only(str(tiny_source), settings("killed"), KillingTrack("replacing blocks", dies_at))
    assert plan_only(str(tiny_source), settings("killed"))[0] == whole
