"""Distances between the blocks of a source: each weight is factored once, then pairs are compared."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations, groupby
from operator import itemgetter

import torch

from flexigpt.architecture import find_architecture
from flexigpt.cache import Cache, CachedStage
from flexigpt.factorization import LowRank
from flexigpt.parallel import in_parallel, workers_of
from flexigpt.progress import Track, silent
from flexigpt.selection import BASE_DISTANCES, BaseDistance
from flexigpt.streaming import StreamedModel

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
