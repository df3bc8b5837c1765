import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from families import tiny_model
from flexigpt import EvalOptions, InputError, evaluate
from flexigpt.calibration import hidden_states
from flexigpt.evaluation import perplexity
from flexigpt.text import TokenizedText
from flexigpt.weights import StreamedModel


def text_of(tokens: int) -> TokenizedText:
    ids = torch.randint(3, 96, (tokens,), generator=torch.Generator().manual_seed(0))
    return TokenizedText(ids=ids, num_bytes=3 * tokens)


@torch.no_grad()
def naive_nll(model: PreTrainedModel, ids: torch.Tensor, length: int, stride: int) -> tuple[float, int]:
    """Target by target: each is predicted from the first window, in order, that has it as a target."""
    total, scored = 0.0, set()
    for start in range(0, len(ids), stride):
        window = ids[start : start + length]
        if not len(window):
            continue
        distribution = model(window[None]).logits[0].double().log_softmax(-1)
        for position in range(len(window)):
            target = start + position + 1
            if target < len(ids) and target not in scored:
                total -= distribution[position, ids[target]].item()
                scored.add(target)
    return total, len(scored)


@pytest.mark.parametrize("tokens", [33, 64, 65, 100, 129])
@pytest.mark.parametrize("stride", [32, 8, 5, 1])
def test_perplexity_equals_a_loop_over_targets(tokens: int, stride: int) -> None:
    model, text = tiny_model("llama-gqa"), text_of(tokens)
    measured = perplexity(model, text, window_length=32, stride=stride)
    total, scored = naive_nll(model, text.ids, 32, stride)
    assert measured["tokens"] == scored == tokens - 1
    assert measured["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / text.num_bytes, rel=1e-4)


def test_a_streamed_model_measures_the_same_whatever_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks take other batches than its head, on several threads at a time."""
    model, text = tiny_model("llama-gqa"), text_of(32 * 10 + 20)
    expected = perplexity(model, text, window_length=32)
    for together, budget in ((64, 96 * 32 * 3), (96, 1), (2048, 96 * 32 * 16)):
        monkeypatch.setattr(importlib.import_module("flexigpt.evaluation.perplexity"), "LOGITS_BUDGET", budget)
        monkeypatch.setattr(hidden_states, "_BATCH_TOKENS", together)
        found = []
        for threads in (1, 3):
            monkeypatch.setattr(hidden_states, "workers_of", lambda _, threads=threads: threads)
            found.append(perplexity(StreamedModel(model), text, window_length=32))
        assert found[0] == found[1]
        assert found[0] == expected | {name: pytest.approx(expected[name]) for name in ("perplexity", "bits_per_byte")}


def test_a_sample_of_a_text_is_windows_of_it_spread_evenly() -> None:
    """Each is measured by itself, to the token after it; a text without more windows stays as it is."""
    model, text = tiny_model("llama-gqa"), text_of(32 * 10 + 20)
    sample = text.sample(4, 32)
    assert (text.windows(32), sample.windows(32)) == (10, 4)
    measured = perplexity(model, sample, window_length=32)
    places = [text.ids[start : start + 33] for start in (0, 64, 160, 224)]  # windows 0, 2, 5 and 7
    total = sum(naive_nll(model, place, 32, 32)[0] for place in places)
    assert measured["tokens"] == 4 * 32
    assert measured["perplexity"] == pytest.approx(math.exp(total / 128), rel=1e-4)
    assert text.sample(10, 32) is text
    assert sample.sample(4, 32) is sample


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, text_of(100), window_length=32)["perplexity"] == pytest.approx(96, rel=1e-5)


@pytest.mark.parametrize("stride", [0, 33, -1])
def test_a_stride_out_of_range_is_refused(stride: int) -> None:
    with pytest.raises(InputError, match="outside 1 to the window length 32"):
        perplexity(tiny_model("llama-gqa"), text_of(100), window_length=32, stride=stride)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    with pytest.raises(InputError, match="not finite"):
        perplexity(model, text_of(100), window_length=32)


@torch.no_grad()
def test_a_real_text_on_the_stock_model(example: Path, tmp_path: Path) -> None:
    """One chapter of the shipped text, tokenized and scored by hand with the stock model."""
    row = (example / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "one.jsonl").write_text(row + "\n", encoding="utf-8")
    options = EvalOptions(perplexity=str(tmp_path / "one.jsonl"), window_length=256, dtype="float32")
    measured = evaluate(str(example), options)["models"][0]["perplexity"]
    chapter = json.loads(row)["text"]
    tokenizer, model = AutoTokenizer.from_pretrained(example), AutoModelForCausalLM.from_pretrained(example).float()
    ids = torch.tensor([1, *tokenizer(chapter, add_special_tokens=False, verbose=False)["input_ids"], 2])
    total = 0.0
    for start in range(0, len(ids) - 1, 256):
        window, targets = ids[start : start + 256][: len(ids) - 1 - start], ids[start + 1 : start + 257]
        total += F.cross_entropy(model(window[None]).logits[0], targets, reduction="sum").item()
    assert measured["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / len(chapter.encode()), rel=1e-4)


@pytest.mark.slow
def test_the_shipped_model_has_its_documented_perplexity(example: Path) -> None:
    options = EvalOptions(perplexity=str(example / "validation.jsonl"), window_length=256)
    measured = evaluate(str(example), options)["models"][0]["perplexity"]
    assert measured["perplexity"] == pytest.approx(34.86, abs=0.01)
