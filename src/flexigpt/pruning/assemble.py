"""A plan of a given size, and the compact model that it makes."""

from collections.abc import Iterator
from contextlib import contextmanager

from flexigpt.model import Plan, check_depth, empty_compact
from flexigpt.pruning.allocation import allocated, check_sublayers, measure_sublayers, stored_for, units_of
from flexigpt.pruning.distances import choose_bases, measure_distances
from flexigpt.pruning.estimate import Announce, open_announced
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.scores import pruned_or_count, scored
from flexigpt.pruning.source import CheckedSource, Workspace, checked_source
from flexigpt.record import Record
from flexigpt.replicas import adapter_spectra, fill, hidden_copies, init_of
from flexigpt.runtime import InputError, Track, digest, silent
from flexigpt.weights import Assembly


@contextmanager
def assembled(
    source: str | Workspace[PruneOptions],
    options: PruneOptions,
    track: Track = silent,
    announce: Announce | None = None,
) -> Iterator[tuple[Assembly, Plan, Record]]:
    """What `assemble_pruned` gives, where it is said how large it is to be; arguments and errors are its own.

    The source may be open already; then `track` is not used.
    """
    workspace, plan, record = planned(source, options, track, announce)
    asked, opened, windows = workspace.options, workspace.source, workspace.windows
    units = units_of(workspace, plan)
    empty, taken = empty_compact(opened.model, plan, asked.has_norms)
    assembly = Assembly(empty, opened, taken)
    depends = {"plan": plan.to_dict(), "init": init_of(asked), "windows": digest(windows)}
    with workspace.cache.stage("replicas", **depends) as stage:
        spill = workspace.hidden_in(hidden_copies(workspace.shape))
        states, given = workspace.states.known, (assembly, opened, windows, asked)
        fill(*given, units=units, stage=stage, spill=spill, states=states, track=workspace.track)
        if isinstance(source, str):  # nothing else is made of it
            workspace.states.forget()
        if plan.replicas:
            record["adapter_spectra"] = adapter_spectra(assembly, opened, plan)
            record["plain_removal"] = {"parameters": workspace.shape.removed_parameters(len(plan.replicas))}
        yield assembly, plan, record | workspace.compared("compact", assembly)
        stage.discard()


def planned(
    source: str | Workspace[PruneOptions],
    options: PruneOptions,
    track: Track,
    announce: Announce | None,
    writes: bool = True,
) -> tuple[Workspace[PruneOptions], Plan, Record]:
    """Opens the source and decides what is pruned, or takes the plan that was given.

    What can be refused early is refused first.
    """
    if options.remove:
        raise InputError("blocks that are removed have no replicas: call flexigpt.remove")
    if options.by_units and options.blocks is not None:
        raise InputError(
            "--blocks names whole blocks, and the form units prunes units of all of them: give --ratio or "
            "--target-size, or --preset paper for replicas of whole blocks, or --remove for none"
        )
    checked = checked_source(source, options)
    if options.plan is not None:
        return _given(checked, Plan.read(options.plan), track, announce, writes)
    if options.by_units:
        stored = stored_for(checked)
        workspace = open_announced(checked, track, announce, stored if writes else 0)
        measured = measure_sublayers(workspace, writes and options.refit_kept)
        return workspace, allocated(workspace, measured, stored), workspace.record() | measured.record(workspace)
    pruned = pruned_or_count(checked)
    count = pruned if isinstance(pruned, int) else len(pruned)
    checked = checked.with_rank(count)
    ranks = [checked.rank] * count if writes else []
    stored = checked.shape.stored_parameters(ranks) if writes else 0
    workspace = open_announced(checked, track, announce, stored, ranks)
    blocks, found = scored(workspace, pruned)
    distances = measure_distances(workspace, blocks)
    record = workspace.record() | found | {"base_distance": options.base_distance, "distances": distances}
    return workspace, choose_bases(distances, checked.rank, checked.depth), record


def _given(
    checked: CheckedSource[PruneOptions], plan: Plan, track: Track, announce: Announce | None, writes: bool
) -> tuple[Workspace[PruneOptions], Plan, Record]:
    """A plan from a file, if it fits the source."""
    check_depth(plan, checked.depth)
    if not plan.replicas and not plan.sublayers:
        raise InputError("the plan prunes nothing: it has no replicas and no sublayers")
    for replica in plan.replicas:
        checked.shape.check_replica(replica)
    check_sublayers(checked, plan)
    empty, _ = empty_compact(checked.empty, plan, checked.options.has_norms)
    stored = empty.num_parameters() if writes else 0
    workspace = open_announced(checked, track, announce, stored, plan.replicas if writes else ())
    found = scored(workspace, plan.pruned)[1] if plan.replicas else {}
    if writes and any(one.units for one in plan.sublayers):  # then it is measured which units stay
        found = measure_sublayers(workspace, checked.options.refit_kept).record(workspace) | found
    return workspace, plan, workspace.record() | found
