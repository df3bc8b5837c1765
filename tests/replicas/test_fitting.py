"""Kept blocks refitted to calibration text, against naive least squares and the source itself."""

import copy
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from families import (
    FAMILIES,
    NUM_BLOCKS,
    block_list,
    compact_of,
    initialize_replicas,
    remove_blocks,
    tiny_model,
    token_ids,
)
from flexigpt import FlexiGPTForCausalLM, Plan, PruneOptions, Replica, prune, remove
from flexigpt.calibration import SourceStates, sensitivities
from flexigpt.model import SublayerReplica, block_output, find_architecture, sublayer_paths
from flexigpt.replicas import readers_of_units, refit_kept
from flexigpt.replicas.least_squares import Moments, ridge_fit
from flexigpt.weights import StreamedModel, exchange_parameters

WINDOWS = token_ids(batch=12, tokens=32, seed=3)


def replicas(rank: int, **bases: int) -> Plan:
    made = tuple(Replica(block=int(block[1:]), base=base, rank=rank) for block, base in bases.items())
    return Plan(num_blocks=NUM_BLOCKS, replicas=made)


def filled(source: PreTrainedModel, plan: Plan) -> FlexiGPTForCausalLM:
    model = compact_of(source, plan, output_norm=False)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


@torch.no_grad()
def error(model: PreTrainedModel, source: PreTrainedModel, ids: torch.Tensor) -> float:
    """Of the hidden states after the last block, relative."""
    ours, theirs = (m.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state for m in (model, source))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("keeps", [False, True])
def test_a_kept_weight_is_refitted_by_least_squares(keeps: bool) -> None:
    """The same problem with its damping, a tenth of the inputs' mean variance, written out as further rows."""
    tokens, inputs, outputs = 400, 7, 5
    generator = torch.Generator().manual_seed(2)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).double()

    x = draw(tokens, inputs) @ draw(inputs, inputs)
    y = x @ draw(inputs, outputs) + draw(tokens, outputs)
    kept = draw(outputs, inputs)
    moments = x.T @ x / tokens
    before = moments.clone()
    found = ridge_fit(kept, Moments(moments, y.T @ x / tokens), keeps=keeps)
    assert torch.equal(moments, before) == keeps
    damping = (0.1 * x.square().mean()).sqrt()
    rows = torch.cat((x / tokens**0.5, damping * torch.eye(inputs)))
    wished = torch.cat((y / tokens**0.5, damping * kept.T))
    expected = np.linalg.lstsq(rows.numpy(), wished.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_refitted_kept_blocks_are_nearer_to_the_source(family: str) -> None:
    """Behind replicas, and where blocks were removed; the source itself stays as it was."""
    source = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    plan = replicas(4, b1=0, b3=2)
    plain, refitted = filled(source, plan), filled(source, plan)
    refit_kept(StreamedModel(source), StreamedModel(refitted), range(NUM_BLOCKS), WINDOWS)
    shorter, mended = remove_blocks(source, [1, 3]), remove_blocks(source, [1, 3])
    refit_kept(StreamedModel(source), StreamedModel(mended), [0, None, 1, None, 2, 3], WINDOWS)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in before.items())
    if family == "opt-norm-after":
        return  # the residual sum is normalised: what a linear adds is not what is left
    assert error(refitted, source, WINDOWS) < error(plain, source, WINDOWS)
    assert error(mended, source, WINDOWS) < error(shorter, source, WINDOWS)


@torch.no_grad()
def naively_refitted(source: PreTrainedModel, model: PreTrainedModel, units: dict[int, torch.Tensor]) -> None:
    """Both models as a whole for each linear, and least squares with further rows for the damping."""
    roles = find_architecture(source.config).roles

    def run(one: PreTrainedModel, block: int, path: str) -> tuple[torch.Tensor, ...]:
        """What a block is given, what a linear in it is given and returns, and what the block puts out."""
        seen: dict[str, torch.Tensor] = {}
        of_block = block_list(one)[block]
        with ExitStack() as hooks:
            linear = of_block.get_submodule(path)
            hooks.callback(linear.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out)).remove)
            note = lambda _, args, kwargs, out: seen.update(enters=args[0], leaves=block_output(out))  # noqa: E731
            hooks.callback(of_block.register_forward_hook(note, with_kwargs=True).remove)
            one(input_ids=WINDOWS, use_cache=False)
        return tuple(seen[key].flatten(0, -2).double() for key in ("enters", "x", "y", "leaves"))

    def solved(kept: torch.Tensor, x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
        damping = (ridge * x.square().mean() * len(x)).sqrt()
        rows, wished = torch.cat((x, damping * torch.eye(x.shape[1]))), torch.cat((y, damping * kept.T))
        return torch.linalg.lstsq(rows, wished, driver="gelsd").solution.T

    for block in range(NUM_BLOCKS):
        for path in (roles.output, roles.down):
            theirs, ours = run(source, block, path), run(model, block, path)
            linear = block_list(model)[block].get_submodule(path)
            is_mlp, has_bias, transposed = path == roles.down, linear.bias is not None, isinstance(linear, Conv1D)
            one = torch.ones_like(ours[1][:, :1]) if has_bias else ours[1][:, :0]
            kept = (linear.weight.T if transposed else linear.weight).double()
            kept = torch.cat((kept, linear.bias.double()[:, None]), 1) if has_bias else kept
            if is_mlp and block in units:
                whole = copy.deepcopy(model)  # with the source's MLP in this block
                for name in filter(None, (roles.gate, roles.up, roles.down)):
                    block_list(whole)[block].set_submodule(name, block_list(source)[block].get_submodule(name))
                kept = solved(kept, torch.cat((ours[1], one), 1), run(whole, block, path)[2], 1e-3)
            wished = ours[2] + theirs[3] - ours[3] if is_mlp else theirs[2] + theirs[0] - ours[0]
            found = solved(kept, torch.cat((ours[1], one), 1), wished, 0.1).float()
            fitted = {"bias": found[:, -1]} if has_bias else {}
            found = found[:, :-1] if has_bias else found
            exchange_parameters(linear, fitted | {"weight": found.T if transposed else found})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_refit_in_few_passes_is_that_of_whole_models(family: str) -> None:
    """Biases, transposed weights; each block mends what those before it left."""
    source, units = tiny_model(family), {i: torch.arange(i + 1, 20, 2) for i in range(NUM_BLOCKS)}
    rows = [SublayerReplica(block=i, sublayer="mlp", form="units", units=len(kept)) for i, kept in units.items()]
    models = [compact_of(source, Plan(num_blocks=NUM_BLOCKS, sublayers=tuple(rows))).eval() for _ in range(2)]
    for model in models:
        for block, kept in units.items():
            readers = readers_of_units(StreamedModel(source), block, sublayer_paths(source)["mlp"], kept)
            StreamedModel(model).own(block, readers)
    refit_kept(StreamedModel(source), StreamedModel(models[0]), range(NUM_BLOCKS), WINDOWS, units=units)
    naively_refitted(source, models[1], units)
    for (name, found), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm(), name  # one sums in float32, the other in float64


def test_bases_are_left_alone() -> None:
    source = tiny_model("llama")
    model = filled(source, replicas(4, b1=3, b4=2))
    refit_kept(StreamedModel(source), StreamedModel(model), range(NUM_BLOCKS), WINDOWS)
    changed = [
        index
        for index, block in enumerate(model.block_list)
        if index not in (1, 4)
        and not torch.equal(block.mlp.down_proj.weight, source.model.layers[index].mlp.down_proj.weight)
    ]
    assert changed == [5]


def test_removal_can_refit_the_kept_blocks(tiny_source: Path, text: Path) -> None:
    calibrated = {"calibration": str(text), "window_length": 64, "windows": 16}
    shorter, _, record = remove(str(tiny_source), PruneOptions.paper(blocks=[2, 3], refit_kept=True, **calibrated))
    plain, _, _ = remove(str(tiny_source), PruneOptions.paper(blocks=[2, 3]))
    assert record["options"]["refit_kept"] is True
    differ = [
        not torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight)
        for a, b in zip(shorter.model.layers, plain.model.layers, strict=True)
    ]
    assert differ == [False, True, True, True]


def test_pruning_can_refit_by_a_plan_with_text_of_its_own(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    """What is stored and the replicas stay as they are without."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(replicas(4, b2=1).to_dict()))
    calibrated = {"calibration": str(text), "window_length": 64, "windows": 8}
    refitted, plan, record = prune(str(tiny_source), PruneOptions.paper(plan=path, refit_kept=True, **calibrated))
    plain, _, without = prune(str(tiny_source), PruneOptions.paper(plan=path))
    assert plan == replicas(4, b2=1)
    assert record["calibration"]["windows"] == [8, 64]
    assert record["compact"] == without["compact"]
    differ = [
        any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        for one, other in zip(refitted.block_list, plain.block_list, strict=True)
    ]
    assert differ == [False, False, False, True, True, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_gives_the_same_whether_the_sources_states_are_known_or_found_again(family: str) -> None:
    """To the bit, in memory and in files: a run that was killed has to find them again."""
    source, units = tiny_model(family), {i: torch.arange(i + 1, 16, 2) for i in range(1, NUM_BLOCKS)}
    roles = find_architecture(source.config).roles
    rows = [SublayerReplica(block=i, sublayer="mlp", form="units", units=len(kept)) for i, kept in units.items()]
    found = []
    for folder in (None, Path(tempfile.gettempdir())):
        states = SourceStates(folder)
        list(sensitivities(StreamedModel(source), WINDOWS, (roles.output, roles.down), spill=folder, states=states))
        for known in (None, states):
            model = compact_of(source, Plan(num_blocks=NUM_BLOCKS, sublayers=tuple(rows))).eval()
            for block, kept in units.items():
                readers = readers_of_units(StreamedModel(source), block, sublayer_paths(source)["mlp"], kept)
                StreamedModel(model).own(block, readers)
            given = (StreamedModel(source), StreamedModel(model), range(NUM_BLOCKS), WINDOWS)
            refit_kept(*given, units=units, spill=folder, states=known)
            found.append(list(model.parameters()))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    shorter = [remove_blocks(source, [1, 3]) for _ in range(2)]
    for model, known in zip(shorter, (None, states), strict=True):
        refit_kept(StreamedModel(source), StreamedModel(model), [0, None, 1, None, 2, 3], WINDOWS, states=known)
    assert all(map(torch.equal, *(list(model.parameters()) for model in shorter)))
