"""What is left of a pruned model refitted to calibration text in closed form: no gradients, one block after the other.

Two streams of hidden states go through the blocks: the source's and the pruned model's. What a block behind the first
change writes to the residual stream is fitted to where the source's stream is, so that it also mends what the blocks
before it left.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from flexigpt.calibration import (
    HiddenStates,
    Probe,
    RunningMoment,
    RunningSum,
    SourceStates,
    Stream,
    calibration_batches,
)
from flexigpt.model import ModelShape, find_architecture, replaced_forwards, watched, weight_matrix
from flexigpt.replicas.least_squares import Moments, ridge_fit
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.weights import StreamedModel, exchange_parameters

# Hidden states that a fit holds: both streams before and behind a block, the source's behind the removed ones after it,
# what the source's attention writes, what ours gathers, and what our block puts out before the MLP is fitted.
_COPIES = 8

# Of the mean variance of an MLP's units, the weight of leaving its last linear as it was, where fewer units are left.
_UNITS_RIDGE = 1e-3

# Of what a norm's weight is scaled by, the weight of leaving it as it is.
_GAIN_RIDGE = 0.1


def hidden_copies(shape: ModelShape) -> int:
    """How many copies of the hidden states a fit holds, with what an MLP's last linear is given."""
    widest = max(inputs for _, inputs in shape.linears.values())
    return _COPIES + math.ceil(widest / shape.hidden_size)


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
    states: SourceStates | None = None,
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
        spill: folder for files that hold the hidden states; None: memory does, `hidden_copies` times.
        states: what the text is on its way through the source, where that is known, and the source need not run again.
        stage: keeps what is fitted, which a run that was killed finds again.
        track: reports each block.
    """
    theirs = Stream(source.model, calibration_batches(windows, source.blocks), spill)
    ours, probe = theirs.at(theirs.hidden), Probe(source.model, windows)
    bases, units = pruned.layout.bases, units or {}
    left_alone, own_change = {*bases, *bases.values()}, {*units, *changed}
    different = [i for i, block in enumerate(standing) if block is None or block in bases or block in own_change]
    depth = len(standing) if different else 0
    for index in track(range(depth), "fitting blocks", depth):
        number = standing[index]
        mends = different[0] < index or (index + 1 < len(standing) and standing[index + 1] is None)
        fits = number is not None and (mends or number in own_change) and number not in left_alone
        source.expect(index + 1)
        with source.block(index) as own:
            noted = _Noted(own, index, theirs, probe, units.get(number)) if fits and number is not None else None
            if states is not None:
                behind = theirs.over(states.entering[index + 1])
            else:
                behind = theirs.at(theirs.outputs(own, index) if noted is None else noted.outputs())
            if noted is not None and states is not None:
                noted.recall(states.written[index])
            if number is not None:
                with pruned.block(number) as block:
                    if noted is not None:
                        leaving = _past_removed(source, standing, index + 1, behind, states).hidden
                        fit = _BlockFit(block, noted, ours, leaving)
                        name = f"fitted-{number}"
                        fitted = fit.run() if stage is None else stage.tensors(name, fit.run)
                        fitted = {path: values.to(source.device) for path, values in fitted.items()}
                        ours.hidden = fit.advanced(fitted)
                        pruned.own(number, fitted if stage is None else stage.readers(name, fitted))
                        del fit  # what it holds of the text is as large as the streams
                    else:
                        ours.advance(block, index)
            del noted
        theirs = behind


def _past_removed(
    source: StreamedModel, standing: Sequence[int | None], index: int, theirs: Stream, states: SourceStates | None
) -> Stream:
    """The source's stream before a block, or behind the removed ones that begin there."""
    removed = list(takewhile(lambda i: standing[i] is None, range(index, len(standing))))
    if states is not None:
        return theirs.over(states.entering[index + len(removed)])
    stream = theirs.at(theirs.hidden) if removed else theirs
    for number in removed:
        with source.block(number) as block:
            stream.advance(block, number)
    return stream


class _Noted:
    """A block of the source, and what a fit needs to know of it, noted while the text goes through it once.

    Args:
        own: the block.
        index: its number.
        theirs: the source's stream before it.
        probe: of the text.
        units: which of its MLP's hidden units are left; None: all.

    Attributes:
        inner: paths of the linears that compute the MLP's hidden units.
        left, gone: which of these units are left, and which are not; None: all are left.
        writers: paths of the last modules of attention and MLP, which write to the residual stream.
        linears: paths of their last linears: the same ones, or the norms follow.
        factor: by what the block scales what these write when it adds it to its input; None if it does not just add.
        writes: by path, what was written, batch by batch, as far as it is needed.
    """

    def __init__(self, own: nn.Module, index: int, theirs: Stream, probe: Probe, units: torch.Tensor | None) -> None:
        architecture = find_architecture(theirs.config)
        self.own, self.index, self.theirs = own, index, theirs
        self.left: torch.Tensor | None = None
        self.gone: torch.Tensor | None = None
        if units is not None:
            self.left, self.gone = _left_and_gone(own, architecture.roles.down, units)
        self.inner = tuple(path for path in (architecture.roles.gate, architecture.roles.up) if path is not None)
        self.writers = architecture.output_norms
        self.linears = (architecture.roles.output, architecture.roles.down)
        self.factor = probe.residual_factor(own, index, theirs.hidden[0], self.writers)
        paths = dict.fromkeys(self.writers + self.linears)
        if self.factor is not None and self.writers == self.linears:
            del paths[self.linears[1]]  # what it should write follows from where the block should put its stream
        self.writes = {path: HiddenStates((), theirs.hidden.folder) for path in paths}

    def outputs(self) -> Iterator[torch.Tensor]:
        """What the block makes of the stream, batch by batch."""
        with watched(self.own, self.writes) as seen:
            for output in self.theirs.outputs(self.own, self.index):
                for path, writes in self.writes.items():
                    writes.append(seen[path][1].reshape(output.shape))
                yield output

    def left_of(self, units: torch.Tensor) -> torch.Tensor:
        """Those that are left of the MLP's hidden units, (..., units)."""
        return units if self.left is None else units.index_select(-1, self.left)

    def recall(self, written: HiddenStates) -> None:
        """The same, where it is known what the attention's last linear returns; the block runs if more is needed."""
        if list(self.writes) == [self.linears[0]]:
            self.writes[self.linears[0]] = written
        else:
            for _ in self.outputs():
                pass


def with_one(block: nn.Module, path: str, given: torch.Tensor) -> torch.Tensor:
    """What a linear is given, and where it has a bias a one beside it: the bias is fitted as its last column."""
    has_bias = block.get_submodule(path).bias is not None
    return torch.cat([given, torch.ones_like(given[:, :1])], 1) if has_bias else given


def _left_and_gone(own: nn.Module, down: str, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Units of an MLP that are left, and those that are not, on its device."""
    weight = weight_matrix(own.get_submodule(down))
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    left = units.to(weight.device)
    gone[left] = False
    return left, gone.nonzero().flatten()


def _in_their_place(gone: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """What is added to the weight of the units that are left to write what the others would; the inputs stay."""
    return ridge_fit(None, Moments(inputs, gone), _UNITS_RIDGE, keeps=True)


class _BlockFit:
    """One kept block of the pruned model.

    Args:
        block: its parameters are exchanged for the fitted ones.
        noted: the source's block in its place, when the text has gone through it.
        ours: the pruned model's stream before it.
        leaving: the source's hidden states that it should put out.
    """

    def __init__(self, block: nn.Module, noted: _Noted, ours: Stream, leaving: HiddenStates) -> None:
        self._block, self._noted, self._ours, self._leaving = block, noted, ours, leaving
        self._modules = dict(block.named_modules())
        self._fitted: dict[str, torch.Tensor] = {}
        # What the attention's last linear was given; the same of the MLP's, and what the block puts out without it.
        self._gathered, self._given, self._output = (HiddenStates((), ours.hidden.folder) for _ in range(3))

    def run(self) -> dict[str, torch.Tensor]:
        """Fits what writes to the residual stream, in the order in which the block computes; fitted tensors by path."""
        noted = self._noted
        for writer, path in zip(noted.writers, noted.linears, strict=True):
            linear = self._linear(path)
            if linear is not None:
                is_mlp = path == noted.linears[1]
                start = weight_matrix(linear)
                if linear.bias is not None:
                    start = torch.cat([start, cast(torch.Tensor, linear.bias)[:, None]], 1)
                if is_mlp:
                    moments, gone = self._of_mlp(writer, path)
                    if gone is not None:
                        start = _in_their_place(gone, moments.inputs).add_(start)
                    del gone
                else:
                    moments = self._of_attention(writer, path)
                found = ridge_fit(start, moments)
                if linear.bias is not None:
                    self._fitted[f"{path}.bias"] = self._like(f"{path}.bias", found[:, -1])
                    found = found[:, :-1]
                found = found.T if isinstance(linear, Conv1D) else found
                self._fitted[f"{path}.weight"] = self._like(f"{path}.weight", found)
                if not (is_mlp and self._is_mended_behind):
                    exchange_parameters(self._block, self._fitted)
                if writer != path and noted.factor is not None:
                    self._fit_gain(writer, noted.factor)
        return self._fitted

    def advanced(self, fitted: Mapping[str, torch.Tensor]) -> HiddenStates:
        """Our stream behind the block with what was fitted, now or by an earlier run: the same numbers either way."""
        ours, noted = self._ours, self._noted
        down, factor = noted.linears[1], noted.factor
        behind = {path: values for path, values in fitted.items() if path.startswith(f"{down}.")}
        if factor is None or not (behind and self._is_mended_behind):
            exchange_parameters(self._block, fitted)
            return ours.at(ours.outputs(self._block, noted.index)).hidden
        if not len(self._output):
            exchange_parameters(self._block, {path: fitted[path] for path in fitted if path not in behind})
            for _ in self._through_mlp(down):
                pass
        exchange_parameters(self._block, fitted)
        values = {path: values.float() for path, values in behind.items()}
        weight, bias = values[f"{down}.weight"], values.get(f"{down}.bias")
        weight = weight if isinstance(self._linear(down), Conv1D) else weight.T

        def mended(given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            more = given.float() @ weight if bias is None else torch.addmm(bias, given.flatten(0, -2).float(), weight)
            return (output.float() + factor * more.view(output.shape)).to(output.dtype)

        return ours.at(map(mended, self._given, self._output)).hidden

    @property
    def _is_mended_behind(self) -> bool:
        """Whether what the MLP's last linear writes can be added to what the block puts out without it."""
        noted = self._noted
        return noted.factor is not None and noted.writers[1] == noted.linears[1]

    def _linear(self, path: str) -> nn.Module | None:
        linear = self._modules.get(path)
        return linear if isinstance(linear, nn.Linear | Conv1D) else None

    def _like(self, path: str, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._block.get_parameter(path).dtype).contiguous()

    def _of_attention(self, writer: str, path: str) -> Moments:
        """What the attention's last linear is given, and should write: what the source's did, and what is missing."""
        inputs, targets = RunningMoment(), RunningSum()
        noted = self._noted
        for number, seen in enumerate(self._ours.inputs(self._block, noted.index, path)):
            self._gathered.append(seen)
            given = with_one(self._block, path, seen.flatten(0, -2).float())
            inputs.add(given)
            wished = noted.writes[path][number]
            if writer == path and noted.factor is not None:
                wished = wished + self._short(number, noted.factor)
            targets.add(wished.flatten(0, -2).float().T @ given)
        return Moments(inputs.total(), targets.total)

    def _of_mlp(self, writer: str, path: str) -> tuple[Moments, torch.Tensor | None]:
        """The same of the MLP's: what it takes to leave the block where the source's stream does.

        And E[y x^T] of what units that are gone would write; None: there are all.
        """
        inputs, targets, of_gone = RunningMoment(), RunningSum(), RunningSum()
        noted = self._noted
        weight = None if noted.gone is None else weight_matrix(noted.own.get_submodule(path))[:, noted.gone].float().T
        for number, seen, output in self._through_mlp(path):
            given = with_one(self._block, path, noted.left_of(seen[0]).flatten(0, -2).float())
            inputs.add(given)
            if writer == path and noted.factor is not None:
                wished = (self._leaving[number].float() - output.float()) / noted.factor
            else:
                wished = noted.writes[path][number]
            targets.add(wished.flatten(0, -2).float().T @ given)
            if noted.gone is not None and weight is not None:
                lost = seen[0].flatten(0, -2).index_select(1, noted.gone).float() @ weight
                of_gone.add(lost.T @ given)
        return Moments(inputs.total(), targets.total), None if noted.gone is None else of_gone.total

    def _short(self, number: int, factor: float) -> torch.Tensor:
        """By how much our stream before the block is short of the source's, in what is written."""
        return (self._noted.theirs.hidden[number] - self._ours.hidden[number]) / factor

    def _through_mlp(self, path: str) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Runs the block: number of the batch, what its MLP's last linear was given and returned, the output.

        The MLP has all of the source's units. Where what it writes can be added afterwards, it returns zeros.
        """
        with self._attention_done(), self._all_units(path), self._mlp_held_back(path):
            for number, seen, output in self._passes(path):
                if self._is_mended_behind:
                    self._given.append(self._noted.left_of(seen[0].reshape(*output.shape[:-1], -1)))
                    self._output.append(output)
                yield number, seen, output

    @contextmanager
    def _all_units(self, path: str) -> Iterator[None]:
        """Within it the linears of the MLP are the source's, where units are gone."""
        names = () if self._noted.left is None else (*self._noted.inner, path)
        with ExitStack() as undo:
            for name in dict.fromkeys(names):
                undo.callback(self._block.set_submodule, name, self._block.get_submodule(name))
                self._block.set_submodule(name, self._noted.own.get_submodule(name))
            yield

    @contextmanager
    def _attention_done(self) -> Iterator[None]:
        """Within it the block's attention, if it was fitted, runs its last linear alone, once for each batch."""
        last = self._noted.linears[0]
        gathered = iter(self._gathered)
        attention = [self._block.get_submodule(last.rpartition(".")[0])] if len(self._gathered) else []
        with replaced_forwards(attention, lambda *_: lambda *_, **__: (self._modules[last](next(gathered)), None)):
            yield

    @contextmanager
    def _mlp_held_back(self, path: str) -> Iterator[None]:
        """Within it the MLP's last linear, if it is mended behind the block, returns zeros without a product."""
        hidden_size = self._ours.hidden[0].shape[-1]
        last = [self._block.get_submodule(path)] if self._is_mended_behind else []

        def zeros(given: torch.Tensor) -> torch.Tensor:
            return given.new_zeros(()).expand(*given.shape[:-1], hidden_size)

        with replaced_forwards(last, lambda *_: zeros):
            yield

    def _passes(self, path: str) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        with watched(self._block, [path]) as seen:
            for number, output in enumerate(self._ours.outputs(self._block, self._noted.index)):
                yield number, seen[path], output

    def _fit_gain(self, writer: str, factor: float) -> None:
        """The weight of a norm that stands between a linear and the residual stream, each channel by least squares."""
        products, squares = RunningSum(), RunningSum()
        for number, seen, output in self._passes(writer):
            written = seen[1].flatten(0, -2).float()
            if writer == self._noted.writers[0]:
                wished = self._noted.writes[writer][number] + self._short(number, factor)
            else:
                wished = seen[1].reshape(output.shape) + (self._leaving[number] - output) / factor
            products.add((written * wished.flatten(0, -2).float()).sum(0))
            squares.add(written.square().sum(0))
        ridge = _GAIN_RIDGE * squares.total.mean().clamp(min=1e-30)
        scale = (products.total + ridge) / (squares.total + ridge)
        norm: Any = self._block.get_submodule(writer)
        # Gemma's norms multiply by 1 + weight, the others by the weight.
        with_zeros = functional_call(norm, {"weight": torch.zeros_like(norm.weight)}, (torch.ones_like(norm.weight),))
        offset = float(with_zeros.any())
        path = f"{writer}.weight"
        self._fitted[path] = self._like(path, (norm.weight.double() + offset) * scale - offset)
        exchange_parameters(self._block, {path: self._fitted[path]})
