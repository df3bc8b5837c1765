"""How a block adds what it writes to its input, told by what it makes of a few tokens."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from flexigpt.calibration.hidden_states import Stream

# So many tell as much as all of a text.
_TOKENS = 64

# How far a block may be from adding its sublayers' outputs to its input, and still count as doing so.
_ADDITIVE_TOLERANCE = 0.02


class Probe:
    """The first few tokens of a text.

    Args:
        model: a model in eval mode, of which only what lies outside the blocks is read.
        windows: (windows, tokens) ids.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor) -> None:
        self._stream = Stream(model, [windows[:1, :_TOKENS]])

    def residual_factor(
        self, block: nn.Module, index: int, hidden: torch.Tensor, writers: Sequence[str]
    ) -> float | None:
        """By what a block scales what it writes when it adds it to its input; None if it does not just add.

        A block that normalises the sum (OPT 350M) or scales it (Granite) tells by what it does with given numbers.

        Args:
            block: the block.
            index: its place in the model.
            hidden: what it is given of the text, or of its first batch: (windows, tokens, hidden size).
            writers: paths of the modules within it that write to the residual stream.
        """
        few = self._stream.at([hidden[:1, :_TOKENS]])
        entering = few.hidden[0].double()
        # As large as what it is added to: what a block writes by itself may be lost in rounding.
        written = entering.abs() + 1
        added = _output_of(written, block, index, few, writers) - entering
        passed = _output_of(torch.zeros_like(entering), block, index, few, writers) - entering
        written = written * len(writers)
        factor = ((added * written).sum() / written.square().sum()).item()
        off = max(passed.norm().item(), (added - factor * written).norm().item())
        return factor if off <= _ADDITIVE_TOLERANCE * added.norm().item() else None


def _output_of(
    written: torch.Tensor, block: nn.Module, index: int, few: Stream, writers: Sequence[str]
) -> torch.Tensor:
    """What the block makes of the tokens where each of its writers writes this; float64."""
    with ExitStack() as hooks:
        for path in writers:
            writer = block.get_submodule(path)
            hooks.callback(writer.register_forward_hook(lambda _, __, out: written.to(out).view(out.shape)).remove)
        return next(few.outputs(block, index)).double()
