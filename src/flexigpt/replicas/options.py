"""How replicas are made. No torch."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from flexigpt.runtime import InputError, check_options, option, parse_share

REPLICA_GROUP = "How replicas are made"

AdapterInit = Literal["svd", "zero"]

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
    """The constant that gamma starts at, or `none`.

    Raises:
        InputError: anything else.
    """
    if output_norm == "none":
        return output_norm
    try:
        value = float(output_norm)
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST_GAMMA:
        raise InputError(f"--output-norm {output_norm} cannot be used: give none, or a small constant, as 0.05")
    return value


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How replicas are made.

    Attributes:
        rank: of the adapters: a number, or the share of the source's parameters that all adapters may have, as 3.7%,
            for the highest rank within it; default: hidden size / 16.
        adapter_init: how adapters start: by the weights (svd), or at zero.
        output_norm: whether replicas have output norms, and where their gamma starts: none, or a constant.
        refit_kept: whether what is left is refitted to the source on calibration text, in closed form; nothing more
            is stored.
        seed: draws random adapters.
    """

    rank: int | str | None = option(None, group=REPLICA_GROUP, metavar="12|3.7%", parse=parse_rank, least=1)
    adapter_init: AdapterInit = option("svd", group=REPLICA_GROUP)
    output_norm: float | str = option(0.05, group=REPLICA_GROUP, metavar="none|0.05", parse=parse_output_norm)
    refit_kept: bool = option(True, group=REPLICA_GROUP)
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
