"""What `prune` is asked: what to prune, and how."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexigpt.errors import InputError, flag
from flexigpt.initialization import ADAPTER_INITS, DEFAULT_NORM_INIT, FITTED, parse_norm_init
from flexigpt.scoring import ScoringOptions
from flexigpt.selection import BASE_DISTANCES, DEFAULT_DISTANCE, REPLACEMENT_SCORE

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


def parse_share(share: str) -> float:
    """A share of a whole as people write it, 3.7%, as 0.037.

    Raises:
        InputError: what cannot be read, or is not between 0 and 100%.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%", share.strip())
    value = float(match[1]) / 100 if match else 0.0
    if not 0 < value < 1:
        raise InputError(f"--adapter-budget {share} cannot be used: give a share of the source's parameters, as 3.7%")
    return value


@dataclass(frozen=True, kw_only=True)
class PruneOptions(ScoringOptions):
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
    align: bool = False
    adapter_init: str = "svd"
    norm_init: float | str | None = None
    output_norm: bool = True
    base_scale: bool = False

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

    @property
    def norm_start(self) -> float | str:
        """Where gamma starts, by default too."""
        given = parse_norm_init(self.norm_init)
        return DEFAULT_NORM_INIT if given is None else given
