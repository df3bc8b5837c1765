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
from families import remove_blocks, tiny_model, token_ids
from flexigpt import PruneOptions, assemble_pruned, plan_only, write_checkpoint
from flexigpt.pruning.scores import BLOCK_SCORES, Choice
from flexigpt.runtime.cache import CACHE_VARIABLE
from flexigpt.weights import Source, StreamedModel
from killing import Killed, KillingTrack
from workspaces import workspace_of


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
    model, windows = tiny_model(family), token_ids(batch=5)
    order, perplexities = naive(model, windows, 2, len(StreamedModel(model)))
    for memory in (0, 2**40):
        done = BLOCK_SCORES["removal-perplexity"].choose(
            workspace_of(model, tmp_path / str(memory), windows, memory), 2
        )
        assert done.record["pruning_order"] == order
        assert done.blocks == tuple(sorted(order))
        assert done.record["scores"] == pytest.approx(perplexities, rel=1e-4)


def test_more_blocks_cost_only_what_is_new(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))

    def chosen(cache: str, count: int) -> Choice:
        workspace = workspace_of(Source(str(tiny_source)), tmp_path / cache, windows)
        return BLOCK_SCORES["removal-perplexity"].choose(workspace, count)

    whole = chosen("whole", 3)
    chosen("parts", 2)
    ran: list[int] = []
    block_of = StreamedModel.block
    monkeypatch.setattr(StreamedModel, "block", lambda self, index: ran.append(index) or block_of(self, index))
    assert chosen("parts", 3) == whole
    assert len(ran) == 6 - 2


def test_pruning_and_removal_choose_alike_and_say_in_which_order(
    run: Run, tiny_source: Path, text: Path, tmp_path: Path
) -> None:
    calibrated = ["--calibration", text, "--window-length", 16, "--windows", 40, "--ratio", 0.4]
    records = {}
    for name, more in (("prune", ["--rank", 3]), ("remove", ["--remove"])):
        out = tmp_path / name
        flags = [*calibrated, "--preset", "paper", "--block-score", "removal-perplexity", *more]
        code, printed, _ = run("prune", tiny_source, out, *flags)
        assert code == 0, printed
        assert "removal-perplexity on the first 32 of 40 windows" in printed
        records[name] = json.loads((out / "record.json").read_text())
    order = records["prune"]["pruning_order"]
    assert records["remove"]["pruning_order"] == order
    assert records["remove"]["removed"]["blocks"] == sorted(order)
    assert {int(block) for block in records["prune"]["distances"]} == set(order)
    AutoModelForCausalLM.from_pretrained(tmp_path / "prune")
    for folder in ("prune", "remove"):
        assert run("report", tmp_path / folder, "--out", tmp_path / f"report-{folder}")[0] == 0


def test_presets_set_what_is_not_given(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    calibrated = {"calibration": str(text), "window_length": 32, "windows": 8}
    flags = [word for name, value in calibrated.items() for word in (f"--{name.replace('_', '-')}", value)]

    def commanded(name: str, *options: object) -> tuple[bytes, dict[str, Any]]:
        out = tmp_path / name
        code, _, errors = run("prune", tiny_source, out, *flags, *options)
        assert code == 0, errors
        return (out / "model.safetensors").read_bytes(), json.loads((out / "record.json").read_text())

    def weights(name: str, options: PruneOptions) -> bytes:
        with assemble_pruned(str(tiny_source), options) as (assembly, _, record):
            write_checkpoint(tmp_path / name, assembly, record)
        return (tmp_path / name / "model.safetensors").read_bytes()

    chosen, record = commanded("paper", "--ratio", 0.4, "--preset", "paper")
    assert not record["options"]["refit_kept"]
    assert chosen == weights("paper2", PruneOptions.paper(ratio=0.4, **calibrated))
    given, record = commanded("given", "--ratio", 0.4, "--preset", "paper", "--refit-kept")
    assert record["options"]["refit_kept"]
    assert given == weights("given2", PruneOptions.paper(ratio=0.4, refit_kept=True, **calibrated)) != chosen
    default = commanded("default", "--ratio", 0.4)[0]
    assert default == commanded("named", "--ratio", 0.4, "--preset", "default")[0]
    assert default == weights("python", PruneOptions(ratio=0.4, **calibrated)) != chosen


@pytest.mark.parametrize("dies_at", [3, 8])
def test_a_killed_choice_comes_to_the_same(
    tiny_source: Path, text: Path, tmp_path: Path, dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either step."""
    calibrated = {"calibration": str(text), "window_length": 32, "windows": 4, "rank": 3}
    options = PruneOptions.paper(ratio=0.4, block_score="removal-perplexity", **calibrated)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "whole"))
    whole, _ = plan_only(str(tiny_source), options)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "killed"))
    with pytest.raises(Killed):
        plan_only(str(tiny_source), options, KillingTrack("removing blocks", dies_at))
    assert plan_only(str(tiny_source), options)[0] == whole
