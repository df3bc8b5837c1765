"""Distances between blocks by what calibration text makes of their weights, for `--base-distance activation`.

The distance of a pruned block's linear to a candidate's is the length of what the best adapter, fitted to what the
pruned block is given in the source, leaves of its output, by the length of that output.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from flexigpt.architecture import find_architecture
from flexigpt.cache import CachedStage
from flexigpt.calibration import Stream, calibration_batches
from flexigpt.linear_moments import input_moments
from flexigpt.progress import Track, silent
from flexigpt.regression import damped_root
from flexigpt.scoring import Opened, digest
from flexigpt.selection import BASE_DISTANCES

DISTANCE = "activation"


@torch.no_grad()
def activation_distances(
    opened: Opened, pruned: Sequence[int], rank: int, *, spill: Path | None = None, track: Track = silent
) -> dict[int, dict[int, float]]:
    """Distance of each pruned block to each kept block: the sum over its linears.

    Text goes through the source's blocks once, up to the last pruned one; at each pruned block its candidates are
    measured. Memory holds a block, the hidden states, and the second moments of one block's inputs. Distances are kept
    by linear; a run that was killed repeats the pass of the text, and no pair that it finds.

    Args:
        opened: a source and its calibration windows.
        pruned: the pruned blocks.
        rank: of the adapters.
        spill: folder for a file that holds the hidden states; None: memory does.
        track: told of each block that text goes through, and of each pair of linears.
    """
    measure = _Measure(opened, pruned, rank)
    unfinished = [i for i in pruned if not measure.is_finished(i)]
    depth = max(unfinished, default=-1) + 1

    def steps() -> Iterator[None]:
        if unfinished:
            assert opened.windows is not None
            text = Stream(opened.source.model, calibration_batches(opened.windows), spill)
            for index in range(depth):
                roots = _run(opened, text, index, measure.linears if index in unfinished else ())
                yield
                if index in unfinished:
                    yield from measure.candidates(index, roots)

    for _ in track(steps(), "measuring distances", depth + len(unfinished) * len(measure.kept) * len(measure.linears)):
        pass
    return {i: measure.found(i) for i in pruned}


def _run(opened: Opened, text: Stream, index: int, linears: Sequence[str]) -> dict[str, torch.Tensor]:
    """Takes the text through a block; roots of the damped second moments of what these linears are given, by path."""
    opened.source.expect(index + 1)
    with opened.source.block(index) as block:
        if not linears:
            text.advance(block, index)
            return {}
        moments, first_of, _ = input_moments(text, block, index, linears)
    roots = {path: damped_root(moments.pop(path)) for path in list(moments)}
    return {path: roots[first_of[path]] for path in linears}


class _Measure:
    """Pruned blocks against their candidates, linear by linear."""

    def __init__(self, opened: Opened, pruned: Sequence[int], rank: int) -> None:
        self.source, self.rank = opened.source, rank
        self.kept = [block for block in range(len(opened.source)) if block not in pruned]
        self.linears = find_architecture(opened.source.model.config).linears
        self._cache, self._windows = opened.cache, digest(opened.windows)
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
