"""Calibration text through the blocks, one block after the other; statistics are running sums.

Only the current hidden states are kept: (windows, tokens, hidden size) in the model's dtype. Nothing grows with the
number of blocks or with the square of the tokens.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexigpt.architecture import block_list, find_architecture, replaced_forwards
from flexigpt.data import batch_size_for
from flexigpt.errors import InputError
from flexigpt.half_precision import fast_half
from flexigpt.progress import Track, silent

# Tokens that go through a block at once. Enough to fill the matrix units, few enough for the caches of a CPU.
_BATCH_TOKENS = 2048

BlockStatistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Stream:
    """Hidden states of calibration text on their way through the blocks.

    Args:
        model: a source model, in eval mode; a block of another model may be run in the place of its own.
        windows: (windows, tokens) ids.

    Attributes:
        hidden: (windows, tokens, hidden size) in the model's dtype, one tensor a batch: what the next block is given.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor) -> None:
        batches = windows.to(model.device).split(batch_size_for(windows.shape[1], 1, _BATCH_TOKENS))
        self._model = model
        self.hidden, self._arguments = _enter_blocks(model, block_list(model), batches)

    def copy(self) -> "Stream":
        """Another stream that goes on from here."""
        return copy.copy(self)

    def outputs(self, block: nn.Module, index: int) -> Iterator[torch.Tensor]:
        """What a block makes of the hidden states, batch by batch; `index` is its place in the model."""
        for inputs in self.hidden:
            args, kwargs = self._arguments[inputs.shape[0]][index]
            with torch.no_grad(), fast_half(self._model):
                yield block_output(block(inputs, *args, **kwargs))


@torch.no_grad()
def block_means(
    model: PreTrainedModel, windows: torch.Tensor, statistic: BlockStatistic, track: Track = silent
) -> list[float]:
    """The mean over all tokens of a statistic of each block's input and output.

    Args:
        model: a source model, in eval mode.
        windows: (windows, tokens) ids.
        statistic: (tokens, hidden) float32 inputs X_i and outputs X_{i+1} -> (tokens,) values. X_{i+1} is the residual
            stream before the final norm.
        track: told of each block.

    Raises:
        InputError: a mean that is not finite; the message names the block.
    """
    blocks, stream = block_list(model), Stream(model, windows)
    means = []
    for index, block in track(enumerate(blocks), "calibrating", len(blocks)):
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for number, outputs in enumerate(stream.outputs(block, index)):
            values = statistic(stream.hidden[number].flatten(0, 1).float(), outputs.flatten(0, 1).float())
            total += values.sum(dtype=torch.float64)
            stream.hidden[number] = outputs
        means.append(total.item() / windows.numel())
        if not torch.isfinite(total):
            raise InputError(
                f"the statistics of block {index} are not finite: the model overflows on this text; "
                "give --dtype float32, or another calibration text"
            )
    return means


def _enter_blocks(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], dict[int, list[_Arguments]]]:
    """Hidden states entering the first block, one tensor a batch, and, by batch size, every block's other arguments.

    The model itself prepares them (masks and position embeddings differ by block in Gemma 3, for one): it runs with
    blocks that pass their input through.
    """
    entering: list[torch.Tensor] = []
    arguments: dict[int, list[_Arguments]] = {}

    def pass_through(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                entering.append(hidden_states)
            seen = arguments.setdefault(hidden_states.shape[0], [])
            if len(seen) == index:
                seen.append((args, kwargs))
            return (hidden_states, None) if returns_tuple else hidden_states

        return forward

    returns_tuple = find_architecture(model.config).block_returns_tuple
    decoder = model.get_decoder()
    with replaced_forwards(blocks, pass_through):
        for batch in batches:
            decoder(input_ids=batch, use_cache=False)
    return entering, arguments


def block_output(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, in some families with more."""
    return output[0] if isinstance(output, tuple) else output
