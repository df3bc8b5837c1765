"""Replicas fitted to calibration text, against naive least squares and the source itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from families import (
    FAMILIES,
    FULL_RANK,
    NUM_BLOCKS,
    block_list,
    compact_of,
    initialize_replicas,
    remove_blocks,
    tiny_model,
    token_ids,
)
from flexigpt import FlexiGPTForCausalLM, Plan, PruneOptions, Replica, prune, remove
from flexigpt.model import find_architecture
from flexigpt.replicas import Fits, fit_blocks
from flexigpt.replicas.least_squares import Moments, low_rank_fit, ridge_fit
from flexigpt.weights import StreamedModel

WINDOWS = token_ids(batch=12, tokens=32, seed=3)


def replicas(rank: int, **bases: int) -> Plan:
    made = tuple(Replica(block=int(block[1:]), base=base, rank=rank) for block, base in bases.items())
    return Plan(num_blocks=NUM_BLOCKS, replicas=made)


def filled(source: PreTrainedModel, plan: Plan, init: str, output_norm: bool = True) -> FlexiGPTForCausalLM:
    model = compact_of(source, plan, output_norm)
    initialize_replicas(model, source, plan, adapter_init=init, norm_init=0.5, seed=0)
    return model.eval()


def fit_all(source: PreTrainedModel, model: FlexiGPTForCausalLM, fits: Fits) -> None:
    fit_blocks(StreamedModel(source), StreamedModel(model), range(NUM_BLOCKS), WINDOWS, fits)


def fitted(source: PreTrainedModel, plan: Plan, output_norm: bool = False, norms: bool = False) -> FlexiGPTForCausalLM:
    model = filled(source, plan, "zero", output_norm)
    fits = Fits(adapter=low_rank_fit, norms=norms)
    fit_all(source, model, fits)
    return model


@torch.no_grad()
def error(model: PreTrainedModel, source: PreTrainedModel, ids: torch.Tensor) -> float:
    """Of the hidden states after the last block, relative."""
    ours, theirs = (m.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state for m in (model, source))
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_what_a_replica_mends_is_what_its_block_did() -> None:
    """By the hidden states of two stock forward passes."""
    source, plan = tiny_model("llama-gqa"), replicas(4, b2=1, b3=1, b5=4)
    model = filled(source, plan, "zero", output_norm=False)
    streams = StreamedModel(source), StreamedModel(model)
    mended = fit_blocks(*streams, range(NUM_BLOCKS), WINDOWS, Fits(adapter=low_rank_fit, kept=True))
    entering: dict[tuple[bool, int], torch.Tensor] = {}
    leaving: dict[tuple[bool, int], torch.Tensor] = {}
    for one in (source, model):
        for index, block in enumerate(block_list(one)):

            def note(
                _: object, args: object, output: torch.Tensor, key: tuple[bool, int] = (one is model, index)
            ) -> None:
                entering[key], leaving[key] = args[0].double(), output.double()  # type: ignore[index]

            block.register_forward_hook(note)
        one(input_ids=WINDOWS, use_cache=False)
    assert mended.keys() == {2, 3, 5}
    for block, share in mended.items():
        without = (leaving[False, block] - entering[True, block]).square().sum()
        left = (leaving[False, block] - leaving[True, block]).square().sum()
        assert share == pytest.approx(1 - (left / without).item(), abs=1e-4)
        assert 0.05 < share < 1


TOKENS, INPUTS, OUTPUTS = 400, 7, 5


class Problem:
    """Random tokens, and the same least squares problem with its damping written out as further rows."""

    def __init__(self, seed: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator).double()

        x = draw(TOKENS, INPUTS) @ draw(INPUTS, INPUTS)
        y = x @ draw(INPUTS, OUTPUTS) + draw(TOKENS, OUTPUTS)
        self.pruned, self.base = draw(OUTPUTS, INPUTS), draw(OUTPUTS, INPUTS)
        self.moments = Moments(x.T @ x / TOKENS, y.T @ x / TOKENS)
        damping = (1e-3 * x.square().mean()).sqrt()
        self.rows = torch.cat((x / TOKENS**0.5, damping * torch.eye(INPUTS)))
        self.wished = torch.cat((y / TOKENS**0.5, damping * self.pruned.T))

    def loss(self, weight: torch.Tensor) -> float:
        return (self.wished - self.rows @ weight.T).square().sum().item()


def test_at_full_rank_the_fit_is_that_of_least_squares() -> None:
    problem = Problem()
    a, b, _ = low_rank_fit(problem.pruned, problem.base, problem.moments, OUTPUTS)
    expected = np.linalg.lstsq(problem.rows.numpy(), problem.wished.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(problem.base + b @ a, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_alternating_least_squares_finds_a_better_adapter(rank: int) -> None:
    problem = Problem()
    a, b, _ = low_rank_fit(problem.pruned, problem.base, problem.moments, rank)
    ours = problem.loss(problem.base + b @ a)
    left = problem.wished - problem.rows @ problem.base.T
    best = float("inf")
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        down = torch.randn(rank, INPUTS, generator=generator).double()
        for _ in range(300):
            up = torch.linalg.lstsq(problem.rows @ down.T, left).solution.T
            down = torch.linalg.lstsq(problem.rows, left @ torch.linalg.pinv(up).T).solution.T
        best = min(best, problem.loss(problem.base + up @ down))
    assert ours <= best * (1 + 1e-9)
    assert best == pytest.approx(ours, rel=1e-3)


def test_inputs_that_never_vary_leave_the_adapter_of_the_weights() -> None:
    """Text that shows nothing: the SVD of the difference."""
    pruned, base = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    a, b, _ = low_rank_fit(pruned, base, Moments(torch.zeros(7, 7).double(), torch.zeros(5, 7).double()), 2)
    left, values, right = torch.linalg.svd(pruned - base, full_matrices=False)
    torch.testing.assert_close(b @ a, (left[:, :2] * values[:2]) @ right[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_full_rank_give_back_the_source(family: str) -> None:
    source = tiny_model(family, torch.float64)
    model = fitted(source, replicas(FULL_RANK, b1=0, b2=0, b4=3))
    assert error(model, source, WINDOWS) < 2e-3
    assert error(model, source, token_ids(seed=9)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_fitted_replicas_are_nearer_than_those_of_weights(family: str) -> None:
    """On text that they were not fitted to; adapters and norms, and adapters alone."""
    source = tiny_model(family)
    plan = replicas(8, b1=0, b2=0, b4=3)
    unseen = token_ids(batch=4, tokens=32, seed=9)
    by_weights = error(filled(source, plan, "svd"), source, unseen)
    assert error(fitted(source, plan, output_norm=True, norms=True), source, unseen) < by_weights
    assert error(fitted(source, plan), source, unseen) < by_weights


def test_gamma_is_that_of_least_squares() -> None:
    """Of the first replica's attention: on what the source's attention wrote, channel by channel."""
    source = tiny_model("llama")
    plan = replicas(4, b1=0)
    model = filled(source, plan, "svd")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "adapter" in name}
    fit_all(source, model, Fits(norms=True))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    normed, wanted = [], []
    output = model.block_list[1].self_attn.o_proj
    output.inner.register_forward_hook(lambda _, __, out: normed.append(F.layer_norm(out, out.shape[-1:]).detach()))
    source.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _, __, out: wanted.append(out.detach()))
    with torch.no_grad():
        model(WINDOWS)
        source(WINDOWS)
    n, w = (torch.cat(values).flatten(0, 1).double().numpy() for values in (normed, wanted))
    expected = [np.linalg.lstsq(n[:, [c]], w[:, c], rcond=None)[0][0] for c in range(n.shape[1])]
    np.testing.assert_allclose(output.output_norm.weight.detach().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_later_replicas_mend_what_earlier_ones_left() -> None:
    """Fitted one behind the other they beat replicas that were each fitted behind unpruned blocks."""
    source = tiny_model("llama")
    together = fitted(source, replicas(8, b1=0, b2=0, b4=3))
    apart = filled(source, replicas(8, b1=0, b2=0, b4=3), "zero", output_norm=False)
    for block, base in ((1, 0), (2, 0), (4, 3)):
        alone = fitted(source, replicas(8, **{f"b{block}": base}))
        apart.block_list[block].load_state_dict(alone.block_list[block].state_dict())
    assert error(together, source, WINDOWS) < error(apart, source, WINDOWS)


def test_pruning_with_fits_needs_text_and_says_what_it_did(tiny_source: Path, text: Path) -> None:
    calibrated = {"calibration": str(text), "window_length": 64, "windows": 16}
    found = {}
    for init, norm in (("svd", 0.05), ("activation", "fitted")):
        options = PruneOptions.paper(
            blocks=[2, 4], rank=4, adapter_init=init, output_norm=norm, perplexity=str(text), **calibrated
        )
        _, _, record = prune(str(tiny_source), options)
        found[init] = record
    assert found["activation"]["options"]["output_norm"] == "fitted"
    assert (found["activation"]["fitted"], found["svd"]["fitted"]) == (True, False)
    assert found["activation"]["compact"] == found["svd"]["compact"]


def test_a_plan_can_be_fitted_with_text_of_its_own(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(replicas(4, b2=1).to_dict()))
    options = PruneOptions.paper(
        plan=path, adapter_init="activation", calibration=str(text), window_length=64, windows=8
    )
    _, plan, record = prune(str(tiny_source), options)
    assert plan == replicas(4, b2=1)
    assert record["calibration"]["windows"] == [8, 64]


def test_a_kept_weight_is_refitted_by_least_squares() -> None:
    problem = Problem()
    found = ridge_fit(problem.pruned, problem.moments)
    damping = (0.1 * problem.moments.inputs.diagonal().mean()).sqrt()
    rows = torch.cat((problem.rows[:TOKENS], damping * torch.eye(INPUTS)))
    wished = torch.cat((problem.wished[:TOKENS], damping * problem.pruned.T))
    expected = np.linalg.lstsq(rows.numpy(), wished.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_refitted_kept_blocks_are_nearer_to_the_source(family: str) -> None:
    """Behind replicas, and where blocks were removed; the source itself stays as it was."""
    source = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    plan = replicas(4, b1=0, b3=2)
    plain, refitted = fitted(source, plan), filled(source, plan, "zero", output_norm=False)
    fits = Fits(adapter=low_rank_fit, kept=True)
    fit_all(source, refitted, fits)
    shorter, mended = remove_blocks(source, [1, 3]), remove_blocks(source, [1, 3])
    standing = [0, None, 1, None, 2, 3]
    fit_blocks(StreamedModel(source), StreamedModel(mended), standing, WINDOWS, Fits(kept=True))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in before.items())
    if find_architecture(source.config).output_norms[0] not in find_architecture(source.config).linears:
        return  # a norm of the family's own writes to the residual stream: nothing can be refitted
    if family == "opt-norm-after":
        return  # the residual sum is normalised: what a linear adds is not what is left
    assert error(refitted, source, WINDOWS) < error(plain, source, WINDOWS)
    assert error(mended, source, WINDOWS) < error(shorter, source, WINDOWS)


def test_bases_are_left_alone() -> None:
    source = tiny_model("llama")
    plan = replicas(4, b1=3, b4=2)
    model = filled(source, plan, "svd")
    fit_all(source, model, Fits(kept=True))
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
