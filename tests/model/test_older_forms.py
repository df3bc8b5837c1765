"""Forms of compact models that are no longer made, scaled bases and ranks of single linears: they work as ever."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conftest import Run
from families import block_list, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, PruneOptions, assemble_pruned, materialize, plan_only, prune
from flexigpt.model import FlexiGPTConfig, SharedLinear, count_parts, find_architecture, stored_bytes
from workspaces import announced

# Weights either way round, biases, norms of their own.
FAMILIES = ["llama-gqa", "gpt2", "opt-norm-before", "gemma2"]
BASES = {1: 0, 3: 4}


def older(source: PreTrainedModel, ranks: bool = True, scaled: bool = True) -> FlexiGPTForCausalLM:
    """The compact model of a source, what is the replicas' own drawn at random; the first linear of each has rank 5."""
    architecture = find_architecture(source.config)
    rows: list[dict[str, Any]] = [{"block": block, "base": base, "rank": 3} for block, base in BASES.items()]
    config = FlexiGPTConfig(
        text_config=source.config,
        replicas=[row | {"ranks": {architecture.linears[0]: 5}} for row in rows] if ranks else rows,
        blocks=architecture.blocks,
        linears=list(architecture.linears),
        base_scale=scaled,
        dtype=source.dtype,
    )
    torch.manual_seed(0)
    model: FlexiGPTForCausalLM = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    model.language_model.load_state_dict(source.state_dict(), strict=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SharedLinear):
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def shared(model: torch.nn.Module) -> list[SharedLinear]:
    return [module for module in model.modules() if isinstance(module, SharedLinear)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids()).logits


@torch.no_grad()
def written_out(source: PreTrainedModel, model: FlexiGPTForCausalLM) -> PreTrainedModel:
    """The source with W = s base's + B A and b = s base's + difference in each replica's place."""
    blocks = block_list(source)
    for block, base in BASES.items():
        for path in find_architecture(source.config).linears:
            own: Any = blocks[block].get_submodule(path)
            kept: Any = blocks[base].get_submodule(path)
            replica: Any = model.block_list[block].get_submodule(path)
            scale = 1.0 if replica.base_scale is None else replica.base_scale
            mended = replica.adapter_B @ replica.adapter_A
            own.weight.copy_(scale * kept.weight + (mended.T if isinstance(own, Conv1D) else mended))
            if own.bias is not None:
                own.bias.copy_(scale * kept.bias + replica.bias_difference)
    return source


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ranks", "scaled", "version"), [(True, True, 3), (False, True, 2), (True, False, 3)])
def test_it_computes_what_it_says_in_every_form(
    family: str, ranks: bool, scaled: bool, version: int, tmp_path: Path
) -> None:
    """As it is, saved and opened, and folded."""
    source = tiny_model(family, torch.float64)
    model = older(source, ranks, scaled)
    assert {len(linear.adapter_A) for linear in shared(model)} == ({3, 5} if ranks else {3})
    expected = logits(written_out(source, model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-8, atol=1e-8)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert read.config.format_version == version
    assert torch.equal(logits(read), logits(model))
    torch.testing.assert_close(logits(materialize(read)), expected, rtol=1e-8, atol=1e-8)


def test_it_is_counted_and_shown(run: Run, tmp_path: Path) -> None:
    model = older(tiny_model("llama-gqa"))
    parts = count_parts(model)
    assert parts["replicas, base scales"] == len(shared(model)) == 2 * 7
    assert sum(parts.values()) == model.num_parameters()
    model.save_pretrained(tmp_path)
    code, shown, errors = run("inspect", tmp_path)
    assert code == 0, errors
    assert "base scales" in shown
    assert "3 to 5" in shown


def test_under_autocast_the_output_is_in_half_precision() -> None:
    model, found = older(tiny_model("llama-gqa")), []
    for linear in shared(model):
        linear.register_forward_hook(lambda _, __, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert set(found) == {torch.bfloat16}


def test_recovery_trains_the_scales_and_keeps_the_ranks(
    run: Run, tiny_source: Path, text: Path, tmp_path: Path
) -> None:
    compact, recovered = tmp_path / "compact", tmp_path / "recovered"
    older(AutoModelForCausalLM.from_pretrained(tiny_source)).save_pretrained(compact)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (compact / name).write_bytes((tiny_source / name).read_bytes())
    steps = ["--tokens", 256, "--batch-tokens", 128, "--window-length", 32]
    code, _, errors = run("recover", compact, recovered, "--train", "replicas", "--data", text, *steps)
    assert code == 0, errors
    before, after = (load_file(folder / "model.safetensors") for folder in (compact, recovered))
    scales = [name for name in before if name.endswith(".base_scale")]
    assert len(scales) == 2 * 7
    assert all(not torch.equal(before[name], after[name]) for name in scales)
    assert {name: values.shape for name, values in before.items()} == {
        name: values.shape for name, values in after.items()
    }


def test_a_plan_with_ranks_is_applied(tiny_source: Path, tmp_path: Path) -> None:
    """An adapter of rank 1 in the place of rank 4 for one linear."""
    plan, _ = plan_only(str(tiny_source), PruneOptions.paper(blocks=[2, 4], rank=4))
    alike, _, _ = prune(str(tiny_source), PruneOptions.paper(blocks=[2, 4], rank=4))
    rows = [row | {"ranks": {"mlp.up_proj": 1}} for row in plan.to_dict()["replicas"]]
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict() | {"replicas": rows}))
    options = PruneOptions.paper(plan=tmp_path / "plan.json")
    model, applied, _ = prune(str(tiny_source), options)
    assert applied.to_dict()["replicas"] == model.config.replicas == rows
    assert [len(linear.adapter_A) for linear in shared(model)] == 2 * [4, 4, 4, 4, 4, 1, 4]
    assert announced(assemble_pruned, tiny_source, options).written == stored_bytes(model)
    assert stored_bytes(alike) - stored_bytes(model) == 4 * 2 * 3 * (48 + 32)
    for linear, other in zip(shared(model), shared(alike), strict=True):
        torch.testing.assert_close(linear.adapter_A, other.adapter_A[: len(linear.adapter_A)])
