"""What is trained: which tensors, from the same logits on, and merged without a trace, over all families."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import CPU, SETTINGS, options
from torch import nn

import textbook
from families import FAMILIES, NUM_BLOCKS, block_list, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import InputError, Plan, Replica, recover
from flexigpt.model import SharedLinear
from flexigpt.pruning import PruneOptions, remove
from flexigpt.record import write_checkpoint
from flexigpt.recovery.trainable import TRAIN, merge_lora, prepare_training, trained_parameters
from flexigpt.recovery.training import Training
from flexigpt.runtime import ALONE

BASES = {2: 1, 4: 5, 3: 1}
PLAN = Plan(
    num_blocks=NUM_BLOCKS, replicas=tuple(Replica(block=block, base=base, rank=3) for block, base in BASES.items())
)
KEPT = (0, 1, 5)
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def compact_model(family: str) -> Any:
    source = tiny_model(family)
    model = compact_of(source, PLAN)
    initialize_replicas(model, source, PLAN, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids()).logits


def disturb(model: nn.Module) -> None:
    """As if trained: what starts at zero, too, is not."""
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["compact", "ordinary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_at_the_models_own_logits_and_merges_into_its_tensors(family: str, kind: str) -> None:
    model = compact_model(family) if kind == "compact" else tiny_model(family)
    before, stored = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    prepare_training(model, "replicas+kept", 4, seed=0)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    disturb(model)
    changed = logits(model)
    assert (changed - before).abs().max() > 0.1
    merge_lora(model)
    torch.testing.assert_close(logits(model), changed, atol=2e-4, rtol=1e-4)
    merged = model.state_dict()
    assert {name: t.shape for name, t in merged.items()} == {name: t.shape for name, t in stored.items()}
    same = {name for name in stored if torch.equal(stored[name], merged[name])}
    blocks = len(KEPT) if kind == "compact" else NUM_BLOCKS
    linears = [m for m in block_list(tiny_model(family))[0].modules() if hasattr(m, "weight") and m.weight.ndim == 2]
    of_replicas = sum(isinstance(m, SharedLinear) for m in model.modules()) * 2
    norms = sum(name.endswith("output_norm.weight") for name in stored)
    assert len(stored) - len(same) == blocks * len(linears) + of_replicas + norms


@pytest.mark.parametrize("family", ["llama-biases-tied", "gpt2", "olmo2"])
def test_replicas_see_what_their_base_learns(family: str) -> None:
    """The merged model is the one in which every base's weight, and nothing else, has the factors' product added."""
    model, other = compact_model(family), compact_model(family)
    prepare_training(model, "replicas+kept", 4, seed=0)
    factors = {name: p for name, p in trained_parameters(model).items() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.normal_(std=0.1)
            if ".lora_B." in name:
                weight = other.get_parameter(name.replace(".lora_B.default.weight", ".weight"))
                product = parameter @ factors[name.replace(".lora_B.", ".lora_A.")]
                weight.add_(product.T if family == "gpt2" else product)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=1e-4)


def expected_changes(train: str, names: set[str]) -> set[str]:
    """By hand, for the tiny LLaMA with blocks 2 and 4 pruned."""
    adapters = {name for name in names if ".adapter_" in name or ".output_norm." in name}
    linears = {name for name in names if name.endswith("_proj.weight")}
    return {"replicas": adapters, "replicas+kept": adapters | linears, "all": names}[train]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", TRAIN)
def test_what_changes_in_a_compact_checkpoint(
    tiny_compact: Path, text: Path, tmp_path: Path, train: str, dtype: str
) -> None:
    source = tmp_path / "source"
    model = textbook.opened(tiny_compact).to(getattr(torch, dtype))
    record = json.loads((tiny_compact / "record.json").read_text())
    write_checkpoint(source, model, record, source=str(tiny_compact))
    before = textbook.weights(source)
    recover(str(source), tmp_path / "out", options(text, train=train))
    after = textbook.weights(tmp_path / "out")
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == expected_changes(train, set(before))
    assert all(torch.equal(t, before[name]) for name, t in textbook.weights(source).items())


def test_what_changes_in_an_ordinary_checkpoint(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    model, _, record = remove(str(tiny_source), PruneOptions.paper(blocks=(1, 3)))
    write_checkpoint(tmp_path / "shorter", model, record, source=str(tiny_source))
    recover(str(tmp_path / "shorter"), tmp_path / "out", options(text, lora_rank=2))
    before, after = textbook.weights(tmp_path / "shorter"), textbook.weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"model.layers.{block}.{linear}.weight" for block in range(4) for linear in LINEARS}


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((family, False) for family in FAMILIES), *((family, True) for family in ("llama", "gpt2", "opt-norm-after"))],
)
def test_no_backward_pass_below_the_first_replica(family: str, checkpointing: bool) -> None:
    model = compact_model(family)
    prepare_training(model, "replicas", 0, seed=0)
    training = Training(model, replace(SETTINGS, activation_checkpointing=checkpointing), ALONE, CPU, None)
    needed: list[bool] = []
    for block in model.block_list:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: needed.append((args[0] if args else kwargs["hidden_states"]).requires_grad),
            with_kwargs=True,
        )
    training.step(0, token_ids(4, 17))
    assert needed[:6] == [False, False, False, True, True, True]


def test_only_replicas_of_a_model_without_any_is_refused(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has no replicas"):
        recover(str(tiny_source), tmp_path / "out", options(text, train="replicas"))
