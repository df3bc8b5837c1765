"""Replicas filled: initialised, and where that is asked for fitted to calibration text."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexigpt.aligned_source import AlignedSource
from flexigpt.cache import CachedStage
from flexigpt.fitting import Fits, fit_blocks
from flexigpt.initialization import ADAPTER_INITS, DEFAULT_NORM_INIT, FITTED, ReplicaStart, replica_tensors
from flexigpt.plan import Plan
from flexigpt.progress import Track
from flexigpt.prune_options import PruneOptions
from flexigpt.streaming import Assembly, StreamedModel


class Filling(NamedTuple):
    """What replicas are filled from.

    Attributes:
        plan: which they are.
        source: whose blocks they replace.
        windows: calibration windows, (windows, tokens) ids; None: nothing is fitted.
        stage: keeps what is done, which a run that was killed finds again.
        spill: folder for files that hold the fits' hidden states; None: memory does.
    """

    plan: Plan
    source: StreamedModel
    windows: torch.Tensor | None
    stage: CachedStage
    spill: Path | None = None


def init_of(options: PruneOptions) -> dict[str, Any]:
    """What decides the replicas' own tensors, besides plan, source and text."""
    settings = {
        name: getattr(options, name) for name in ("align", "adapter_init", "output_norm", "base_scale", "refit_kept")
    }
    return settings | {"norm_init": options.norm_start, "seed": options.seed or 0}


def source_of_replicas(source: StreamedModel, plan: Plan, options: PruneOptions, stage: CachedStage) -> StreamedModel:
    """The source itself, or with its pruned blocks aligned to their bases; the stage keeps those."""
    return AlignedSource(source, plan, stage) if options.align else source


def fill(assembly: Assembly, work: Filling, options: PruneOptions, track: Track) -> None:
    """Fills what is the replicas' own, block by block, from the stage's folder where it is there already."""
    norm_init = options.norm_start
    start = ReplicaStart(
        adapter_init=options.adapter_init,
        norm_init=DEFAULT_NORM_INIT if isinstance(norm_init, str) else norm_init,
        seed=options.seed or 0,
    )
    for replica in track(work.plan.replicas, "initialising replicas", len(work.plan.replicas)):
        make = partial(replica_tensors, assembly.blocks[replica.block], work.source, replica, start)
        assembly.own(replica.block, work.stage.tensors(f"replica-{replica.block}", make))
    if options.fits:
        assert work.windows is not None
        init = ADAPTER_INITS[options.adapter_init]
        kept = options.refit_kept
        fits = Fits(adapter=init.fit, weighted=init.weighted, norms=norm_init == FITTED, kept=kept)
        numbers = range(len(assembly))
        given = (work.source, assembly, numbers, work.windows, fits)
        fit_blocks(*given, spill=work.spill, stage=work.stage, track=track)
