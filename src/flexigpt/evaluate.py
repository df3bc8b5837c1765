"""Perplexity of a source or compact model on a text."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.checkpoint import check_dtype, find_device, load_model, load_tokenizer, read_config
from flexigpt.data import TokenizedText, batch_size_for, check_window_length, tokenize_text, window_batches
from flexigpt.distributed import ALONE, World
from flexigpt.errors import InputError
from flexigpt.half_precision import fast_half
from flexigpt.progress import Track, silent

# Numbers in one batch's logits: 64 MiB in float32.
_LOGITS_BUDGET = 2**24


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and how.

    Attributes:
        perplexity: text to measure perplexity on: a .txt, .jsonl, .jsonl.gz or .parquet file, or NAME[:CONFIG][@SPLIT]
            of a data set on the hub.
        text_column: column that holds the text.
        window_length: tokens in a window; default: the model's context, at most 2048.
        stride: tokens from one window's start to the next's; default: the window length, no overlap.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """

    perplexity: str
    text_column: str = "text"
    window_length: int | None = None
    stride: int | None = None
    dtype: str = "auto"
    device: str = "auto"


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


def evaluate(model: str, options: EvalOptions, track: Track = silent) -> Perplexity:
    """Perplexity of a local or hub model, source or compact.

    Raises:
        InputError: a model or a text that cannot be used, or a window that does not fit.
    """
    check_dtype(options.dtype)
    find_device(options.device)
    window_length = check_window_length(options.window_length, read_config(model))
    text = tokenize_text(
        options.perplexity, load_tokenizer(model), column=options.text_column, window_length=window_length
    )
    loaded = load_model(model, options.dtype, options.device)
    return perplexity(loaded, text, window_length=window_length, stride=options.stride, track=track)


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
    stride = window_length if stride is None else stride
    if not 1 <= stride <= window_length:
        raise InputError(f"stride {stride} is outside 1 to the window length {window_length}")
    starts = range(0, max(1, len(text.ids) - 1 - (window_length - stride)), stride)
    batch_size = batch_size_for(window_length, model.config.get_text_config().vocab_size, _LOGITS_BUDGET)
    batches = list(window_batches(text.ids, starts, window_length, batch_size))
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
