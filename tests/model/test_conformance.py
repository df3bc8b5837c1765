"""Every family behaves: one parametrised suite over ARCHITECTURES."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from families import (
    CACHE,
    FAMILIES,
    FULL_RANK,
    NUM_BLOCKS,
    block_list,
    compact_of,
    initialize_replicas,
    remove_blocks,
    tiny_config,
    tiny_model,
    token_ids,
)
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from flexigpt.calibration import block_means
from flexigpt.model import ARCHITECTURES, find_architecture, weight_matrix
from flexigpt.model.build import config_with_blocks
from flexigpt.pruning.scores import influence
from flexigpt.runtime import replaced_folder
from flexigpt.weights import StreamedModel, load_model

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def plan_with(rank: int, **bases: int) -> Plan:
    replicas = tuple(Replica(block=int(block[1:]), base=base, rank=rank) for block, base in bases.items())
    return Plan(num_blocks=NUM_BLOCKS, replicas=replicas)


def compact(source: PreTrainedModel, plan: Plan, *, output_norm: bool = True, init: str = "svd") -> FlexiGPTForCausalLM:
    model = compact_of(source, plan, output_norm)
    initialize_replicas(model, source, plan, adapter_init=init, norm_init=0.5, seed=0)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def test_every_architecture_has_a_family(family: str) -> None:
    assert FAMILIES[family][0] in ARCHITECTURES
    assert {model_type for model_type, _ in FAMILIES.values()} == set(ARCHITECTURES)


def test_no_replicas_is_bit_equal_to_the_source(family: str) -> None:
    source = tiny_model(family)
    assert torch.equal(logits(compact(source, plan_with(1)), token_ids()), logits(source, token_ids()))


def test_full_rank_adapters_without_output_norm_give_back_the_source(family: str) -> None:
    source = tiny_model(family, torch.float64)
    model = compact(source, plan_with(FULL_RANK, b1=0, b3=4), output_norm=False)
    assert len(model.config.replicas) == 2
    torch.testing.assert_close(logits(model, token_ids()), logits(source, token_ids()), rtol=1e-8, atol=1e-8)


def test_replica_computes_the_equations(family: str) -> None:
    """Stock blocks, in which W_j + B A is written out and a plain layer norm follows, give the same logits."""
    source = tiny_model(family, torch.float64)
    model = compact(source, plan_with(4, b2=4))
    reference = copy.deepcopy(source)
    architecture = find_architecture(source.config)
    pruned, base = block_list(reference)[2], block_list(source)[4]
    with torch.no_grad():
        for path in architecture.linears:
            own = weight_matrix(pruned.get_submodule(path))
            other = weight_matrix(base.get_submodule(path))
            u, s, v = torch.linalg.svd(own - other, full_matrices=False)
            own.copy_(other + (u[:, :4] * s[:4]) @ v[:4])
    for path in architecture.output_norms:
        pruned.get_submodule(path).register_forward_hook(
            lambda module, args, output: F.layer_norm(output, output.shape[-1:], eps=1e-6) * 0.5
        )
    torch.testing.assert_close(logits(model, token_ids()), logits(reference, token_ids()), rtol=1e-8, atol=1e-8)


def test_fresh_replica_is_nearly_a_no_op(family: str) -> None:
    """A tiny gamma leaves the residual stream as it was: the logits are those of plain removal."""
    source = tiny_model(family, torch.float64)
    plan = plan_with(2, b2=4)
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=1e-9, seed=0)
    expected = logits(remove_blocks(source, [2]), token_ids())
    if family == "opt-norm-after":  # it normalises the residual stream itself, block or no block
        block = block_list(source)[2]
        block.register_forward_hook(
            lambda module, args, output: module.final_layer_norm(module.self_attn_layer_norm(args[0]))
        )
        expected = logits(source, token_ids())
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_is_bit_equal(family: str, tmp_path: Path) -> None:
    source = tiny_model(family, torch.bfloat16)
    model = compact(source, plan_with(3, b1=0, b2=0, b4=5))
    with replaced_folder(tmp_path / "out") as folder:
        model.save_pretrained(folder)
    loaded = load_model(str(tmp_path / "out"))
    assert isinstance(loaded, FlexiGPTForCausalLM)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(logits(loaded, token_ids()), logits(model, token_ids()))


def test_stock_generate_equals_decoding_without_a_cache(family: str) -> None:
    model = compact(tiny_model(family), plan_with(3, b1=0, b3=0, b4=5))
    ids = token_ids(batch=1, tokens=20)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    for _ in range(12):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_a_cache_may_have_either_name(family: str) -> None:
    """Whatever the installed transformers calls it, and past the sliding windows of 16."""
    model, ids = compact(tiny_model(family), plan_with(3, b1=0, b3=0, b4=5)), token_ids(tokens=40)
    for name in ("cache", "past_key_values"):
        cache, parts = DynamicCache(config=model.config), []
        for piece in ids.split([30, 1, 9], 1):
            output = model(input_ids=piece, **{name: cache})
            assert output[CACHE] is cache
            parts.append(output.logits)
        assert cache.get_seq_length() == 40
        torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="give one of them"):
        model(input_ids=ids, cache=cache, past_key_values=cache)


def test_each_tensor_is_registered_once(family: str) -> None:
    source = tiny_model(family)
    model = compact(source, plan_with(3, b1=0, b2=0))
    tensors = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(tensors) == len(set(tensors))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tied = 1 if source.config.tie_word_embeddings else 0
    assert len(names) == len(tensors) + tied


def test_a_copied_model_reads_its_own_base(family: str) -> None:
    model = compact(tiny_model(family), plan_with(3, b1=0))
    copied = copy.deepcopy(model)
    before = logits(model, token_ids())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, token_ids()), before)
    assert not torch.equal(logits(copied, token_ids()), before)


def test_gradients_reach_adapters_norms_and_base(family: str) -> None:
    model = compact(tiny_model(family), plan_with(3, b3=1)).train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not still
    replica = dict(model.block_list[3].named_parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in replica.items() if n.endswith(("adapter_B", "output_norm.weight")))


def test_influence_equals_the_naive_computation(family: str) -> None:
    """All hidden states of a stock forward pass, one window at a time, in float64."""
    source = tiny_model(family)
    windows = token_ids(batch=5)
    expected = torch.zeros(NUM_BLOCKS, dtype=torch.float64)
    streams: list[torch.Tensor] = []
    for index, block in enumerate(block_list(source)):
        block.register_forward_hook(
            lambda m, args, output: streams.append(output[0] if type(output) is tuple else output)
        )
        if index == 0:
            block.register_forward_pre_hook(lambda m, args, kwargs: streams.append(args[0]), with_kwargs=True)
    for window in windows:
        streams.clear()
        logits(source, window[None])
        for index in range(NUM_BLOCKS):
            x, y = streams[index].double(), streams[index + 1].double()
            cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
            expected[index] += (1 - cosine).sum() / windows.numel()
    for block in block_list(source):
        block._forward_hooks.clear()
        block._forward_pre_hooks.clear()
    measured = torch.tensor(block_means(StreamedModel(source), windows, {"it": influence})["it"], dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-6)


def test_plain_removal_equals_skipping_the_blocks(family: str) -> None:
    source = tiny_model(family)
    shorter = remove_blocks(source, [1, 4])
    assert type(shorter) is type(source)
    assert shorter.config.num_hidden_layers == NUM_BLOCKS - 2
    short_ids = token_ids(
        tokens=12
    )  # shorter than every sliding window: skipping leaves the others' masks as they were
    measured = logits(shorter, short_ids)
    returns_tuple = find_architecture(source.config).block_returns_tuple
    for block in (1, 4):
        block_list(source)[block].forward = lambda x, *a, **k: (x, None) if returns_tuple else x
    torch.testing.assert_close(measured, logits(source, short_ids))


def test_configuration_can_be_extended(family: str) -> None:
    """Blocks repeated: depth and per-block lists follow, and what is built generates."""
    blocks = [0, 1, 2, 1, 2, 3, 4, 5]
    config = config_with_blocks(tiny_config(family), blocks)
    for name in ("layer_types", "attention_layers"):
        source_list = getattr(tiny_config(family), name, None)
        if source_list is not None:
            assert getattr(config, name) == [source_list[block] for block in blocks]
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(block_list(model)) == len(blocks)
    ids = model.generate(token_ids(batch=1), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert ids.shape == (1, 27)
