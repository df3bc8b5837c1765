"""Which blocks are pruned: how many by the options, which by their scores on calibration text."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from flexigpt.architecture import find_architecture, model_shape, num_blocks
from flexigpt.cache import Cache
from flexigpt.calibration import block_means, check_means
from flexigpt.checkpoint import check_dtype, load_tokenizer, open_empty, read_config
from flexigpt.data import DEFAULT_TEXT, TokenizedText, calibration_windows, check_window_length, tokenize_text
from flexigpt.errors import InputError, check_seed, flag
from flexigpt.greedy import MOST_WINDOWS, remove_greedily
from flexigpt.plan import ModelShape, parse_size
from flexigpt.progress import Track
from flexigpt.selection import BLOCK_SCORES, GREEDY_SCORES, REMOVAL_SCORE, check_blocks, lowest, num_pruned_at
from flexigpt.streaming import Source, check_finite

DEFAULT_WINDOWS = 64


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Which blocks to prune, by which scores on which text: the options of all flows that prune.

    None stands for the default that a field's description names. A field that is given but has no effect is refused.

    Attributes:
        ratio: share of the blocks to prune, in (0, 1); rounded down to whole blocks.
        blocks: the blocks to prune, from 0.
        target_size: stored size to come down to: parameters (4.8B, 350M) or bytes (3.2GB, 900MiB).
        calibration: text to score blocks on: a .txt, .jsonl, .jsonl.gz or .parquet file, or NAME[:CONFIG][@SPLIT] of a
            data set on the hub; default: MiniPile's validation split, or no calibration where `blocks` are given.
        text_column: column that holds the text; default: text.
        windows: calibration windows; default: 64.
        window_length: tokens in a window, for calibration and perplexity; default: the model's context, at most 2048.
        block_score: score whose lowest blocks are pruned; removal-perplexity chooses one block after the other, each
            time that without which the perplexity of the calibration text is least, and takes longer; in prune,
            replacement-perplexity looks at the perplexity with its replica instead; default: influence.
        refit_kept: whether the kept blocks are refitted to the source on the calibration text, in closed form; nothing
            more is stored.
        perplexity: text to measure perplexity on before and after, as for calibration; default: none.
        dtype: of the weights: auto (the source's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        memory: what a block and the hidden states of calibration text may take, as 4GiB; hidden states that do not fit
            go through a file; default: half of the memory that is free.
        cache: folder that keeps what was measured, so that other ratios cost next to nothing and a run that was killed
            goes on; default: $FLEXIGPT_CACHE, or flexigpt in the user's cache folder.
        seed: shuffles the calibration text; default: 0.
    """

    ratio: float | None = None
    blocks: Sequence[int] | None = None
    target_size: str | None = None
    calibration: str | None = None
    text_column: str | None = None
    windows: int | None = None
    window_length: int | None = None
    block_score: str | None = None
    refit_kept: bool = False
    perplexity: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    memory: str | None = None
    cache: str | Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given = [flag(name) for name in self.how_much if getattr(self, name) is not None]
        if len(given) != 1:
            *most, last = map(flag, self.how_much)
            got = " and ".join(given) or "none of them"
            raise InputError(f"give exactly one of {', '.join(most)} and {last}: got {got}")
        if self.block_score is not None and self.block_score not in self.score_names:
            raise InputError(f"--block-score {self.block_score} is unknown: give {', '.join(self.score_names)}")
        if self.windows is not None and self.windows < 1:
            raise InputError(f"--windows {self.windows} is too small: give at least 1")
        check_seed(self.seed)
        for name, reason in self.idle_settings():
            if getattr(self, name) is not None:
                raise InputError(f"{flag(name)} has no effect, since {reason}: leave it out")

    def idle_settings(self) -> list[tuple[str, str]]:
        """Fields that have no effect beside the others, each with the reason: giving one is an error."""
        idle: list[tuple[str, str]] = []
        if self.blocks is not None and not self.calibrates:
            reason = "--blocks needs no calibration text unless --calibration gives one"
            idle += [("windows", reason), ("block_score", reason)]
        elif self.blocks is not None and self.block_score in GREEDY_SCORES:
            idle.append(("block_score", f"--blocks names the blocks that {self.block_score} would choose"))
        if not self.calibrates and self.perplexity is None:
            idle += [(name, "no text is read") for name in ("text_column", "window_length")]
        if not self.is_random:
            idle.append(("seed", "nothing is random"))
        return idle

    @property
    def how_much(self) -> tuple[str, ...]:
        """The fields of which exactly one is given."""
        return "ratio", "blocks", "target_size"

    @property
    def score_names(self) -> tuple[str, ...]:
        """Values of block_score."""
        return *BLOCK_SCORES, REMOVAL_SCORE

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is read."""
        return self.fits or self.blocks is None or self.calibration is not None

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to calibration text."""
        return self.refit_kept

    @property
    def is_random(self) -> bool:
        """Whether anything depends on the seed."""
        return self.calibrates

    def defaults(self, window_length: int) -> dict[str, Any]:
        """What the fields stand for that have an effect and are None; `window_length` is the one in use."""
        values: dict[str, Any] = {}
        if self.is_random:
            values["seed"] = self.seed or 0
        if self.calibrates:
            values |= {"calibration": _calibration_text(self), "windows": self.windows or DEFAULT_WINDOWS}
            values["block_score"] = self.block_score or "influence"
        if self.calibrates or self.perplexity is not None:
            values |= {"window_length": window_length, "text_column": self.text_column or "text"}
        return values


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


def digest(windows: torch.Tensor | None) -> str:
    """What tells calibration windows from others, as a key of the cache."""
    if windows is None:
        return ""
    return f"{tuple(windows.shape)} {hashlib.sha256(windows.numpy().tobytes()).hexdigest()}"


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
    column = options.text_column or "text"
    if options.perplexity is not None:
        text = tokenize_text(options.perplexity, tokenizer, column=column, window_length=window_length)
    if options.calibrates:
        windows = calibration_windows(
            _calibration_text(options),
            tokenizer,
            column=column,
            windows=options.windows or DEFAULT_WINDOWS,
            window_length=window_length,
            seed=options.seed or 0,
        )
    return windows, text


def _calibration_text(options: ScoringOptions) -> str:
    return DEFAULT_TEXT if options.calibration is None else options.calibration
