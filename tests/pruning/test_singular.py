"""Blocks and texts that leave nothing to solve for: each still gets a replica, and a block that is zero a zero one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flexigpt import InputError, PruneOptions, prune
from flexigpt.model import block_output
from flexigpt.pruning.scores import STATISTICS


def write_nothing(block: nn.Module) -> None:
    """As the blocks that LLaMA-Pro adds."""
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(path).weight.zero_()


def zero(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.zero_()


def write_less_than_rounding(block: nn.Module) -> None:
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(path).weight.mul_(1e-22)


def dead_units(block: nn.Module) -> None:
    for path in ("gate_proj", "up_proj"):
        block.get_submodule(f"mlp.{path}").weight[:40] = 0


def constant_inputs(block: nn.Module) -> None:
    block.input_layernorm.weight.zero_()


def dead_attention(block: nn.Module) -> None:
    block.self_attn.o_proj.weight.zero_()


Edit = Callable[[nn.Module], None]


def source_with(folder: Path, like: Path, edit: Edit) -> str:
    """The tiny LLaMA with an edited block 2."""
    shutil.copytree(like, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        edit(model.model.layers[2])
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("preset", ["fitted", "thorough"])
@pytest.mark.parametrize(
    "edit", [write_nothing, zero, write_less_than_rounding, dead_units, constant_inputs, dead_attention]
)
def test_singular_blocks_are_pruned(tiny_source: Path, text: Path, tmp_path: Path, edit: Edit, preset: str) -> None:
    """On 32 tokens, fewer than a linear has inputs."""
    source = source_with(tmp_path / "source", tiny_source, edit)
    which = {"blocks": (2,)} if preset == "fitted" else {"ratio": 0.2}
    asked = {"rank": 4, "calibration": str(text), "windows": 4, "window_length": 8}
    made, plan, record = prune(source, getattr(PruneOptions, preset)(**which, **asked))
    assert all(values.isfinite().all() for values in made.state_dict().values())
    if preset == "thorough":
        assert torch.tensor(record["scores"]).isfinite().all()
    elif edit in (write_nothing, zero):
        # Nothing is pruned before it: what it should write is nothing, and so its replica writes rounding errors.
        assert plan.pruned == [2]
        inner = made.language_model.model
        given = torch.randn(1, 5, inner.config.hidden_size, generator=torch.Generator().manual_seed(0))
        positions = inner.rotary_emb(given, torch.arange(5)[None])
        left = block_output(inner.layers[2](given, position_embeddings=positions))
        torch.testing.assert_close(left, given, atol=1e-6, rtol=0)


def test_numbers_that_overflow_are_one_clear_line(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    def vast(block: nn.Module) -> None:
        for parameter in block.parameters():
            parameter.mul_(1e9)

    source = source_with(tmp_path / "source", tiny_source, vast)
    with pytest.raises(InputError, match="not finite: the model overflows on this text; give --dtype float32"):
        prune(source, PruneOptions(blocks=(2,), rank=4, calibration=str(text), windows=4, window_length=16))


@pytest.mark.parametrize("name", STATISTICS)
def test_a_token_that_is_zero_and_stays_it_has_not_changed(name: str) -> None:
    nothing, something = torch.zeros(1, 8), torch.ones(1, 8)
    assert STATISTICS[name](nothing, nothing) == 0
    assert STATISTICS[name](something, something) == pytest.approx(0, abs=1e-3)
    assert STATISTICS[name](something, nothing).isfinite()
    assert STATISTICS[name](nothing, something).isfinite()
