"""Plain removal of blocks (ShortGPT): what pruning is compared with."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from flexigpt.pruning.estimate import Announce, open_announced
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.scores import pruned_or_count, scored
from flexigpt.pruning.source import Workspace, checked_source
from flexigpt.record import Record
from flexigpt.replicas import hidden_copies, refit_kept
from flexigpt.runtime import Track, digest, silent
from flexigpt.weights import Assembly, without_blocks


def remove(
    source: str, options: PruneOptions, track: Track = silent
) -> tuple[PreTrainedModel, tuple[int, ...], Record]:
    """Removes the blocks that `prune` would prune, and puts nothing in their place.

    With `target_size` they are fewer, since nothing is stored for them. With `refit_kept`, which is the default, the
    kept blocks are fitted to the source; `PruneOptions.paper` leaves them as they are (ShortGPT).

    Args:
        source: folder or hub name of a source model.
        options: which blocks to remove; how replicas are made has no effect.
        track: reports the progress of each stage.

    Returns:
        The shorter model, an ordinary one of the source's family; the removed blocks, ascending; and the record:
        everything measured on the way, JSON-ready.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    with assemble_removed(source, options, track) as (assembly, blocks, record):
        return assembly.in_memory(), blocks, record


@contextmanager
def assemble_removed(
    source: str | Workspace[PruneOptions],
    options: PruneOptions,
    track: Track = silent,
    announce: Announce | None = None,
) -> Iterator[tuple[Assembly, tuple[int, ...], Record]]:
    """`remove` with one block in memory at a time: the shorter model is assembled, for `write_checkpoint` to write.

    A run that is killed or fails before the end of the `with` block goes on where it was when it is started again.

    Arguments and errors are those of `remove`, but that the source may be open already, and then `track` is not used;
    `announce` is called once with what the run will take, after the checks and before the work.
    """
    options = dataclasses.replace(options, remove=True)
    checked = checked_source(source, options)
    pruned = pruned_or_count(checked)
    stored = checked.shape.removed_parameters(pruned if isinstance(pruned, int) else len(pruned))
    workspace = open_announced(checked, track, announce, stored)
    opened, windows = workspace.source, workspace.windows
    blocks, found = scored(workspace, pruned)
    assembly = without_blocks(opened, blocks)
    with workspace.cache.stage("removed", blocks=blocks, windows=digest(windows)) as stage:
        if workspace.options.refit_kept:
            left = iter(range(len(assembly)))
            standing = [None if block in blocks else next(left) for block in range(workspace.depth)]
            spill = workspace.hidden_in(hidden_copies(workspace.shape))
            given, states = (opened, assembly, standing, windows), workspace.states.known
            refit_kept(*given, spill=spill, states=states, stage=stage, track=workspace.track)
        record = workspace.record() | found
        record["removed"] = {"blocks": list(blocks), "num_blocks": workspace.depth, "source": checked.name}
        yield assembly, blocks, record | workspace.compared("shorter", assembly)
        stage.discard()
