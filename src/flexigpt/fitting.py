"""Blocks fitted to calibration text in closed form: no gradients, one block after the other.

Two streams of hidden states go through the blocks: the source's and the pruned model's. Each linear of a replica is
fitted to the inputs that it will see, behind the blocks before it; what a block writes to the residual stream is fitted
to where the source's stream is, so that it also mends what the blocks before it left.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexigpt.architecture import block_list, find_architecture, weight_matrix
from flexigpt.calibration import Stream
from flexigpt.modeling_flexigpt import NormedOutput, SharedLinear
from flexigpt.plan import Plan
from flexigpt.progress import Track, silent
from flexigpt.regression import Moments, ridge_fit

# W_i, W_j, moments, rank -> A (rank, inputs), B (outputs, rank).
AdapterFit = Callable[[torch.Tensor, torch.Tensor, Moments, int], tuple[torch.Tensor, torch.Tensor]]
# How far a block may be from adding its sublayers' outputs to its input, and still count as doing so.
_ADDITIVE_TOLERANCE = 0.02
# By path within the block: what a module was given, and what it returned.
_Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What is fitted.

    Attributes:
        adapter: makes a replica's adapter of moments; None: adapters stay.
        norms: whether the output norms' gamma is fitted, each channel by least squares.
        kept: whether the kept blocks behind a pruned one are refitted: those of their linears that write to the
            residual stream, at full rank, as nothing more is stored for them. Bases are left alone: fitted to their own
            place, they would be farther from their replicas'.
    """

    adapter: AdapterFit | None = None
    norms: bool = False
    kept: bool = False


@torch.no_grad()
def fit_blocks(
    source: PreTrainedModel,
    blocks: Sequence[nn.Module | None],
    windows: torch.Tensor,
    fits: Fits,
    *,
    plan: Plan | None = None,
    track: Track = silent,
) -> None:
    """Fits the blocks of a pruned model, in order.

    Args:
        source: the source model.
        blocks: of the pruned model, by the source's numbering, filled, on the source's device; None: removed. What is
            not fitted stays as it is; what is, gets tensors of its own.
        windows: (windows, tokens) ids.
        fits: what is fitted.
        plan: of a compact model.
        track: told of each block.
    """
    theirs = Stream(source, windows)
    ours = theirs.copy()
    pruned = set(plan.pruned) if plan is not None else {i for i, block in enumerate(blocks) if block is None}
    last = max(pruned, default=-1)
    depth = len(blocks) if fits.kept and pruned else last + 1
    bases = set() if plan is None else {replica.base for replica in plan.replicas}
    writers = find_architecture(source.config).output_norms
    for index in track(range(depth), "fitting blocks", depth):
        own, block = block_list(source)[index], blocks[index]
        behind = list(theirs.outputs(own, index))
        if block is not None:
            changed = min(pruned) < index or (index + 1 < len(blocks) and blocks[index + 1] is None)
            if index in pruned or (fits.kept and changed and index not in bases):
                leaving = _past_removed(source, blocks, index + 1, theirs, behind)
                _BlockFit(own, block, writers, _Streams(index, theirs, ours, leaving)).run(fits, index in pruned)
            ours.hidden = list(ours.outputs(block, index))
        theirs.hidden = behind


def _past_removed(
    source: PreTrainedModel, blocks: Sequence[nn.Module | None], index: int, theirs: Stream, hidden: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The source's hidden states before a block, or behind the removed ones that begin there."""
    stream = theirs.copy()
    stream.hidden = hidden
    while index < len(blocks) and blocks[index] is None:
        stream.hidden = list(stream.outputs(block_list(source)[index], index))
        index += 1
    return stream.hidden


class _Streams(NamedTuple):
    """Both streams before a block, and where the source's is when the block has run."""

    block: int
    theirs: Stream
    ours: Stream
    leaving: list[torch.Tensor]


class _BlockFit:
    """One block of the pruned model and what it is fitted to.

    Args:
        own: the source's block in that place.
        block: a replica, or the kept block itself.
        writers: paths of the last modules of attention and MLP, which write to the residual stream.
        streams: before the block.
    """

    def __init__(self, own: nn.Module, block: nn.Module, writers: tuple[str, str], streams: _Streams) -> None:
        self._own, self._block, self._writers, self._streams = own, block, writers, streams
        self._their_writes: list[dict[str, torch.Tensor]] = []
        own_outputs: list[torch.Tensor] = []
        with _watched(own, writers) as seen:
            for output in streams.theirs.outputs(own, streams.block):
                own_outputs.append(output)
                self._their_writes.append({path: seen[path][1].reshape(output.shape) for path in writers})
        self._factor = self._residual_factor(own_outputs[0])

    def run(self, fits: Fits, is_replica: bool) -> None:
        """Fits what is asked for, in the order in which the block computes."""
        if not is_replica:
            for path in self._writers:
                if self._factor is not None and isinstance(self._block.get_submodule(path), nn.Linear | Conv1D):
                    self.refit(path)
            return
        for step in self.steps():
            if isinstance(self._block.get_submodule(step[0]), NormedOutput):
                if fits.norms:
                    self.fit_norm(step[0])
            elif fits.adapter is not None:
                self.fit_adapters(step, fits.adapter)

    def _residual_factor(self, leaving: torch.Tensor) -> float | None:
        """By what the block scales its sublayers' outputs when it adds them to its input; None if it does not just add.

        A block that normalises the sum (OPT 350M) or scales it (Granite) tells by what it does with zeros.
        """
        entering, leaving = self._streams.theirs.hidden[0].double(), leaving.double()
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
        writer = paths[0].removesuffix(".inner")
        inputs, targets = self._moments(paths[0], writer if writer in self._writers else None)
        for path in paths:
            shared = cast(SharedLinear, self._block.get_submodule(path))
            pruned = weight_matrix(self._own.get_submodule(path.removesuffix(".inner"))).double()
            moments = Moments(inputs, pruned @ inputs if targets is None else targets)
            adapter = fit(pruned, weight_matrix(shared.base), moments, len(shared.adapter_A))
            for parameter, values in zip((shared.adapter_A, shared.adapter_B), adapter, strict=True):
                parameter.copy_(values)

    def refit(self, path: str) -> None:
        """A kept block's linear that writes to the residual stream. The source's own tensor stays as it is."""
        linear = self._block.get_submodule(path)
        inputs, targets = self._moments(path, path)
        assert targets is not None
        weight = cast(nn.Parameter, linear.weight)
        fitted = ridge_fit(weight_matrix(linear), Moments(inputs, targets)).to(weight.dtype)
        linear.weight = nn.Parameter(fitted.T.contiguous() if isinstance(linear, Conv1D) else fitted)

    def _moments(self, path: str, writer: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of a linear's inputs and, where it writes to the residual stream, of what it should write."""
        inputs, targets = _Sum(), _Sum()
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
        products, squares = _Sum(), _Sum()
        for number, seen, output in self._passes((path, f"{path}.inner")):
            normed = F.layer_norm(seen[f"{path}.inner"][1].float(), norm.normalized_shape, eps=norm.eps).flatten(0, -2)
            wished = self._wished(path, number, seen[path][1], output).float().flatten(0, -2)
            products.add((normed * wished).sum(0))
            squares.add(normed.square().sum(0))
        norm.weight.copy_(products.total / squares.total.clamp(min=1e-30))

    def _passes(self, paths: Iterable[str]) -> Iterator[tuple[int, _Seen, torch.Tensor]]:
        """Runs the replica on our stream: number of the batch, what its modules saw, its output."""
        with _watched(self._block, paths) as seen:
            for number, output in enumerate(self._streams.ours.outputs(self._block, self._streams.block)):
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
        return written.reshape(output.shape) + (self._streams.leaving[number] - output) / self._factor


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
