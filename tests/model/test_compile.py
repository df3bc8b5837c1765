"""Compact models under torch.compile: one graph, static cache, the same tokens."""

import pytest
import torch
from transformers import StaticCache

from families import CACHE, compact_of, initialize_replicas, remove_blocks, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, Plan, Replica, materialize

PROMPT, NEW = 9, 5


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """torch keeps what it compiled of a function, and refuses more than eight forms of it."""
    torch._dynamo.reset()


def compact(family: str) -> FlexiGPTForCausalLM:
    """Of three blocks: to compile takes long for each."""
    source = remove_blocks(tiny_model(family), (3, 4, 5))
    plan = Plan(num_blocks=3, replicas=(Replica(block=2, base=1, rank=4),))
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


@torch.no_grad()
def decoded(model: FlexiGPTForCausalLM, backend: str) -> torch.Tensor:
    """Greedy tokens by a compiled forward pass; fullgraph=True raises where the graph would break."""
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    ids = token_ids(batch=1, tokens=PROMPT)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    mask = torch.ones(1, 32)  # without one, OPT of transformers 5.17 makes its own, as long as the text: no one graph
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    token = model(input_ids=ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    found = [token]
    for place in range(PROMPT, PROMPT + NEW - 1):
        given = {"input_ids": token, "position_ids": torch.tensor([[place]]), "attention_mask": mask, CACHE: cache}
        logits = step(**given).logits
        token = logits[:, -1:].argmax(-1)
        found.append(token)
    return torch.cat([ids, *found], 1)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt-norm-before", "gpt2"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_forward_pass_is_one_graph(family: str, folded: bool) -> None:
    model = compact(family)
    if folded:
        materialize(model)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(token_ids(batch=1, tokens=PROMPT), **options)
    assert torch.equal(decoded(model, "eager"), expected)
    static = model.generate(token_ids(batch=1, tokens=PROMPT), cache_implementation="static", **options)
    assert torch.equal(static, expected)


@pytest.mark.slow
def test_generated_code_gives_the_same_tokens() -> None:
    """Some 45 s, most of them in the C++ compiler."""
    model = compact("llama-gqa")
    assert torch.equal(decoded(model, "inductor"), decoded(model, "eager"))
