"""The walk over the windows of a text, and the perplexity that it adds up to."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt.calibration import run_through
from flexigpt.evaluation.metrics import Predictions, add_up
from flexigpt.model import fast_half
from flexigpt.runtime import ALONE, InputError, Track, World, silent
from flexigpt.text import TokenizedText, batch_size_for, window_batches
from flexigpt.weights import StreamedModel

# Numbers in one batch's logits: 64 MiB in float32; half as many of each of two models, since there are more copies.
LOGITS_BUDGET = 2**24

# (windows, tokens) ids that go in; those that are to come; the position of the first of these.
_Windows = Sequence[tuple[torch.Tensor, torch.Tensor, int]]

# (windows, tokens) ids -> logits of one model, or of two.
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def logits_over(
    model: PreTrainedModel,
    text: TokenizedText,
    window_length: int,
    *,
    stride: int | None = None,
    both: Forward | None = None,
    world: World = ALONE,
    stage: str = "measuring perplexity",
    track: Track = silent,
) -> Iterator[Predictions]:
    """Walks over a text in windows, each of which takes tokens in and predicts the token after each.

    Every token but the first of the text is predicted once, with the most context that the windows give it.

    Args:
        model: in eval mode.
        text: at least 2 tokens.
        window_length: tokens in.
        stride: tokens from one window's start to the next's; default: the window length, no overlap.
        both: runs the model and another one beside it; default: the model alone runs.
        world: processes that share the windows; each must walk to the end, and sees its own share.
        stage: name for `track`.
        track: reports the progress, batch by batch.
    """
    windows = _windows(model, text, window_length, stride or window_length, 1 if both is None else 2)
    return _walk(model, windows, both, world, stage, track)


def _windows(model: PreTrainedModel, text: TokenizedText, window_length: int, stride: int, models: int = 1) -> _Windows:
    step = text.piece or stride
    starts = range(0, max(1, len(text.ids) - 1 - (window_length - step)), step)
    size = batch_size_for(window_length, model.config.get_text_config().vocab_size, LOGITS_BUDGET // models)
    batches = window_batches(text.ids, starts, window_length, size)
    return [(ids[:, :-1], ids[:, 1 + first :], first) for ids, first in batches]


@torch.no_grad()
def _walk(
    model: PreTrainedModel,
    windows: _Windows,
    forward: Forward | None = None,
    world: World = ALONE,
    stage: str = "",
    track: Track = silent,
) -> Iterator[Predictions]:
    # As many batches for every process, since all must take part in every forward pass of a sharded model.
    rounds = math.ceil(len(windows) / world.size)
    for number in track(range(rounds), stage, rounds):
        mine = number * world.size + world.rank
        ids, targets, first = windows[min(mine, len(windows) - 1)]
        ids, end = ids.to(model.device), first + targets.shape[1]
        with fast_half(model):
            found = (model(input_ids=ids, use_cache=False).logits,) if forward is None else forward(ids)
        if mine < len(windows):
            yield Predictions(targets.to(model.device), tuple(logits[:, first:end] for logits in found))


def perplexity(
    model: PreTrainedModel | StreamedModel,
    text: TokenizedText,
    *,
    window_length: int,
    stride: int | None = None,
    spill: Path | None = None,
    world: World = ALONE,
    track: Track = silent,
) -> dict[str, Any]:
    """Perplexity, and what else METRICS measure of a model without its source.

    Args:
        model: in eval mode; of a streamed one a block at a time is in memory.
        text: at least 2 tokens.
        window_length: tokens in.
        stride: 1 to window_length; default: window_length.
        spill: folder for a file that holds the hidden states of a streamed model; None: memory does.
        world: processes that share the work; each must call this, and gets the result for the whole text.
        track: reports the progress, batch by batch or block by block.

    Returns:
        JSON-ready: `perplexity` per token, `bits_per_byte`, `tokens` scored (all but the first, each once), `bytes` of
        the text in UTF-8, `window_length` and `stride`.

    Raises:
        InputError: a stride out of range, or logits that are not finite.
    """
    stride = window_length if stride is None else stride
    if not 1 <= stride <= window_length:
        raise InputError(f"stride {stride} is outside 1 to the window length {window_length}")
    if isinstance(model, StreamedModel):
        batches = [ids for ids, *_ in _windows(model.model, text, window_length, stride)]
        with run_through(model, batches, "measuring perplexity", spill, track):
            return perplexity(model.model, text, window_length=window_length, stride=stride)
    walk = logits_over(model, text, window_length, stride=stride, world=world, track=track)
    measured = add_up(walk, text.num_bytes, model.device, against=False, world=world)
    return measured | {"bytes": text.num_bytes, "window_length": window_length, "stride": stride}


def windows_perplexity(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> float:
    """Perplexity of each token of windows but the first; NaN where logits are not finite.

    Args:
        model: in eval mode, whole or within `finished_blocks`.
        batches: (windows, tokens) ids each.
    """
    total = sum(seen.loss for seen in _walk(model, [(ids, ids[:, 1:], 0) for ids in batches]))
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    return math.exp(min(total / tokens, 700.0)) if math.isfinite(total) else math.nan
