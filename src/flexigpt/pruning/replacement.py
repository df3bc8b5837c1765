"""Blocks chosen one after the other, each time the one whose replica does the least damage."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

from flexigpt.calibration import calibration_batches, run_through
from flexigpt.evaluation import windows_perplexity
from flexigpt.model import empty_compact
from flexigpt.pruning.distances import BASE_DISTANCES, activation_distances, base_distances, choose_bases
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.scores import MOST_WINDOWS, GreedyChoice, choose_greedily
from flexigpt.pruning.source import CheckedSource, Opened
from flexigpt.replicas import HIDDEN_COPIES, Filling, fill, init_of, source_of_replicas
from flexigpt.runtime import InputError, Track, digest, silent
from flexigpt.weights import Assembly


def distances_by_name(
    opened: Opened, checked: CheckedSource, pruned: Sequence[int], rank: int, name: str, track: Track = silent
) -> dict[int, dict[int, float]]:
    """Of each pruned block to each kept one, by a key of BASE_DISTANCES."""
    if not BASE_DISTANCES[name].calibrated:
        return base_distances(opened.source, pruned, rank, name, opened.cache, track)
    assert opened.windows is not None
    spill = checked.spill(opened.cache.folder, opened.windows.numel())
    given = (opened.source, opened.windows, pruned, rank)
    return activation_distances(*given, cache=opened.cache, spill=spill, track=track)


def replace_greedily(
    opened: Opened, checked: CheckedSource, options: PruneOptions, rank: int, count: int, track: Track = silent
) -> GreedyChoice:
    """Chooses `count` blocks, each time the one with whose replica perplexity is least, beside those chosen before.

    Candidates are pruned as the options say, but with kept blocks not refitted and one rank for all: bases by distance,
    replicas filled on the first half of the first 32 calibration windows. Perplexity is that of the second half.

    Args:
        opened: the source, its calibration windows and its cache, which keeps every candidate's perplexity.
        checked: the source.
        options: of the run.
        rank: of the adapters.
        count: blocks to choose, fewer than there are.
        track: told of each candidate.

    Raises:
        InputError: a single calibration window.
    """
    assert opened.windows is not None
    windows = opened.windows[:MOST_WINDOWS]
    half = len(windows) // 2
    if half == 0:
        raise InputError("one calibration window cannot be halved into text to fit and text to judge: give --windows 2")
    screening = dataclasses.replace(options, refit_kept=False, spread_rank=False)
    judge = _Judge(opened, checked, screening, rank, (windows[:half], windows[half:]))
    depends = {
        "windows": digest(windows),
        "init": init_of(screening),
        "rank": rank,
        "base_distance": options.distances[0],
    }
    if BASE_DISTANCES[options.distances[0]].prepare is not None:
        distances_by_name(opened, checked, [0], rank, options.distances[0], track)  # of all pairs, kept
    candidates = sum(len(opened.source) - step for step in range(count))
    told = iter(track(range(candidates), "replacing blocks", candidates))

    def step(chosen: list[int]) -> dict[int, float]:
        others = sorted(set(range(len(opened.source))) - set(chosen))
        with opened.cache.stage("replacement", chosen=sorted(chosen), **depends) as stage:
            for _ in stage.numbers(
                {str(block): partial(judge.perplexity, sorted([*chosen, block])) for block in others}
            ):
                next(told)
            return {int(block): value for block, value in stage.result.items()}

    choice = choose_greedily(len(opened.source), count, step)
    list(told)
    return choice


class _Judge:
    """Prunes by a plan and measures what is left."""

    def __init__(
        self,
        opened: Opened,
        checked: CheckedSource,
        options: PruneOptions,
        rank: int,
        windows: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._opened, self._checked, self._options, self._rank = opened, checked, options, rank
        self._fitted, self._held = windows

    @torch.no_grad()
    def perplexity(self, pruned: Sequence[int]) -> float:
        """Of the second half of the windows, with replicas in the place of these blocks."""
        source, cache = self._opened.source, self._opened.cache
        distances = distances_by_name(self._opened, self._checked, pruned, self._rank, self._options.distances[0])
        plan = choose_bases(distances, self._rank, len(source))
        empty, taken = empty_compact(source.model, plan, self._options.output_norm, base_scale=self._options.base_scale)
        assembly = Assembly(empty, source, taken)
        depends = {"plan": plan.to_dict(), "init": init_of(self._options), "windows": digest(self._fitted)}
        with cache.stage("candidate", **depends) as stage:
            blocks = source_of_replicas(source, plan, self._options, stage)
            spill = self._checked.spill(cache.folder, HIDDEN_COPIES * self._fitted.numel())
            fill(assembly, Filling(plan, blocks, self._fitted, stage, spill), self._options, silent)
            batches = calibration_batches(self._held)
            spill = self._checked.spill(cache.folder, self._held.numel())
            with run_through(assembly, batches, "judging", spill):
                found = windows_perplexity(assembly.model, batches)
            stage.discard()
        return found
