"""Sums over a text."""

import torch

from flexigpt.calibration.hidden_states import overflow

# Rows of a second moment that are computed together.
_ROWS = 256


class RunningSum:
    """Adds up float32 tensors."""

    def __init__(self) -> None:
        self._total = torch.zeros(())

    def add(self, values: torch.Tensor) -> None:
        """One more of the same shape; its memory may be used."""
        self._total = self._total.add_(values) if self._total.shape == values.shape else values

    @property
    def total(self) -> torch.Tensor:
        """Of what was added, on its device.

        Raises:
            InputError: it is not finite, and nothing can be fitted to it.
        """
        return _finite(self._total)


class RunningMoment:
    """Adds up X^T X of (tokens, numbers) float32 values: half of each, some rows at a time.

    In float32, in which the products are summed up anyway: of a wide MLP the sum is half a gigabyte, and nothing else
    as large is held beside it.
    """

    def __init__(self) -> None:
        self._total = torch.zeros(0, 0)

    def add(self, values: torch.Tensor) -> None:
        """Those of some more tokens."""
        width = values.shape[1]
        if len(self._total) != width:
            self._total = values.new_zeros(width, width)
        for start in range(0, width, _ROWS):
            rows = slice(start, start + _ROWS)
            self._total[rows, start:].addmm_(values[:, rows].T, values[:, start:])

    def total(self, count: int = 1) -> torch.Tensor:
        """Of what was added over so many; nothing more is added then.

        Raises:
            InputError: it is not finite, and nothing can be fitted to it.
        """
        found, self._total = self._total, torch.zeros(0, 0)
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
