"""What is left of a pruned model refitted to calibration text in closed form: no gradients, one block after the other.

Two streams of hidden states go through the blocks: the source's and the pruned model's. What a block behind the first
change writes to the residual stream is fitted to where the source's stream is, so that it also mends what the blocks
before it left.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from flexigpt.calibration import HiddenStates, RunningSum, Stream, calibration_batches
from flexigpt.model import find_architecture, watched, weight_matrix
from flexigpt.replicas.least_squares import Moments, ridge_fit
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.weights import StreamedModel, exchange_parameters

# Hidden states that a fit holds: both streams before a block, the source's behind it and behind the removed ones after
# it, and what each of its two sublayers writes, before and after a norm of the family's own.
HIDDEN_COPIES = 8

# How far a block may be from adding its sublayers' outputs to its input, and still count as doing so.
_ADDITIVE_TOLERANCE = 0.02

# Of the mean variance of an MLP's units, the weight of leaving its last linear as it was, where fewer units are left.
_UNITS_RIDGE = 1e-3

# Of what a norm's weight is scaled by, the weight of leaving it as it is.
_GAIN_RIDGE = 0.1


@torch.no_grad()
def refit_kept(
    source: StreamedModel,
    pruned: StreamedModel,
    standing: Sequence[int | None],
    windows: torch.Tensor,
    *,
    units: Mapping[int, torch.Tensor] | None = None,
    changed: Sequence[int] = (),
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> None:
    """Refits what is left behind the first change, block by block, in order.

    Those linears that write to the residual stream, at full rank, as nothing more is stored for them; in families that
    normalise what these write (Gemma, OLMo 2) also the norm's weight. Bases are left alone: fitted to their own place,
    they would be farther from their replicas'.

    Args:
        source: the source model.
        pruned: the compact model, what is its own filled in, or the shorter one. What is not refitted stays as it is;
            what is, gets tensors of its own.
        standing: the pruned model's block in the place of each of the source's; None: none is.
        windows: (windows, tokens) ids.
        units: by block of the pruned model, which of the source's hidden units its MLP has, where not all.
        changed: further blocks that differ from the source's, as those whose attention is gone.
        spill: folder for files that hold the hidden states; None: memory does, HIDDEN_COPIES times.
        stage: keeps what is fitted, which a run that was killed finds again.
        track: reports each block.
    """
    theirs = Stream(source.model, calibration_batches(windows), spill)
    ours = theirs.at(theirs.hidden)
    bases, units = pruned.layout.bases, units or {}
    left_alone, own_change = {*bases, *bases.values()}, {*units, *changed}
    different = [i for i, block in enumerate(standing) if block is None or block in bases or block in own_change]
    depth = len(standing) if different else 0
    for index in track(range(depth), "fitting blocks", depth):
        number = standing[index]
        source.expect(index + 1)
        with source.block(index) as own:
            behind = theirs.at(theirs.outputs(own, index))
            if number is not None:
                mends = different[0] < index or (index + 1 < len(standing) and standing[index + 1] is None)
                with pruned.block(number) as block:
                    if (mends or number in own_change) and number not in left_alone:
                        leaving = _past_removed(source, standing, index + 1, behind).hidden
                        streams = _Streams(index, theirs, ours, leaving)
                        fit = _BlockFit(source, own, block, streams, units.get(number))
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
    """One block of the pruned model and what it is fitted to.

    Args:
        source: the source model.
        own: its block in that place.
        block: what is left of it in the pruned model.
        streams: before the block.
        units: of the source's, that the MLP has; None: all of them.
    """

    def __init__(
        self, source: StreamedModel, own: nn.Module, block: nn.Module, streams: _Streams, units: torch.Tensor | None
    ) -> None:
        self._own, self._block, self._streams, self._units = own, block, streams, units
        architecture = find_architecture(source.model.config)
        # Paths of the last modules of attention and MLP, which write to the residual stream, and of their last linears:
        # the same ones, or the norms that follow.
        self._writers = architecture.output_norms
        self._linears = (architecture.roles.output, architecture.roles.down)
        folder = streams.theirs.hidden.folder
        self._their_writes = {path: HiddenStates((), folder) for path in dict.fromkeys(self._writers + self._linears)}
        self._fitted: dict[str, torch.Tensor] = {}
        # Of the MLP's last linear: what the source's units that are left give, and what the source writes with all.
        self._seen_units = (RunningSum(), RunningSum())

    def run(self) -> dict[str, torch.Tensor]:
        """Fits what writes to the residual stream, in the order in which the block computes; fitted tensors by path."""
        factor = self._watch_own()
        modules = dict(self._block.named_modules())
        for writer, path in zip(self._writers, self._linears, strict=True):
            linear = modules.get(path)
            if isinstance(linear, nn.Linear | Conv1D):
                found = ridge_fit(self._start(path, linear), self._moments(writer, path, factor))
                if linear.bias is not None:
                    self._set(f"{path}.bias", found[:, -1])
                    found = found[:, :-1]
                self._set(f"{path}.weight", found.T if isinstance(linear, Conv1D) else found)
                if writer != path and factor is not None:
                    self._fit_gain(writer, factor)
        return self._fitted

    def _set(self, path: str, values: torch.Tensor) -> None:
        """It takes the place of the parameter, which itself stays as it is."""
        self._fitted[path] = values.to(self._block.get_parameter(path).dtype).contiguous()
        exchange_parameters(self._block, {path: self._fitted[path]})

    def _start(self, path: str, linear: nn.Module) -> torch.Tensor:
        """Where a linear's fit begins: as it is, or, with fewer units, refitted to these alone."""
        weight = weight_matrix(linear)
        if linear.bias is not None:
            weight = torch.cat([weight, cast(torch.Tensor, linear.bias)[:, None]], 1)
        if self._units is None or path != self._linears[1]:
            return weight
        inputs, targets = (running.total for running in self._seen_units)
        return ridge_fit(weight, Moments(inputs, targets), _UNITS_RIDGE)

    def _watch_own(self) -> float | None:
        """Notes what the source's block writes; by what it scales that when it adds it to the residual stream."""
        first: torch.Tensor | None = None
        down = self._linears[1]
        with watched(self._own, self._their_writes) as seen:
            for output in self._streams.theirs.outputs(self._own, self._streams.block):
                first = output if first is None else first
                for path, writes in self._their_writes.items():
                    writes.append(seen[path][1].reshape(output.shape))
                if self._units is not None:
                    given, written = (values.flatten(0, -2).float() for values in seen[down])
                    given = self._with_one(down, given[:, self._units.to(given.device)])
                    self._seen_units[0].add(given.T @ given)
                    self._seen_units[1].add(written.T @ given)
        assert first is not None
        return self._residual_factor(first)

    def _with_one(self, path: str, given: torch.Tensor) -> torch.Tensor:
        """What a linear is given, and where it has a bias a one beside it: the bias is fitted as its last column."""
        has_bias = self._own.get_submodule(path).bias is not None
        return torch.cat([given, torch.ones_like(given[:, :1])], 1) if has_bias else given

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

    def _moments(self, writer: str, path: str, factor: float | None) -> Moments:
        """Of what a linear is given in the pruned model, and of what it should write there."""
        inputs, targets = RunningSum(), RunningSum()
        for number, seen, output in self._passes(path):
            given = self._with_one(path, seen[0].flatten(0, -2).float())
            inputs.add(given.T @ given)
            if writer == path and factor is not None:
                wished = self._wished(writer, number, seen[1], output, factor)
            else:
                wished = self._their_writes[path][number]
            targets.add(wished.flatten(0, -2).float().T @ given)
        return Moments(inputs.total, targets.total)

    def _fit_gain(self, writer: str, factor: float) -> None:
        """The weight of a norm that stands between a linear and the residual stream, each channel by least squares."""
        products, squares = RunningSum(), RunningSum()
        for number, seen, output in self._passes(writer):
            written = seen[1].flatten(0, -2).float()
            wished = self._wished(writer, number, seen[1], output, factor).flatten(0, -2).float()
            products.add((written * wished).sum(0))
            squares.add(written.square().sum(0))
        ridge = _GAIN_RIDGE * squares.total.mean().clamp(min=1e-30)
        scale = (products.total + ridge) / (squares.total + ridge)
        norm: Any = self._block.get_submodule(writer)
        # Gemma's norms multiply by 1 + weight, the others by the weight.
        with_zeros = functional_call(norm, {"weight": torch.zeros_like(norm.weight)}, (torch.ones_like(norm.weight),))
        offset = float(with_zeros.any())
        self._set(f"{writer}.weight", (norm.weight.double() + offset) * scale - offset)

    def _passes(self, path: str) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Runs the block on our stream: number of the batch, what that module was given and returned, the output."""
        with watched(self._block, [path]) as seen:
            for number, output in enumerate(self._streams.ours.outputs(self._block, self._streams.block)):
                yield number, seen[path], output

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
