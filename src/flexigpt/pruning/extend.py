"""Extension: a source's blocks are repeated; each repetition after the first is a replica."""

import re
from collections.abc import Sequence
from typing import cast

from flexigpt.model import FlexiGPTForCausalLM, Plan, Replica, empty_compact
from flexigpt.pruning.estimate import Announce, open_announced
from flexigpt.pruning.options import ExtendOptions
from flexigpt.pruning.source import CheckedSource
from flexigpt.record import Record
from flexigpt.replicas import ReplicaOptions, replica_tensors
from flexigpt.runtime import InputError, Track, silent
from flexigpt.weights import Assembly


def block_pattern(blocks: range, times: int) -> list[int]:
    """Each block `times` times in a row: 3 3 4 4 5 5."""
    return [block for block in blocks for _ in range(times)]


def sequential_pattern(blocks: range, times: int) -> list[int]:
    """The whole run `times` times: 3 4 5 3 4 5."""
    return list(blocks) * times


PATTERNS = {"block": block_pattern, "sequential": sequential_pattern}


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


def extend(source: str, options: ExtendOptions, track: Track = silent) -> tuple[FlexiGPTForCausalLM, Plan, Record]:
    """Makes a deeper model of a source model for almost no storage (FlexiGPT, section 3.5).

    Adapters start at zero and output norms at a small constant, so that before any training the extended model is near
    its source.

    Args:
        source: folder or hub name of a source model.
        options: which blocks to repeat, and how.
        track: reports the progress of each stage.

    Returns:
        The compact model, its plan in the numbering of the extended model, and the record: JSON-ready; its
        `source_blocks` names the source's block behind each logical block.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    assembly, plan, record = assemble_extended(source, options, track)
    return cast(FlexiGPTForCausalLM, assembly.in_memory()), plan, record


def assemble_extended(
    source: str, options: ExtendOptions, track: Track = silent, announce: Announce | None = None
) -> tuple[Assembly, Plan, Record]:
    """`extend` with one block in memory at a time: the extended model is assembled, for `write_checkpoint` to write.

    Arguments and errors are those of `extend`; `announce` is called once with what the run will take, after the checks
    and before the work.
    """
    start = ReplicaOptions(adapter_init="zero", output_norm=options.output_norm, seed=options.seed)
    checked = CheckedSource.check(source, options, start)
    ranges = parse_ranges(options.blocks, checked.depth)
    checked = checked.with_rank(1)
    plan, source_blocks = extension_plan(ranges, options.times, options.pattern, checked.rank, checked.depth)
    shape = checked.shape
    own = shape.replica_parameters(checked.rank) + shape.block_parameters - shape.linear_parameters
    stored = shape.parameters + own * len(plan.replicas)
    workspace = open_announced(checked, track, announce, stored, plan.replicas)
    empty, taken = empty_compact(workspace.source.model, plan, source_blocks=source_blocks)
    assembly = Assembly(empty, workspace.source, taken)
    for replica in workspace.track(plan.replicas, "initialising replicas", len(plan.replicas)):
        block = assembly.blocks[replica.block]
        assembly.own(replica.block, replica_tensors(block, workspace.source, replica, start, source_blocks))
    record = workspace.record() | {"source_blocks": list(source_blocks)}
    return assembly, plan, record | workspace.compared("compact", assembly)
