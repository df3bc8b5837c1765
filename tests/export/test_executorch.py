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
pytest.importorskip("torchao")

PROMPT, TOKENS = 6, 9


def logits_with_cache(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """The first tokens at once, and each of the others by itself."""
    from executorch.kernels import quantized  # noqa: F401, PLC0415 - lookups in a table of few bits
    from executorch.runtime import Runtime  # noqa: PLC0415

    forward: Any = Runtime.get().load_program(file).load_method("forward")
    found = []
    for start, end in [(0, PROMPT), *((token, token + 1) for token in range(PROMPT, TOKENS))]:
        (logits,) = forward.execute([ids[:, start:end].contiguous(), torch.arange(start, end)])
        found.append(logits.clone())
    return torch.cat(found, 1)


@pytest.mark.filterwarnings("ignore")  # of executorch and torchao, as they are imported
@pytest.mark.parametrize(("made", "bits"), [(shared, None), (narrow, None), (shared, 8), (shared, 4)])
@torch.no_grad()
def test_it_computes_what_the_compact_model_does(made: Any, bits: int | None, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "compact")
    export(str(tmp_path / "compact"), tmp_path / "out", ExportOptions(to="executorch", bits=bits))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=torch.float32).eval()
    ids = token_ids(1, TOKENS)
    found, wanted = logits_with_cache(tmp_path / "out" / "model.pte", ids), model(input_ids=ids).logits
    if bits is None:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    else:
        alike = torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]
        assert alike > {8: 0.99, 4: 0.9}[bits]
