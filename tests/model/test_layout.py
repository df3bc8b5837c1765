"""Parameter counts of real models on the meta device, against published totals and the paper's arithmetic."""

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flexigpt import Plan, Replica
from flexigpt.model import ModelShape, empty_model, mlp_widths, model_shape, num_blocks
from flexigpt.model.build import compact_config
from flexigpt.pruning.scores import num_pruned_at
from flexigpt.runtime import InputError, parse_size
from three_blocks import narrow, shared

_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

# name: model type, settings, published parameters, pruned at 30 %, rank, and for each linear (outputs + inputs).
REAL_MODELS: dict[str, tuple[str, dict[str, Any], int, int, int, tuple[int, ...]]] = {
    "LLaMA-2 7B": (
        "llama",
        _7B | {"intermediate_size": 11008, "vocab_size": 32000},
        6_738_415_616,
        9,
        256,
        (8192, 8192, 8192, 8192, 15104, 15104, 15104),
    ),
    "LLaMA-3 8B": (
        "llama",
        _7B | {"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8},
        8_030_261_248,
        9,
        256,
        (8192, 5120, 5120, 8192, 18432, 18432, 18432),
    ),
    "OPT 6.7B": (
        "opt",
        _7B | {"ffn_dim": 16384, "vocab_size": 50272, "word_embed_proj_dim": 4096, "max_position_embeddings": 2048},
        6_658_473_984,
        9,
        256,
        (8192, 8192, 8192, 8192, 20480, 20480),
    ),
    "OPT 1.3B": (
        "opt",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "ffn_dim": 8192,
            "vocab_size": 50272,
            "word_embed_proj_dim": 2048,
            "max_position_embeddings": 2048,
        },
        1_315_758_080,
        7,
        128,
        (4096, 4096, 4096, 4096, 10240, 10240),
    ),
    "TinyLlama 1.1B": (
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 5632,
            "vocab_size": 32000,
        },
        1_100_048_384,
        6,
        128,
        (4096, 2304, 2304, 4096, 7680, 7680, 7680),
    ),
}


@pytest.mark.parametrize("name", REAL_MODELS)
def test_stored_parameters_of_real_models_at_30_percent(name: str) -> None:
    model_type, settings, published, pruned, rank, sides = REAL_MODELS[name]
    config = CONFIG_MAPPING[model_type](**settings)
    shape = model_shape(empty_model(config))
    assert shape.parameters == published
    assert num_pruned_at(0.3, num_blocks(config)) == pruned
    assert shape.hidden_size // 16 == rank
    extra = pruned * (rank * sum(sides) + 2 * shape.hidden_size)  # adapters and two output norms a replica
    assert pruned * shape.replica_parameters(rank) == extra
    replicas = tuple(Replica(block=block, base=0, rank=rank) for block in range(10, 10 + pruned))
    plan = Plan(num_blocks=num_blocks(config), replicas=replicas)
    compact = empty_model(compact_config(config, plan))
    assert compact.num_parameters() == shape.stored_parameters([rank] * pruned)
    # What a replica keeps beside adapters and output norms: the block's own norms and biases.
    kept_small = pruned * (shape.block_parameters - shape.linear_parameters)
    assert compact.num_parameters() == shape.removed_parameters(pruned) + extra + kept_small


def test_llama_2_7b_costs_as_the_paper_says() -> None:
    """3.67 % more parameters than plain removal (section 4.1); the exact figure is 3.66 %."""
    model_type, settings, _, pruned, rank, _ = REAL_MODELS["LLaMA-2 7B"]
    shape = model_shape(empty_model(CONFIG_MAPPING[model_type](**settings)))
    share = pruned * shape.replica_parameters(rank) / shape.removed_parameters(pruned)
    assert round(100 * share, 2) == 3.66


@pytest.fixture(scope="module")
def llama_2() -> ModelShape:
    model_type, settings, *_ = REAL_MODELS["LLaMA-2 7B"]
    return model_shape(empty_model(CONFIG_MAPPING[model_type](**settings)))


@pytest.mark.parametrize(("size", "pruned"), [("5.5B", 7), ("11GB", 7), ("4.8B", 11), ("6.7B", 1), ("9.6 gb", 11)])
def test_target_size_prunes_just_enough(llama_2: ModelShape, size: str, pruned: int) -> None:
    target = parse_size(size, itemsize=2)
    assert llama_2.num_pruned_for(target, 256, 32) == pruned
    assert llama_2.stored_parameters([256] * pruned) <= target < llama_2.stored_parameters([256] * (pruned - 1))


@pytest.mark.parametrize(("size", "reason"), [("7B", "meets the target"), ("100M", "out of reach")])
def test_target_size_out_of_range_is_refused(llama_2: ModelShape, size: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        llama_2.num_pruned_for(parse_size(size, itemsize=2), 256, 32)


@pytest.mark.parametrize(("size", "removed"), [("5.5B", 7), ("11GB", 7), ("4.8B", 10), ("6.7B", 1)])
def test_target_size_removes_just_enough(llama_2: ModelShape, size: str, removed: int) -> None:
    """By hand: a block of LLaMA-2 7B has 4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096 = 202,383,360 parameters."""
    target = parse_size(size, itemsize=2)
    assert llama_2.num_removed_for(target, 32) == removed
    assert 6_738_415_616 - removed * 202_383_360 <= target < 6_738_415_616 - (removed - 1) * 202_383_360


@pytest.mark.parametrize(("size", "reason"), [("7B", "meets the target"), ("100M", "the least is 464,531,456; give a")])
def test_target_size_out_of_range_of_removal_is_refused(llama_2: ModelShape, size: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        llama_2.num_removed_for(parse_size(size, itemsize=2), 32)


def test_no_target_is_in_reach_of_a_single_block(llama_2: ModelShape) -> None:
    for ask in (lambda: llama_2.num_removed_for(10**9, 1), lambda: llama_2.num_pruned_for(10**9, 256, 1)):
        with pytest.raises(InputError, match="out of reach"):
            ask()


@pytest.mark.parametrize("size", ["", "big", "3.2", "-1GB", "0GB", "1.2.3GB", "3 potatoes"])
def test_sizes_that_cannot_be_read_are_refused(size: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        parse_size(size, itemsize=2)


def test_sizes_are_parameters_or_bytes() -> None:
    assert parse_size("4.8B", 2) == 4_800_000_000
    assert parse_size("350m", 2) == 350_000_000
    assert parse_size("3.2GB", 2) == 1_600_000_000
    assert parse_size("1GiB", 4) == 2**28


def test_mlps_are_as_wide_as_their_down_projections_also_behind_output_norms() -> None:
    model = shared()
    assert mlp_widths(model) == [model.config.text_config.intermediate_size] * 3
    assert mlp_widths(narrow()) == [21, model.config.text_config.intermediate_size, 0]
