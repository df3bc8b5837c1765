"""Sums over a text."""

import torch

from flexigpt.calibration.hidden_states import overflow

# Rows of a second moment that are computed together.
_ROWS = 256


def second_moment(values: torch.Tensor) -> torch.Tensor:
    """X^T X of (tokens, numbers) float32 values; what lies below the diagonal is copied from above it."""
    width = values.shape[1]
    if width <= _ROWS:
        return values.T @ values
    found = values.new_empty(width, width)
    for start in range(0, width, _ROWS):
        rows = slice(start, start + _ROWS)
        torch.mm(values[:, rows].T, values[:, start:], out=found[rows, start:])
        found[start + _ROWS :, rows] = found[rows, start + _ROWS :].T
    return found


class RunningSum:
    """Adds up float32 tensors in float64."""

    def __init__(self) -> None:
        self._total = torch.zeros((), dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """One more of the same shape."""
        total = self._total.to(values.device)
        self._total = total.add_(values) if total.shape == values.shape else values.double()

    @property
    def total(self) -> torch.Tensor:
        """Of what was added, on its device.

        Raises:
            InputError: it is not finite, and nothing can be fitted to it.
        """
        if not self._total.isfinite().all():
            raise overflow("sums over the calibration text")
        return self._total

    def mean(self, count: int) -> torch.Tensor:
        """Of what was added over so many; nothing more is added then.

        Raises:
            InputError: as `total`.
        """
        return self.total.div_(count)
