"""Extension: a source's blocks are repeated; each repetition after the first is a replica."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from flexigpt.model import (
    FlexiGPTForCausalLM,
    ModelShape,
    Plan,
    Replica,
    default_rank,
    empty_compact,
    find_architecture,
    model_shape,
    num_blocks,
)
from flexigpt.record import Record, measure_both, new_record
from flexigpt.replicas import DEFAULT_NORM_INIT, ReplicaStart, parse_norm_init, replica_tensors
from flexigpt.runtime import InputError, Timed, Track, check_dtype, check_seed, silent
from flexigpt.text import check_window_length, tokenize_text
from flexigpt.weights import Assembly, Source, check_finite, load_tokenizer, open_empty, read_config


def block_pattern(blocks: range, times: int) -> list[int]:
    """Each block `times` times in a row: 3 3 4 4 5 5."""
    return [block for block in blocks for _ in range(times)]


def sequential_pattern(blocks: range, times: int) -> list[int]:
    """The whole run `times` times: 3 4 5 3 4 5."""
    return list(blocks) * times


PATTERNS = {"block": block_pattern, "sequential": sequential_pattern}


@dataclass(frozen=True, kw_only=True)
class ExtendOptions:
    """Which blocks to repeat, and how.

    None stands for the default that a field's description names. A field that is given but has no effect is refused.

    Attributes:
        blocks: ranges of blocks to repeat, first to last but one: 4:18, or several, 2:6,10:14.
        times: how often each of them stands in the extended model, at least 2.
        pattern: block (3 3 4 4 5 5) or sequential (3 4 5 3 4 5).
        rank: rank of the adapters; default: hidden size / 16.
        norm_init: constant that the output norms' gamma starts at; default: 0.05.
        perplexity: text to measure perplexity on before and after: a .txt, .jsonl, .jsonl.gz or .parquet file, or
            NAME[:CONFIG][@SPLIT] of a data set on the hub; default: none.
        text_column: column that holds the text; default: text.
        window_length: tokens in a window; default: the model's context, at most 2048.
        dtype: of the weights: auto (the source's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        seed: draws the adapters' random factors.
    """

    blocks: str
    times: int = 2
    pattern: str = "block"
    rank: int | None = None
    norm_init: float | None = None
    perplexity: str | None = None
    text_column: str | None = None
    window_length: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise InputError(f"--pattern {self.pattern} is unknown: give {', '.join(PATTERNS)}")
        if self.times < 2:
            raise InputError(f"--times {self.times} repeats nothing: give at least 2")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank {self.rank} is too small: give at least 1")
        parse_norm_init(self.norm_init)
        check_seed(self.seed)
        for name in ("text_column", "window_length"):
            if self.perplexity is None and getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} has no effect, since no text is read: leave it out")


def parse_ranges(blocks: str, depth: int) -> list[range]:
    """Half-open ranges of blocks: 4:18, or 2:6,10:14.

    Raises:
        InputError: what cannot be read, is empty, overlaps, is out of order or leaves the model's blocks.
    """
    matches = [re.fullmatch(r"\s*(\d+):(\d+)\s*", part) for part in blocks.split(",")]
    ranges = [range(int(match[1]), int(match[2])) for match in matches if match]
    ends = [end for run in ranges for end in (run.start, run.stop)]
    if len(ranges) < len(matches) or not all(ranges) or ends != sorted(ends) or ends[-1] > depth:
        raise InputError(
            f"--blocks {blocks} cannot be repeated: give ranges within 0:{depth}, ascending, as 4:18 or 2:6,10:14"
        )
    return ranges


def extension_plan(
    ranges: Sequence[range], times: int, pattern: str, rank: int, depth: int
) -> tuple[Plan, tuple[int, ...]]:
    """The plan of an extended model and the source's block behind each logical block (section 3.5).

    Args:
        ranges: disjoint, ascending runs of the source's blocks.
        times: how often each of their blocks stands in the extended model.
        pattern: a key of PATTERNS.
        rank: of the adapters.
        depth: blocks of the source.
    """
    order: list[int] = []
    for run in ranges:
        order += range(order[-1] + 1 if order else 0, run.start)
        order += PATTERNS[pattern](run, times)
    order += range(max(order) + 1, depth)
    first = {source_block: order.index(source_block) for source_block in order}
    replicas = tuple(
        Replica(block=block, base=first[source_block], rank=rank)
        for block, source_block in enumerate(order)
        if first[source_block] != block
    )
    return Plan(num_blocks=len(order), replicas=replicas), tuple(order)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What the source's configuration and the options decide."""

    empty: PreTrainedModel
    shape: ModelShape
    rank: int
    plan: Plan
    source_blocks: tuple[int, ...]
    window_length: int


def _check_source(source: str, options: ExtendOptions) -> _Checked:
    """Refuses what the configuration rules out, before any text or weight is read."""
    check_dtype(options.dtype)
    find_architecture(read_config(source))
    empty = open_empty(source)
    shape = model_shape(empty)
    rank = options.rank or default_rank(shape.hidden_size)
    shape.check_rank(rank)
    depth = num_blocks(empty.config)
    ranges = parse_ranges(options.blocks, depth)
    plan, source_blocks = extension_plan(ranges, options.times, options.pattern, rank, depth)
    window_length = check_window_length(options.window_length, empty.config)
    return _Checked(
        empty=empty, shape=shape, rank=rank, plan=plan, source_blocks=source_blocks, window_length=window_length
    )


def extended_bytes(source: str, options: ExtendOptions) -> int:
    """Bytes of the weights that `extend` with these options would have to store; no weight is read.

    Raises:
        InputError: what the source's configuration rules out.
    """
    checked = _check_source(source, options)
    own = checked.shape.replica_parameters(checked.rank)
    own += checked.shape.block_parameters - checked.shape.linear_parameters  # input norms and biases
    dtype = checked.empty.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return (checked.shape.parameters + own * len(checked.plan.replicas)) * int(dtype.itemsize)


def extend(source: str, options: ExtendOptions, track: Track = silent) -> tuple[FlexiGPTForCausalLM, Plan, Record]:
    """Makes a deeper model of a source model for almost no storage (FlexiGPT, section 3.5).

    Adapters start at zero and output norms at a small constant, so that before any training the extended model is near
    its source.

    Args:
        source: folder or hub name of a source model.
        options: which blocks to repeat, and how.
        track: told of the progress of each stage.

    Returns:
        The compact model, its plan in the numbering of the extended model, and the record: JSON-ready; its
        `source_blocks` names the source's block behind each logical block.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    assembly, plan, record = assemble_extended(source, options, track)
    return cast(FlexiGPTForCausalLM, assembly.in_memory()), plan, record


def assemble_extended(source: str, options: ExtendOptions, track: Track = silent) -> tuple[Assembly, Plan, Record]:
    """`extend` with one block in memory at a time: the extended model is assembled, for `write_checkpoint` to write.

    Arguments and errors are those of `extend`.
    """
    timed = Timed(track)
    checked = _check_source(source, options)
    plan, source_blocks = checked.plan, checked.source_blocks
    window_length, text = checked.window_length, None
    if options.perplexity is not None:
        text = tokenize_text(options.perplexity, load_tokenizer(source), window_length=window_length)
    opened = Source(source, options.dtype, options.device)
    check_finite(opened, timed)
    norm_init = DEFAULT_NORM_INIT if options.norm_init is None else options.norm_init
    empty, taken = empty_compact(opened.model, plan, source_blocks=source_blocks)
    assembly = Assembly(empty, opened, taken)
    start = ReplicaStart(adapter_init="zero", norm_init=norm_init, seed=options.seed)
    for replica in timed(plan.replicas, "initialising replicas", len(plan.replicas)):
        block = assembly.blocks[replica.block]
        assembly.own(replica.block, replica_tensors(block, opened, replica, start, source_blocks))
    resolved: dict[str, Any] = {"rank": checked.rank, "norm_init": norm_init}
    if text is not None:
        resolved |= {"window_length": window_length, "text_column": options.text_column or "text"}
    record = new_record(source, options, resolved) | {"source_blocks": list(source_blocks)}
    record |= measure_both(
        {"source": opened, "compact": assembly},
        text,
        name=options.perplexity,
        window_length=window_length,
        cache=opened.cache(None),
        track=timed,
    )
    return assembly, plan, record | {"stages": timed.seconds, "seconds": round(timed.total, 1)}
