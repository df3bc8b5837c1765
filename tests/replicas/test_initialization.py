import pytest
import torch
from transformers import PreTrainedModel

from families import NUM_BLOCKS, block_list, compact_of, initialize_replicas, tiny_model
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from flexigpt.model import NormedOutput, SharedLinear, find_architecture, weight_matrix
from flexigpt.replicas.initialization import ADAPTER_INITS

RANK = 5


def replica_of(source: PreTrainedModel, init: str, seed: int = 0) -> FlexiGPTForCausalLM:
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=(Replica(block=3, base=1, rank=RANK),))
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init=init, norm_init=0.05, seed=seed)
    return model


def shared_linears(model: FlexiGPTForCausalLM) -> dict[str, SharedLinear]:
    modules = model.block_list[3].named_modules()
    return {path.removesuffix(".inner"): m for path, m in modules if isinstance(m, SharedLinear)}


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "opt-norm-before", "phi3"])
def test_svd_adapters_leave_the_least_residual_of_that_rank(family: str) -> None:
    """Eckart-Young: |W_i - (W_j + B A)|_F^2 is the sum of the squared singular values beyond the rank."""
    source = tiny_model(family, torch.float64)
    model = replica_of(source, "svd")
    assert set(shared_linears(model)) == set(find_architecture(source.config).linears)
    for path, shared in shared_linears(model).items():
        own, base = (weight_matrix(block_list(source)[i].get_submodule(path)) for i in (3, 1))
        residual = (own - base - shared.adapter_B @ shared.adapter_A).norm()
        least = torch.linalg.svdvals(own - base)[RANK:].norm()
        torch.testing.assert_close(residual, least, rtol=1e-9, atol=0)


def test_the_factors_are_those_of_the_paper() -> None:
    """Equations 7 and 8: A = V_r^T has orthonormal rows, B = U_r S_r orthogonal columns."""
    for shared in shared_linears(replica_of(tiny_model("llama-gqa", torch.float64), "svd")).values():
        identity = torch.eye(RANK, dtype=torch.float64)
        torch.testing.assert_close(shared.adapter_A @ shared.adapter_A.T, identity, rtol=0, atol=1e-9)
        gram = shared.adapter_B.T @ shared.adapter_B
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-8)


def test_zero_adapters_compute_the_base_and_can_learn() -> None:
    source = tiny_model("opt-norm-before")
    for path, shared in shared_linears(replica_of(source, "zero")).items():
        x = torch.randn(4, shared.in_features)
        own, base = (block_list(source)[i].get_submodule(path) for i in (3, 1))
        torch.testing.assert_close(shared(x), base(x) + own.bias - base.bias)
        assert shared.adapter_A.abs().sum() > 0
        assert shared.adapter_B.abs().sum() == 0


def test_output_norms_start_at_the_constant() -> None:
    model = replica_of(tiny_model("llama-gqa"), "svd")
    norms = [m.output_norm for m in model.modules() if isinstance(m, NormedOutput)]
    assert len(norms) == 2
    assert all((norm.weight == 0.05).all() and norm.bias is None for norm in norms)


@pytest.mark.parametrize("init", ADAPTER_INITS)
def test_same_seed_same_bits(init: str) -> None:
    source = tiny_model("llama-gqa")
    first, again, other = (replica_of(source, init, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) for name in first) == (init == "svd")
