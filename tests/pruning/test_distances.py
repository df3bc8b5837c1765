"""Distances by what calibration text makes of weights, against explicit activations and a full SVD."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from conftest import Run
from families import FAMILIES, NUM_BLOCKS, block_list, tiny_model, token_ids
from flexigpt import PruneOptions, plan_only, prune
from flexigpt.model import find_architecture, weight_matrix
from flexigpt.pruning.distances import Distances, choose_bases, measure_distances
from flexigpt.replicas.least_squares import Moments, low_rank_fit
from flexigpt.runtime import cache as cache_module
from flexigpt.runtime.cache import CACHE_VARIABLE
from killing import Killed, KillingTrack
from workspaces import announced, workspace_of

RANK = 4
PRUNED = (1, 4)
KEPT = (0, 2, 3, 5)
WINDOWS = token_ids(batch=6, tokens=24, seed=3)


def measured(
    model: PreTrainedModel, cache: Path, pruned: tuple[int, ...] = (4,), windows: torch.Tensor = WINDOWS, **more: Any
) -> Distances:
    settings = {"rank": RANK, "base_distance": "activation"} | more
    return measure_distances(workspace_of(model, cache, windows, **settings), pruned)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, block: int, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear of a block is given when the stock model reads the windows, (tokens, inputs), float64."""
    found: dict[str, torch.Tensor] = {}

    def note(path: str, linear: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[path] = args[0].reshape(-1, args[0].shape[-1]).double().clone()

        handles.append(linear.register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for path in find_architecture(model.config).linears:
        note(path, block_list(model)[block].get_submodule(path))
    model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def damped_rows(x: torch.Tensor) -> torch.Tensor:
    """X, and the damping written out as further rows: a thousandth of the inputs' mean variance."""
    damping = (1e-3 * x.square().sum() / x.shape[1]).sqrt()
    return torch.cat((x, damping * torch.eye(x.shape[1], dtype=torch.float64)))


def weight(model: PreTrainedModel, block: int, path: str) -> torch.Tensor:
    return weight_matrix(block_list(model)[block].get_submodule(path)).detach().double()


def naive_distance(model: PreTrainedModel, block: int, base: int, windows: torch.Tensor, rank: int = RANK) -> float:
    total = 0.0
    for path, x in inputs_of(model, block, windows).items():
        rows, own = damped_rows(x), weight(model, block, path)
        left = torch.linalg.svdvals(rows @ (own - weight(model, base, path)).T)[rank:]
        total += (left.norm() / (rows @ own.T).norm()).item()
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_distances_are_those_of_explicit_activations(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    found = measured(model, tmp_path, PRUNED, memory=0)
    assert {i: tuple(candidates) for i, candidates in found.items()} == dict.fromkeys(PRUNED, KEPT)
    for i, candidates in found.items():
        for j, distance in candidates.items():
            assert distance == pytest.approx(naive_distance(model, i, j, WINDOWS), rel=1e-4)


def test_a_distance_is_what_the_fitted_adapters_leave(tmp_path: Path) -> None:
    """Of outputs on the text, with the adapters of --adapter-init activation themselves."""
    model = tiny_model("llama-gqa")
    found = measured(model, tmp_path)[4][2]
    left = 0.0
    for path, x in inputs_of(model, 4, WINDOWS).items():
        own, base, rows = weight(model, 4, path), weight(model, 2, path), damped_rows(x)
        a, b, _ = low_rank_fit(own, base, Moments(x.T @ x, own @ x.T @ x), RANK)
        left += ((rows @ (own - base - b @ a).T).norm() / (rows @ own.T).norm()).item()
    assert found == pytest.approx(left, rel=1e-4)


def test_text_that_shows_few_directions(tmp_path: Path) -> None:
    """Fewer tokens than inputs, so that every second moment is singular; some are zero."""
    model, few = tiny_model("llama-gqa"), token_ids(batch=1, tokens=3)
    found = measured(model, tmp_path, windows=few)[4]
    for j, distance in found.items():
        assert distance == pytest.approx(naive_distance(model, 4, j, few), rel=1e-4)
    with torch.no_grad():
        block_list(model)[4].input_layernorm.weight.zero_()
        block_list(model)[4].mlp.down_proj.weight.zero_()
    blind = measured(model, tmp_path / "blind", windows=few)[4]
    json.dumps(blind, allow_nan=False)
    writes_nothing = {
        j: torch.linalg.svdvals(
            damped_rows(inputs_of(model, 4, few)["mlp.down_proj"]) @ weight(model, j, "mlp.down_proj").T
        )[RANK:].norm()
        for j in blind
    }
    assert sorted(blind, key=blind.__getitem__) == sorted(blind, key=writes_nothing.__getitem__)


def test_inputs_that_are_zero_leave_the_distance_of_weights(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    with torch.no_grad():
        block_list(model)[4].input_layernorm.weight.zero_()
    found = measured(model, tmp_path)[4][2]
    expected_of = 0.0
    for path, x in inputs_of(model, 4, WINDOWS).items():
        rows = damped_rows(x) if x.any() else torch.eye(x.shape[1], dtype=torch.float64)
        own = weight(model, 4, path)
        left = torch.linalg.svdvals(rows @ (own - weight(model, 2, path)).T)[RANK:]
        expected_of += (left.norm() / (rows @ own.T).norm()).item()
    assert not inputs_of(model, 4, WINDOWS)["self_attn.q_proj"].any()
    assert found == pytest.approx(expected_of, rel=1e-4)


def test_what_text_never_shows_does_not_count(tmp_path: Path) -> None:
    """Block 3 is block 2 but for inputs that block 2's text hardly shows; block 5 is nearer by weights alone."""
    model = tiny_model("llama-gqa")
    blocks = block_list(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for other in (3, 5):
            blocks[other].load_state_dict(blocks[2].state_dict())
        blocks[2].input_layernorm.weight[16:] *= 1e-3
        for name in ("q_proj", "k_proj", "v_proj"):
            noise = torch.randn(blocks[2].self_attn.get_submodule(name).weight[:, :16].shape, generator=generator)
            blocks[3].self_attn.get_submodule(name).weight[:, 16:] += 0.2 * noise
            blocks[5].self_attn.get_submodule(name).weight[:, :16] += 0.1 * noise
    by_weights = measured(model, tmp_path, (2,), base_distance="full-rank")
    by_outputs = measured(model, tmp_path, (2,))
    assert choose_bases(by_weights, RANK, NUM_BLOCKS).replicas[0].base == 5
    assert choose_bases(by_outputs, RANK, NUM_BLOCKS).replicas[0].base == 3


def test_a_copy_of_a_pruned_block_is_its_base(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    block_list(model)[5].load_state_dict(block_list(model)[2].state_dict())
    distances = measured(model, tmp_path, (2,))
    assert distances[2][5] == 0
    assert choose_bases(distances, RANK, NUM_BLOCKS).replicas[0].base == 5


def test_other_text_and_another_rank_give_other_distances(tmp_path: Path) -> None:
    """From the same cache."""
    model = tiny_model("llama-gqa")
    other = token_ids(batch=6, tokens=24, seed=4)
    for windows, rank in ((WINDOWS, RANK), (other, RANK), (WINDOWS, 2)):
        found = measured(model, tmp_path, PRUNED, windows, rank=rank)
        assert found[4][0] == pytest.approx(naive_distance(model, 4, 0, windows, rank), rel=1e-4)


@pytest.fixture(scope="module")
def settings(text: Path) -> dict[str, object]:
    calibrated = {"calibration": str(text), "window_length": 64, "windows": 8}
    return calibrated | {"rank": 3, "base_distance": "activation"}


def test_bases_are_chosen_by_it(tiny_source: Path, settings: dict[str, object]) -> None:
    _, plan, record = prune(str(tiny_source), PruneOptions.paper(ratio=0.4, **settings))
    assert record["base_distance"] == record["options"]["base_distance"] == "activation"
    for replica in plan.replicas:
        candidates = record["distances"][replica.block]
        assert set(candidates) == set(plan.kept)
        assert candidates[replica.base] == min(candidates.values())


def test_the_command_chooses_bases_by_it(tiny_source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    options = ["--blocks", "2,4", "--rank", 3, "--calibration", text, "--window-length", 64, "--windows", 8]
    code, _, errors = run("prune", tiny_source, tmp_path, "--plan-only", "--base-distance", "activation", *options)
    assert code == 0, errors
    record = json.loads((tmp_path / "record.json").read_text())
    plan = json.loads((tmp_path / "plan.json").read_text())
    for replica in plan["replicas"]:
        candidates = record["distances"][str(replica["block"])]
        assert min(candidates, key=candidates.__getitem__) == str(replica["base"])


STEPS = 5 + 2 * 4 * 7  # text goes through blocks 0 to 4; 2 pruned blocks, 4 candidates, 7 linears


@pytest.mark.parametrize("at", [2, 4, 20, 34, 50, STEPS - 1])
def test_a_run_that_was_killed_goes_on_to_the_same_distances(
    at: int, tiny_source: Path, settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_SAVE_SECONDS", 0.0)

    def distances(cache: str, track: KillingTrack) -> Distances:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / cache))
        return plan_only(str(tiny_source), PruneOptions.paper(blocks=[2, 4], **settings), track)[1]["distances"]

    whole = KillingTrack()
    wanted = distances("whole", whole)
    assert whole.seen["measuring distances"] == STEPS
    with pytest.raises(Killed):
        distances("killed", KillingTrack("measuring distances", at))
    assert distances("killed", KillingTrack()) == wanted
    assert not [path for path in (tmp_path / "killed").iterdir() if path.is_dir()]


def test_what_was_measured_is_found_again(
    tiny_source: Path, settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run takes no text through the blocks; where more blocks are pruned, only their candidates are new."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    def distances(blocks: list[int]) -> tuple[Distances, int]:
        track = KillingTrack()
        record = plan_only(str(tiny_source), PruneOptions.paper(blocks=blocks, **settings), track)[1]
        return record["distances"], track.seen.get("measuring distances", 0)

    first, _ = distances([2, 4])
    assert distances([2, 4]) == (first, 0)
    more, steps = distances([1, 2, 4])
    assert steps == 2 + 3 * 7
    assert more[2] == {j: distance for j, distance in first[2].items() if j != 1}


def test_named_blocks_need_text_for_it() -> None:
    assert not PruneOptions.paper(blocks=[1]).calibrates
    assert PruneOptions.paper(blocks=[1], base_distance="activation").calibrates


def test_its_memory_is_told_before_the_start(tiny_source: Path, settings: dict[str, object]) -> None:
    by_weights, by_outputs = (
        announced(plan_only, tiny_source, PruneOptions.paper(blocks=[2, 4], **settings | {"base_distance": name}))
        for name in ("frobenius", "activation")
    )
    assert by_outputs.memory > by_weights.memory + 8 * (3 * 32**2 + 64**2 + 48**2)
