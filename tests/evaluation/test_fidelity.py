"""Fidelity to the source, against naive loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from families import FAMILIES, NUM_BLOCKS, block_list, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, InputError, Plan, PruneOptions, Replica, remove
from flexigpt.evaluation.fidelity import measure_fidelity
from flexigpt.text import TokenizedText
from flexigpt.weights import load_model

WINDOW = 24
PLAN = Plan(num_blocks=NUM_BLOCKS, replicas=(Replica(block=2, base=1, rank=4), Replica(block=4, base=5, rank=4)))


def compacted(source: PreTrainedModel) -> PreTrainedModel:
    model = compact_of(source, PLAN)
    initialize_replicas(model, source, PLAN, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


def some_text(source: PreTrainedModel, tokens: int = 3 * WINDOW + 8) -> TokenizedText:
    generator = torch.Generator().manual_seed(5)
    vocabulary = source.config.get_text_config().vocab_size
    return TokenizedText(ids=torch.randint(3, vocabulary, (tokens,), generator=generator), num_bytes=tokens)


@torch.no_grad()
def one_by_one(model: PreTrainedModel, source: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Window by window, token by token."""
    divergences, agreed, losses = [], [], {"source": {}, "model": {}}
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW + 1]
        theirs, ours = (m(window[None, :-1], use_cache=False).logits[0].double() for m in (source, model))
        for position in range(len(window) - 1):
            p, q = theirs[position].softmax(0), ours[position].softmax(0)
            divergences.append((p * (p / q).log()).sum().item())
            agreed.append(theirs[position].argmax().item() == ours[position].argmax().item())
            for name, probabilities in (("source", p), ("model", q)):
                loss = -probabilities[window[position + 1]].log().item()
                losses[name].setdefault(position, []).append(loss)
    mean = {name: [sum(x) / len(x) for x in by_position.values()] for name, by_position in losses.items()}
    return {
        "tokens": len(divergences),
        "divergence": sum(divergences) / len(divergences),
        "agreement": sum(agreed) / len(agreed),
        **mean,
    }


@pytest.mark.parametrize("family", ["llama", "opt-norm-after", "gpt2", "gemma3_text"])
def test_figures_equal_a_loop_over_tokens(family: str) -> None:
    source = tiny_model(family)
    model, text = compacted(source), some_text(source)
    measured = measure_fidelity(model, source, text, window_length=WINDOW, against="source")
    expected = one_by_one(model, source, text.ids)
    assert measured["tokens"] == expected["tokens"] == len(text.ids) - 1
    assert measured["divergence"] == pytest.approx(expected["divergence"], rel=1e-4)
    assert measured["agreement"] == expected["agreement"]
    assert measured["positions"]["position"] == list(range(WINDOW))
    for name in ("source", "model"):
        assert measured["positions"][name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_replicas_error_is_that_of_what_it_adds(family: str) -> None:
    """The replica is exchanged for a copy of the source in which only that block is replaced: hidden states tell."""
    source = tiny_model(family)
    model = compacted(source)
    text = TokenizedText(ids=token_ids()[0, : WINDOW + 1], num_bytes=WINDOW)
    measured = measure_fidelity(model, source, text, window_length=WINDOW, against="source")
    assert {block: row["base"] for block, row in measured["blocks"].items()} == {2: 1, 4: 5}
    for block, row in measured["blocks"].items():
        hybrid = compacted(source)
        for other in range(block):
            blocks_of(hybrid)[other] = block_list(source)[other]
        ids = text.ids[None, :-1]
        theirs, ours = (states_around(m, block, ids) for m in (source, hybrid))
        torch.testing.assert_close(ours[0], theirs[0])
        added = theirs[1] - theirs[0]
        assert row["output"] == pytest.approx(((ours[1] - theirs[1]).norm() / added.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("other", ["gpt2", "mistral", "opt-norm-before"])
def test_blocks_of_another_family_are_not_compared(other: str) -> None:
    text = TokenizedText(ids=token_ids()[0, : WINDOW + 1], num_bytes=WINDOW)
    measured = measure_fidelity(
        compacted(tiny_model("llama")), tiny_model(other), text, window_length=WINDOW, against="x"
    )
    assert measured["divergence"] > 0
    assert "blocks" not in measured


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.block_list if isinstance(model, FlexiGPTForCausalLM) else block_list(model)


def states_around(model: PreTrainedModel, block: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states before and after a block."""
    seen: list[torch.Tensor] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks_of(model)[block].register_forward_hook(note, with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0], seen[1]


def test_a_model_agrees_with_itself() -> None:
    source = tiny_model("llama")
    measured = measure_fidelity(source, source, some_text(source), window_length=WINDOW, against="itself")
    assert measured["divergence"] == pytest.approx(0, abs=1e-9)
    assert measured["agreement"] == 1
    assert measured["positions"]["source"] == measured["positions"]["model"]
    assert "blocks" not in measured


def test_a_shorter_model_has_no_blocks_to_compare(tiny_source: Path) -> None:
    shorter, _, _ = remove(str(tiny_source), PruneOptions.paper(blocks=[2]))
    source = load_model(str(tiny_source))
    measured = measure_fidelity(shorter, source, some_text(source), window_length=WINDOW, against="source")
    assert measured["divergence"] > 0
    assert "blocks" not in measured


def test_long_windows_come_in_buckets_whose_mean_is_the_loss() -> None:
    source = tiny_model("llama")
    text = some_text(source, 2 * 100 + 1)
    measured = measure_fidelity(compacted(source), source, text, window_length=100, against="source")
    positions = measured["positions"]
    assert positions["position"] == list(range(0, 100, 2))
    with torch.no_grad():
        logits = source(torch.stack(text.ids[:-1].split(100)), use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), text.ids[1:])
    assert sum(positions["source"]) / len(positions["source"]) == pytest.approx(loss.item(), rel=1e-5)


def test_nothing_stays_hooked() -> None:
    source = tiny_model("llama")
    measure_fidelity(compacted(source), source, some_text(source), window_length=WINDOW, against="source")
    assert not any(block._forward_hooks for block in block_list(source))


def test_another_vocabulary_is_refused(tiny_source: Path) -> None:
    source, other = load_model(str(tiny_source)), tiny_model("llama")
    with pytest.raises(InputError, match="has 96 tokens in its vocabulary, the model 4,096: give its own source"):
        measure_fidelity(source, other, some_text(other), window_length=WINDOW, against="other")
