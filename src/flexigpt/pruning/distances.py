"""Distances between the blocks of a source, and the bases that they choose."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any

import torch

from flexigpt.calibration import Stream, calibration_batches, input_moments
from flexigpt.model import Plan, Replica
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import Workspace
from flexigpt.replicas import LowRank, damped_root, tail_norm, truncated_svd, unmended
from flexigpt.runtime import CachedStage, digest, in_parallel, workers_of

# Of each pruned block to each kept one.
Distances = dict[int, dict[int, float]]

_Pair = tuple[int, int]

# Stands in for the length of an output that is zero: candidates still differ by what they leave of it.
_LEAST_OUTPUT = 1e-100


@dataclass(frozen=True, kw_only=True)
class BaseDistance:
    """How far a candidate's linear is from a pruned block's.

    Attributes:
        between: (one, other, rank) -> the distance, a scalar; of weights (outputs, inputs), or, where there is
            `prepare`, of what it made of them; `one` is the pruned block's where the distance is `calibrated`.
        prepare: (weight, rank) -> factors, made once for each weight; None: weights are compared.
        calibrated: whether weights are first multiplied by a root of the second moment of what the pruned block's
            linear is given on calibration text (`damped_root`), so that norms are those of outputs.
    """

    between: Callable[[Any, Any, int], torch.Tensor]
    prepare: Callable[[torch.Tensor, int], LowRank] | None = None
    calibrated: bool = False


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
    # Ours: what an adapter fitted to calibration text cannot mend of a linear's output, by the output itself.
    "activation": BaseDistance(
        between=lambda one, other, rank: tail_norm(one - other, rank) / one.norm().clamp(min=_LEAST_OUTPUT),
        calibrated=True,
    ),
}


@torch.no_grad()
def measure_distances(workspace: Workspace[PruneOptions], pruned: Sequence[int]) -> Distances:
    """Distance of each pruned block to each kept block: the sum over its linears.

    Where weights are factored, all pairs of blocks are measured, so that pruning others later costs nothing; elsewhere
    the pairs that are asked for. Memory holds two weights, or one for each core that factors, or as many pairs of
    blocks' factors of one linear; on text, a block, the hidden states, and the second moments of one block's inputs.
    What was measured is kept, and what a run that was killed needs to go on.
    """
    kept = [block for block in range(workspace.depth) if block not in pruned]
    if BASE_DISTANCES[workspace.options.base_distance].calibrated:
        return _OnText(workspace, pruned, kept).distances()
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


class _OnText:
    """Outputs compared: text goes through the blocks once, up to the last pruned one."""

    def __init__(self, workspace: Workspace[PruneOptions], pruned: Sequence[int], kept: Sequence[int]) -> None:
        self._workspace, self._source = workspace, workspace.source
        self._pruned, self._kept = pruned, kept
        self._linears = tuple(workspace.shape.linears)
        self._found: dict[tuple[int, str], dict[str, float]] = {}

    def distances(self) -> Distances:
        """Of the pruned blocks to the kept ones."""
        unfinished = [i for i in self._pruned if not self._is_finished(i)]
        depth = max(unfinished, default=-1) + 1

        def steps() -> Iterator[None]:
            if unfinished:
                batches = calibration_batches(self._workspace.windows)
                text = Stream(self._source.model, batches, self._workspace.hidden_in(1))
                for index in range(depth):
                    roots = self._advance(text, index, self._linears if index in unfinished else ())
                    yield
                    if index in unfinished:
                        yield from self._candidates(index, roots)

        total = depth + len(unfinished) * len(self._kept) * len(self._linears)
        for _ in self._workspace.track(steps(), "measuring distances", total):
            pass
        return {
            i: {j: sum(self._found[i, path][str(j)] for path in self._linears) for j in self._kept}
            for i in self._pruned
        }

    def _stage(self, pruned: int, path: str) -> Any:
        depends = {"block": pruned, "path": path, "rank": self._workspace.rank}
        return self._workspace.cache.stage("activation-distances", windows=digest(self._workspace.windows), **depends)

    def _is_finished(self, pruned: int) -> bool:
        """Whether every candidate of a pruned block has been measured, in an earlier run."""
        for path in self._linears:
            with self._stage(pruned, path) as stage:
                self._found[pruned, path] = stage.result or {}
        return all(str(j) in self._found[pruned, path] for path in self._linears for j in self._kept)

    def _advance(self, text: Stream, index: int, linears: Sequence[str]) -> dict[str, torch.Tensor]:
        """Takes the text through a block; roots of the damped second moments of what these linears are given."""
        self._source.expect(index + 1)
        with self._source.block(index) as block:
            if not linears:
                text.advance(block, index)
                return {}
            moments, first_of, _ = input_moments(text, block, index, linears)
        roots = {path: damped_root(moments.pop(path)) for path in list(moments)}
        return {path: roots[first_of[path]] for path in linears}

    def _candidates(self, pruned: int, roots: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Measures the kept blocks' linears; yields once for each."""
        between = BASE_DISTANCES["activation"].between
        for path in self._linears:
            with self._stage(pruned, path) as stage:
                own = self._source.weight_matrix(pruned, path).double() @ roots[path]

                def measure(base: int, path: str = path, own: torch.Tensor = own) -> float:
                    other = self._source.weight_matrix(base, path).double() @ roots[path]
                    return between(own, other, self._workspace.rank).item()

                yield from stage.numbers({str(j): partial(measure, j) for j in self._kept})
                self._found[pruned, path] = stage.result
