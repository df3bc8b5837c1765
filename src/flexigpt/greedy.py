"""Blocks chosen one after the other; by perplexity without them, each time the one that the model misses least."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from flexigpt.cache import Cache
from flexigpt.calibration import Stream, calibration_batches, finished_blocks
from flexigpt.half_precision import fast_half
from flexigpt.losses import token_loss
from flexigpt.progress import Track, silent
from flexigpt.streaming import StreamedModel

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


@torch.no_grad()
def windows_perplexity(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> float:
    """Perplexity of each token of windows but the first.

    Args:
        model: in eval mode, whole or within `finished_blocks`.
        batches: (windows, tokens) ids each.

    Returns:
        NaN where logits are not finite.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        targets = batch[:, 1:].to(model.device).flatten()
        with fast_half(model):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
        total += token_loss(logits.flatten(0, 1), targets).cross_entropy.item()
        tokens += len(targets)
    return math.exp(min(total / tokens, 700.0)) if math.isfinite(total) else math.nan


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
