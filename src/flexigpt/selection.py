"""Scores and distances -> plan: which blocks are pruned, and which base stands in for each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.architecture import block_list, find_architecture, weight_matrix
from flexigpt.errors import InputError
from flexigpt.factorization import tail_norm, truncated_svd, unmended
from flexigpt.plan import Plan, Replica
from flexigpt.progress import Track, silent


def influence(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Block influence (eq. 1): 1 - cos(X_i, X_{i+1}) of each token. (tokens, hidden) twice -> (tokens,)."""
    return 1 - F.cosine_similarity(inputs, outputs, dim=-1)


def angular(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Angular distance arccos(cos(X_i, X_{i+1})) / pi of each token (Gromov et al. 2024, eq. 7)."""
    return F.cosine_similarity(inputs, outputs, dim=-1).clamp(-1, 1).arccos() / math.pi


def relative_magnitude(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """|X_{i+1} - X_i| / |X_{i+1}| of each token (Samragh et al. 2023, section 3.1)."""
    return (outputs - inputs).norm(dim=-1) / outputs.norm(dim=-1)


# A score is the mean over tokens of its function; the blocks of lowest score are pruned.
BLOCK_SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "influence": influence,
    "angular": angular,
    "relative-magnitude": relative_magnitude,
}


@dataclass(frozen=True, kw_only=True)
class BaseDistance:
    """How far a candidate's linear is from a pruned block's.

    Attributes:
        prepare: (weight (outputs, inputs), rank) -> what is compared, made once for each weight.
        between: (prepared pruned, prepared candidate, rank) -> the distance, a scalar.
    """

    prepare: Callable[[torch.Tensor, int], Any]
    between: Callable[[Any, Any, int], torch.Tensor]


BASE_DISTANCES: dict[str, BaseDistance] = {
    # The method (eq. 2-4): what an adapter cannot mend between the low-rank cores of the two.
    "low-rank": BaseDistance(
        prepare=truncated_svd,
        between=lambda pruned, candidate, rank: unmended(pruned, candidate),
    ),
    # Figure 4 (b): without the high-rank elimination.
    "full-rank": BaseDistance(
        prepare=lambda weight, rank: weight,
        between=lambda pruned, candidate, rank: tail_norm(pruned.double() - candidate.double(), rank),
    ),
    # Figure 4 (c): plain |W_i - W_j|_F.
    "frobenius": BaseDistance(
        prepare=lambda weight, rank: weight,
        between=lambda pruned, candidate, rank: (pruned.double() - candidate.double()).norm(),
    ),
}
DEFAULT_DISTANCE = "low-rank"


def num_pruned_at(ratio: float, num_blocks: int) -> int:
    """floor(ratio x blocks), safe from rounding (0.29 x 100 is 29).

    Raises:
        InputError: a ratio outside (0, 1), or one that prunes nothing.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio {ratio} is outside (0, 1): give the share of the {num_blocks} blocks to prune, as 0.3")
    num_pruned = math.floor(ratio * num_blocks + 1e-9)
    if num_pruned == 0:
        raise InputError(
            f"ratio {ratio} of {num_blocks} blocks prunes nothing: give at least {math.ceil(1000 / num_blocks) / 1000}"
        )
    return num_pruned


def check_blocks(blocks: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Blocks to prune that a user named, ascending.

    Raises:
        InputError: none, one that does not exist, one named twice, or all of them.
    """
    given = ", ".join(map(str, blocks)) or "none"
    strange = sorted(set(blocks) - set(range(num_blocks)))
    if not blocks or strange or len(set(blocks)) < len(blocks):
        raise InputError(f"blocks {given} cannot be pruned: name some of 0 to {num_blocks - 1}, each once")
    if len(blocks) == num_blocks:
        raise InputError(f"pruning all {num_blocks} blocks leaves none: keep at least one")
    return tuple(sorted(blocks))


def lowest(scores: Sequence[float], num_pruned: int) -> tuple[int, ...]:
    """The blocks of lowest score, ascending by block; the earlier block first where scores are equal."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda block: scores[block])[:num_pruned]))


@torch.no_grad()
def base_distances(
    model: PreTrainedModel, pruned: Sequence[int], rank: int, distance: str, track: Track = silent
) -> dict[int, dict[int, float]]:
    """Distance of each pruned block to each kept block: the sum over its linears.

    One linear at a time: what is held is one prepared weight for each block.

    Args:
        model: a source model.
        pruned: the pruned blocks.
        rank: of the low-rank cores and of the adapters.
        distance: a key of BASE_DISTANCES.
        track: told of each linear of each block.
    """
    blocks = block_list(model)
    linears = find_architecture(model.config).linears
    kept = [block for block in range(len(blocks)) if block not in pruned]
    measure = BASE_DISTANCES[distance]
    totals = {i: dict.fromkeys(kept, 0.0) for i in pruned}
    steps = track(
        ((path, i) for path in linears for i in range(len(blocks))), "measuring distances", len(linears) * len(blocks)
    )
    prepared: dict[int, Any] = {}
    for path, i in steps:
        prepared[i] = measure.prepare(weight_matrix(blocks[i].get_submodule(path)), rank)
        if len(prepared) == len(blocks):
            for pruned_block in pruned:
                for candidate in kept:
                    apart = measure.between(prepared[pruned_block], prepared[candidate], rank)
                    totals[pruned_block][candidate] += apart.item()
            prepared = {}
    return totals


def choose_bases(distances: dict[int, dict[int, float]], rank: int, num_blocks: int) -> Plan:
    """The plan in which each pruned block's base is the candidate of least distance (eq. 5)."""
    replicas = tuple(
        Replica(block=block, base=min(candidates, key=lambda j: candidates[j]), rank=rank)
        for block, candidates in distances.items()
    )
    return Plan(num_blocks=num_blocks, replicas=replicas)
