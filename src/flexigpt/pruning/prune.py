"""Pruning: source model -> plan -> compact model."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flexigpt.calibration import check_means
from flexigpt.model import FlexiGPTForCausalLM, ModelShape, Plan, Replica, check_depth, default_rank, empty_compact
from flexigpt.pruning.distances import BASE_DISTANCES, DEFAULT_DISTANCE, choose_bases
from flexigpt.pruning.estimate import Estimate, Work, estimate
from flexigpt.pruning.options import DEFAULT_WINDOWS, PruneOptions
from flexigpt.pruning.replacement import distances_by_name, replace_greedily
from flexigpt.pruning.scores import GREEDY_SCORES, REPLACEMENT_SCORE
from flexigpt.pruning.source import CheckedSource, Opened, check_source, chosen, open_scored, pruned_or_count
from flexigpt.record import Record, measure_both, new_record
from flexigpt.replicas import (
    ADAPTER_INITS,
    HIDDEN_COPIES,
    Filling,
    adapter_spectra,
    fill,
    init_of,
    source_of_replicas,
    spread_ranks,
)
from flexigpt.runtime import InputError, Timed, Track, digest, flag, parse_share, silent
from flexigpt.weights import Assembly


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
    empty, taken = empty_compact(opened.source.model, plan, options.output_norm, base_scale=options.base_scale)
    assembly = Assembly(empty, opened.source, taken)
    depends = {"plan": plan.to_dict(), "init": init_of(options), "windows": digest(opened.windows)}
    with opened.cache.stage("replicas", **depends) as stage:
        blocks = source_of_replicas(opened.source, plan, options, stage)
        tokens = 0 if opened.windows is None else opened.windows.numel()
        spill = checked.source.spill(opened.cache.folder, HIDDEN_COPIES * tokens)
        fill(assembly, Filling(plan, blocks, opened.windows, stage, spill), options, timed)
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


def plan_only(source: str, options: PruneOptions, track: Track = silent) -> tuple[Plan, Record]:
    """The plan that `prune` would apply, and the record of what it rests on; no model is made.

    Raises:
        InputError: as `prune`; or settings that only applying a plan reads.
    """
    idle = ["plan", "perplexity", "align", "refit_kept"]
    if options.block_score != REPLACEMENT_SCORE:  # which judges replicas, made as they say
        idle += ["adapter_init", "norm_init", "output_norm", "base_scale"]
    read = ("align", "base_scale") if options.spread_rank else ()  # what ranks are spread by
    for field in idle:
        if field not in read and getattr(options, field) != getattr(PruneOptions, field):
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
        removals=len(ranks) if options.block_score in GREEDY_SCORES else 0,
        replicas=0 if plan_only else len(ranks),
        rank=max((rank if isinstance(rank, int) else rank.rank for rank in ranks), default=0),
        spreads=options.spread_rank,
        written=0 if plan_only else checked.source.shape.stored_parameters(ranks) * checked.source.itemsize,
    )
    return estimate(checked.source, options, work)


def _ranks(checked: _Checked) -> Sequence[int | Replica]:
    """The replicas that there will be: those of the plan, or their ranks, as far as parameters go."""
    if checked.plan is not None:
        return list(checked.plan.replicas)
    return [checked.rank] * (checked.pruned if isinstance(checked.pruned, int) else len(checked.pruned))


def _check_source(source: str, options: PruneOptions) -> _Checked:
    """Refuses what the configuration or the plan rules out."""
    checked = check_source(source, options, options.output_norm, options.base_scale)
    shape, depth = checked.shape, checked.depth
    rank = options.rank or default_rank(shape.hidden_size)
    if options.plan is not None:
        return _Checked(source=checked, rank=rank, plan=_read_plan(options.plan, shape, depth), pruned=())
    if options.adapter_budget is None:
        shape.check_rank(rank)
    pruned = pruned_or_count(options, checked, lambda target: shape.num_pruned_for(target, rank, depth))
    if options.adapter_budget is not None:
        rank = _rank_within(options.adapter_budget, shape, pruned if isinstance(pruned, int) else len(pruned))
    return _Checked(source=checked, rank=rank, plan=None, pruned=pruned)


def _rank_within(budget: str, shape: ModelShape, replicas: int) -> int:
    """The highest rank at which the adapters of so many replicas stay within that share of the source's parameters."""
    of_a_rank = replicas * shape.adapter_parameters(1) / shape.parameters
    rank = int(parse_share(budget) / of_a_rank + 1e-9)
    if not 1 <= rank <= shape.max_rank:
        # Rounded up, so that what is advised will do.
        least, most = (f"{math.ceil(1e5 * of_a_rank * limit) / 1e3:g}%" for limit in (1, shape.max_rank))
        raise InputError(
            f"--adapter-budget {budget} is out of range for {replicas} replicas: give {least} (rank 1) to {most} "
            f"(rank {shape.max_rank})"
        )
    return rank


def _read_plan(path: str | Path, shape: ModelShape, depth: int) -> Plan:
    plan = Plan.read(path)
    check_depth(plan, depth)
    for replica in plan.replicas:
        shape.check_replica(replica)
    return plan


def _plan_source(source: str, options: PruneOptions, track: Track) -> tuple[Opened, _Checked, Plan, Record]:
    """Opens the source, scores its blocks, measures distances, and gives each pruned block its base.

    Or takes the plan that was given. What can be refused early is refused first.
    """
    checked = _check_source(source, options)
    opened = open_scored(source, options, checked.source, checked.pruned, track)
    if options.block_score == REPLACEMENT_SCORE:
        assert isinstance(checked.pruned, int)
        replaced = replace_greedily(opened, checked.source, options, checked.rank, checked.pruned, track)
        check_means(replaced.perplexities)
        opened = dataclasses.replace(opened, scored=opened.scored | replaced.record())
    record = new_record(source, options, _resolved(options, checked)) | opened.scored
    record["fitted"] = ADAPTER_INITS[options.adapter_init].fit is not None
    if checked.plan is not None:
        return opened, checked, checked.plan, record
    pruned = chosen(checked.pruned, opened.scored)
    name, *others = options.distances
    record["base_distance"] = name
    record["distances"] = distances_by_name(opened, checked.source, pruned, checked.rank, name, track)
    record["compared_distances"] = {
        other: distances_by_name(opened, checked.source, pruned, checked.rank, other, track) for other in others
    }
    plan = choose_bases(record["distances"], checked.rank, checked.source.depth)
    return opened, checked, _spread(opened, checked, plan, options, track) if options.spread_rank else plan, record


def _spread(opened: Opened, checked: _Checked, plan: Plan, options: PruneOptions, track: Track) -> Plan:
    """The plan with a rank for each adapter."""
    assert opened.windows is not None
    settings = {name: getattr(options, name) for name in ("align", "base_scale")}
    depends = {"plan": plan.to_dict(), "windows": digest(opened.windows), **settings}
    spill = checked.source.spill(opened.cache.folder, opened.windows.numel())
    with opened.cache.stage("ranks", **depends) as stage:
        source = source_of_replicas(opened.source, plan, options, stage)
        shape = checked.source.shape
        return spread_ranks(source, plan, opened.windows, shape, stage, spill=spill, track=track)


def _resolved(options: PruneOptions, checked: _Checked) -> dict[str, Any]:
    """What the defaults that have an effect stand for."""
    values = options.defaults(checked.source.window_length)
    if checked.plan is None:
        values |= {"rank": checked.rank, "base_distance": options.base_distance or DEFAULT_DISTANCE}
    if options.output_norm:
        values["norm_init"] = options.norm_start
    return values


def _flag(field: str) -> str:
    return "--no-output-norm" if field == "output_norm" else flag(field)
