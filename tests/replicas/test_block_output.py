"""Adapters fitted to what errors make of the block's output: the weights of errors, and the fit under them."""

from typing import Any

import pytest
import torch
from test_fitting import Problem, filled, fit_all, replicas
from torch import nn
from transformers import PreTrainedModel

from families import FAMILIES, block_list, tiny_model, token_ids
from flexigpt.calibration import Stream, output_weights
from flexigpt.model import block_output
from flexigpt.replicas import Fits
from flexigpt.replicas.least_squares import low_rank_fit


def naive_weights(block: nn.Module, path: str, stream: Stream) -> torch.Tensor:
    """J^T J summed over tokens: J by one derivative for each number that the block puts out."""
    total = torch.zeros(())
    for hidden in stream.hidden:
        args, kwargs = stream._arguments[hidden.shape[:2]][1]

        def put_out(added: torch.Tensor, hidden: Any = hidden, args: Any = args, kwargs: Any = kwargs) -> Any:
            handle = block.get_submodule(path).register_forward_hook(lambda _, __, output: output + added)
            try:
                return block_output(block(hidden, *args, **kwargs))
            finally:
                handle.remove()

        outputs = block.get_submodule(path).weight.shape[0]
        jacobian = torch.autograd.functional.jacobian(put_out, torch.zeros(*hidden.shape[:2], outputs).double())
        rows = jacobian.reshape(-1, hidden.shape[0] * hidden.shape[1], outputs)
        total = total + torch.einsum("vti,vtj->ij", rows, rows)
    return total


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_weights_are_those_of_the_blocks_derivative(path: str) -> None:
    """By random directions, of which many are needed to see it."""
    model = tiny_model("llama", torch.float64)
    block, ids = block_list(model)[1], token_ids(batch=2, tokens=4)
    stream = Stream(model, [ids])
    stream.advance(block_list(model)[0], 0)
    expected = naive_weights(block, path, stream)
    many = Stream(model, [ids] * 2000)
    many.advance(block_list(model)[0], 0)
    found = output_weights(many, block, 1, [path])[path] / 2000
    if path == "mlp.gate_proj":  # more outputs than inputs
        expected = expected.diagonal()
    assert found.shape == expected.shape
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_alternating_least_squares_finds_a_better_weighted_adapter(rank: int, diagonal: bool) -> None:
    problem, generator = Problem(), torch.Generator().manual_seed(rank)
    weights = torch.randn(5, 5, generator=generator).double()
    weights = weights @ weights.T
    weights = weights.diagonal().diag() if diagonal else weights
    moments = problem.moments._replace(weights=weights.diagonal() if diagonal else weights)
    a, b, _ = low_rank_fit(problem.pruned, problem.base, moments, rank)
    damped = weights + 1e-2 * weights.diagonal().mean() * torch.eye(5)
    root = torch.linalg.cholesky(damped).T
    left = problem.wished - problem.rows @ problem.base.T

    def loss(product: torch.Tensor) -> float:
        return ((left - problem.rows @ product.T) @ root.T).square().sum().item()

    best = float("inf")
    for _ in range(5):
        down = torch.randn(rank, 7, generator=generator).double()
        for _ in range(500):
            up = torch.linalg.lstsq(problem.rows @ down.T, left).solution.T
            down = torch.linalg.lstsq(problem.rows, left @ root.T @ torch.linalg.pinv(root @ up).T).solution.T
        best = min(best, loss(up @ down))
    assert loss(b @ a) <= best * (1 + 1e-9)
    assert best == pytest.approx(loss(b @ a), rel=1e-3)
    a_alike, b_alike, _ = low_rank_fit(problem.pruned, problem.base, problem.moments, rank)
    assert loss(b @ a) < loss(b_alike @ a_alike)


@torch.no_grad()
def block_error(source: PreTrainedModel, weighted: bool) -> float:
    """Of what a replica puts out on text that it was not fitted to, by the energy of what the source's block adds."""
    model = filled(source, replicas(20, b1=0), "zero", output_norm=False)
    fit_all(source, model, Fits(adapter=low_rank_fit, weighted=weighted))
    stream = Stream(source, [token_ids(batch=16, tokens=32, seed=9)])
    stream.advance(block_list(source)[0], 0)
    (ours,) = stream.outputs(model.block_list[1], 1)
    (theirs,) = stream.outputs(block_list(source)[1], 1)
    return ((ours - theirs).norm() / (theirs - stream.hidden[0]).norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_is_nearer_than_by_its_linears(family: str) -> None:
    source = tiny_model(family)
    assert block_error(source, weighted=True) < block_error(source, weighted=False)
