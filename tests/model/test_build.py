"""Materialised models against the compact models they are made of, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, NUM_BLOCKS, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import (
    InputError,
    Plan,
    Replica,
    SpeculateOptions,
    SpeculateStatistics,
    inspect_model,
    materialize,
    speculative_generate,
    write_checkpoint,
)
from flexigpt.decoding import GenerateOptions, generate
from flexigpt.evaluation import perplexity
from flexigpt.model import SharedLinear, empty_model, layout_of
from flexigpt.text import tokenize_text
from flexigpt.weights import load_model, load_tokenizer

BASES = {1: 0, 2: 0, 4: 5}


def compact(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny compact model every part of which changes the logits."""
    source = tiny_model(family, dtype)
    replicas = tuple(Replica(block=block, base=base, rank=3) for block, base in BASES.items())
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=replicas)
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def greedy(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_nothing_is_shared(family: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = compact(family, dtype)
        expected = logits(model, token_ids())
        kept = {name: (p, p.clone()) for name, p in model.named_parameters() if not name.endswith(("_A", "_B"))}
        same = materialize(model)
        assert same is model
        torch.testing.assert_close(logits(model, token_ids()), expected, rtol=tolerance, atol=tolerance)
        assert not any(isinstance(module, SharedLinear) for module in model.modules())
        now = dict(model.named_parameters())
        for name, (parameter, value) in kept.items():
            assert name.endswith(".bias_difference") or (now[name] is parameter and torch.equal(parameter, value))
        places = [parameter.data_ptr() for parameter in now.values()]
        assert len(set(places)) == len(places)
        source = tiny_model(family)
        assert model.num_parameters() == source.num_parameters() + 2 * 32 * len(BASES)  # their output norms
        classes = {type(layout_of(model).blocks[0].get_submodule(path)) for path in layout_of(model).linears}
        assert classes == ({Conv1D} if family == "gpt2" else {nn.Linear})


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_bases_plus_the_adapters_and_caches_work(family: str) -> None:
    model = compact(family)
    reference, ids = copy.deepcopy(model), token_ids(1, 12)
    materialize(model)
    layout = layout_of(reference)
    for block, base in BASES.items():
        for path in layout.linears:
            shared = layout.blocks[block].get_submodule(path)
            shared = getattr(shared, "inner", shared)
            mine = layout_of(model).blocks[block].get_submodule(path)
            mine = getattr(mine, "inner", mine)
            x = torch.randn(5, shared.in_features, generator=torch.Generator().manual_seed(2))
            original = layout.blocks[base].get_submodule(path)
            original = getattr(original, "inner", original)
            expected = original(x) + x @ shared.adapter_A.T @ shared.adapter_B.T
            expected = expected if shared.bias_difference is None else expected + shared.bias_difference
            torch.testing.assert_close(mine(x), expected, rtol=1e-5, atol=1e-5)
    out = greedy(model, ids)
    assert torch.equal(out, greedy(model, ids, use_cache=False))
    assert torch.equal(out, greedy(reference, ids))
    seen = SpeculateStatistics()
    options = {"custom_generate": speculative_generate, "speculate": SpeculateOptions(draft_length=3)}
    assert torch.equal(out, greedy(model, ids, statistics=seen, **options))
    assert seen.drafted > 0


def test_half_precision_is_rounded_once() -> None:
    model = compact("llama-biases-tied", torch.bfloat16)
    attention = layout_of(model).blocks[1].self_attn
    base = attention.q_proj.base
    weight = base.weight.double() + attention.q_proj.adapter_B.double() @ attention.q_proj.adapter_A.double()
    bias = base.bias.double() + attention.q_proj.bias_difference.double()
    materialize(model)
    assert attention.q_proj.weight.dtype == torch.bfloat16
    # A half of a bfloat16 step, which has 8 significant bits.
    assert ((attention.q_proj.weight.double() - weight).abs() <= weight.abs() * 2**-8).all()
    assert ((attention.q_proj.bias.double() - bias).abs() <= bias.abs() * 2**-8).all()
    assert base.weight is not attention.q_proj.weight


def test_it_cannot_be_saved(tmp_path: Path, tiny_compact: Path) -> None:
    model = materialize(load_model(str(tiny_compact)))
    with pytest.raises(ValueError, match="a materialised model cannot be saved"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="save the model before it is materialised"):
        write_checkpoint(tmp_path / "out", model, {})
    assert not (tmp_path / "out").exists()
    load_model(str(tiny_compact)).save_pretrained(tmp_path / "out")  # the class is as it was


def test_parameters_are_the_effective_ones_without_adapters(tiny_compact: Path) -> None:
    inspection = inspect_model(str(tiny_compact))
    adapters = inspection["parts"]["replicas, adapters"]["parameters"]
    model = materialize(load_model(str(tiny_compact)))
    assert model.num_parameters() == inspection["parameters"]["effective"] - adapters


def test_what_cannot_be_folded_is_refused_and_left_as_it_was() -> None:
    with pytest.raises(InputError, match="this LlamaForCausalLM has no shared linears"):
        materialize(tiny_model("llama"))
    with pytest.raises(InputError, match="nothing to materialise"):
        materialize(materialize(compact("llama")))
    wrapped = compact("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*layers\.0\.self_attn\.v_proj"), wrapped)
    with pytest.raises(InputError, match=r"the base of a replica's v_proj is a peft\..*, whose weight cannot"):
        materialize(wrapped)
    assert sum(isinstance(module, SharedLinear) for module in wrapped.modules()) == 7 * len(BASES)
    quantised = compact("llama")
    linear = layout_of(quantised).blocks[5].mlp.up_proj
    linear.weight = nn.Parameter((linear.weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(
        InputError,
        match=r"up_proj is a torch.nn.modules.linear.Linear of torch.int8, whose weight cannot be folded",
    ):
        materialize(quantised)
    with pytest.raises(InputError, match="on the meta device"):
        materialize(empty_model(compact("llama").config))


def test_generate_makes_the_same_text(tiny_compact: Path, tiny_source: Path) -> None:
    def text(model: Path, **more: bool) -> str:
        pieces: list[str] = []
        generate(str(model), GenerateOptions(prompt="It was a dark", max_new_tokens=20, **more), pieces.append)
        return "".join(pieces)

    expected = text(tiny_compact)
    assert text(tiny_compact, materialize=True) == expected
    assert text(tiny_compact, materialize=True, speculative=True) == expected
    assert text(tiny_source, materialize=True) == text(tiny_source)


def test_it_measures_the_same(tiny_compact: Path, tiny_source: Path, text: Path) -> None:
    words = tokenize_text(str(text), load_tokenizer(str(tiny_source)), window_length=128)
    plain, folded = load_model(str(tiny_compact)), materialize(load_model(str(tiny_compact)))
    before, after = (perplexity(model, words, window_length=128)["perplexity"] for model in (plain, folded))
    assert after == pytest.approx(before, rel=1e-5)
