"""What a block's linears are given, and what errors of theirs weigh, over a text."""

from collections.abc import Sequence

import torch
from torch import nn

from flexigpt.calibration.hidden_states import Stream, overflow
from flexigpt.model import linear_size, watched


def input_moments(
    text: Stream, block: nn.Module, index: int, linears: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str], torch.Tensor]:
    """Takes a text through a block; what its linears are given on the way, and what the block adds to it.

    Args:
        text: what the block is given; afterwards what it makes of that.
        block: of the text's model.
        index: its place in the model.
        linears: paths in the block.

    Returns:
        Summed over tokens, float64: X^T X (inputs, inputs) by path, of one linear for all that are given the same; that
        linear by path of each; and the squared length of the block's output less its input, a scalar.
    """
    sums: dict[str, RunningSum] = {}
    first_of: dict[str, str] = {}
    added = RunningSum()
    with watched(block, linears) as seen:
        for number, output in enumerate(text.outputs(block, index)):
            for path in linears:
                same = next((p for p in sums if seen[p][0] is seen[path][0]), path)
                sums.setdefault(first_of.setdefault(path, same), RunningSum())
            for path, moment in sums.items():
                given = seen[path][0].flatten(0, -2).float()
                moment.add(given.T @ given)
            added.add((output.float() - text.hidden[number].float()).square().sum())
            text.hidden[number] = output
    return {path: moment.total for path, moment in sums.items()}, first_of, added.total


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
