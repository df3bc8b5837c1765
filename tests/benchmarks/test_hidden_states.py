"""benchmarks/hidden_states.py: without the term it is `recover`, and the term is what it says."""

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import textbook
from flexigpt import RecoverOptions, recover

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hidden_states.py"


def streams(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block of a model puts out, (tokens, hidden)."""
    model: Any = textbook.opened(folder)
    found: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, 1)))
    model(input_ids=ids)
    return found


def test_the_term_is_the_mean_relative_error_of_the_stream(
    tiny_source: Path, tiny_compact: Path, single: Path, tmp_path: Path
) -> None:
    given = {"data": [str(single)], "held_out": [str(single)], "tokens": 128, "epochs": 1, "last": 0, "seed": 0}
    given |= {"model": str(tiny_compact), "teacher": str(tiny_source), "window_length": 16, "batch_tokens": 64}
    train = runpy.run_path(str(SCRIPT))["train"]
    found = [train(argparse.Namespace(**given, lr=2e-3, apart="relative"), weight) for weight in (0.0, 5.0)]
    asked: dict[str, Any] = {"data": str(single), "tokens": "128", "window_length": 16, "batch_tokens": 64}
    options = RecoverOptions(**asked, lr=2e-3, teacher=str(tiny_source), replica_lr=2e-4)
    record = recover(str(tiny_compact), tmp_path / "out", options)
    assert record is not None
    assert found[0]["loss"] == pytest.approx(record["recovery"]["history"][-1]["loss"], rel=1e-6)
    (batch,) = textbook.batches_of(textbook.text_ids(single, tiny_compact), 4, 16, 1)
    pairs = zip(streams(tiny_compact, batch[:, :-1]), streams(tiny_source, batch[:, :-1]), strict=True)
    errors = [((own - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean() for own, wanted in pairs]
    assert found[0]["term"][0] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert found[1]["term"][1] < found[0]["term"][1], "it does not come closer"
