"""Adapters and output norms of a new replica."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from flexigpt.architecture import block_list, weight_matrix
from flexigpt.errors import InputError
from flexigpt.factorization import truncated_svd
from flexigpt.fitting import AdapterFit
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM, NormedOutput, SharedLinear
from flexigpt.plan import Plan, Replica
from flexigpt.progress import Track, silent
from flexigpt.regression import low_rank_fit

# The paper's rank 256 at LLaMA-2 7B's hidden size 4096.
_HIDDEN_SIZE_PER_RANK = 16
DEFAULT_NORM_INIT = 0.05

# ranks 1, 2, 4 ... r, and the share of |W_i - W_j|_F^2 that so many of an adapter's directions mend.
Spectrum = dict[str, list[Any]]
AdapterStart = Callable[[torch.Tensor, torch.Tensor, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def svd_adapter(
    pruned: torch.Tensor,
    base: torch.Tensor,
    rank: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-r approximation of W_i - W_j (eq. 7-8): A = V_r^T, B = U_r S_r."""
    difference = truncated_svd(pruned.double() - base.double(), rank)
    return difference.right.T, difference.left * difference.values


def zero_adapter(
    pruned: torch.Tensor,
    base: torch.Tensor,
    rank: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B = 0 and A random with variance 1 / inputs, as LoRA starts: the replica computes what its base does."""
    outputs, inputs = base.shape
    adapter = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
    return adapter, torch.zeros(outputs, rank)


class AdapterInit(NamedTuple):
    """How adapters start.

    Attributes:
        start: (W_i, W_j, rank, random generator) -> A (rank, inputs), B (outputs, rank).
        fit: of calibration text, which then follows; None: the start stands.
    """

    start: AdapterStart
    fit: AdapterFit | None = None


ADAPTER_INITS: dict[str, AdapterInit] = {
    # The method (eq. 7-8).
    "svd": AdapterInit(svd_adapter),
    # Table 4, without SVD initialisation; and where blocks are repeated.
    "zero": AdapterInit(zero_adapter),
    # Least squares on what goes through the replica, instead of on weights.
    "activation": AdapterInit(zero_adapter, fit=low_rank_fit),
}
# The word for gamma by least squares, in the place of a constant.
FITTED = "fitted"


def parse_norm_init(norm_init: str | float | None) -> float | str | None:
    """A constant for gamma, `fitted`, or None.

    Raises:
        InputError: anything else.
    """
    if norm_init is None or norm_init == FITTED:
        return norm_init
    try:
        value = float(norm_init)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--norm-init {norm_init} cannot be used: give a small constant, as 0.05, or {FITTED}")
    return value


def default_rank(hidden_size: int) -> int:
    """Rank of the adapters where none is asked for."""
    return max(1, hidden_size // _HIDDEN_SIZE_PER_RANK)


@torch.no_grad()
def initialize_replicas(
    model: FlexiGPTForCausalLM,
    source: PreTrainedModel,
    plan: Plan,
    *,
    adapter_init: str,
    norm_init: float,
    seed: int,
    source_blocks: Sequence[int] | None = None,
    track: Track = silent,
) -> None:
    """Fills what is the replicas' own: adapters, output norms and bias differences.

    Args:
        model: the compact model; its replicas' own tensors may still be on the meta device.
        source: the model that the blocks come from.
        plan: the model's plan.
        adapter_init: a key of ADAPTER_INITS.
        norm_init: the constant that the output norms' gamma starts at.
        seed: for random adapters.
        source_blocks: the source's block behind each logical block; None: the same numbering.
        track: told of each replica.
    """
    generator = torch.Generator().manual_seed(seed)
    own_blocks = model.block_list
    origins = block_list(source) if source_blocks is None else [block_list(source)[i] for i in source_blocks]
    for replica in track(plan.replicas, "initialising replicas", len(plan.replicas)):
        for path, module in own_blocks[replica.block].named_modules():
            if isinstance(module, SharedLinear):
                linear_path = path.removesuffix(".inner")
                own, base = (
                    cast(nn.Linear, origins[i].get_submodule(linear_path)) for i in (replica.block, replica.base)
                )
                _fill_linear(module, own, base, replica, ADAPTER_INITS[adapter_init].start, generator)
            elif isinstance(module, NormedOutput):
                like = next(source.parameters())
                module.output_norm.weight = _parameter(torch.full(module.output_norm.normalized_shape, norm_init), like)


def _fill_linear(
    shared: SharedLinear,
    own: nn.Linear,
    base: nn.Linear,
    replica: Replica,
    init: AdapterStart,
    generator: torch.Generator,
) -> None:
    weight = weight_matrix(own)
    shared.adapter_A, shared.adapter_B = (
        _parameter(factor, own.weight) for factor in init(weight, weight_matrix(base), replica.rank, generator)
    )
    if shared.bias_difference is not None:
        shared.bias_difference = _parameter(own.bias - base.bias, own.bias)


@torch.no_grad()
def adapter_spectra(model: FlexiGPTForCausalLM, source: PreTrainedModel, plan: Plan) -> dict[int, dict[str, Spectrum]]:
    """What part of the difference of two weights each adapter mends, by block and path of the linear.

    Args:
        model: the compact model, its adapters filled.
        source: the source model.
        plan: the model's plan; blocks are numbered as the source's.
    """
    spectra: dict[int, dict[str, Spectrum]] = {replica.block: {} for replica in plan.replicas}
    for replica in plan.replicas:
        for path, module in model.block_list[replica.block].named_modules():
            if isinstance(module, SharedLinear):
                path = path.removesuffix(".inner")
                own, base = (block_list(source)[i].get_submodule(path) for i in (replica.block, replica.base))
                spectra[replica.block][path] = _spectrum(module, weight_matrix(own) - weight_matrix(base))
    return spectra


def _spectrum(shared: SharedLinear, difference: torch.Tensor) -> Spectrum:
    """What is left of W_i - W_j after the first 1, 2, 4 ... of the adapter's directions."""
    difference = difference.float()
    energy = difference.square().sum().item()
    rank = len(shared.adapter_A)
    ranks = [*(2**power for power in range(rank.bit_length()) if 2**power < rank), rank]
    shares = []
    for r in ranks:
        left = difference - shared.adapter_B[:, :r].float() @ shared.adapter_A[:r].float()
        shares.append(round(1 - left.square().sum().item() / energy, 5) if energy else 1.0)
    return {"ranks": ranks, "mended": shares}


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(device=like.device, dtype=like.dtype).contiguous())
