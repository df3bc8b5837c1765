"""The MLX form, run by mlx-lm, against the compact model."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from compacts import narrow, shared
from families import tiny_config, tiny_model, token_ids
from flexigpt import ExportOptions, FlexiGPTForCausalLM, export

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
utils = pytest.importorskip("mlx_lm.utils")

WITHOUT_WINDOWS = ("llama", "llama-gqa", "llama-biases-tied", "mistral", "qwen3", "llama-yarn", "llama-linear")
WITHOUT_WINDOWS += ("llama-llama3", "llama-one-key", "mistral-one-key", "qwen2-tied")


def written(model: FlexiGPTForCausalLM, folder: Path, bits: int | None = None) -> Path:
    model.save_pretrained(folder / "compact")
    export(str(folder / "compact"), folder / "mlx", ExportOptions(to="mlx", bits=bits))
    return folder / "mlx"


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """By mlx-lm: the whole text at once, and then again in pieces through its cache."""
    model, _ = utils.load_model(folder, trust_remote_code=True)
    at_once = numpy.array(model(mx.array(ids.numpy())))
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    pieces = [
        numpy.array(model(mx.array(part.numpy()), cache=cache)) for part in ids.split((7, 1, 5, ids.shape[1] - 13), 1)
    ]
    numpy.testing.assert_allclose(numpy.concatenate(pieces, 1), at_once, rtol=1e-3, atol=1e-4)
    return torch.from_numpy(at_once)


@pytest.mark.parametrize("kind", ["narrow", "shared", "normed"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
@torch.no_grad()
def test_mlx_computes_the_same_and_stores_each_weight_once(family: str, kind: str, tmp_path: Path) -> None:
    source = tiny_model(family)
    compact = narrow(source) if kind == "narrow" else shared(source, output_norm=kind == "normed")
    folder = written(compact, tmp_path)
    ids = token_ids(tokens=16 if family == "mistral" else 48)
    torch.testing.assert_close(logits(folder, ids), compact(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    stored = sum(values.size for values in mx.load(str(folder / "model.safetensors")).values())
    assert stored == sum(parameter.numel() for parameter in compact.parameters())


def dequantised(folder: Path, compact: FlexiGPTForCausalLM, bits: int) -> FlexiGPTForCausalLM:
    """The compact model with the values that the quantised weights stand for, in place; zeros for units left over."""
    stored = mx.load(str(folder / "model.safetensors"))
    for name, parameter in compact.named_parameters():
        name = name.removeprefix("language_model.")
        values, of = stored[name], name.removesuffix("weight")
        if (scales := stored.get(f"{of}scales")) is not None:
            values = mx.dequantize(values, scales, stored[f"{of}biases"], 64, bits)
        given = torch.from_numpy(numpy.array(values))
        assert not name.endswith("_proj.weight") or scales is not None
        parameter.copy_(given[tuple(slice(size) for size in parameter.shape)])
    return compact


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [narrow, shared])
@torch.no_grad()
def test_quantised_by_mlx_lm_it_computes_what_its_values_say(make: Any, bits: int, tmp_path: Path) -> None:
    config = tiny_config("llama-gqa")
    config.hidden_size, config.intermediate_size, config.initializer_range = 64, 128, 0.2
    compact = make(AutoModelForCausalLM.from_config(config))
    folder, ids = written(compact, tmp_path, bits), token_ids(tokens=48)
    before = compact(input_ids=ids).logits
    expected = dequantised(folder, compact, bits)(input_ids=ids).logits
    assert (expected - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(logits(folder, ids), expected, rtol=1e-3, atol=1e-3)
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == bits
