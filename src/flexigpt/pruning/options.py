"""What `prune` is asked: what to prune, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexigpt.pruning.distances import BASE_DISTANCES, DEFAULT_DISTANCE
from flexigpt.pruning.scores import BLOCK_SCORES, GREEDY_SCORES, REMOVAL_SCORE, REPLACEMENT_SCORE
from flexigpt.replicas import ADAPTER_INITS, FITTED, ReplicaOptions, parse_norm_init
from flexigpt.runtime import InputError, check_seed, flag, parse_share
from flexigpt.text import DEFAULT_TEXT

_FITTED = {
    "adapter_init": "block-output",
    "spread_rank": True,
    "output_norm": False,
    "base_scale": True,
    "refit_kept": True,
}

# Settings that go together, for `PruneOptions(ratio=0.3, **PRESETS["fitted"])`: the paper's recipe, which is what
# PruneOptions sets by itself; what the command sets; and what leaves the least perplexity before recovery, and takes
# the time of many fits.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fitted": _FITTED,
    "thorough": _FITTED | {"block_score": REPLACEMENT_SCORE},
}

DEFAULT_PRESET = "fitted"


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Which blocks to prune, by which scores on which text: the options of all flows that prune.

    None stands for the default that a field's description names. A field that is given but has no effect is refused.

    Attributes:
        ratio: share of the blocks to prune, in (0, 1); rounded down to whole blocks.
        blocks: the blocks to prune, from 0.
        target_size: stored size to come down to: parameters (4.8B, 350M) or bytes (3.2GB, 900MiB).
        calibration: text to score blocks on: a .txt, .jsonl, .jsonl.gz or .parquet file, or NAME[:CONFIG][@SPLIT] of a
            data set on the hub; default: MiniPile's validation split, or no calibration where `blocks` are given.
        text_column: column that holds the text; default: text.
        windows: calibration windows; default: 64.
        window_length: tokens in a window, for calibration and perplexity; default: the model's context, at most 2048.
        block_score: score whose lowest blocks are pruned; removal-perplexity chooses one block after the other, each
            time that without which the perplexity of the calibration text is least, and takes longer; in prune,
            replacement-perplexity looks at the perplexity with its replica instead; default: influence.
        refit_kept: whether the kept blocks are refitted to the source on the calibration text, in closed form; nothing
            more is stored.
        perplexity: text to measure perplexity on before and after, as for calibration; default: none.
        dtype: of the weights: auto (the source's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        memory: what a block and the hidden states of calibration text may take, as 4GiB; hidden states that do not fit
            go through a file; default: half of the memory that is free.
        cache: folder that keeps what was measured, so that other ratios cost next to nothing and a run that was killed
            goes on; default: $FLEXIGPT_CACHE, or flexigpt in the user's cache folder.
        seed: shuffles the calibration text; default: 0.
    """

    ratio: float | None = None
    blocks: Sequence[int] | None = None
    target_size: str | None = None
    calibration: str | None = None
    text_column: str | None = None
    windows: int | None = None
    window_length: int | None = None
    block_score: str | None = None
    refit_kept: bool = False
    perplexity: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    memory: str | None = None
    cache: str | Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given = [flag(name) for name in self.how_much if getattr(self, name) is not None]
        if len(given) != 1:
            *most, last = map(flag, self.how_much)
            got = " and ".join(given) or "none of them"
            raise InputError(f"give exactly one of {', '.join(most)} and {last}: got {got}")
        if self.block_score is not None and self.block_score not in self.score_names:
            raise InputError(f"--block-score {self.block_score} is unknown: give {', '.join(self.score_names)}")
        if self.windows is not None and self.windows < 1:
            raise InputError(f"--windows {self.windows} is too small: give at least 1")
        check_seed(self.seed)
        for name, reason in self.idle_settings():
            if getattr(self, name) is not None:
                raise InputError(f"{flag(name)} has no effect, since {reason}: leave it out")

    def idle_settings(self) -> list[tuple[str, str]]:
        """Fields that have no effect beside the others, each with the reason: giving one is an error."""
        idle: list[tuple[str, str]] = []
        if self.blocks is not None and not self.calibrates:
            reason = "--blocks needs no calibration text unless --calibration gives one"
            idle += [("windows", reason), ("block_score", reason)]
        elif self.blocks is not None and self.block_score in GREEDY_SCORES:
            idle.append(("block_score", f"--blocks names the blocks that {self.block_score} would choose"))
        if not self.calibrates and self.perplexity is None:
            idle += [(name, "no text is read") for name in ("text_column", "window_length")]
        if not self.is_random:
            idle.append(("seed", "nothing is random"))
        return idle

    @property
    def how_much(self) -> tuple[str, ...]:
        """The fields of which exactly one is given."""
        return "ratio", "blocks", "target_size"

    @property
    def score_names(self) -> tuple[str, ...]:
        """Values of block_score."""
        return *BLOCK_SCORES, REMOVAL_SCORE

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is read."""
        return self.fits or self.blocks is None or self.calibration is not None

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to calibration text."""
        return self.refit_kept

    @property
    def is_random(self) -> bool:
        """Whether anything depends on the seed."""
        return self.calibrates

    def defaults(self, window_length: int) -> dict[str, Any]:
        """What the fields stand for that have an effect and are None; `window_length` is the one in use."""
        values: dict[str, Any] = {}
        if self.is_random:
            values["seed"] = self.seed or 0
        if self.calibrates:
            values |= {"calibration": calibration_text(self), "windows": self.windows or DEFAULT_WINDOWS}
            values["block_score"] = self.block_score or "influence"
        if self.calibrates or self.perplexity is not None:
            values |= {"window_length": window_length, "text_column": self.text_column or "text"}
        return values


@dataclass(frozen=True, kw_only=True)
class PruneOptions(ScoringOptions, ReplicaOptions):
    """What to prune, and how. Exactly one of ratio, blocks, target_size and plan says how much.

    The fields of `ScoringOptions` say which blocks are pruned; these are the rest.

    Attributes:
        plan: a plan file to apply as it is.
        rank: rank of the adapters; default: hidden size / 16.
        adapter_budget: in the place of rank, the share of the source's parameters that all adapters may have, as 3.7%:
            the highest rank within it.
        spread_rank: whether the parameters that adapters of that rank have are spent where they mend most: each linear
            of each replica then gets a rank of its own.
        base_distance: distance by which each pruned block's base is chosen; default: low-rank.
        compare_distances: further distances to measure and record, for the report; they choose nothing.
        align: whether a pruned block's weights are first brought near its base's, by what changes nothing that the
            block computes: places of units and heads, turns of values and keys.
        adapter_init: how adapters start.
        norm_init: where the output norms' gamma starts: a constant, or fitted; default: 0.05.
        output_norm: whether replicas have output norms.
        base_scale: whether each linear of a replica scales its base's output by a number of its own, which starts at
            the least-squares value; with adapters that start at zero, at 1.
        seed: shuffles the calibration text and draws random adapters; default: 0.
    """

    plan: str | Path | None = None
    rank: int | None = None
    adapter_budget: str | None = None
    spread_rank: bool = False
    base_distance: str | None = None
    compare_distances: Sequence[str] | None = None

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
        if self.adapter_budget is not None:
            parse_share(self.adapter_budget)
            if self.target_size is not None:
                raise InputError(
                    "--target-size already says how much is stored: give --rank in place of --adapter-budget"
                )
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
            by_plan = ["rank", "adapter_budget", "base_distance", "compare_distances", "block_score"]
            by_plan += [] if self.fits else ["calibration", "windows"]
            by_plan += ["spread_rank"] if self.spread_rank else []
            idle += [(name, "the plan decides it") for name in by_plan]
        if self.rank is not None:
            idle.append(("adapter_budget", "--rank decides it"))
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
        return self.fits or self.spread_rank or self.compares_activations or (self.plan is None and super().calibrates)

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to calibration text."""
        fitted = ADAPTER_INITS[self.adapter_init].fit is not None or (self.output_norm and self.norm_init == FITTED)
        return fitted or super().fits

    @property
    def is_random(self) -> bool:
        """Whether anything depends on the seed."""
        return self.calibrates or self.adapter_init != "svd"

    @property
    def score_names(self) -> tuple[str, ...]:
        """Values of block_score."""
        return *super().score_names, REPLACEMENT_SCORE


DEFAULT_WINDOWS = 64


def calibration_text(options: ScoringOptions) -> str:
    return DEFAULT_TEXT if options.calibration is None else options.calibration
