"""A program for ExecuTorch in its own runtime against the compact model: a prompt, then token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import token_ids
from flexigpt import ExportOptions, export
from three_blocks import narrow, shared

pytest.importorskip("executorch")

PROMPT, TOKENS = 6, 9


def logits_with_cache(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """The first tokens at once, and each of the others by itself."""
    from executorch.runtime import Runtime  # noqa: PLC0415

    forward: Any = Runtime.get().load_program(file).load_method("forward")
    found = []
    for start, end in [(0, PROMPT), *((token, token + 1) for token in range(PROMPT, TOKENS))]:
        (logits,) = forward.execute([ids[:, start:end].contiguous(), torch.arange(start, end)])
        found.append(logits.clone())
    return torch.cat(found, 1)


@pytest.mark.filterwarnings("ignore")  # of executorch, as it is imported
@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("made", [shared, narrow])
@torch.no_grad()
def test_it_computes_what_the_compact_model_does(made: Any, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "compact")
    export(str(tmp_path / "compact"), tmp_path / "out", ExportOptions(to="executorch"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=torch.float32).eval()
    ids = token_ids(1, TOKENS)
    found, wanted = logits_with_cache(tmp_path / "out" / "model.pte", ids), model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
