"""Scores and distances -> plan: which blocks are pruned, and which base stands in for each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from flexigpt.errors import InputError
from flexigpt.factorization import LowRank, tail_norm, truncated_svd, unmended
from flexigpt.plan import Plan, Replica

# Stands in for the length of an output that is zero: candidates still differ by what they leave of it.
_LEAST_OUTPUT = 1e-100


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
# Not of each block by itself: blocks are chosen one after the other, by perplexity of the calibration text without them
# (`greedy.remove_greedily`) or with their replicas (`replacement.replace_greedily`).
REMOVAL_SCORE, REPLACEMENT_SCORE = "removal-perplexity", "replacement-perplexity"
GREEDY_SCORES = (REMOVAL_SCORE, REPLACEMENT_SCORE)


@dataclass(frozen=True, kw_only=True)
class BaseDistance:
    """How far a candidate's linear is from a pruned block's.

    Attributes:
        between: (one, other, rank) -> the distance, a scalar; of weights (outputs, inputs), or, where there is
            `prepare`, of what it made of them; `one` is the pruned block's where the distance is `calibrated`.
        prepare: (weight, rank) -> factors, made once for each weight; None: weights are compared.
        calibrated: whether weights are first multiplied by a root of the second moment of what the pruned block's
            linear is given on calibration text (`regression.damped_root`), so that norms are those of outputs.
    """

    between: Callable[[Any, Any, int], torch.Tensor]
    prepare: Callable[[torch.Tensor, int], LowRank] | None = None
    calibrated: bool = False


BASE_DISTANCES: dict[str, BaseDistance] = {
    # The method (eq. 2-4): what an adapter cannot mend between the low-rank cores of the two.
    "low-rank": BaseDistance(
        prepare=truncated_svd,
        between=lambda one, other, rank: unmended(one, other),
    ),
    # Figure 4 (b): without the high-rank elimination.
    "full-rank": BaseDistance(
        between=lambda one, other, rank: tail_norm(one.double() - other.double(), rank),
    ),
    # Figure 4 (c): plain |W_i - W_j|_F.
    "frobenius": BaseDistance(
        between=lambda one, other, rank: (one.double() - other.double()).norm(),
    ),
    # Ours: what an adapter fitted to calibration text cannot mend of a linear's output, by the output itself.
    "activation": BaseDistance(
        between=lambda one, other, rank: tail_norm(one - other, rank) / one.norm().clamp(min=_LEAST_OUTPUT),
        calibrated=True,
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


def choose_bases(distances: dict[int, dict[int, float]], rank: int, num_blocks: int) -> Plan:
    """The plan in which each pruned block's base is the candidate of least distance (eq. 5)."""
    replicas = tuple(
        Replica(block=block, base=min(candidates, key=lambda j: candidates[j]), rank=rank)
        for block, candidates in distances.items()
    )
    return Plan(num_blocks=num_blocks, replicas=replicas)
