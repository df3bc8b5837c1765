"""Blocks chosen one after the other, each time the one that the model misses least: by perplexity without it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from flexigpt.cache import Cache
from flexigpt.calibration import Stream, calibration_batches, finished_blocks
from flexigpt.progress import Track, silent
from flexigpt.streaming import StreamedModel


class Removal(NamedTuple):
    """What was chosen.

    Attributes:
        order: the blocks, in the order in which they were removed.
        perplexities: for each block of the model, the perplexity of the calibration text when it was removed; for one
            that was kept, what it would have been in the last step.
    """

    order: list[int]
    perplexities: list[float]


def remove_greedily(
    source: StreamedModel,
    windows: torch.Tensor,
    count: int,
    *,
    cache: Cache,
    key: str,
    spill: Path | None = None,
    track: Track = silent,
) -> Removal:
    """Removes `count` blocks, each time the one without which perplexity is least.

    A step takes about half as many forward passes as there are blocks, with one block in memory at a time: the hidden
    states of all candidates go through the blocks together, and a candidate's part from the others' where it is left
    out. Every step is kept, so that a killed run goes on there and a larger `count` costs only what is new.

    Args:
        source: a source model.
        windows: calibration windows, (windows, tokens) ids.
        count: blocks to remove, fewer than there are.
        cache: keeps the steps.
        key: tells the windows from others.
        spill: folder for files that hold the hidden states; None: memory does.
        track: told of each block of each step.

    Returns:
        The choice. Perplexities are not finite where the model overflows.
    """
    order: list[int] = []
    perplexities = [math.nan] * len(source)
    blocks = iter(track(range(count * len(source)), "removing blocks", count * len(source)))
    for _ in range(count):
        with cache.stage("removal", windows=key, removed=sorted(order)) as stage:
            if stage.result is None:
                step = _Step(source, windows, order, spill)
                for index in range(len(source)):
                    next(blocks)
                    step.run(index)
                stage.finish({str(block): step.perplexity(stream) for block, stream in step.without.items()})
            else:
                for _ in range(len(source)):
                    next(blocks)
            found = {int(block): value for block, value in stage.result.items()}
        for block, value in found.items():
            perplexities[block] = value
        # NaN is not less than anything: a block whose removal overflows is never chosen before others.
        order.append(min(found, key=lambda block: math.inf if math.isnan(found[block]) else found[block]))
    list(blocks)  # tells that it is done
    return Removal(order, perplexities)


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

    @torch.no_grad()
    def perplexity(self, stream: Stream) -> float:
        """Of the windows, each token but a window's first, by what stands behind the last block."""
        model, total, tokens = self._source.model, 0.0, 0
        with finished_blocks(self._source, stream):
            for batch in self._batches:
                targets = batch[:, 1:].to(model.device)
                logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
                for row, wanted in zip(logits, targets, strict=True):
                    total += F.cross_entropy(row.float(), wanted, reduction="sum").item()
                tokens += targets.numel()
        return math.exp(min(total / tokens, 700.0)) if math.isfinite(total) else math.nan
