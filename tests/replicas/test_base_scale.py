"""A replica's linear that scales its base: s by least squares, the same function in every form, and trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fitting import Problem
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Run
from families import FULL_RANK, NUM_BLOCKS, compact_of, initialize_replicas, tiny_config, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, Plan, Replica, materialize
from flexigpt.model import SharedLinear, count_parts, model_shape
from flexigpt.replicas import Fits, fit_blocks
from flexigpt.replicas.least_squares import low_rank_fit
from flexigpt.weights import StreamedModel

FAMILIES = ["llama-gqa", "gpt2", "opt-norm-before", "gemma2"]  # weights either way round, biases, norms of their own


def scaled(
    source: PreTrainedModel, rank: int, init: str, fitted: bool = False, scale: bool = True
) -> FlexiGPTForCausalLM:
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=tuple(Replica(block=b, base=a, rank=rank) for b, a in ((1, 0), (3, 4))))
    model = compact_of(source, plan, False, base_scale=scale)
    initialize_replicas(model, source, plan, adapter_init=init, norm_init=0.5, seed=0)
    if fitted:
        windows = token_ids(batch=12, tokens=32, seed=3)
        fit_blocks(StreamedModel(source), StreamedModel(model), range(NUM_BLOCKS), windows, Fits(adapter=low_rank_fit))
    return model.eval()


def scales(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([m.base_scale.detach() for m in model.modules() if isinstance(m, SharedLinear)])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_scale_changes_nothing_but_itself(family: str, tmp_path: Path) -> None:
    """Bias differences follow it, folding and a checkpoint keep it."""
    source = tiny_model(family, torch.float64)
    expected = logits(source)
    model = scaled(source, FULL_RANK, "svd")
    assert (scales(model) - 1).abs().min() > 0.1  # random weights have nothing of each other
    torch.testing.assert_close(logits(model), expected, rtol=1e-8, atol=1e-8)
    by_text = scaled(source, FULL_RANK, "zero", fitted=True)
    assert (scales(by_text) - 1).abs().min() > 0.1
    torch.testing.assert_close(logits(by_text), expected, rtol=2e-3, atol=2e-3)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert read.config.format_version == 2
    assert torch.equal(logits(read), logits(model))
    torch.testing.assert_close(logits(materialize(read)), expected, rtol=1e-8, atol=1e-8)


def test_hardly_another_scale_leaves_less() -> None:
    """For each of 601 scales the best adapter, by the fit that knows no scale: three turns come within 5 % of it."""
    for seed in range(4):
        problem, losses = Problem(seed), {}
        for scale in torch.linspace(-3, 3, 601).double():
            base = scale * problem.base
            a, b, _ = low_rank_fit(problem.pruned, base, problem.moments, 1)
            losses[round(scale.item(), 2)] = problem.loss(base + b @ a)
        a, b, scale = low_rank_fit(problem.pruned, problem.base, problem.moments, 1, scaled=True)
        ours = problem.loss(scale * problem.base + b @ a)
        assert ours <= min(losses.values()) * 1.05
        assert ours < 0.9 * losses[1.0]


def test_a_scaled_fit_is_nearer_to_the_source() -> None:
    source = tiny_model("llama-gqa")
    expected, near = logits(source), []
    for scale in (True, False):
        model = scaled(source, 4, "zero", fitted=True, scale=scale)
        near.append((logits(model) - expected).norm().item())
    assert near[0] < 0.95 * near[1]


def test_it_is_counted_and_expected() -> None:
    source = tiny_model("llama-gqa")
    model = scaled(source, 4, "svd")
    assert count_parts(model)["replicas, base scales"] == 2 * 7
    expected = model_shape(source, output_norm=False, base_scale=True).stored_parameters([4, 4])
    assert model.num_parameters() == expected


def test_under_autocast_the_output_is_in_half_precision() -> None:
    model, found = scaled(tiny_model("llama-gqa"), 4, "svd"), []
    for module in model.modules():
        if isinstance(module, SharedLinear):
            module.register_forward_hook(lambda _, __, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert set(found) == {torch.bfloat16}


def test_recovery_trains_it(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    compact, recovered = tmp_path / "compact", tmp_path / "recovered"
    flags = ["--calibration", text, "--window-length", "32", "--rank", "4"]
    run("prune", tiny_source, compact, "--blocks", "2", *flags)
    trained = [
        "--train",
        "replicas",
        "--data",
        text,
        "--tokens",
        "256",
        "--batch-tokens",
        "128",
        "--window-length",
        "32",
    ]
    run("recover", compact, recovered, *trained)
    before, after = (scales(AutoModelForCausalLM.from_pretrained(folder)) for folder in (compact, recovered))
    assert (before != after).all()


def test_the_defaults_leave_out_what_a_family_cannot_have(run: Run, example: Path, text: Path, tmp_path: Path) -> None:
    """Gemma 2 normalises what its sublayers write: there is nothing to refit, and the record says so."""
    config = tiny_config("gemma2")
    config.vocab_size = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example / name, tmp_path / "source")
    flags = ["--blocks", "2", "--rank", "4", "--calibration", text, "--window-length", "16", "--windows", "4"]
    code, _, errors = run("prune", tmp_path / "source", tmp_path / "out", *flags)
    assert code == 0, errors
    options = json.loads((tmp_path / "out" / "record.json").read_text())["options"]
    assert options["base_scale"]
    assert not options["refit_kept"]
