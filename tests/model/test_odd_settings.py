"""Full-rank replicas are the source whatever its settings: cached, uncached, and past the lengths where it changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from families import (
    CACHE,
    FAMILIES,
    FULL_RANK,
    NUM_BLOCKS,
    ODD_SETTINGS,
    compact_of,
    initialize_replicas,
    remove_blocks,
    tiny_model,
    token_ids,
)
from flexigpt import FlexiGPTForCausalLM, InputError, Plan, Replica, materialize
from flexigpt.decoding import speculative_generate

ALL = [*FAMILIES, *ODD_SETTINGS]


def planned(*blocks: int) -> Plan:
    """These blocks are replicas of block 0 that leave nothing out."""
    replicas = tuple(Replica(block=block, base=0, rank=FULL_RANK) for block in blocks)
    return Plan(num_blocks=NUM_BLOCKS, replicas=replicas)


# Norms compute in float32, whatever the model's dtype: the last digit of theirs may fall the other way.
NEAR = {"rtol": 1e-6, "atol": 2e-6}


def full_rank(source: PreTrainedModel, *blocks: int) -> FlexiGPTForCausalLM:
    """The source with these blocks as such replicas."""
    plan = planned(*blocks)
    model = compact_of(source, plan, output_norm=False)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=1.0, seed=0)
    return model


@torch.no_grad()
def in_pieces(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The logits of ids that are given one piece after the other, with a cache."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(input_ids=piece, **{CACHE: cache}).logits for piece in ids.split(lengths, 1)], 1)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_it_is_the_source_with_and_without_a_cache(family: str) -> None:
    source = tiny_model(family, torch.float64)
    model, ids = full_rank(source, 1, 3, 4), token_ids(tokens=48)
    torch.testing.assert_close(model(input_ids=ids).logits, source(input_ids=ids).logits, **NEAR)
    pieces = [20, 1, 15, 1, 1, 10]  # past windows of 16, and past 32 positions
    expected = in_pieces(source, ids, pieces)
    torch.testing.assert_close(in_pieces(model, ids, pieces), expected, **NEAR)
    torch.testing.assert_close(in_pieces(materialize(model), ids, pieces), expected, **NEAR)


@pytest.mark.parametrize("family", ALL)
def test_it_generates_what_the_source_does(family: str) -> None:
    """From 24 tokens over 32, where the rotation of some changes and their caches begin again, to 44."""
    source = tiny_model(family, torch.float64)
    model = full_rank(source, 1, 3)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    asked: dict[str, Any] = settings | {"output_logits": True, "return_dict_in_generate": True}
    expected = source.generate(token_ids(), **asked)
    for one in (model, materialize(model)):
        found = one.generate(token_ids(), **asked)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", {kind: family for family, (kind, _) in FAMILIES.items()}.values())
def test_no_method_of_the_source_is_passed_over(family: str) -> None:
    """What the source's class does in its own way, the compact model hands on to it or does itself."""
    source = tiny_model(family)
    source_class, stock = type(source), {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}
    names_of_stock = {name for kind in stock for name in vars(kind)}
    own = {
        name
        for kind in source_class.__mro__
        if kind not in stock
        for name, value in vars(kind).items()
        if callable(value) and name in names_of_stock and not name.startswith("__")
    }
    # The source's own model is built, and its weights drawn, by its own class.
    ours = FlexiGPTForCausalLM
    assert own - {"_init_weights", "config_class"} <= {
        *vars(ours),
        *vars(ours.__base__),
        *vars(compact_of(source, planned(1))),
    }


@pytest.mark.parametrize("family", ALL)
def test_every_setting_of_the_source_is_the_compact_models(family: str) -> None:
    source = tiny_model(family)
    config = compact_of(source, planned(1)).config
    names = {name for name in [*vars(source.config), *source.config.attribute_map] if not name.startswith("_")}
    assert {"vocab_size", "hidden_size", "num_hidden_layers", "use_cache"} <= names
    # GPT-Neo's types are written in another way, and say what `attention_layers` says.
    for name in names - {"architectures", "transformers_version", "dtype", "id2label", "label2id", "attention_types"}:
        assert getattr(config, name) == getattr(config.text_config, name) == getattr(source.config, name), name
    assert not hasattr(config, "no_such_setting")
    assert json.loads(config.to_json_string())["text_config"]["model_type"] == source.config.model_type


SETTINGS: dict[str, Any] = {
    "use_cache": False,
    "attention_dropout": 0.5,
    "output_hidden_states": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
}


def behaviour(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """What the settings above change."""
    torch.manual_seed(0)
    with torch.no_grad():
        output, trained = model.eval()(input_ids=ids), model.train()(input_ids=ids)
    return {
        "logits": output.logits,
        "trained": trained.logits,
        "has_cache": output[CACHE] is not None if CACHE in output else False,
        "hidden_states": None if output.hidden_states is None else len(output.hidden_states),
    }


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("way", ["argument", "configuration", "saved"])
def test_a_setting_has_the_effect_that_it_has_on_the_source(name: str, way: str, tmp_path: Path) -> None:
    """Given to `from_pretrained`, in an edited configuration, or in one that was saved with the model."""
    source = tiny_model("llama")
    full_rank(source, 2).save_pretrained(tmp_path / "compact")
    source.save_pretrained(tmp_path / "source")
    found = []
    for kind in ("source", "compact"):
        folder, given = tmp_path / kind, {name: SETTINGS[name]}
        if way != "argument":
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
            setattr(config, name, SETTINGS[name])
            assert getattr(config, name) == SETTINGS[name]
            given = {"config": config}
        if way == "saved":
            config.save_pretrained(folder)
            given = {}
        found.append(behaviour(AutoModelForCausalLM.from_pretrained(folder, **given), token_ids()))
        plain = behaviour(AutoModelForCausalLM.from_pretrained(folder), token_ids())
        if way != "saved":
            assert str(plain) != str(found[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_blocks_that_depend_on_their_place_are_not_moved() -> None:
    """Nor left out before others. Replicas stay where they are."""
    source = tiny_model("gpt2-scaled")
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        remove_blocks(source, [2])
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        compact_of(source, Plan(num_blocks=NUM_BLOCKS + 1, replicas=()), source_blocks=[0, 1, 1, 2, 3, 4, 5])
    assert remove_blocks(source, [NUM_BLOCKS - 1]).config.num_hidden_layers == NUM_BLOCKS - 1  # moves none


def test_what_has_no_weights_of_its_own_is_not_saved_as_if_it_had(tmp_path: Path) -> None:
    source = tiny_model("llama")
    model = full_rank(source, 2)
    with pytest.raises(ValueError, match="call save_pretrained of the compact model"):
        model.language_model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    without = full_rank(source)  # a stock model, whole
    without.language_model.save_pretrained(tmp_path / "stock")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(opened(input_ids=token_ids()).logits, source(input_ids=token_ids()).logits)


@pytest.mark.parametrize(("family", "prompt"), [("phi3-longrope", 24), ("llama-dynamic", 40)])
def test_speculation_that_would_cross_a_change_of_rotation_is_refused(family: str, prompt: int) -> None:
    model, ids = full_rank(tiny_model(family), 2), token_ids(batch=1, tokens=prompt)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(InputError, match="32 positions"):
        model.generate(ids, max_new_tokens=20, custom_generate=speculative_generate, **settings)
    short, few = token_ids(batch=1, tokens=10), 12
    expected = model.generate(short, max_new_tokens=few, **settings)
    found = model.generate(short, max_new_tokens=few, custom_generate=speculative_generate, **settings)
    assert torch.equal(found, expected)
