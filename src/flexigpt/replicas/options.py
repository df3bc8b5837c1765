"""How replicas are made."""

import math
from dataclasses import dataclass

from flexigpt.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How replicas are made.

    Attributes:
        align: whether a pruned block's weights are first brought near its base's, by what changes nothing that the
            block computes: places of units and heads, turns of values and keys.
        adapter_init: how adapters start.
        norm_init: where the output norms' gamma starts: a constant, or fitted; default: 0.05.
        output_norm: whether replicas have output norms.
        base_scale: whether each linear of a replica scales its base's output by a number of its own, which starts at
            the least-squares value; with adapters that start at zero, at 1.
        refit_kept: whether the kept blocks are refitted to the source on the calibration text, in closed form; nothing
            more is stored.
        seed: draws random adapters; default: 0.
    """

    align: bool = False
    adapter_init: str = "svd"
    norm_init: float | str | None = None
    output_norm: bool = True
    base_scale: bool = False
    refit_kept: bool = False
    seed: int | None = None

    @property
    def norm_start(self) -> float | str:
        """Where gamma starts, by default too."""
        given = parse_norm_init(self.norm_init)
        return DEFAULT_NORM_INIT if given is None else given

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to calibration text."""
        raise NotImplementedError


DEFAULT_NORM_INIT = 0.05

# The word for gamma by least squares, in the place of a constant.
FITTED = "fitted"


def parse_norm_init(norm_init: str | float | None) -> float | str | None:
    """A constant for gamma, `fitted`, or None.

    Raises:
        InputError: anything else.
    """
    if norm_init is None or norm_init == FITTED:
        return norm_init
    try:
        value = float(norm_init)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--norm-init {norm_init} cannot be used: give a small constant, as 0.05, or {FITTED}")
    return value
