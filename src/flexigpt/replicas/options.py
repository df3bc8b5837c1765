"""How replicas are made. No torch."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from flexigpt.runtime import InputError, check_options, option, parse_share

REPLICA_GROUP = "How replicas are made"

AdapterInit = Literal["svd", "zero", "activation", "block-output"]

# Those that are fitted to calibration text.
FITTED_INITS = ("activation", "block-output")

# Where an output norm's gamma starts by the paper, and before it is fitted.
SMALL_GAMMA = 0.05

MOST_GAMMA = 1e3


def parse_rank(rank: int | str) -> int | str:
    """A rank, as a number, or a share of the source's parameters, as it was given.

    Raises:
        InputError: what is neither 12 nor 3.7%.
    """
    if isinstance(rank, str) and not re.fullmatch(r"\s*[0-9]{1,18}\s*", rank):
        parse_share(rank)
        return rank
    return int(rank)


def parse_output_norm(output_norm: float | str) -> float | str:
    """Where gamma starts: a constant, or `fitted`; or `none`.

    Raises:
        InputError: anything else.
    """
    if output_norm in ("none", "fitted"):
        return output_norm
    try:
        value = float(output_norm)
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST_GAMMA:
        raise InputError(f"--output-norm {output_norm} cannot be used: give none, a small constant, as 0.05, or fitted")
    return value


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How replicas are made.

    Attributes:
        rank: of the adapters: a number, or the share of the source's parameters that all adapters may have, as 3.7%,
            for the highest rank within it; default: hidden size / 16.
        adapter_init: how adapters start: by the weights (svd), at zero, or fitted to calibration text, each linear by
            itself (activation) or by what it does to the block's output.
        output_norm: whether replicas have output norms, and where their gamma starts: none, a constant, or fitted.
        refit_kept: whether the kept blocks are refitted to the source on calibration text, in closed form; nothing more
            is stored. Families that normalise what attention and MLP write (Gemma, OLMo 2) have nothing to refit.
        base_scale: whether each linear of a replica scales its base's output by a number of its own, which starts at
            the least-squares value; with adapters that start at zero, at 1.
        seed: draws random adapters.
    """

    rank: int | str | None = option(None, group=REPLICA_GROUP, metavar="12|3.7%", parse=parse_rank, least=1)
    adapter_init: AdapterInit = option("block-output", group=REPLICA_GROUP)
    output_norm: float | str = option("none", group=REPLICA_GROUP, metavar="none|0.05|fitted", parse=parse_output_norm)
    refit_kept: bool = option(True, group=REPLICA_GROUP)
    base_scale: bool = option(True, group=REPLICA_GROUP, command=False)
    seed: int = option(0)

    def __post_init__(self) -> None:
        if self.rank is not None:
            object.__setattr__(self, "rank", parse_rank(self.rank))
        object.__setattr__(self, "output_norm", parse_output_norm(self.output_norm))
        check_options(self)

    @property
    def has_norms(self) -> bool:
        """Whether replicas have output norms."""
        return self.output_norm != "none"

    @property
    def gamma(self) -> float:
        """Where those start."""
        return self.output_norm if isinstance(self.output_norm, float) else SMALL_GAMMA

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to calibration text."""
        return self.refit_kept or self.adapter_init in FITTED_INITS or self.output_norm == "fitted"
