"""Replicas in the place of pruned blocks."""

from collections.abc import Iterator
from contextlib import contextmanager

from flexigpt.model import Plan, empty_compact
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import Workspace
from flexigpt.replicas import HIDDEN_COPIES, fill, init_of
from flexigpt.runtime import digest
from flexigpt.weights import Assembly


@contextmanager
def filled(workspace: Workspace[PruneOptions], plan: Plan, stage_name: str) -> Iterator[Assembly]:
    """The compact model of a plan.

    What the stage keeps of the replicas goes when the block ends, and stays where it is killed or fails.
    """
    options, source = workspace.options, workspace.source
    empty, taken = empty_compact(source.model, plan, options.has_norms)
    assembly = Assembly(empty, source, taken)
    depends = {"plan": plan.to_dict(), "init": init_of(options), "windows": digest(workspace.windows)}
    with workspace.cache.stage(stage_name, **depends) as stage:
        spill = workspace.hidden_in(HIDDEN_COPIES)
        track, windows = workspace.track, workspace.windows
        fill(assembly, source, windows, options, stage=stage, spill=spill, track=track)
        yield assembly
        stage.discard()
