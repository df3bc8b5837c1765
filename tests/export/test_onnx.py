"""ONNX in onnxruntime against the compact model: a padded prompt, then token by token with the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import token_ids
from flexigpt import ExportOptions, FlexiGPTForCausalLM, export
from flexigpt.model import stored_bytes
from three_blocks import narrow, shared

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

PROMPT, TOKENS = 7, 10


def exported(model: FlexiGPTForCausalLM, folder: Path, bits: int | None = None) -> Path:
    model.save_pretrained(folder / "compact")
    export(str(folder / "compact"), folder / "onnx", ExportOptions(to="onnx", bits=bits))
    return folder / "onnx"


def logits_with_cache(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first tokens at once, and each of the others by itself."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = {
        given.name: np.zeros((len(ids), given.shape[1], 0, given.shape[3]), np.float32)
        for given in session.get_inputs()
        if given.name.startswith("past_key_values.")
    }
    assert [given.name.replace("past_key_values", "present") for given in session.get_inputs()[3:]] == [
        made.name for made in session.get_outputs()[1:]
    ]
    found = []
    for start, end in [(0, PROMPT), *((token, token + 1) for token in range(PROMPT, TOKENS))]:
        text = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        text |= {"position_ids": positions[:, start:end]}
        logits, *present = session.run(None, {name: given.numpy() for name, given in text.items()} | past)
        past = dict(zip(past, present, strict=True))
        found.append(torch.from_numpy(logits))
    return torch.cat(found, 1)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences, of which the second begins three tokens later."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :3] = 0
    return token_ids(2, TOKENS), mask


@torch.no_grad()
def assert_alike(folder: Path, model: Any) -> None:
    ids, mask = text()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = logits_with_cache(folder, ids, mask)
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", [shared, narrow])
def test_it_computes_what_the_compact_model_does_and_stores_each_weight_once(made: Any, tmp_path: Path) -> None:
    folder = exported(made(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=torch.float32).eval()
    assert_alike(folder, model)
    assert (folder / "model.onnx.data").stat().st_size <= 1.05 * stored_bytes(made())
    assert (folder / "config.json").is_file()


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The numbers in bytes, the lower half of a byte first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_it_computes_with_the_rounded_weights_in_every_place(bits: int, tmp_path: Path) -> None:
    folder = exported(shared(), tmp_path, bits)
    stored = {name: part.const_value.numpy() for name, part in _graph(folder).initializers.items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=torch.float32).eval()
    rounded = [name.removesuffix("_rounded") for name in stored if name.endswith("_rounded")]
    assert len(rounded) == 2 * 7 + 1  # of the two blocks that have linears, and the head, which is the table, too
    for name in rounded:
        packed, scales, zeros = (stored[f"{name}_{part}"] for part in ("rounded", "scales", "zeros"))
        blocks = scales.shape[1]
        numbers = unpacked(packed, bits).astype(np.float32) - unpacked(zeros, bits)[:, :blocks, None]
        whole = numbers * scales[..., None]
        weight = model.get_parameter(name.removeprefix("model."))
        values = torch.from_numpy(whole.reshape(len(whole), -1)[:, : weight.shape[1]])
        assert (values - weight).abs().max() <= scales.max()
        weight.data = values
    assert name not in stored
    model.tie_weights()
    assert_alike(folder, model)


def _graph(folder: Path) -> Any:
    return onnx_ir.load(folder / "model.onnx").graph
