"""Text that a model writes itself, to calibrate it on or to train what became of it."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from flexigpt.decoding.drafts import Draft, Writer
from flexigpt.decoding.options import SampleOptions
from flexigpt.decoding.rounds import Rounds
from flexigpt.model import cache_name, fast_half
from flexigpt.runtime import InputError, Track, claimed, digest, parse_tokens, replace_file, silent
from flexigpt.text import check_tokenizer, check_window_length, local_files, text_fingerprint
from flexigpt.weights import load_model, load_tokenizer, model_fingerprint, read_config

# Tokens that a document may have, where the model takes more: what is written is read again for every token.
_WINDOW_LENGTH = 512

# Documents that are written at once: so many that a step is bound by computing, not by reading the weights.
_ON_CPU, _ON_GPU = 32, 256


def sample(
    model: str,
    out: str | Path,
    options: SampleOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    track: Track = silent,
) -> dict[str, Any]:
    """Has a source or compact model write documents or conversations, and puts them into a .jsonl file.

    The tokens are drawn from the model's own distribution, at temperature 1. Rows of a batch write one document after
    the other, over `window_length` steps; that is a round, which depends on the options and its number only. Finished
    rounds are kept beside `out` until all are there.

    Args:
        model: folder or hub name.
        out: file to write; complete or untouched.
        options: how much to write, and how.
        resume: goes on after the last finished round of the same run.
        overwrite: whether a file `out`, or an unfinished run, may be replaced.
        track: reports the steps of each round.

    Returns:
        `documents`, `tokens` that were written (prompts among them), `tokens_per_second`, `window_length`,
        `batch_size`.

    Raises:
        InputError: a model or prompts that cannot be used; a run that was interrupted.
    """
    out = Path(out).expanduser()
    _check_file(out, model, overwrite, options.prompts)
    config, tokenizer = read_config(model), load_tokenizer(model)
    check_tokenizer(model, tokenizer, config)
    length = check_window_length(options.window_length, config)
    if options.window_length is None:
        length = min(length, _WINDOW_LENGTH)
    writer = Writer.of(model, tokenizer, options, length)
    with claimed(out):
        loaded = load_model(model, options.dtype, options.device)
        writer.stops_at(loaded.generation_config)
        batch_size = options.batch_size or (_ON_CPU if loaded.device.type == "cpu" else _ON_GPU)
        sizes = _rows_of_rounds(math.ceil(parse_tokens(options.tokens) / length), batch_size)
        asked = {name: value for name, value in asdict(options).items() if name != "device"}
        asked |= {"model": model_fingerprint(model), "window_length": length, "batch_size": batch_size}
        rounds = Rounds(out, asked | {"prompts": options.prompts and text_fingerprint(options.prompts)})
        rounds.open(resume, overwrite)
        began, fresh = time.perf_counter(), 0
        try:
            for number in range(len(rounds.done), len(sizes)):
                drafts = writer.drafts(rounds.begun)
                seed = int(digest(f"{options.seed} {number}".encode())[:15], 16)
                place = f"writing, round {number + 1} of {len(sizes)}"
                tracked = partial(track, stage=place, total=length)
                kept, begun = write_round(loaded, drafts, sizes[number], length, options.top_p, seed, tracked)
                rounds.add(kept, begun)
                fresh += sizes[number] * length
        except KeyboardInterrupt:
            done = f"{len(rounds.done)} of {len(sizes)} rounds"
            raise InputError(f"interrupted after {done}: --resume goes on from there") from None
        seconds = time.perf_counter() - began
        lines = rounds.lines()
        if not lines:
            raise InputError(f"the model wrote nothing within {length} tokens: give a larger --window-length")
        replace_file(out, "".join(lines))
        rounds.remove()
    written = {"documents": len(lines), "tokens": rounds.tokens, "tokens_per_second": fresh / seconds}
    return written | {"window_length": length, "batch_size": batch_size}


def _check_file(out: Path, model: str, overwrite: bool, prompts: str | None) -> None:
    """Refuses a place for the output before the work begins."""
    if out.suffix != ".jsonl":
        raise InputError(f"{out} is no name of a .jsonl file: give one, as own.jsonl")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out} is there: give another file, or --overwrite to replace a file")
    if prompts is not None and out.resolve() in [file.resolve() for file in local_files(prompts)]:
        raise InputError(f"{out} holds the prompts: give another file to write")
    if Path(model, "config.json").is_file() and out.resolve().is_relative_to(Path(model).resolve()):
        raise InputError(f"{out} lies in the model {model}, which is read: give a file outside it")


def _rows_of_rounds(rows: int, most: int) -> list[int]:
    """So many rows in as few rounds as can be, each of about as many."""
    rounds = math.ceil(rows / most)
    return [rows * (number + 1) // rounds - rows * number // rounds for number in range(rounds)]


@torch.no_grad()
def write_round(
    model: PreTrainedModel,
    drafts: Iterator[Draft],
    rows: int,
    length: int,
    top_p: float,
    seed: int,
    track: Callable[[Iterable[int]], Iterator[int]],
) -> tuple[list[tuple[dict[str, Any], int]], int]:
    """Has `rows` drafts written at once, over `length` steps; where one ends, the next begins in its place.

    Each step takes one token of each row: one that the draft was given, or the one drawn last. What was cached before
    a draft's beginning is hidden from it, and its positions count from there, so that it is written as if alone.

    Returns:
        The finished documents in the order of their ends, then those that the last step cut; each with its tokens. And
        how many drafts were begun.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    seen = torch.zeros((rows, length), dtype=torch.int64, device=device)
    given = {cache_name(model): DynamicCache(config=model.config.get_text_config()), "use_cache": True}
    current, starts, begun = list(itertools.islice(drafts, rows)), [0] * rows, rows
    kept: list[tuple[dict[str, Any] | None, int]] = []
    with fast_half(model):
        for step in track(range(length)):
            seen[:, step] = 1
            ids = torch.tensor([[draft.token] for draft in current], device=device)
            positions = torch.tensor([[step - start] for start in starts], device=device)
            logits = model(input_ids=ids, attention_mask=seen[:, : step + 1], position_ids=positions, **given).logits
            for row, token in enumerate(_drawn(logits[:, -1], top_p, generator)):
                if current[row].goes_on(token):
                    continue
                kept.append((current[row].document(), step + 1 - starts[row]))
                current[row], starts[row], begun = next(drafts), step + 1, begun + 1
                seen[row, : step + 1] = 0
    kept += [(draft.document(cut=True), length - start) for draft, start in zip(current, starts, strict=True)]
    return [(document, tokens) for document, tokens in kept if document is not None], begun


def _drawn(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> list[int]:
    """A token for each row, at temperature 1, from the likeliest that hold `top_p` of the probability."""
    chances = logits.float().softmax(-1)
    if not chances.isfinite().all():
        raise InputError("logits are not finite: give --dtype float32, or check the weights")
    if top_p < 1:
        ordered, places = chances.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        chances = torch.zeros_like(chances).scatter_(-1, places, ordered)
    tokens: list[int] = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
    return tokens
