"""Blocks fitted to calibration text in closed form: no gradients, one block after the other.

Two streams of hidden states go through the blocks: the source's and the pruned model's. Each linear of a replica is
fitted to the inputs that it will see, behind the blocks before it; what a block writes to the residual stream is fitted
to where the source's stream is, so that it also mends what the blocks before it left.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flexigpt.calibration import HiddenStates, RunningSum, Stream, calibration_batches, output_weights
from flexigpt.model import (
    INNER,
    OUTPUT_NORM,
    NormedOutput,
    Seen,
    SharedLinear,
    find_architecture,
    linear_tensors,
    watched,
    weight_matrix,
)
from flexigpt.replicas.least_squares import FittedAdapter, Moments, ridge_fit
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.weights import StreamedModel, exchange_parameters

# W_i, W_j, moments, rank, whether the base is scaled -> what is fitted.
AdapterFit = Callable[[torch.Tensor, torch.Tensor, Moments, int, bool], FittedAdapter]

# Hidden states that a fit holds: both streams before a block, the source's behind it and behind the removed ones after
# it, and what each of its two sublayers writes.
HIDDEN_COPIES = 6

# How far a block may be from adding its sublayers' outputs to its input, and still count as doing so.
_ADDITIVE_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What is fitted.

    Attributes:
        adapter: makes a replica's adapter of moments; None: adapters stay.
        weighted: whether errors of a linear count by how much they move the block's output, instead of all alike.
        norms: whether the output norms' gamma is fitted, each channel by least squares.
        kept: whether the kept blocks behind a pruned one are refitted: those of their linears that write to the
            residual stream, at full rank, as nothing more is stored for them. Bases are left alone: fitted to their own
            place, they would be farther from their replicas'.
    """

    adapter: AdapterFit | None = None
    weighted: bool = False
    norms: bool = False
    kept: bool = False


@torch.no_grad()
def fit_blocks(
    source: StreamedModel,
    pruned: StreamedModel,
    standing: Sequence[int | None],
    windows: torch.Tensor,
    fits: Fits,
    *,
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> dict[int, float]:
    """Fits the blocks of a pruned model, in order.

    Args:
        source: the source model.
        pruned: the compact model, its replicas filled, or the shorter one. What is not fitted stays as it is; what is,
            gets tensors of its own.
        standing: the pruned model's block in the place of each of the source's; None: none is.
        windows: (windows, tokens) ids.
        fits: what is fitted.
        spill: folder for files that hold the hidden states; None: memory does, HIDDEN_COPIES times.
        stage: keeps what is fitted, which a run that was killed finds again.
        track: reports each block.

    Returns:
        By replica: of the squared distance between the two streams that its block would leave if it did nothing, the
        share that the replica mends. 1 is all of it.
    """
    mended: dict[int, float] = {}
    theirs = Stream(source.model, calibration_batches(windows), spill)
    ours = theirs.at(theirs.hidden)
    replicas = pruned.layout.bases
    missing = [i for i, block in enumerate(standing) if block is None or block in replicas]
    last = max(missing, default=-1)
    depth = len(standing) if fits.kept and missing else last + 1
    for index in track(range(depth), "fitting blocks", depth):
        number = standing[index]
        source.expect(index + 1)
        with source.block(index) as own:
            behind = theirs.at(theirs.outputs(own, index))
            if number is not None:
                changed = min(missing) < index or (index + 1 < len(standing) and standing[index + 1] is None)
                is_replica = number in replicas
                with pruned.block(number) as block:
                    if is_replica or (fits.kept and changed and number not in replicas.values()):
                        leaving = _past_removed(source, standing, index + 1, behind).hidden
                        fit = _BlockFit(source, own, block, _Streams(index, theirs, ours, leaving))
                        run = partial(fit.run, fits, is_replica)
                        fitted = run() if stage is None else stage.tensors(f"fitted-{number}", run)
                        exchange_parameters(block, {path: values.to(source.device) for path, values in fitted.items()})
                        pruned.own(number, fitted)
                    without = _apart(behind.hidden, ours.hidden) if is_replica else 0.0
                    ours.advance(block, index)
                    if is_replica:
                        mended[number] = 1 - _apart(behind.hidden, ours.hidden) / without if without else 1.0
        theirs = behind
    return mended


def _apart(first: HiddenStates, second: HiddenStates) -> float:
    """The squared distance of two streams, summed over a text."""
    pairs = zip(first, second, strict=True)
    return sum((one - other).float().square().sum(dtype=torch.float64).item() for one, other in pairs)


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
        block: a replica, or the kept block itself.
        streams: before the block.
    """

    def __init__(self, source: StreamedModel, own: nn.Module, block: nn.Module, streams: _Streams) -> None:
        self._own, self._block, self._streams = own, block, streams
        # Paths of the last modules of attention and MLP, which write to the residual stream.
        self._writers = find_architecture(source.model.config).output_norms
        self._fitted: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._their_writes = {path: HiddenStates((), streams.theirs.hidden.folder) for path in self._writers}
        self._factor: float | None = None

    def run(self, fits: Fits, is_replica: bool) -> dict[str, torch.Tensor]:
        """Fits what is asked for, in the order in which the block computes; the fitted tensors by path."""
        self._watch_own()
        if not is_replica:
            for path in self._writers:
                if self._factor is not None and isinstance(self._block.get_submodule(path), nn.Linear | Conv1D):
                    self.refit(path)
            return self._fitted
        steps = self.steps()
        if fits.weighted and fits.adapter is not None:
            # A writer's output is the block's, and all of it counts alike.
            linears = (path for step in steps for path in step if path.removesuffix(".inner") not in self._writers)
            self._weights = output_weights(self._streams.theirs, self._own, self._streams.block, list(linears))
        for step in steps:
            if isinstance(self._block.get_submodule(step[0]), NormedOutput):
                if fits.norms:
                    self.fit_norm(step[0])
            elif fits.adapter is not None:
                self.fit_adapters(step, fits.adapter)
        return self._fitted

    def _watch_own(self) -> None:
        """Notes what the source's block writes, and how it adds that to the residual stream."""
        first: torch.Tensor | None = None
        with watched(self._own, self._writers) as seen:
            for output in self._streams.theirs.outputs(self._own, self._streams.block):
                first = output if first is None else first
                for path, writes in self._their_writes.items():
                    writes.append(seen[path][1].reshape(output.shape))
        assert first is not None
        self._factor = self._residual_factor(first)

    def _set(self, path: str, values: torch.Tensor) -> None:
        """A fitted tensor takes the place of the parameter at that path; that itself stays as it is."""
        self._fitted[path] = values.to(self._block.get_parameter(path).dtype).contiguous()
        exchange_parameters(self._block, {path: self._fitted[path]})

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

    def steps(self) -> list[tuple[str, ...]]:
        """Paths of what can be fitted, in the order in which it is computed; linears of one input together."""
        order: list[tuple[str, torch.Tensor]] = []
        with ExitStack() as hooks:
            for path, module in self._block.named_modules():
                if isinstance(module, SharedLinear | NormedOutput):
                    handle = module.register_forward_hook(lambda _, args, __, path=path: order.append((path, args[0])))
                    hooks.callback(handle.remove)
            next(self._streams.ours.outputs(self._block, self._streams.block))
        steps: list[tuple[str, ...]] = []
        last: torch.Tensor | None = None
        for path, given in order:
            joined = given is last and isinstance(self._block.get_submodule(path), SharedLinear)
            steps[-1:] = [(*steps[-1], path)] if joined else [*steps[-1:], (path,)]
            last = given
        return steps

    def fit_adapters(self, paths: tuple[str, ...], fit: AdapterFit) -> None:
        """Linears that are given the same: one that writes to the residual stream stands alone."""
        writer = paths[0].removesuffix(INNER)
        inputs, targets = self._moments(paths[0], writer if writer in self._writers else None)
        for path in paths:
            shared = cast(SharedLinear, self._block.get_submodule(path))
            pruned = weight_matrix(self._own_linear(path)).double()
            moments = Moments(inputs, pruned @ inputs if targets is None else targets, self._weights.get(path))
            scaled = shared.base_scale is not None
            adapter = fit(pruned, weight_matrix(shared.base), moments, len(shared.adapter_A), scaled)
            ends = (self._own_linear(path), shared.base) if scaled and shared.bias_difference is not None else ()
            biases = [cast(torch.Tensor, module.bias).double() for module in ends]
            scale = adapter.scale if scaled else None
            for name, values in linear_tensors(path, (adapter.down, adapter.up), scale, biases).items():
                self._set(name, values)

    def _own_linear(self, path: str) -> nn.Module:
        return self._own.get_submodule(path.removesuffix(INNER))

    def refit(self, path: str) -> None:
        """A kept block's linear that writes to the residual stream."""
        linear = self._block.get_submodule(path)
        inputs, targets = self._moments(path, path)
        assert targets is not None
        fitted = ridge_fit(weight_matrix(linear), Moments(inputs, targets))
        self._set(f"{path}.weight", fitted.T if isinstance(linear, Conv1D) else fitted)

    def _moments(self, path: str, writer: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of a linear's inputs and, where it writes to the residual stream, of what it should write."""
        inputs, targets = RunningSum(), RunningSum()
        for number, seen, output in self._passes({path, writer or path}):
            given = seen[path][0].flatten(0, -2).float()
            inputs.add(given.T @ given)
            if writer is not None:
                wished = self._wished(writer, number, seen[writer][1], output).flatten(0, -2).float()
                bias = cast(torch.Tensor | None, self._own.get_submodule(writer).bias)
                targets.add((wished if bias is None else wished - bias.float()).T @ given)
        return inputs.total, None if writer is None else targets.total

    def fit_norm(self, path: str) -> None:
        """gamma of an output norm, each channel by least squares."""
        module = cast(NormedOutput, self._block.get_submodule(path))
        norm = module.output_norm
        products, squares = RunningSum(), RunningSum()
        inner = f"{path}{INNER}"
        for number, seen, output in self._passes((path, inner)):
            normed = F.layer_norm(seen[inner][1].float(), norm.normalized_shape, eps=norm.eps).flatten(0, -2)
            wished = self._wished(path, number, seen[path][1], output).float().flatten(0, -2)
            products.add((normed * wished).sum(0))
            squares.add(normed.square().sum(0))
        self._set(f"{path}{OUTPUT_NORM}", products.total / squares.total.clamp(min=1e-30))

    def _passes(self, paths: Iterable[str]) -> Iterator[tuple[int, Seen, torch.Tensor]]:
        """Runs the replica on our stream: number of the batch, what its modules saw, its output."""
        with watched(self._block, paths) as seen:
            for number, output in enumerate(self._streams.ours.outputs(self._block, self._streams.block)):
                yield number, seen, output

    def _wished(self, writer: str, number: int, written: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What a writer should have written in a batch, where it has written `written` and the block put out `output`.

        The attention: what the pruned block's wrote, and by how much our stream is short of the source's. The MLP:
        what it takes to leave the block where the source's stream does.
        """
        if self._factor is None:
            return self._their_writes[writer][number]
        if writer == self._writers[0]:
            short = self._streams.theirs.hidden[number] - self._streams.ours.hidden[number]
            return self._their_writes[writer][number] + short / self._factor
        return written.reshape(output.shape) + (self._streams.leaving[number] - output) / self._factor
