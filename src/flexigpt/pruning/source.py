"""Which blocks are pruned: how many by the options, which by their scores on calibration text."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from flexigpt.calibration import block_means, check_means
from flexigpt.model import ModelShape, find_architecture, model_shape, num_blocks
from flexigpt.pruning.options import DEFAULT_WINDOWS, ScoringOptions, calibration_text
from flexigpt.pruning.scores import (
    BLOCK_SCORES,
    GREEDY_SCORES,
    MOST_WINDOWS,
    REMOVAL_SCORE,
    check_blocks,
    lowest,
    num_pruned_at,
    remove_greedily,
)
from flexigpt.runtime import Cache, InputError, Track, check_dtype, digest, parse_size
from flexigpt.text import TokenizedText, calibration_windows, check_window_length, tokenize_text
from flexigpt.weights import Source, check_finite, load_tokenizer, open_empty, read_config


@dataclass(frozen=True, kw_only=True)
class CheckedSource:
    """What the source's configuration says, before any text or weight is read.

    Attributes:
        shape: of the source.
        depth: blocks of the source.
        itemsize: bytes of a stored parameter.
        window_length: for calibration and perplexity.
        memory: bytes that a block and hidden states may take.
    """

    shape: ModelShape
    depth: int
    itemsize: int
    window_length: int
    memory: int

    def needs_file(self, tokens: int) -> bool:
        """Whether the hidden states of so many tokens, each copy counted, do not fit beside a block."""
        block = self.shape.block_parameters * self.itemsize
        return block + tokens * self.shape.hidden_size * self.itemsize > self.memory

    def spill(self, folder: Path, tokens: int) -> Path | None:
        """The folder, where the hidden states of so many tokens have to go into a file; None: memory holds them."""
        return folder if self.needs_file(tokens) else None


def can_refit(source: str) -> bool:
    """Whether kept blocks can be refitted: what attention and MLP write goes to the residual stream as it is.

    Raises:
        InputError: a source that is not there or of another family.
    """
    architecture = find_architecture(read_config(source))
    return set(architecture.output_norms) <= set(architecture.linears)


def check_source(
    source: str, options: ScoringOptions, output_norm: bool = True, base_scale: bool = False
) -> CheckedSource:
    """What the source's configuration says; no weight is read.

    Raises:
        InputError: what the configuration rules out.
    """
    check_dtype(options.dtype)
    if options.refit_kept and not can_refit(source):
        raise InputError(
            f"--refit-kept has no effect on {source}, whose blocks normalise what attention and MLP write: leave it out"
        )
    empty = open_empty(source)
    stored: torch.dtype = empty.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    shape = model_shape(empty, output_norm, base_scale)
    return CheckedSource(
        shape=shape,
        depth=num_blocks(empty.config),
        itemsize=stored.itemsize,
        window_length=check_window_length(options.window_length, empty.config),
        memory=_memory(options.memory, shape.block_parameters * stored.itemsize),
    )


def _memory(given: str | None, block_bytes: int) -> int:
    """Bytes that a block and hidden states may take."""
    if given is None:
        return int(psutil.virtual_memory().available) // 2
    memory = parse_size(given, itemsize=1)
    if memory < block_bytes:
        raise InputError(
            f"--memory {given} is too small: one block alone takes {math.ceil(block_bytes / 2**20):,} MiB; give more"
        )
    return memory


def pruned_or_count(
    options: ScoringOptions, checked: CheckedSource, num_pruned_for: Callable[[int], int]
) -> Sequence[int] | int:
    """The blocks to prune, or, where their scores decide, how many.

    Args:
        options: which say it.
        checked: the source.
        num_pruned_for: stored parameters to come down to -> how many blocks.
    """
    if options.blocks is not None:
        return check_blocks(options.blocks, checked.depth)
    if options.ratio is not None:
        return num_pruned_at(options.ratio, checked.depth)
    assert options.target_size is not None
    return num_pruned_for(parse_size(options.target_size, checked.itemsize))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source whose blocks have been scored, where the options ask for it.

    Attributes:
        source: the source.
        text: to measure perplexity on.
        windows: calibration windows, (windows, tokens) ids.
        scored: what the record says of the scores: nothing, or `calibration`, `block_score` and `scores`, and
            `pruning_order` where blocks were chosen one after the other.
        cache: keeps what is measured of this source.
        spill: where hidden states of the text go that memory does not hold; None: it does.
    """

    source: Source
    text: TokenizedText | None
    windows: torch.Tensor | None
    scored: dict[str, Any]
    cache: Cache
    spill: Path | None


def open_scored(
    name: str, options: ScoringOptions, checked: CheckedSource, pruned: Sequence[int] | int, track: Track
) -> Opened:
    """Opens the source and scores its blocks, where the options ask for it; what can be refused early is, first.

    Args:
        name: folder or hub name of the source.
        options: as given.
        checked: the source.
        pruned: the blocks to prune, or how many.
        track: told of the progress of each stage.
    """
    windows, text = _read_texts(name, options, checked.window_length)
    source = Source(name, options.dtype, options.device)
    cache = source.cache(options.cache)
    with cache.stage("finite") as stage:
        if stage.result is None:
            check_finite(source, track)
            stage.finish(True)
    tokens = 0 if text is None else len(text.ids)
    opened = Opened(
        source=source,
        text=text,
        windows=windows,
        scored={},
        cache=cache,
        spill=checked.spill(cache.folder, tokens),
    )
    if windows is None:
        return opened
    defaults = options.defaults(checked.window_length)
    scored: dict[str, Any] = {
        "calibration": {
            "text": defaults["calibration"],
            "windows": list(windows.shape),
            "asked": defaults["windows"],
        },
        "block_score": defaults["block_score"],
    }
    if defaults["block_score"] in GREEDY_SCORES:
        scored["calibration"]["judged"] = min(len(windows), MOST_WINDOWS)
    if defaults["block_score"] == REMOVAL_SCORE:
        assert isinstance(pruned, int)
        scored |= _removed(opened, windows, checked, pruned, track)
    elif defaults["block_score"] in BLOCK_SCORES:
        scored["scores"] = _scores(opened, windows, checked, track)[defaults["block_score"]]
    check_means(scored.get("scores", ()))
    return dataclasses.replace(opened, scored=scored)


def _scores(opened: Opened, windows: torch.Tensor, checked: CheckedSource, track: Track) -> dict[str, list[float]]:
    """Every block's score by each of BLOCK_SCORES, in one pass."""
    sources = [opened.source, *opened.source.twins()]
    with opened.cache.stage("scores", windows=digest(windows), devices=len(sources)) as stage:
        if stage.result is None:
            spill = checked.spill(opened.cache.folder, windows.numel())
            stage.finish(block_means(sources, windows, BLOCK_SCORES, spill=spill, stage=stage, track=track))
        found: dict[str, list[float]] = stage.result
    return found


def _removed(opened: Opened, windows: torch.Tensor, checked: CheckedSource, count: int, track: Track) -> dict[str, Any]:
    """The blocks that the model misses least, one after the other."""
    windows = windows[:MOST_WINDOWS]
    spill = checked.spill(opened.cache.folder, windows.numel() * checked.depth)
    key = digest(windows)
    done = remove_greedily(opened.source, windows, count, cache=opened.cache, key=key, spill=spill, track=track)
    return done.record()


def chosen(pruned: Sequence[int] | int, scored: dict[str, Any]) -> Sequence[int]:
    """The blocks that were named, or as many of the lowest scores as were counted."""
    if not isinstance(pruned, int):
        return pruned
    return sorted(scored.get("pruning_order", ())) or lowest(scored["scores"], pruned)


def _read_texts(
    source: str, options: ScoringOptions, window_length: int
) -> tuple[torch.Tensor | None, TokenizedText | None]:
    """The calibration windows and the text for perplexity, where the options ask for them."""
    windows, text = None, None
    if not options.calibrates and options.perplexity is None:
        return windows, text
    tokenizer = load_tokenizer(source)
    if options.perplexity is not None:
        text = tokenize_text(options.perplexity, tokenizer, window_length=window_length)
    if options.calibrates:
        windows = calibration_windows(
            calibration_text(options),
            tokenizer,
            windows=options.windows or DEFAULT_WINDOWS,
            window_length=window_length,
            seed=options.seed or 0,
        )
    return windows, text
