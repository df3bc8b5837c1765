"""Sums over a text."""

import torch

from flexigpt.calibration.hidden_states import overflow

# Rows of a second moment that are computed together.
_ROWS = 256


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
        return _finite(self._total)


class RunningMoment:
    """Adds up X^T X of (tokens, numbers) float32 values in float64: half of each, some rows at a time.

    Of a wide MLP the sum is a gigabyte, and nothing else as large is held beside it.
    """

    def __init__(self) -> None:
        self._total = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """Those of some more tokens."""
        width = values.shape[1]
        if len(self._total) != width:
            self._total = values.new_zeros(width, width, dtype=torch.float64)
        for start in range(0, width, _ROWS):
            self._total[start : start + _ROWS, start:] += values[:, start : start + _ROWS].T @ values[:, start:]

    def total(self, count: int = 1) -> torch.Tensor:
        """Of what was added over so many; nothing more is added then.

        Raises:
            InputError: it is not finite, and nothing can be fitted to it.
        """
        found, self._total = self._total, torch.zeros(0, 0, dtype=torch.float64)
        if count != 1:
            found.div_(count)
        for start in range(0, len(found), _ROWS):
            rows = slice(start, start + _ROWS)
            _finite(found[rows, start:])
            found[start + _ROWS :, rows] = found[rows, start + _ROWS :].T
        return found


def _finite(sums: torch.Tensor) -> torch.Tensor:
    if not sums.isfinite().all():
        raise overflow("sums over the calibration text")
    return sums
