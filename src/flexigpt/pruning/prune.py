"""Pruning: source model -> plan -> compact model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from flexigpt.model import FlexiGPTForCausalLM, Plan, empty_compact, stored_bytes
from flexigpt.pruning.assemble import assembled, planned
from flexigpt.pruning.estimate import Announce
from flexigpt.pruning.frontier import sized
from flexigpt.pruning.options import PruneOptions
from flexigpt.record import Record
from flexigpt.runtime import Track, silent
from flexigpt.weights import Assembly


def prune(source: str, options: PruneOptions, track: Track = silent) -> tuple[FlexiGPTForCausalLM, Plan, Record]:
    """Makes a compact model of a source model (FlexiGPT, section 3).

    The weights that the two share stay in the source's files until they are used, unless `dtype` or `device` differ
    from the files'. `assemble_pruned` does without a model in memory altogether.

    Args:
        source: folder or hub name of a source model.
        options: what to prune, and how.
        track: reports the progress of each stage.

    Returns:
        The compact model, its plan, and the record: everything measured on the way, JSON-ready.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    with assemble_pruned(source, options, track) as (assembly, plan, record):
        return cast(FlexiGPTForCausalLM, assembly.in_memory()), plan, record


@contextmanager
def assemble_pruned(
    source: str, options: PruneOptions, track: Track = silent, announce: Announce | None = None
) -> Iterator[tuple[Assembly, Plan, Record]]:
    """`prune` with one block in memory at a time: the compact model is assembled, for `write_checkpoint` to write.

    A run that is killed or fails before the end of the `with` block goes on where it was when it is started again.

    Args:
        source: folder or hub name of a source model.
        options: what to prune, and how.
        track: reports the progress of each stage.
        announce: is called once with what the run will take, after the checks and before the work.

    Raises:
        InputError: as `prune`.
    """
    with assembled(source, sized(source, options, track), track, announce) as made:
        yield made


def plan_only(
    source: str, options: PruneOptions, track: Track = silent, announce: Announce | None = None
) -> tuple[Plan, Record]:
    """The plan that `prune` would apply, and the record of what it rests on; no model is made.

    Arguments and errors are those of `assemble_pruned`.
    """
    workspace, plan, record = planned(source, sized(source, options, track), track, announce, writes=False)
    empty, _ = empty_compact(workspace.empty, plan, workspace.options.has_norms)
    size = {"parameters": empty.num_parameters(), "bytes": stored_bytes(empty)}
    record["planned"] = size | {"share": size["parameters"] / workspace.shape.parameters}
    return plan, record | workspace.took()
