"""Pruning: source model -> plan -> compact model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt.architecture import find_architecture, model_shape, num_blocks
from flexigpt.calibration import block_means
from flexigpt.checkpoint import (
    check_depth,
    check_dtype,
    check_finite,
    compact_of,
    load_model,
    load_tokenizer,
    move,
    open_empty,
    read_config,
)
from flexigpt.data import DEFAULT_TEXT, TokenizedText, calibration_windows, check_window_length, tokenize_text
from flexigpt.errors import InputError, check_seed
from flexigpt.initialization import ADAPTER_INITS, DEFAULT_NORM_INIT, check_norm_init, default_rank, initialize_replicas
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM
from flexigpt.plan import ModelShape, Plan, parse_size
from flexigpt.progress import Track, silent
from flexigpt.record import Record, measure_both, new_record
from flexigpt.selection import (
    BASE_DISTANCES,
    BLOCK_SCORES,
    base_distances,
    check_blocks,
    choose_bases,
    lowest,
    num_pruned_at,
)

DEFAULT_WINDOWS = 64


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What to prune, and how. Exactly one of ratio, blocks, target_size and plan says how much.

    None stands for the default that a field's description names. A field that is given but has no effect is refused.

    Attributes:
        ratio: share of the blocks to prune, in (0, 1); rounded down to whole blocks.
        blocks: the blocks to prune, from 0.
        target_size: stored size to come down to: parameters (4.8B, 350M) or bytes (3.2GB, 900MiB).
        plan: a plan file to apply as it is.
        rank: rank of the adapters; default: hidden size / 16.
        calibration: text to score blocks on: a .txt, .jsonl, .jsonl.gz or .parquet file, or NAME[:CONFIG][@SPLIT] of a
            data set on the hub; default: MiniPile's validation split, or no calibration where `blocks` are given.
        text_column: column that holds the text; default: text.
        windows: calibration windows; default: 64.
        window_length: tokens in a window, for calibration and perplexity; default: the model's context, at most 2048.
        block_score: score whose lowest blocks are pruned; default: influence.
        base_distance: distance by which each pruned block's base is chosen; default: low-rank.
        adapter_init: how adapters start.
        norm_init: constant that the output norms' gamma starts at; default: 0.05.
        output_norm: whether replicas have output norms.
        perplexity: text to measure perplexity on before and after, as for calibration; default: none.
        dtype: of the weights: auto (the source's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        seed: shuffles the calibration text and draws random adapters; default: 0.
    """

    ratio: float | None = None
    blocks: Sequence[int] | None = None
    target_size: str | None = None
    plan: str | Path | None = None
    rank: int | None = None
    calibration: str | None = None
    text_column: str | None = None
    windows: int | None = None
    window_length: int | None = None
    block_score: str | None = None
    base_distance: str | None = None
    adapter_init: str = "svd"
    norm_init: float | None = None
    output_norm: bool = True
    perplexity: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        sizes = {"ratio": self.ratio, "blocks": self.blocks, "target-size": self.target_size, "plan": self.plan}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(f"--{name}" for name in given) or "none of them"
            raise InputError(f"give exactly one of --ratio, --blocks, --target-size and --plan: got {got}")
        for name, value, known in (
            ("block-score", self.block_score, BLOCK_SCORES),
            ("base-distance", self.base_distance, BASE_DISTANCES),
            ("adapter-init", self.adapter_init, ADAPTER_INITS),
        ):
            if value is not None and value not in known:
                raise InputError(f"--{name} {value} is unknown: give {', '.join(known)}")
        for name, number in (("rank", self.rank), ("windows", self.windows)):
            if number is not None and number < 1:
                raise InputError(f"--{name} {number} is too small: give at least 1")
        check_norm_init(self.norm_init)
        check_seed(self.seed)
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        """A setting without effect is an error, never ignored."""
        by_plan = ("rank", "calibration", "windows", "block_score", "base_distance")
        by_calibration = ("windows", "block_score")
        idle: list[tuple[str, str]] = []
        if self.plan is not None:
            idle += [(name, "the plan decides it") for name in by_plan]
        if self.blocks is not None and self.calibration is None:
            idle += [
                (name, "--blocks needs no calibration text unless --calibration gives one") for name in by_calibration
            ]
        if not self.calibrates and self.perplexity is None:
            idle += [(name, "no text is read") for name in ("text_column", "window_length")]
        if not self.calibrates and self.adapter_init == "svd":
            idle.append(("seed", "nothing is random"))
        if not self.output_norm:
            idle.append(("norm_init", "--no-output-norm leaves no output norm"))
        for name, reason in idle:
            if getattr(self, name) is not None:
                raise InputError(f"{_flag(name)} has no effect, since {reason}: leave it out")

    @property
    def calibrates(self) -> bool:
        """Whether blocks are scored on a text."""
        return self.plan is None and (self.blocks is None or self.calibration is not None)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What the source's configuration and the options decide, before any text or weight is read.

    Attributes:
        shape: of the source.
        depth: blocks of the source.
        itemsize: bytes of a stored parameter.
        rank: of the adapters, where no plan is given.
        plan: that was given.
        pruned: where none was, the blocks to prune or, where their scores decide, how many.
        window_length: for calibration and perplexity.
    """

    shape: ModelShape
    depth: int
    itemsize: int
    rank: int
    plan: Plan | None
    pruned: Sequence[int] | int
    window_length: int


def prune(source: str, options: PruneOptions, track: Track = silent) -> tuple[FlexiGPTForCausalLM, Plan, Record]:
    """Makes a compact model of a source model (FlexiGPT, section 3).

    Args:
        source: folder or hub name of a source model.
        options: what to prune, and how.
        track: told of the progress of each stage.

    Returns:
        The compact model, its plan, and the record: everything measured on the way, JSON-ready.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    started = time.perf_counter()
    model, text, checked, plan, record = _plan_source(source, options, track)
    compact = compact_of(model, plan, options.output_norm)
    initialize_replicas(
        compact,
        model,
        plan,
        adapter_init=options.adapter_init,
        norm_init=_norm_init(options),
        seed=options.seed or 0,
        track=track,
    )
    move(compact, model.device)
    record |= measure_both(
        model, compact, text, name=options.perplexity, window_length=checked.window_length, track=track
    )
    record["plain_removal"] = {"parameters": checked.shape.removed_parameters(len(plan.replicas))}
    return compact, plan, record | {"seconds": round(time.perf_counter() - started, 1)}


def plan_only(source: str, options: PruneOptions, track: Track = silent) -> tuple[Plan, Record]:
    """The plan that `prune` would apply, and the record of what it rests on; no model is made.

    Raises:
        InputError: as `prune`; or settings that only applying a plan reads.
    """
    for field in ("plan", "perplexity", "adapter_init", "norm_init", "output_norm"):
        if getattr(options, field) != getattr(PruneOptions, field):
            raise InputError(f"{_flag(field)} has no effect with --plan-only, which makes no model: leave it out")
    started = time.perf_counter()
    *_, plan, record = _plan_source(source, options, track)
    return plan, record | {"seconds": round(time.perf_counter() - started, 1)}


def expected_bytes(source: str, options: PruneOptions) -> int:
    """Bytes of the weights that `prune` with these options would have to store; no weight is read.

    Raises:
        InputError: what the source's configuration or the plan rules out.
    """
    checked = _check_source(source, options)
    if checked.plan is not None:
        ranks = [replica.rank for replica in checked.plan.replicas]
    else:
        ranks = [checked.rank] * (checked.pruned if isinstance(checked.pruned, int) else len(checked.pruned))
    return checked.shape.stored_parameters(ranks) * checked.itemsize


def _check_source(source: str, options: PruneOptions) -> _Checked:
    """Refuses what the configuration or the plan rules out."""
    check_dtype(options.dtype)
    find_architecture(read_config(source))
    empty = open_empty(source)
    shape, depth = model_shape(empty, options.output_norm), num_blocks(empty.config)
    stored: torch.dtype = empty.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    rank = options.rank or default_rank(shape.hidden_size)
    plan: Plan | None = None
    pruned: Sequence[int] | int = ()
    if options.plan is not None:
        plan = _read_plan(options.plan, shape, depth)
    else:
        shape.check_rank(rank)
        pruned = _pruned_or_count(options, shape, rank, depth, stored.itemsize)
    return _Checked(
        shape=shape,
        depth=depth,
        itemsize=stored.itemsize,
        rank=rank,
        plan=plan,
        pruned=pruned,
        window_length=check_window_length(options.window_length, empty.config),
    )


def _read_plan(path: str | Path, shape: ModelShape, depth: int) -> Plan:
    plan = Plan.read(path)
    check_depth(plan, depth)
    for replica in plan.replicas:
        shape.check_rank(replica.rank)
    return plan


def _read_texts(
    source: str, options: PruneOptions, window_length: int
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


def _plan_source(
    source: str, options: PruneOptions, track: Track
) -> tuple[PreTrainedModel, TokenizedText | None, _Checked, Plan, Record]:
    """Opens the source, scores its blocks, measures distances, and gives each pruned block its base.

    Or takes the plan that was given. What can be refused early is refused first.
    """
    checked = _check_source(source, options)
    windows, text = _read_texts(source, options, checked.window_length)
    model = load_model(source, options.dtype, options.device)
    check_finite(model, track)
    record = new_record(source, options, _resolved(options, checked))
    if checked.plan is not None:
        return model, text, checked, checked.plan, record
    if windows is not None:
        record["calibration"] = {"text": _calibration_text(options), "windows": list(windows.shape)}
        record["calibration"]["asked"] = record["options"]["windows"]
        record["block_score"] = record["options"]["block_score"]
        record["scores"] = block_means(model, windows, BLOCK_SCORES[record["block_score"]], track)
    pruned = lowest(record["scores"], checked.pruned) if isinstance(checked.pruned, int) else checked.pruned
    record["base_distance"] = record["options"]["base_distance"]
    record["distances"] = base_distances(model, pruned, checked.rank, record["base_distance"], track)
    return model, text, checked, choose_bases(record["distances"], checked.rank, checked.depth), record


def _pruned_or_count(
    options: PruneOptions, shape: ModelShape, rank: int, depth: int, itemsize: int
) -> Sequence[int] | int:
    """The blocks to prune, or, where their scores decide, how many."""
    if options.blocks is not None:
        return check_blocks(options.blocks, depth)
    if options.ratio is not None:
        return num_pruned_at(options.ratio, depth)
    assert options.target_size is not None
    return shape.num_pruned_for(parse_size(options.target_size, itemsize), rank, depth)


def _calibration_text(options: PruneOptions) -> str:
    return DEFAULT_TEXT if options.calibration is None else options.calibration


def _resolved(options: PruneOptions, checked: _Checked) -> dict[str, Any]:
    """What the defaults that have an effect stand for."""
    values: dict[str, Any] = {"seed": options.seed or 0}
    if checked.plan is None:
        values |= {"rank": checked.rank, "base_distance": options.base_distance or "low-rank"}
    if options.output_norm:
        values["norm_init"] = _norm_init(options)
    if options.calibrates:
        values |= {"calibration": _calibration_text(options), "windows": options.windows or DEFAULT_WINDOWS}
        values["block_score"] = options.block_score or "influence"
    if options.calibrates or options.perplexity is not None:
        values |= {"window_length": checked.window_length, "text_column": options.text_column or "text"}
    return values


def _norm_init(options: PruneOptions) -> float:
    return DEFAULT_NORM_INIT if options.norm_init is None else options.norm_init


def _flag(field: str) -> str:
    return "--no-output-norm" if field == "output_norm" else f"--{field.replace('_', '-')}"
