"""Distances between the blocks of a source, and the bases that they choose."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any

import torch

from flexigpt.model import Plan, Replica
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import Workspace
from flexigpt.replicas import LowRank, tail_norm, truncated_svd, unmended
from flexigpt.runtime import CachedStage, in_parallel, workers_of

# Of each pruned block to each kept one.
Distances = dict[int, dict[int, float]]

_Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BaseDistance:
    """How far a candidate's linear is from a pruned block's.

    Attributes:
        between: (one, other, rank) -> the distance, a scalar; of weights (outputs, inputs), or, where there is
            `prepare`, of what it made of them.
        prepare: (weight, rank) -> factors, made once for each weight; None: weights are compared.
    """

    between: Callable[[Any, Any, int], torch.Tensor]
    prepare: Callable[[torch.Tensor, int], LowRank] | None = None


BASE_DISTANCES: Mapping[str, BaseDistance] = {
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
}


@torch.no_grad()
def measure_distances(workspace: Workspace[PruneOptions], pruned: Sequence[int]) -> Distances:
    """Distance of each pruned block to each kept block: the sum over its linears.

    Where weights are factored, all pairs of blocks are measured, so that pruning others later costs nothing; elsewhere
    the pairs that are asked for. Memory holds two weights, or one for each core that factors, or as many pairs of
    blocks' factors of one linear. What was measured is kept, and what a run that was killed needs to go on.
    """
    kept = [block for block in range(workspace.depth) if block not in pruned]
    return _OfWeights(workspace).distances(pruned, kept)


def choose_bases(distances: Distances, rank: int, num_blocks: int) -> Plan:
    """The plan in which each pruned block's base is the candidate of least distance (eq. 5)."""
    replicas = tuple(
        Replica(block=block, base=min(candidates, key=lambda j: candidates[j]), rank=rank)
        for block, candidates in distances.items()
    )
    return Plan(num_blocks=num_blocks, replicas=replicas)


class _OfWeights:
    """Weights or their factors compared, linear by linear."""

    def __init__(self, workspace: Workspace[PruneOptions]) -> None:
        self._workspace, self._source, self._rank = workspace, workspace.source, workspace.rank
        self._name = workspace.options.base_distance
        self._distance = BASE_DISTANCES[self._name]

    def distances(self, pruned: Sequence[int], kept: Sequence[int]) -> Distances:
        """Of the pruned blocks to the kept ones."""
        linears, factored = self._workspace.shape.linears, self._distance.prepare is not None
        wanted = sorted({_pair(i, j) for i in pruned for j in kept})
        if factored:
            wanted = list(combinations(range(len(self._source)), 2))
        totals = dict.fromkeys(wanted, 0.0)

        def steps() -> Iterator[None]:
            for path in linears:
                with self._workspace.cache.stage("distances", path=path, rank=self._rank, distance=self._name) as stage:
                    yield from self._all_pairs(path, wanted, stage) if factored else self._pairs(path, wanted, stage)
                    for i, j in wanted:
                        totals[i, j] += stage.result[f"{i} {j}"]

        each = len(self._source) if factored else len(wanted)
        for _ in self._workspace.track(steps(), "measuring distances", each * len(linears)):
            pass
        return {i: {j: totals[_pair(i, j)] for j in kept} for i in pruned}

    def _pairs(self, path: str, wanted: Sequence[_Pair], stage: CachedStage) -> Iterator[None]:
        """Compares weights; yields after each pair."""

        def measure(i: int, j: int) -> float:
            one, other = (self._source.weight_matrix(block, path) for block in (i, j))
            return self._distance.between(one, other, self._rank).item()

        yield from stage.numbers({f"{i} {j}": partial(measure, i, j) for i, j in wanted})

    def _all_pairs(self, path: str, wanted: Sequence[_Pair], stage: CachedStage) -> Iterator[None]:
        """Factors every block's weight, into files, and compares the factors; yields after each block."""
        if stage.result is not None:
            yield from (None for _ in range(len(self._source)))
            return
        workers = workers_of(self._source.device)
        for _ in in_parallel((partial(self._factors, path, i, stage) for i in range(len(self._source))), workers):
            yield
        rows = ((i, [j for _, j in pairs]) for i, pairs in groupby(wanted, key=itemgetter(0)))
        known: dict[str, float] = {}
        for row in in_parallel((partial(self._compare, path, i, others, stage) for i, others in rows), workers):
            known |= row
        stage.finish(known)

    def _compare(self, path: str, i: int, others: Sequence[int], stage: CachedStage) -> dict[str, float]:
        one = self._factors(path, i, stage)
        between = self._distance.between
        return {f"{i} {j}": between(one, self._factors(path, j, stage), self._rank).item() for j in others}

    def _factors(self, path: str, block: int, stage: CachedStage) -> LowRank:
        prepare = self._distance.prepare
        assert prepare is not None
        weight = partial(self._source.weight_matrix, block, path)
        found = stage.tensors(str(block), lambda: prepare(weight(), self._rank)._asdict())
        return LowRank(**{name: value.to(self._source.device) for name, value in found.items()})


def _pair(i: int, j: int) -> _Pair:
    return (i, j) if i < j else (j, i)
