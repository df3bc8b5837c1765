"""Perplexity of a text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.calibration import run_through
from flexigpt.model import fast_half
from flexigpt.runtime import ALONE, InputError, Track, World, silent
from flexigpt.text import TokenizedText, batch_size_for, window_batches
from flexigpt.weights import StreamedModel

# Numbers in one batch's logits: 64 MiB in float32.
_LOGITS_BUDGET = 2**24


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured.

    Attributes:
        perplexity: per token: exp of the mean negative log-likelihood.
        bits_per_byte: the text's negative log-likelihood in bits, by its UTF-8 bytes.
        tokens: tokens scored: all but the first, each once.
        bytes: UTF-8 bytes of the text.
        window_length: tokens that a window sees at most.
        stride: tokens between the starts of two windows.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window_length: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_stride(stride: int | None, window_length: int) -> None:
    if stride is not None and not 1 <= stride <= window_length:
        raise InputError(f"stride {stride} is outside 1 to the window length {window_length}")


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    text: TokenizedText,
    *,
    window_length: int,
    stride: int | None = None,
    world: World = ALONE,
    track: Track = silent,
) -> Perplexity:
    """Perplexity over sliding windows.

    A window takes `window_length` tokens in and predicts the token after each. Every token but the first of the text is
    scored once, with the most context that the windows give it; windows without overlap (stride = window length) are
    the common, stricter protocol.

    Args:
        model: in eval mode.
        text: at least 2 tokens.
        window_length: tokens in.
        stride: 1 to window_length; default: window_length.
        world: processes that share the work; each must call this, and gets the result for the whole text.
        track: told of each batch.

    Raises:
        InputError: a stride out of range, or logits that are not finite.
    """
    check_stride(stride, window_length)
    stride = window_length if stride is None else stride
    batches = _batches(model, text, window_length, stride)
    # As many batches for every process, since all must take part in every forward pass of a sharded model.
    rounds = math.ceil(len(batches) / world.size)
    total, scored = 0.0, 0
    for number in track(range(rounds), "measuring perplexity", rounds):
        mine = number * world.size + world.rank
        batch, first_scored = batches[min(mine, len(batches) - 1)]
        inputs, targets = batch[:, :-1].to(model.device), batch[:, 1:].to(model.device)
        with fast_half(model):
            logits = model(input_ids=inputs, use_cache=False).logits[:, first_scored:]
        targets = targets[:, first_scored:]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        if mine < len(batches):
            total += loss.item()
            scored += targets.numel()
    sums = world.sum(torch.tensor([total, scored], dtype=torch.float64, device=model.device))
    total, scored = sums[0].item(), int(sums[1])
    if not math.isfinite(total):
        raise InputError("the model's logits are not finite on this text: give --dtype float32, or check the weights")
    return Perplexity(
        perplexity=math.exp(min(total / scored, 700.0)),
        bits_per_byte=total / math.log(2) / text.num_bytes,
        tokens=scored,
        bytes=text.num_bytes,
        window_length=window_length,
        stride=stride,
    )


def _batches(
    model: PreTrainedModel, text: TokenizedText, window_length: int, stride: int
) -> list[tuple[torch.Tensor, int]]:
    """(windows, tokens + 1) ids and the first position to score."""
    starts = range(0, max(1, len(text.ids) - 1 - (window_length - stride)), stride)
    batch_size = batch_size_for(window_length, model.config.get_text_config().vocab_size, _LOGITS_BUDGET)
    return window_batches(text.ids, starts, window_length, batch_size)


@torch.no_grad()
def streamed_perplexity(
    model: StreamedModel,
    text: TokenizedText,
    *,
    window_length: int,
    spill: Path | None = None,
    track: Track = silent,
) -> Perplexity:
    """`perplexity` over windows without overlap, with one block in memory at a time.

    Args:
        model: a source or compact model.
        text: at least 2 tokens.
        window_length: tokens in.
        spill: folder for a file that holds the hidden states; None: memory does.
        track: told of each block.

    Raises:
        InputError: logits that are not finite.
    """
    batches = [batch[:, :-1] for batch, _ in _batches(model.model, text, window_length, window_length)]
    with run_through(model, batches, "measuring perplexity", spill, track):
        return perplexity(model.model, text, window_length=window_length)


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
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum").item()
        tokens += len(targets)
    return math.exp(min(total / tokens, 700.0)) if math.isfinite(total) else math.nan
