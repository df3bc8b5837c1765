"""What a block's linears are given, and what errors of theirs weigh, over a text."""

from collections.abc import Sequence

import torch
from torch import nn

from flexigpt.calibration.hidden_states import Stream, overflow
from flexigpt.model import linear_size


def output_weights(text: Stream, block: nn.Module, index: int, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weight of each linear's outputs, as `Moments.weights`, summed over the text.

    G = J^T J, J the derivative of the block's output, over all tokens of a window, by the linear's at one token: an
    error e there moves the block's output by e^T G e, to second order. Estimated from one random direction v for each
    batch, as (J^T v)(J^T v)^T (Hutchinson, 1990). No gradient leaves the block.

    Args:
        text: what the block is given.
        block: of the source.
        index: its place in the model.
        paths: of linears in the block.

    Returns:
        By path, float64: G (outputs, outputs), or only its diagonal (outputs,) for a linear of more outputs than
        inputs. Those are an MLP's units, of which the diagonal says nearly everything, and whose G would be larger than
        the weight itself.
    """
    sums = {path: RunningSum() for path in paths}
    sizes = {path: linear_size(block.get_submodule(path)) for path in paths}
    wide = {path for path, (outputs, inputs) in sizes.items() if outputs > inputs}
    for gradients in text.gradients(block, index, paths):
        for path, gradient in zip(paths, gradients, strict=True):
            rows = gradient.flatten(0, -2).float()
            sums[path].add(rows.square().sum(0) if path in wide else rows.T @ rows)
    return {path: running.total for path, running in sums.items()}


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
