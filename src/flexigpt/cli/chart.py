"""The sizes of a model as a picture of characters, for a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 64, 12

# Of a series; in 8 bits it is a capital.
_MARKS = {"flexigpt prune": "o", "plain removal": "x", "source": "s"}


def chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity, by its logarithm, against stored bytes.

    Args:
        rows: as `frontier_series` gives them.
    """
    across = [row["bytes"] for row in rows]
    up = [math.log(min(max(row["perplexity"], 1.0), 1e300)) for row in rows]
    cells = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for row, x, y in reversed(list(zip(rows, across, up, strict=True))):  # the first series lies on top
        cells[-1 - _step(y, up, _HEIGHT)][_step(x, across, _WIDTH)] = _mark(row["series"])
    high, low = f"{math.exp(max(up)):,.1f}", f"{math.exp(min(up)):,.1f}"
    left = max(len(high), len(low))
    sides = [high, *[""] * (_HEIGHT - 2), low]
    lines = [f"{side:>{left}} |{''.join(its)}" for side, its in zip(sides, cells, strict=True)]
    least, most = (f"{size / 1e6:,.1f} MB" for size in (min(across), max(across)))
    names = dict.fromkeys(row["series"] for row in rows)
    key = ", ".join(f"{_mark(name)} {name}" for name in names if name in _MARKS)
    key += "; capitals: in 8 bits" if names.keys() - _MARKS else ""
    start = " " * (left + 1)
    return "\n".join(
        [*lines, f"{start}+{'-' * _WIDTH}", f"{start} {least}{most:>{_WIDTH - len(least)}}", f"{start} {key}"]
    )


def _step(value: float, values: Sequence[float], steps: int) -> int:
    """Which of so many equal steps from the least to the greatest value."""
    least, most = min(values), max(values)
    return round((value - least) / (most - least) * (steps - 1)) if most > least else steps - 1


def _mark(series: str) -> str:
    mark = _MARKS[series.partition(",")[0]]
    return mark if series in _MARKS else mark.upper()
