"""Blocks and texts that leave nothing to solve for: each still gets a replica, and finite weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flexigpt import InputError, PruneOptions, prune
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


@pytest.mark.parametrize(
    "edit", [write_nothing, zero, write_less_than_rounding, dead_units, constant_inputs, dead_attention]
)
def test_singular_blocks_are_pruned_and_refitted(tiny_source: Path, text: Path, tmp_path: Path, edit: Edit) -> None:
    """On 32 tokens, fewer than a linear has inputs; pruned itself, kept behind a pruned one, and pruned by units."""
    source = source_with(tmp_path / "source", tiny_source, edit)
    asked = {"rank": 4, "calibration": str(text), "windows": 4, "window_length": 8, "output_norm": "none"}
    for pruned in (1, 2):
        made, _, _ = prune(source, PruneOptions.paper(blocks=(pruned,), refit_kept=True, **asked))
        assert all(values.isfinite().all() for values in made.state_dict().values())
    made, _, _ = prune(source, PruneOptions(ratio=0.5, **asked))
    assert all(values.isfinite().all() for values in made.state_dict().values())


def test_numbers_that_overflow_are_one_clear_line(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    def vast(block: nn.Module) -> None:
        for parameter in block.parameters():
            parameter.mul_(1e9)

    source = source_with(tmp_path / "source", tiny_source, vast)
    asked = {"rank": 4, "calibration": str(text), "windows": 4, "window_length": 16}
    reason = "not finite: the model overflows on this text; give --dtype float32"
    with pytest.raises(InputError, match=reason):
        prune(source, PruneOptions.paper(blocks=(2,), refit_kept=True, **asked))
    with pytest.raises(InputError, match=reason):
        prune(source, PruneOptions(ratio=0.3, **asked))


@pytest.mark.parametrize("name", STATISTICS)
def test_a_token_that_is_zero_and_stays_it_has_not_changed(name: str) -> None:
    nothing, something = torch.zeros(1, 8), torch.ones(1, 8)
    assert STATISTICS[name](nothing, nothing) == 0
    assert STATISTICS[name](something, something) == pytest.approx(0, abs=1e-3)
    assert STATISTICS[name](something, nothing).isfinite()
    assert STATISTICS[name](nothing, something).isfinite()
