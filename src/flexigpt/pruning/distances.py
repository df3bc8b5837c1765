"""Distances between the blocks of a source: each weight is factored once, then pairs are compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from flexigpt.calibration import Stream, calibration_batches, input_moments
from flexigpt.model import Plan, Replica, find_architecture
from flexigpt.replicas import LowRank, damped_root, tail_norm, truncated_svd, unmended
from flexigpt.runtime import Cache, CachedStage, Track, digest, in_parallel, silent, workers_of
from flexigpt.weights import StreamedModel

_Pair = tuple[int, int]


@torch.no_grad()
def base_distances(
    source: StreamedModel, pruned: Sequence[int], rank: int, distance: str, cache: Cache, track: Track = silent
) -> dict[int, dict[int, float]]:
    """Distance of each pruned block to each kept block: the sum over its linears.

    Where weights are factored, all pairs of blocks are measured, so that pruning others later costs nothing; elsewhere
    the pairs that are asked for. Memory holds two weights, or one for each core that factors, or as
    many pairs of blocks' factors of one linear.

    Args:
        source: a source model.
        pruned: the pruned blocks.
        rank: of the low-rank cores and of the adapters.
        distance: a key of BASE_DISTANCES.
        cache: keeps what was measured, and what a run that was killed needs to go on.
        track: told of each linear of each block, or of each pair.
    """
    kept = [block for block in range(len(source)) if block not in pruned]
    measure = _Measure(source, BASE_DISTANCES[distance], rank)
    linears = find_architecture(source.model.config).linears
    if measure.distance.prepare is None:
        wanted = sorted({_pair(i, j) for i in pruned for j in kept})
        each = len(wanted)
    else:
        wanted = list(combinations(range(len(source)), 2))
        each = len(source)
    totals = dict.fromkeys(wanted, 0.0)

    def steps() -> Iterator[None]:
        for path in linears:
            with cache.stage("distances", path=path, rank=rank, distance=distance) as stage:
                if measure.distance.prepare is None:
                    yield from measure.pairs(path, wanted, stage)
                else:
                    yield from measure.all_pairs(path, wanted, stage)
                for i, j in wanted:
                    totals[i, j] += stage.result[f"{i} {j}"]

    for _ in track(steps(), "measuring distances", each * len(linears)):
        pass
    return {i: {j: totals[_pair(i, j)] for j in kept} for i in pruned}


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


class _Measure:
    """One distance between blocks, linear by linear. A step is yielded for each piece of work."""

    def __init__(self, source: StreamedModel, distance: BaseDistance, rank: int) -> None:
        self.source, self.distance, self.rank = source, distance, rank

    def pairs(self, path: str, wanted: Sequence[_Pair], stage: CachedStage) -> Iterator[None]:
        """Compares weights."""

        def measure(i: int, j: int) -> float:
            one, other = (self.source.weight_matrix(block, path) for block in (i, j))
            return self.distance.between(one, other, self.rank).item()

        yield from stage.numbers({f"{i} {j}": partial(measure, i, j) for i, j in wanted})

    def all_pairs(self, path: str, wanted: Sequence[_Pair], stage: CachedStage) -> Iterator[None]:
        """Factors every block's weight, into files, and compares the factors."""
        if stage.result is not None:
            yield from (None for _ in range(len(self.source)))
            return
        tasks = (partial(self._factors, path, block, stage) for block in range(len(self.source)))
        for _ in in_parallel(tasks, workers_of(self.source.device)):
            yield
        rows = ((i, [j for _, j in pairs]) for i, pairs in groupby(wanted, key=itemgetter(0)))
        compare = (partial(self._compare, path, i, others, stage) for i, others in rows)
        known: dict[str, float] = {}
        for row in in_parallel(compare, workers_of(self.source.device)):
            known |= row
        stage.finish(known)

    def _compare(self, path: str, i: int, others: Sequence[int], stage: CachedStage) -> dict[str, float]:
        one = self._factors(path, i, stage)
        between = self.distance.between
        return {f"{i} {j}": between(one, self._factors(path, j, stage), self.rank).item() for j in others}

    def _factors(self, path: str, block: int, stage: CachedStage) -> LowRank:
        prepare = self.distance.prepare
        assert prepare is not None
        found = stage.tensors(str(block), lambda: prepare(self.source.weight_matrix(block, path), self.rank)._asdict())
        return LowRank(**{name: value.to(self.source.device) for name, value in found.items()})


def _pair(i: int, j: int) -> _Pair:
    return (i, j) if i < j else (j, i)


DISTANCE = "activation"


@torch.no_grad()
def activation_distances(
    source: StreamedModel,
    windows: torch.Tensor,
    pruned: Sequence[int],
    rank: int,
    *,
    cache: Cache,
    spill: Path | None = None,
    track: Track = silent,
) -> dict[int, dict[int, float]]:
    """Distance of each pruned block to each kept block: the sum over its linears.

    Text goes through the source's blocks once, up to the last pruned one; at each pruned block its candidates are
    measured. Memory holds a block, the hidden states, and the second moments of one block's inputs. Distances are kept
    by linear; a run that was killed repeats the pass of the text, and no pair that it finds.

    Args:
        source: a source model.
        windows: calibration windows, (windows, tokens) ids.
        pruned: the pruned blocks.
        rank: of the adapters.
        cache: keeps what was measured.
        spill: folder for a file that holds the hidden states; None: memory does.
        track: told of each block that text goes through, and of each pair of linears.
    """
    measure = _ActivationMeasure(source, windows, pruned, rank, cache)
    unfinished = [i for i in pruned if not measure.is_finished(i)]
    depth = max(unfinished, default=-1) + 1

    def steps() -> Iterator[None]:
        if unfinished:
            text = Stream(source.model, calibration_batches(windows), spill)
            for index in range(depth):
                roots = _run(source, text, index, measure.linears if index in unfinished else ())
                yield
                if index in unfinished:
                    yield from measure.candidates(index, roots)

    for _ in track(steps(), "measuring distances", depth + len(unfinished) * len(measure.kept) * len(measure.linears)):
        pass
    return {i: measure.found(i) for i in pruned}


def _run(source: StreamedModel, text: Stream, index: int, linears: Sequence[str]) -> dict[str, torch.Tensor]:
    """Takes the text through a block; roots of the damped second moments of what these linears are given, by path."""
    source.expect(index + 1)
    with source.block(index) as block:
        if not linears:
            text.advance(block, index)
            return {}
        moments, first_of, _ = input_moments(text, block, index, linears)
    roots = {path: damped_root(moments.pop(path)) for path in list(moments)}
    return {path: roots[first_of[path]] for path in linears}


class _ActivationMeasure:
    """Pruned blocks against their candidates, linear by linear."""

    def __init__(
        self, source: StreamedModel, windows: torch.Tensor, pruned: Sequence[int], rank: int, cache: Cache
    ) -> None:
        self.source, self.rank = source, rank
        self.kept = [block for block in range(len(source)) if block not in pruned]
        self.linears = find_architecture(source.model.config).linears
        self._cache, self._windows = cache, digest(windows)
        self._found: dict[tuple[int, str], dict[str, float]] = {}

    def is_finished(self, pruned: int) -> bool:
        """Whether every candidate of a pruned block has been measured, in an earlier run."""
        for path in self.linears:
            with self._stage(pruned, path) as stage:
                self._found[pruned, path] = stage.result or {}
        return all(str(j) in self._found[pruned, path] for path in self.linears for j in self.kept)

    def found(self, pruned: int) -> dict[int, float]:
        """Distance of a pruned block, which is finished, to each kept block."""
        return {j: sum(self._found[pruned, path][str(j)] for path in self.linears) for j in self.kept}

    def candidates(self, pruned: int, roots: dict[str, torch.Tensor]) -> Iterator[None]:
        """Measures the kept blocks' linears; yields once for each."""
        between = BASE_DISTANCES[DISTANCE].between
        for path in self.linears:
            with self._stage(pruned, path) as stage:
                own = self.source.weight_matrix(pruned, path).double() @ roots[path]

                def measure(base: int, path: str = path, own: torch.Tensor = own) -> float:
                    other = self.source.weight_matrix(base, path).double() @ roots[path]
                    return between(own, other, self.rank).item()

                yield from stage.numbers({str(j): partial(measure, j) for j in self.kept})
                self._found[pruned, path] = stage.result

    def _stage(self, pruned: int, path: str) -> AbstractContextManager[CachedStage]:
        depends = {"block": pruned, "path": path, "rank": self.rank, "windows": self._windows}
        return self._cache.stage("activation-distances", **depends)


# Stands in for the length of an output that is zero: candidates still differ by what they leave of it.
_LEAST_OUTPUT = 1e-100

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


def choose_bases(distances: dict[int, dict[int, float]], rank: int, num_blocks: int) -> Plan:
    """The plan in which each pruned block's base is the candidate of least distance (eq. 5)."""
    replicas = tuple(
        Replica(block=block, base=min(candidates, key=lambda j: candidates[j]), rank=rank)
        for block, candidates in distances.items()
    )
    return Plan(num_blocks=num_blocks, replicas=replicas)
