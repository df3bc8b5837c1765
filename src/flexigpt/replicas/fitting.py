"""Kept blocks refitted to calibration text in closed form: no gradients, one block after the other.

Two streams of hidden states go through the blocks: the source's and the pruned model's. What a kept block behind a
pruned one writes to the residual stream is fitted to where the source's stream is, so that it also mends what the
blocks before it left.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flexigpt.calibration import HiddenStates, RunningSum, Stream, calibration_batches
from flexigpt.model import find_architecture, watched, weight_matrix
from flexigpt.replicas.least_squares import Moments, ridge_fit
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.weights import StreamedModel, exchange_parameters

# Hidden states that a fit holds: both streams before a block, the source's behind it and behind the removed ones after
# it, and what each of its two sublayers writes.
HIDDEN_COPIES = 6

# How far a block may be from adding its sublayers' outputs to its input, and still count as doing so.
_ADDITIVE_TOLERANCE = 0.02


@torch.no_grad()
def refit_kept(
    source: StreamedModel,
    pruned: StreamedModel,
    standing: Sequence[int | None],
    windows: torch.Tensor,
    *,
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> None:
    """Refits the kept blocks behind a pruned one, in order.

    Those of their linears that write to the residual stream, at full rank, as nothing more is stored for them. Bases
    are left alone: fitted to their own place, they would be farther from their replicas'.

    Args:
        source: the source model.
        pruned: the compact model, its replicas filled, or the shorter one. What is not refitted stays as it is; what
            is, gets tensors of its own.
        standing: the pruned model's block in the place of each of the source's; None: none is.
        windows: (windows, tokens) ids.
        spill: folder for files that hold the hidden states; None: memory does, HIDDEN_COPIES times.
        stage: keeps what is fitted, which a run that was killed finds again.
        track: reports each block.
    """
    theirs = Stream(source.model, calibration_batches(windows), spill)
    ours = theirs.at(theirs.hidden)
    bases = pruned.layout.bases
    left_alone = {*bases, *bases.values()}
    missing = [i for i, block in enumerate(standing) if block is None or block in bases]
    depth = len(standing) if missing else 0
    for index in track(range(depth), "fitting blocks", depth):
        number = standing[index]
        source.expect(index + 1)
        with source.block(index) as own:
            behind = theirs.at(theirs.outputs(own, index))
            if number is not None:
                changed = missing[0] < index or (index + 1 < len(standing) and standing[index + 1] is None)
                with pruned.block(number) as block:
                    if changed and number not in left_alone:
                        leaving = _past_removed(source, standing, index + 1, behind).hidden
                        fit = _BlockFit(source, own, block, _Streams(index, theirs, ours, leaving))
                        fitted = fit.run() if stage is None else stage.tensors(f"fitted-{number}", fit.run)
                        exchange_parameters(block, {path: values.to(source.device) for path, values in fitted.items()})
                        pruned.own(number, fitted)
                    ours.advance(block, index)
        theirs = behind


def _past_removed(source: StreamedModel, standing: Sequence[int | None], index: int, theirs: Stream) -> Stream:
    """The source's stream before a block, or behind the removed ones that begin there."""
    removed = list(takewhile(lambda i: standing[i] is None, range(index, len(standing))))
    stream = theirs.at(theirs.hidden) if removed else theirs
    for number in removed:
        with source.block(number) as block:
            stream.advance(block, number)
    return stream


class _Streams(NamedTuple):
    """Both streams before a block, and where the source's is when the block has run."""

    block: int
    theirs: Stream
    ours: Stream
    leaving: HiddenStates


class _BlockFit:
    """One kept block and what it is fitted to.

    Args:
        source: the source model.
        own: its block in that place.
        block: the kept block in the pruned model.
        streams: before the block.
    """

    def __init__(self, source: StreamedModel, own: nn.Module, block: nn.Module, streams: _Streams) -> None:
        self._own, self._block, self._streams = own, block, streams
        # Paths of the last modules of attention and MLP, which write to the residual stream.
        self._writers = find_architecture(source.model.config).output_norms
        self._their_writes = {path: HiddenStates((), streams.theirs.hidden.folder) for path in self._writers}

    def run(self) -> dict[str, torch.Tensor]:
        """Fits what writes to the residual stream, in the order in which the block computes; fitted tensors by path."""
        fitted: dict[str, torch.Tensor] = {}
        factor = self._watch_own()
        for writer in self._writers:
            linear = self._block.get_submodule(writer)
            if factor is None or not isinstance(linear, nn.Linear | Conv1D):
                continue
            found = ridge_fit(weight_matrix(linear), self._moments(writer, factor))
            found = found.T if isinstance(linear, Conv1D) else found
            # It takes the place of the parameter, which itself stays as it is.
            path = f"{writer}.weight"
            fitted[path] = found.to(linear.weight.dtype).contiguous()
            exchange_parameters(self._block, {path: fitted[path]})
        return fitted

    def _watch_own(self) -> float | None:
        """Notes what the source's block writes; by what it scales that when it adds it to the residual stream."""
        first: torch.Tensor | None = None
        with watched(self._own, self._writers) as seen:
            for output in self._streams.theirs.outputs(self._own, self._streams.block):
                first = output if first is None else first
                for path, writes in self._their_writes.items():
                    writes.append(seen[path][1].reshape(output.shape))
        assert first is not None
        return self._residual_factor(first)

    def _residual_factor(self, leaving: torch.Tensor) -> float | None:
        """By what the block scales its sublayers' outputs when it adds them to its input; None if it does not just add.

        A block that normalises the sum (OPT 350M) or scales it (Granite) tells by what it does with zeros.
        """
        entering, leaving = self._streams.theirs.hidden[0].double(), leaving.double()
        passed = self._output_of(torch.zeros_like(entering))
        written = torch.stack([writes[0].double() for writes in self._their_writes.values()]).sum(0)
        if torch.equal(leaving, entering):  # what it writes is zero, or lost in rounding: it is made to write something
            one = entering.abs() + 1
            written, leaving = one * len(self._their_writes), self._output_of(one)
        added = leaving - entering
        factor = ((added * written).sum() / written.square().sum()).item()
        off = max((passed - entering).norm().item(), (added - factor * written).norm().item())
        return factor if off <= _ADDITIVE_TOLERANCE * added.norm().item() else None

    def _output_of(self, written: torch.Tensor) -> torch.Tensor:
        """What the source's block makes of the first batch where each of its writers writes this; float64."""
        with ExitStack() as hooks:
            for path in self._writers:
                writer = self._own.get_submodule(path)
                handle = writer.register_forward_hook(lambda _, __, out: written.to(out).view(out.shape))
                hooks.callback(handle.remove)
            return next(self._streams.theirs.outputs(self._own, self._streams.block)).double()

    def _moments(self, writer: str, factor: float) -> Moments:
        """Of what a writer is given in the pruned model, and of what it should write there."""
        inputs, targets = RunningSum(), RunningSum()
        bias = cast(torch.Tensor | None, self._own.get_submodule(writer).bias)
        with watched(self._block, [writer]) as seen:
            for number, output in enumerate(self._streams.ours.outputs(self._block, self._streams.block)):
                given = seen[writer][0].flatten(0, -2).float()
                inputs.add(given.T @ given)
                wished = self._wished(writer, number, seen[writer][1], output, factor).flatten(0, -2).float()
                targets.add((wished if bias is None else wished - bias.float()).T @ given)
        return Moments(inputs.total, targets.total)

    def _wished(
        self, writer: str, number: int, written: torch.Tensor, output: torch.Tensor, factor: float
    ) -> torch.Tensor:
        """What a writer should have written in a batch, where it has written `written` and the block put out `output`.

        The attention: what the source's wrote, and by how much our stream is short of the source's. The MLP: what it
        takes to leave the block where the source's stream does.
        """
        if writer == self._writers[0]:
            short = self._streams.theirs.hidden[number] - self._streams.ours.hidden[number]
            return self._their_writes[writer][number] + short / factor
        return written.reshape(output.shape) + (self._streams.leaving[number] - output) / factor
