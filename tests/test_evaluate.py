import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from families import tiny_model
from flexigpt import EvalOptions, InputError, evaluate
from flexigpt.data import TokenizedText
from flexigpt.evaluate import perplexity


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
    assert measured.tokens == scored == tokens - 1
    assert measured.perplexity == pytest.approx(math.exp(total / scored), rel=1e-4)
    assert measured.bits_per_byte == pytest.approx(total / math.log(2) / text.num_bytes, rel=1e-4)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, text_of(100), window_length=32).perplexity == pytest.approx(96, rel=1e-5)


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


def test_the_shipped_model_has_its_documented_perplexity(example: Path, tmp_path: Path) -> None:
    """On the first three validation chapters; examples/novel16/README.md gives the whole file's figure."""
    rows = (example / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    (tmp_path / "three.jsonl").write_text("".join(rows), encoding="utf-8")
    options = EvalOptions(perplexity=str(tmp_path / "three.jsonl"), window_length=256, dtype="float32")
    assert 25 < evaluate(str(example), options).perplexity < 45
