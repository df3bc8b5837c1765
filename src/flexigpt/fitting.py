"""Replicas fitted to calibration text in closed form: no gradients, one replica after the other.

Two streams of hidden states go through the blocks: the source's and the compact model's. Each linear of a replica is
fitted to the inputs that it will see, behind the replicas before it; what a replica writes to the residual stream is
fitted to where the source's stream is, so that it also mends what the replicas before it left.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.architecture import block_list, find_architecture, weight_matrix
from flexigpt.calibration import Stream
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM, NormedOutput, SharedLinear
from flexigpt.plan import Plan
from flexigpt.progress import Track, silent
from flexigpt.regression import Moments

# W_i, W_j, moments, rank -> A (rank, inputs), B (outputs, rank).
AdapterFit = Callable[[torch.Tensor, torch.Tensor, Moments, int], tuple[torch.Tensor, torch.Tensor]]
# How far a block may be from adding its sublayers' outputs to its input, and still count as doing so.
_ADDITIVE_TOLERANCE = 0.02
# By path within the block: what a module was given, and what it returned.
_Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def fit_replicas(
    model: FlexiGPTForCausalLM,
    source: PreTrainedModel,
    plan: Plan,
    windows: torch.Tensor,
    *,
    fit_adapter: AdapterFit | None,
    fit_norms: bool,
    track: Track = silent,
) -> None:
    """Fits adapters, output norms or both of every replica, in order.

    Args:
        model: the compact model, filled, on the source's device; what is not fitted stays as it is.
        source: the source model.
        plan: the model's plan.
        windows: (windows, tokens) ids.
        fit_adapter: makes an adapter of moments; None: adapters stay.
        fit_norms: whether the output norms' gamma is fitted, each channel by least squares.
        track: told of each block.
    """
    theirs = Stream(source, windows)
    ours = theirs.copy()
    first, depth = min(plan.pruned, default=0), max(plan.pruned, default=-1) + 1
    writers = find_architecture(source.config).output_norms
    for block in track(range(depth), "fitting replicas", depth):
        own, logical = block_list(source)[block], model.block_list[block]
        if block in plan.pruned:
            fit = _ReplicaFit(own, logical, writers, _Streams(block, theirs, ours))
            for step in fit.steps():
                if isinstance(logical.get_submodule(step[0]), NormedOutput):
                    if fit_norms:
                        fit.fit_norm(step[0])
                elif fit_adapter is not None:
                    fit.fit_adapters(step, fit_adapter)
        theirs.hidden = list(theirs.outputs(own, block))
        ours.hidden = theirs.hidden if block < first else list(ours.outputs(logical, block))


class _Streams:
    """Both streams before a block."""

    def __init__(self, block: int, theirs: Stream, ours: Stream) -> None:
        self.block, self.theirs, self.ours = block, theirs, ours


class _ReplicaFit:
    """One replica and what it is fitted to.

    Args:
        own: the pruned block.
        replica: what stands in its place.
        writers: paths of the last modules of attention and MLP, which write to the residual stream.
        streams: before the block.
    """

    def __init__(self, own: nn.Module, replica: nn.Module, writers: tuple[str, str], streams: _Streams) -> None:
        self._own, self._replica, self._writers, self._streams = own, replica, writers, streams
        self._their_writes: list[dict[str, torch.Tensor]] = []
        self._their_outputs: list[torch.Tensor] = []
        with _watched(own, writers) as seen:
            for output in streams.theirs.outputs(own, streams.block):
                self._their_outputs.append(output)
                self._their_writes.append({path: seen[path][1].reshape(output.shape) for path in writers})
        self._factor = self._residual_factor()

    def _residual_factor(self) -> float | None:
        """By what the block scales its sublayers' outputs when it adds them to its input; None if it does not just add.

        A block that normalises the sum (OPT 350M) or scales it (Granite) tells by what it does with zeros.
        """
        entering, leaving = self._streams.theirs.hidden[0].double(), self._their_outputs[0].double()
        with ExitStack() as hooks:
            for path in self._writers:
                handle = self._own.get_submodule(path).register_forward_hook(lambda _, __, out: torch.zeros_like(out))
                hooks.callback(handle.remove)
            passed = next(self._streams.theirs.outputs(self._own, self._streams.block)).double()
        added = leaving - entering
        written = torch.stack([write.double() for write in self._their_writes[0].values()]).sum(0)
        factor = ((added * written).sum() / written.square().sum()).item()
        off = max((passed - entering).norm().item(), (added - factor * written).norm().item())
        return factor if off <= _ADDITIVE_TOLERANCE * added.norm().item() else None

    def steps(self) -> list[tuple[str, ...]]:
        """Paths of what can be fitted, in the order in which it is computed; linears of one input together."""
        order: list[tuple[str, torch.Tensor]] = []
        with ExitStack() as hooks:
            for path, module in self._replica.named_modules():
                if isinstance(module, SharedLinear | NormedOutput):
                    handle = module.register_forward_hook(lambda _, args, __, path=path: order.append((path, args[0])))
                    hooks.callback(handle.remove)
            next(self._streams.ours.outputs(self._replica, self._streams.block))
        steps: list[tuple[str, ...]] = []
        last: torch.Tensor | None = None
        for path, given in order:
            joined = given is last and isinstance(self._replica.get_submodule(path), SharedLinear)
            steps[-1:] = [(*steps[-1], path)] if joined else [*steps[-1:], (path,)]
            last = given
        return steps

    def fit_adapters(self, paths: tuple[str, ...], fit: AdapterFit) -> None:
        """Linears that are given the same: one that writes to the residual stream stands alone."""
        writer = paths[0].removesuffix(".inner")
        writes = writer in self._writers
        inputs, targets = _Sum(), _Sum()
        for number, seen, output in self._passes((paths[0], *([writer] if writes else []))):
            given = seen[paths[0]][0].flatten(0, -2)
            inputs.add(given.T.float() @ given.float())
            if writes:
                wished = self._wished(writer, number, seen[writer][1], output).flatten(0, -2)
                bias = cast(torch.Tensor | None, self._own.get_submodule(writer).bias)
                wished = wished if bias is None else wished - bias
                targets.add(wished.T.float() @ given.float())
        for path in paths:
            shared = cast(SharedLinear, self._replica.get_submodule(path))
            pruned = weight_matrix(self._own.get_submodule(path.removesuffix(".inner"))).double()
            moments = Moments(inputs.total, targets.total if writes else pruned @ inputs.total)
            adapter = fit(pruned, weight_matrix(shared.base), moments, len(shared.adapter_A))
            for parameter, values in zip((shared.adapter_A, shared.adapter_B), adapter, strict=True):
                parameter.copy_(values)

    def fit_norm(self, path: str) -> None:
        """gamma of an output norm, each channel by least squares."""
        module = cast(NormedOutput, self._replica.get_submodule(path))
        norm = module.output_norm
        products, squares = _Sum(), _Sum()
        for number, seen, output in self._passes((path, f"{path}.inner")):
            normed = F.layer_norm(seen[f"{path}.inner"][1].float(), norm.normalized_shape, eps=norm.eps).flatten(0, -2)
            wished = self._wished(path, number, seen[path][1], output).float().flatten(0, -2)
            products.add((normed * wished).sum(0))
            squares.add(normed.square().sum(0))
        norm.weight.copy_(products.total / squares.total.clamp(min=1e-30))

    def _passes(self, paths: Iterable[str]) -> Iterator[tuple[int, _Seen, torch.Tensor]]:
        """Runs the replica on our stream: number of the batch, what its modules saw, its output."""
        with _watched(self._replica, paths) as seen:
            for number, output in enumerate(self._streams.ours.outputs(self._replica, self._streams.block)):
                yield number, seen, output

    def _wished(self, writer: str, number: int, written: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What a writer should have written in a batch, where it has written `written` and the block put out `output`.

        The attention: what the pruned block's wrote, and by how much our stream is short of the source's. The MLP:
        what it takes to leave the block where the source's stream does.
        """
        if self._factor is None:
            return self._their_writes[number][writer]
        if writer == self._writers[0]:
            short = self._streams.theirs.hidden[number] - self._streams.ours.hidden[number]
            return self._their_writes[number][writer] + short / self._factor
        return written.reshape(output.shape) + (self._their_outputs[number] - output) / self._factor


class _Sum:
    """Adds up float32 tensors in float64."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        self.total = self.total.to(values.device) + values.double()


@contextmanager
def _watched(block: nn.Module, paths: Iterable[str]) -> Iterator[_Seen]:
    """Within it modules note what they were last given and returned."""
    seen: _Seen = {}

    def note(path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _, args, output: seen.update({path: (args[0], output)})

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(block.get_submodule(path).register_forward_hook(note(path)).remove)
        yield seen
