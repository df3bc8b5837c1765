"""Pruning: source model -> plan -> compact model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from flexigpt.activation_distances import activation_distances
from flexigpt.aligned_source import AlignedSource
from flexigpt.cache import CachedStage
from flexigpt.checkpoint import check_depth, empty_compact
from flexigpt.distances import base_distances
from flexigpt.errors import InputError, flag
from flexigpt.estimate import Estimate, Work, estimate
from flexigpt.fitting import Fits, fit_blocks
from flexigpt.initialization import (
    ADAPTER_INITS,
    DEFAULT_NORM_INIT,
    FITTED,
    ReplicaStart,
    adapter_spectra,
    default_rank,
    parse_norm_init,
    replica_tensors,
)
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM
from flexigpt.plan import ModelShape, Plan
from flexigpt.progress import Timed, Track, silent
from flexigpt.record import Record, measure_both, new_record
from flexigpt.scoring import (
    DEFAULT_WINDOWS,
    CheckedSource,
    Opened,
    ScoringOptions,
    check_source,
    chosen,
    digest,
    open_scored,
    pruned_or_count,
)
from flexigpt.selection import BASE_DISTANCES, DEFAULT_DISTANCE, GREEDY_SCORE, choose_bases
from flexigpt.streaming import Assembly, StreamedModel


@dataclass(frozen=True, kw_only=True)
class PruneOptions(ScoringOptions):
    """What to prune, and how. Exactly one of ratio, blocks, target_size and plan says how much.

    The fields of `ScoringOptions` say which blocks are pruned; these are the rest.

    Attributes:
        plan: a plan file to apply as it is.
        rank: rank of the adapters; default: hidden size / 16.
        base_distance: distance by which each pruned block's base is chosen; default: low-rank.
        compare_distances: further distances to measure and record, for the report; they choose nothing.
        align: whether a pruned block's weights are first brought near its base's, by what changes nothing that the
            block computes: places of units and heads, turns of values and keys.
        adapter_init: how adapters start.
        norm_init: where the output norms' gamma starts: a constant, or fitted; default: 0.05.
        output_norm: whether replicas have output norms.
        seed: shuffles the calibration text and draws random adapters; default: 0.
    """

    plan: str | Path | None = None
    rank: int | None = None
    base_distance: str | None = None
    compare_distances: Sequence[str] | None = None
    align: bool = False
    adapter_init: str = "svd"
    norm_init: float | str | None = None
    output_norm: bool = True

    def __post_init__(self) -> None:
        if self.adapter_init not in ADAPTER_INITS:
            raise InputError(f"--adapter-init {self.adapter_init} is unknown: give {', '.join(ADAPTER_INITS)}")
        super().__post_init__()
        distances = [("compare_distances", name) for name in self.compare_distances or ()]
        for name, value in (("base_distance", self.base_distance), *distances):
            if value is not None and value not in BASE_DISTANCES:
                raise InputError(f"{flag(name)} {value} is unknown: give {', '.join(BASE_DISTANCES)}")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank {self.rank} is too small: give at least 1")
        parse_norm_init(self.norm_init)
        if self.align and self.adapter_init == "zero":
            raise InputError("--align has no effect with --adapter-init zero, which mends nothing: leave it out")
        if self.compare_distances and (self.base_distance or DEFAULT_DISTANCE) in self.compare_distances:
            raise InputError(
                f"--compare-distances {','.join(self.compare_distances)} names the distance by which bases are chosen, "
                "which is recorded anyway: name others"
            )

    def idle_settings(self) -> list[tuple[str, str]]:
        """Fields that have no effect beside the others, each with the reason: giving one is an error."""
        idle = super().idle_settings()
        if self.plan is not None:
            by_plan = ["rank", "base_distance", "compare_distances", "block_score"]
            by_plan += [] if self.fits else ["calibration", "windows"]
            idle += [(name, "the plan decides it") for name in by_plan]
        if not self.output_norm:
            idle.append(("norm_init", "--no-output-norm leaves no output norm"))
        return idle

    @property
    def how_much(self) -> tuple[str, ...]:
        """The fields of which exactly one is given."""
        return *super().how_much, "plan"

    @property
    def distances(self) -> tuple[str, ...]:
        """Keys of BASE_DISTANCES: what is measured, first that by which bases are chosen; none with a plan."""
        if self.plan is not None:
            return ()
        return self.base_distance or DEFAULT_DISTANCE, *(self.compare_distances or ())

    @property
    def compares_activations(self) -> bool:
        """Whether a distance is measured on calibration text."""
        return any(name in BASE_DISTANCES and BASE_DISTANCES[name].calibrated for name in self.distances)

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is read."""
        return self.fits or self.compares_activations or (self.plan is None and super().calibrates)

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to calibration text."""
        fitted = ADAPTER_INITS[self.adapter_init].fit is not None or (self.output_norm and self.norm_init == FITTED)
        return fitted or super().fits

    @property
    def is_random(self) -> bool:
        """Whether anything depends on the seed."""
        return self.calibrates or self.adapter_init != "svd"


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What the source's configuration and the options decide, before any text or weight is read.

    Attributes:
        source: what its configuration says.
        rank: of the adapters, where no plan is given.
        plan: that was given.
        pruned: where none was, the blocks to prune or, where their scores decide, how many.
    """

    source: CheckedSource
    rank: int
    plan: Plan | None
    pruned: Sequence[int] | int


def prune(source: str, options: PruneOptions, track: Track = silent) -> tuple[FlexiGPTForCausalLM, Plan, Record]:
    """Makes a compact model of a source model (FlexiGPT, section 3).

    The weights that the two share stay in the source's files until they are used, unless `dtype` or `device` differ
    from the files'. `assemble_pruned` does without a model in memory altogether.

    Args:
        source: folder or hub name of a source model.
        options: what to prune, and how.
        track: told of the progress of each stage.

    Returns:
        The compact model, its plan, and the record: everything measured on the way, JSON-ready.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    with assemble_pruned(source, options, track) as (assembly, plan, record):
        return cast(FlexiGPTForCausalLM, assembly.in_memory()), plan, record


@contextmanager
def assemble_pruned(
    source: str, options: PruneOptions, track: Track = silent
) -> Iterator[tuple[Assembly, Plan, Record]]:
    """`prune` with one block in memory at a time: the compact model is assembled, for `write_checkpoint` to write.

    Arguments and errors are those of `prune`. A run that is killed or fails before the end of the `with` block goes on
    where it was when it is started again.
    """
    timed = Timed(track)
    opened, checked, plan, record = _plan_source(source, options, timed)
    empty, taken = empty_compact(opened.source.model, plan, options.output_norm)
    assembly = Assembly(empty, opened.source, taken)
    depends = {"plan": plan.to_dict(), "init": _init_of(options), "windows": digest(opened.windows)}
    with opened.cache.stage("replicas", **depends) as stage:
        blocks = AlignedSource(opened.source, plan, stage) if options.align else opened.source
        _fill(assembly, _Filling(plan, blocks, opened.windows, stage), options, timed)
        record["adapter_spectra"] = adapter_spectra(assembly, blocks, plan)
        record |= measure_both(
            {"source": opened.source, "compact": assembly},
            opened.text,
            name=options.perplexity,
            window_length=checked.source.window_length,
            spill=opened.spill,
            cache=opened.cache,
            track=timed,
        )
        record["plain_removal"] = {"parameters": checked.source.shape.removed_parameters(len(plan.replicas))}
        yield assembly, plan, record | {"stages": timed.seconds, "seconds": round(timed.total, 1)}
        stage.discard()


class _Filling(NamedTuple):
    """What replicas are filled from."""

    plan: Plan
    source: StreamedModel
    windows: torch.Tensor | None
    stage: CachedStage


def _init_of(options: PruneOptions) -> dict[str, Any]:
    """What decides the replicas' own tensors, besides plan, source and text."""
    settings = {name: getattr(options, name) for name in ("align", "adapter_init", "output_norm", "refit_kept")}
    return settings | {"norm_init": _norm_init(options), "seed": options.seed or 0}


def _fill(assembly: Assembly, work: _Filling, options: PruneOptions, track: Track) -> None:
    """Fills what is the replicas' own, block by block, from the stage's folder where it is there already."""
    norm_init = _norm_init(options)
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
        fits = Fits(adapter=ADAPTER_INITS[options.adapter_init].fit, norms=norm_init == FITTED, kept=options.refit_kept)
        numbers = range(len(assembly))
        fit_blocks(work.source, assembly, numbers, work.windows, fits, stage=work.stage, track=track)


def plan_only(source: str, options: PruneOptions, track: Track = silent) -> tuple[Plan, Record]:
    """The plan that `prune` would apply, and the record of what it rests on; no model is made.

    Raises:
        InputError: as `prune`; or settings that only applying a plan reads.
    """
    for field in ("plan", "perplexity", "align", "adapter_init", "norm_init", "output_norm", "refit_kept"):
        if getattr(options, field) != getattr(PruneOptions, field):
            raise InputError(f"{_flag(field)} has no effect with --plan-only, which makes no model: leave it out")
    timed = Timed(track)
    *_, plan, record = _plan_source(source, options, timed)
    return plan, record | {"stages": timed.seconds, "seconds": round(timed.total, 1)}


def expected_bytes(source: str, options: PruneOptions) -> int:
    """Bytes of the weights that `prune` with these options would have to store; no weight is read.

    Raises:
        InputError: what the source's configuration or the plan rules out.
    """
    checked = _check_source(source, options)
    return checked.source.shape.stored_parameters(_ranks(checked)) * checked.source.itemsize


def expected(source: str, options: PruneOptions, plan_only: bool = False) -> Estimate:
    """What `prune`, or `plan_only`, with these options takes at most; no weight is read.

    Raises:
        InputError: what the source's configuration or the plan rules out.
    """
    checked = _check_source(source, options)
    ranks = _ranks(checked)
    name = options.base_distance or DEFAULT_DISTANCE
    tokens = (options.windows or DEFAULT_WINDOWS) * checked.source.window_length if options.calibrates else 0
    work = Work(
        tokens=tokens,
        factors=checked.plan is None and BASE_DISTANCES[name].prepare is not None,
        activations=len(ranks) if options.compares_activations else 0,
        removals=len(ranks) if options.block_score == GREEDY_SCORE else 0,
        replicas=0 if plan_only else len(ranks),
        rank=max(ranks, default=0),
        written=0 if plan_only else checked.source.shape.stored_parameters(ranks) * checked.source.itemsize,
    )
    return estimate(checked.source, options, work)


def _ranks(checked: _Checked) -> list[int]:
    """Of the replicas that there will be."""
    if checked.plan is not None:
        return [replica.rank for replica in checked.plan.replicas]
    return [checked.rank] * (checked.pruned if isinstance(checked.pruned, int) else len(checked.pruned))


def _check_source(source: str, options: PruneOptions) -> _Checked:
    """Refuses what the configuration or the plan rules out."""
    checked = check_source(source, options, options.output_norm)
    shape, depth = checked.shape, checked.depth
    rank = options.rank or default_rank(shape.hidden_size)
    if options.plan is not None:
        return _Checked(source=checked, rank=rank, plan=_read_plan(options.plan, shape, depth), pruned=())
    shape.check_rank(rank)
    pruned = pruned_or_count(options, checked, lambda target: shape.num_pruned_for(target, rank, depth))
    return _Checked(source=checked, rank=rank, plan=None, pruned=pruned)


def _read_plan(path: str | Path, shape: ModelShape, depth: int) -> Plan:
    plan = Plan.read(path)
    check_depth(plan, depth)
    for replica in plan.replicas:
        shape.check_rank(replica.rank)
    return plan


def _plan_source(source: str, options: PruneOptions, track: Track) -> tuple[Opened, _Checked, Plan, Record]:
    """Opens the source, scores its blocks, measures distances, and gives each pruned block its base.

    Or takes the plan that was given. What can be refused early is refused first.
    """
    checked = _check_source(source, options)
    opened = open_scored(source, options, checked.source, checked.pruned, track)
    record = new_record(source, options, _resolved(options, checked)) | opened.scored
    if checked.plan is not None:
        return opened, checked, checked.plan, record
    pruned = chosen(checked.pruned, opened.scored)
    name, *others = options.distances
    record["base_distance"] = name
    record["distances"] = _distances(opened, checked, pruned, name, track)
    record["compared_distances"] = {other: _distances(opened, checked, pruned, other, track) for other in others}
    return opened, checked, choose_bases(record["distances"], checked.rank, checked.source.depth), record


def _distances(
    opened: Opened, checked: _Checked, pruned: Sequence[int], name: str, track: Track
) -> dict[int, dict[int, float]]:
    """Of each pruned block to each kept one, by a key of BASE_DISTANCES."""
    if not BASE_DISTANCES[name].calibrated:
        return base_distances(opened.source, pruned, checked.rank, name, opened.cache, track)
    assert opened.windows is not None
    spill = opened.cache.folder if checked.source.needs_file(opened.windows.numel()) else None
    return activation_distances(opened, pruned, checked.rank, spill=spill, track=track)


def _resolved(options: PruneOptions, checked: _Checked) -> dict[str, Any]:
    """What the defaults that have an effect stand for."""
    values = options.defaults(checked.source.window_length)
    if checked.plan is None:
        values |= {"rank": checked.rank, "base_distance": options.base_distance or DEFAULT_DISTANCE}
    if options.output_norm:
        values["norm_init"] = _norm_init(options)
    return values


def _norm_init(options: PruneOptions) -> float | str:
    given = parse_norm_init(options.norm_init)
    return DEFAULT_NORM_INIT if given is None else given


def _flag(field: str) -> str:
    return "--no-output-norm" if field == "output_norm" else flag(field)
