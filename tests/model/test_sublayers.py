"""Compact models whose sublayers are replicas of their own: fewer hidden units, or nothing. Over all families."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import CACHE, FAMILIES, NUM_BLOCKS, block_list, compact_of, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, Plan
from flexigpt.model import SublayerReplica, find_architecture, sublayer_paths
from flexigpt.replicas import readers_of_units
from flexigpt.weights import StreamedModel

KEPT = torch.tensor([0, 3, 4, 7, 20, 21, 40])


def shrunk(source: PreTrainedModel, *rows: SublayerReplica, kept: torch.Tensor = KEPT) -> FlexiGPTForCausalLM:
    """The compact model with these replicas, its MLPs with those units of the source's."""
    model = compact_of(source, Plan(num_blocks=NUM_BLOCKS, sublayers=rows))
    for row in rows:
        if row.form == "units":
            readers = readers_of_units(StreamedModel(source), row.block, sublayer_paths(source)["mlp"], kept)
            StreamedModel(model).own(row.block, readers)
    return model.eval()


@torch.no_grad()
def silenced(source: PreTrainedModel, rows: tuple[SublayerReplica, ...], kept: torch.Tensor = KEPT) -> torch.Tensor:
    """Logits of the stock model whose missing units, or sublayers, are made to write nothing."""
    roles, hooks = find_architecture(source.config).roles, []
    for row in rows:
        path = roles.down if row.sublayer == "mlp" else roles.output
        linear = block_list(source)[row.block].get_submodule(path)
        if row.form == "units":
            mask = torch.zeros(sublayer_paths(source)["mlp"]["units"]).index_fill(0, kept, 1.0)
            hooks.append(linear.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
        else:
            hooks.append(linear.register_forward_hook(lambda _, __, output: torch.zeros_like(output)))
    logits: torch.Tensor = source(input_ids=token_ids(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def mlp(block: int, units: int | None = len(KEPT)) -> SublayerReplica:
    return SublayerReplica(block=block, sublayer="mlp", form="units" if units else "none", units=units)


def attention(block: int) -> SublayerReplica:
    return SublayerReplica(block=block, sublayer="attention", form="none")


ROWS = (mlp(0), mlp(2, None), attention(2), mlp(3), attention(4))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_computes_what_the_source_does_with_those_units_silenced(family: str) -> None:
    source = tiny_model(family)
    expected = silenced(source, ROWS)
    torch.testing.assert_close(shrunk(source, *ROWS)(input_ids=token_ids()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_units_in_their_order_are_the_source(family: str) -> None:
    source = tiny_model(family)
    units = sublayer_paths(source)["mlp"]["units"]
    model = shrunk(source, mlp(1, units), kept=torch.arange(units))
    assert torch.equal(model(input_ids=token_ids()).logits, source(input_ids=token_ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_opened_it_is_the_same_and_stores_only_what_is_left(family: str, tmp_path: Path) -> None:
    source = tiny_model(family)
    model = shrunk(source, *ROWS)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
    gone = {f"{n}" for n, _ in source.named_parameters()} - {
        n.removeprefix("language_model.") for n, _ in opened.named_parameters()
    }
    roles = find_architecture(source.config).roles
    assert any(f".2.{roles.down}." in name for name in gone)
    assert any(f".4.{roles.output}." in name for name in gone)
    assert opened.num_parameters() == model.num_parameters() < source.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decodes_with_its_cache_what_it_computes_without(family: str) -> None:
    model = shrunk(tiny_model(family), *ROWS)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = token_ids(batch=1, tokens=20)
    cached = model.generate(ids, **asked, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, model.generate(ids, **asked, use_cache=False))
    layers = getattr(cached, CACHE, None) or cached.past_key_values
    held = [layer.get_seq_length() for layer in layers.layers]
    assert held[0] > 0
    assert not any(held[block] for block in (2, 4) if block < len(held))
