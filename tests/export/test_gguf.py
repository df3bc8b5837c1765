"""The GGUF form: its metadata, and what llama.cpp computes of it, against the compact model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TokenizersBackend

from compacts import KEPT, narrow, shared
from conftest import EXAMPLE, Run
from families import tiny_config
from flexigpt import ExportOptions, FlexiGPTForCausalLM, export

gguf = pytest.importorskip("gguf")

FAMILIES = ("llama", "llama-gqa", "llama-biases-tied", "mistral-one-key", "qwen2-tied", "qwen3")
FAMILIES += ("llama-linear", "llama-llama3", "llama-yarn")


def source(family: str) -> PreTrainedModel:
    """As `tiny_model`, with a vocabulary that the shipped tokenizer fits into."""
    config = tiny_config(family)
    config.vocab_size = 4096
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model


def written(model: FlexiGPTForCausalLM, folder: Path, bits: int | None = None) -> Path:
    model.save_pretrained(folder / "compact")
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder / "compact")
    export(str(folder / "compact"), folder / "gguf", ExportOptions(to="gguf", bits=bits))
    return folder / "gguf" / "model.gguf"


def opened(file: Path) -> Any:
    """By llama.cpp, with a key/value cache in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    settings = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
    return llama_cpp.Llama(str(file), logits_all=True, verbose=False, **settings)


@pytest.mark.parametrize("make", [narrow, shared])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(family: str, make: Callable[..., Any], tmp_path: Path) -> None:
    compact = make(source(family))
    ids = torch.randint(3, 4096, (1, 40), generator=torch.Generator().manual_seed(1))
    llama = opened(written(compact, tmp_path))
    llama.eval(ids[0].tolist())
    found = torch.from_numpy(numpy.array(llama.scores[:40]))
    torch.testing.assert_close(found, compact(input_ids=ids).logits[0], rtol=1e-3, atol=2e-3)


def test_llama_cpp_reads_a_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    llama, tokenizer = opened(written(shared(source("llama")), tmp_path)), AutoTokenizer.from_pretrained(EXAMPLE)
    text = "It's said: DON'T give 12345 crowns\n\n\n  to Mr. Ñandú ?!"
    assert llama.tokenize(text.encode(), add_bos=True) == tokenizer(text).input_ids


def test_mlps_keep_their_widths_and_what_is_gone_takes_next_to_nothing(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(narrow(source("llama-gqa")), tmp_path))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    for block, kept in KEPT.items():
        assert shapes[f"blk.{block}.ffn_down.weight"] == (32 * -(-len(kept) // 32), 32)
    assert not any(name.startswith("blk.4.attn") for name in shapes)
    assert "blk.3.attn_q.weight" in shapes


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
@torch.no_grad()
def test_quantised_weights_stand_for_the_models(bits: int, kind: str, tmp_path: Path) -> None:
    compact = narrow(source("llama-gqa"))
    reader = gguf.GGUFReader(written(compact, tmp_path, bits))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.3.ffn_up.weight"].tensor_type.name == kind
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    found = gguf.quants.dequantize(tensors["blk.3.ffn_up.weight"].data, tensors["blk.3.ffn_up.weight"].tensor_type)
    expected = compact.get_parameter("language_model.model.layers.3.mlp.up_proj.weight")
    error = (torch.from_numpy(found)[: len(expected)] - expected).norm() / expected.norm()
    assert error < {8: 0.01, 4: 0.12}[bits]


def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(run: Run, tmp_path: Path) -> None:
    shared(source("llama")).save_pretrained(tmp_path / "compact")
    strange = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    strange.pre_tokenizer = pre_tokenizers.Split(Regex("x"), "isolated")
    TokenizersBackend(tokenizer_object=strange).save_pretrained(tmp_path / "compact")
    code, printed, errors = run("export", tmp_path / "compact", tmp_path / "out", "--to", "gguf")
    assert (code, printed) == (2, "")
    assert "does not know how llama.cpp would split text for this tokenizer" in errors
    assert not (tmp_path / "out").exists()
