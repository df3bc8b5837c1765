"""What `prune`, plain removal and `extend` are asked. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from flexigpt.calibration import TEXT_GROUP, CalibrationOptions
from flexigpt.model import Plan
from flexigpt.replicas import MOST_GAMMA, REPLICA_GROUP, ReplicaOptions
from flexigpt.runtime import InputError, RunOptions, flag, option, parse_numbers, parse_share
from flexigpt.text import shares_of

_WHAT = "What to prune"

BlockScoreName = Literal["influence", "angular", "relative-magnitude", "removal-perplexity"]

BaseDistanceName = Literal["low-rank", "full-rank", "frobenius"]

FormOfReplicas = Literal["units", "shared-linears"]

PatternName = Literal["block", "sequential"]

# Settings that go together, by name: the defaults, and the paper's recipe.
PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": {"form": "shared-linears", "refit_kept": False}}


# Shares of the blocks that a frontier removes, least and most.
_FRONTIER = 0.05, 0.45

_BLOCKS = partial(parse_numbers, name="--blocks", example="12,13")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(RunOptions, CalibrationOptions, ReplicaOptions):
    """What to prune, and how. Exactly one of ratio, blocks, target_size, max_loss and plan says how much.

    Attributes:
        ratio: share of the blocks to prune, in (0, 1): of their parameters, or, where whole blocks are pruned, of their
            number, rounded down.
        blocks: the blocks to prune, from 0, where whole blocks are pruned.
        target_size: stored size to come down to: parameters (4.8B, 350M) or bytes (3.2GB, 900MiB).
        max_loss: by how much the perplexity of the text that it is measured on may rise, as 10%: the smallest model
            that keeps within it is looked for.
        plan: a plan file to apply as it is.
        form: what is pruned, and what is left of it. Units: each MLP keeps those of its hidden units that the text
            needs most, and an attention that pays too little goes. Shared-linears: whole blocks are pruned, and borrow
            the weights of another block, with a small correction of their own (the paper).
        block_score: score whose lowest blocks are pruned, where whole blocks are. The perplexity chooses one block
            after the other, each time that without which the perplexity of the calibration text is least; this takes
            longer.
        remove: whether blocks are removed and nothing stands in for them (plain removal, to compare with).
        perplexity: text to measure perplexity on before and after, as for calibration; default: none.
        base_distance: distance by which each pruned block's base is chosen.
        memory: what a block and the hidden states of calibration text may take, as 4GiB; hidden states that do not fit
            go through a file; default: half of the memory that is free.
        seed: shuffles the calibration text and draws random adapters.
    """

    ratio: float | None = option(None, group=_WHAT, everyday=True)
    blocks: Sequence[int] | None = option(None, group=_WHAT, metavar="12,13,...", parse=_BLOCKS)
    target_size: str | None = option(None, group=_WHAT, everyday=True, metavar="4.8B|3.2GB")
    max_loss: str | None = option(None, group=_WHAT, metavar="10%")
    plan: str | Path | None = option(None, group=_WHAT)
    form: FormOfReplicas = option("units", group=_WHAT, command=False)
    block_score: BlockScoreName = option("influence", group=_WHAT)
    remove: bool = option(False, group=_WHAT)
    perplexity: str | None = option(None, group=TEXT_GROUP, everyday=True, metavar="FILE|NAME")
    base_distance: BaseDistanceName = option("low-rank", group=REPLICA_GROUP)
    memory: str | None = option(None, metavar="4GiB")

    def __post_init__(self) -> None:
        ReplicaOptions.__post_init__(self)  # which checks the fields of all of them
        shares_of(self.calibration)
        how_much = ("ratio", "blocks", "target_size", "max_loss", "plan")
        given = [flag(name) for name in how_much if getattr(self, name) is not None]
        if len(given) != 1:
            *most, last = map(flag, how_much)
            got = " and ".join(given) or "none of them"
            raise InputError(f"give exactly one of {', '.join(most)} and {last}: got {got}")
        if self.ratio is not None and not 0 < self.ratio < 1:
            near = self.ratio / 100 if 1 < self.ratio < 100 else 0.3  # who wrote 30 meant percent
            raise InputError(f"--ratio {self.ratio} is out of range: give a share above 0 and below 1, as {near:g}")
        if self.target_size is not None and isinstance(self.rank, str):
            raise InputError(f"--target-size already says how much is stored: give --rank {self.rank} as a number")
        if self.max_loss is not None:
            parse_share(self.max_loss, "--max-loss", "by how much the perplexity may rise, as 10%")
            if self.perplexity is None or not self.by_units:
                raise InputError(
                    "--max-loss is measured on the text of --perplexity, of what the default preset makes: give "
                    "--perplexity, and neither --remove nor --preset paper"
                )
        if self.remove and self.plan is not None:
            raise InputError("a plan says which replicas stand in, and --remove leaves them out: give --blocks instead")

    @classmethod
    def paper(cls, **given: Any) -> Self:
        """The paper's recipe: replicas start near no-ops, by the weights alone."""
        return cls(**{**PRESETS["paper"], **given})

    @property
    def by_units(self) -> bool:
        """Whether it is measured which hidden units to keep, and how many."""
        return self.form == "units" and not self.remove

    @property
    def plan_has_replicas(self) -> bool:
        """Whether a plan is given that makes replicas of blocks."""
        return self.plan is not None and bool(Plan.read(self.plan).replicas)

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is read."""
        return self.refit_kept or self.by_units or (self.plan is None and self.blocks is None)


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(RunOptions, CalibrationOptions):
    """A ladder of sizes.

    Attributes:
        perplexity: text to measure perplexity on, as for calibration.
        sizes: how many sizes are measured, from 95 to 55 % of the source's blocks.
        memory: as for pruning.
    """

    perplexity: str = option(group=TEXT_GROUP, everyday=True, metavar="FILE|NAME")
    sizes: int = option(8, group="Which sizes", everyday=True, least=2, most=64)
    memory: str | None = option(None, metavar="4GiB")

    def of_prune(self) -> PruneOptions:
        """Those of the models that are made; their size is still to come."""
        return PruneOptions(ratio=0.5, **{name: value for name, value in vars(self).items() if name != "sizes"})

    def removed_of(self, depth: int) -> list[int]:
        """How many blocks plain removal takes at each size, fewest first."""
        least, most = (share * depth for share in _FRONTIER)
        steps = [least + (most - least) * number / (self.sizes - 1) for number in range(self.sizes)]
        return sorted({min(max(1, round(step)), depth - 1) for step in steps})


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(RunOptions):
    """Which blocks to repeat, and how.

    Attributes:
        blocks: ranges of blocks to repeat, first to last but one: 4:18, or several, 2:6,10:14.
        times: how often each of them stands in the extended model.
        pattern: block (3 3 4 4 5 5) or sequential (3 4 5 3 4 5).
        rank: of the adapters; default: hidden size / 16.
        output_norm: constant that the output norms' gamma starts at.
        perplexity: text to measure perplexity on before and after: a .txt, .jsonl, .jsonl.gz or .parquet file, or
            NAME[:CONFIG][@SPLIT] of a data set on the hub; default: none.
        window_length: tokens in a window; default: the model's context, at most 2048.
        seed: draws the adapters' random factors.
    """

    blocks: str = option(group="What to repeat", everyday=True, metavar="4:18|2:6,10:14")
    times: int = option(2, group="What to repeat", everyday=True, least=2, most=1000)
    pattern: PatternName = option("block", group="What to repeat", everyday=True)
    rank: int | None = option(None, group=REPLICA_GROUP, everyday=True, least=1)
    output_norm: float = option(0.05, group=REPLICA_GROUP)
    perplexity: str | None = option(None, group=TEXT_GROUP, everyday=True, metavar="FILE|NAME")
    window_length: int | None = option(None, group=TEXT_GROUP)
    seed: int = option(0, command=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.output_norm) <= MOST_GAMMA:
            raise InputError(f"--output-norm {self.output_norm} cannot be used: give a small constant, as 0.05")
