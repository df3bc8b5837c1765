"""Scores and distances -> plan: which blocks are pruned, and which base stands in for each."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from flexigpt.calibration import Stream, calibration_batches, finished_blocks
from flexigpt.evaluation import windows_perplexity
from flexigpt.runtime import Cache, InputError, Track, silent
from flexigpt.weights import StreamedModel


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


# Of the calibration windows, so many judge candidates: every one of them costs forward passes.
MOST_WINDOWS = 32


class GreedyChoice(NamedTuple):
    """What was chosen.

    Attributes:
        order: the blocks, in the order in which they were chosen.
        perplexities: for each block of the model, the perplexity of the calibration text when it was chosen; for one
            that was not, what it would have been in the last step.
    """

    order: list[int]
    perplexities: list[float]

    def record(self) -> dict[str, Any]:
        """What the record says of it."""
        return {"scores": self.perplexities, "pruning_order": self.order}


def choose_greedily(depth: int, count: int, step: Callable[[list[int]], dict[int, float]]) -> GreedyChoice:
    """Chooses `count` of `depth` blocks, each time the one of least perplexity given those chosen before.

    Args:
        depth: blocks of the model.
        count: fewer than that.
        step: blocks chosen so far -> for each other one the perplexity with it.
    """
    order: list[int] = []
    perplexities = [math.nan] * depth
    for _ in range(count):
        found = step(order)
        for block, value in found.items():
            perplexities[block] = value
        # NaN is not less than anything: a block without which the model overflows comes behind all others.
        order.append(min(found, key=lambda block: math.inf if math.isnan(found[block]) else found[block]))
    return GreedyChoice(order, perplexities)


def remove_greedily(
    source: StreamedModel,
    windows: torch.Tensor,
    count: int,
    *,
    cache: Cache,
    key: str,
    spill: Path | None = None,
    track: Track = silent,
) -> GreedyChoice:
    """Chooses `count` blocks, each time the one without which perplexity is least.

    A step takes about half as many forward passes as there are blocks, with one block in memory at a time: the hidden
    states of all candidates go through the blocks together, and a candidate's part from the others' where it is left
    out. Every step is kept, so that a killed run goes on there and a larger `count` costs only what is new.

    Args:
        source: a source model.
        windows: calibration windows, (windows, tokens) ids.
        count: blocks to choose, fewer than there are.
        cache: keeps the steps.
        key: tells the windows from others.
        spill: folder for files that hold the hidden states; None: memory does.
        track: told of each block of each step.

    Returns:
        The choice. Perplexities are not finite where the model overflows.
    """
    told = iter(track(range(count * len(source)), "removing blocks", count * len(source)))

    def step(chosen: list[int]) -> dict[int, float]:
        with cache.stage("removal", windows=key, chosen=sorted(chosen)) as stage:
            candidates = None if stage.result is not None else _Step(source, windows, chosen, spill)
            for index in range(len(source)):
                next(told)
                if candidates is not None:
                    candidates.run(index)
            if candidates is not None:
                stage.finish({str(block): candidates.perplexity(block) for block in candidates.without})
            return {int(block): value for block, value in stage.result.items()}

    choice = choose_greedily(len(source), count, step)
    list(told)  # tells that it is done
    return choice


class _Step:
    """All candidates of one step.

    Attributes:
        without: candidate -> its stream, which has left it out.
    """

    def __init__(
        self, source: StreamedModel, windows: torch.Tensor, removed: Sequence[int], spill: Path | None
    ) -> None:
        self._source, self._removed, self._spill = source, set(removed), spill
        self._batches = calibration_batches(windows)
        self._whole = Stream(source.model, self._batches, spill)
        self.without: dict[int, Stream] = {}

    def run(self, index: int) -> None:
        """Takes every stream past a block."""
        if index in self._removed:
            return
        self._source.expect(index + 1)
        leaving = self._whole.copy(self._spill)
        with self._source.block(index) as block:
            for stream in (*self.without.values(), self._whole):
                stream.advance(block, index)
        self.without[index] = leaving

    def perplexity(self, block: int) -> float:
        """Without that block."""
        with finished_blocks(self._source, self.without[block]):
            return windows_perplexity(self._source.model, self._batches)
