"""Text through the blocks, one block after the other; statistics are running sums.

Only the current hidden states are kept, in files where they are many. Nothing grows with the number of blocks or with
the square of the tokens.
"""

import copy
import math
import mmap
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexigpt.model import Widened, block_output, fast_half, held_back, layout_of, replaced_forwards, watched
from flexigpt.runtime import CachedStage, InputError, Track, in_parallel, return_memory, silent, workers_of
from flexigpt.text import batch_size_for
from flexigpt.weights import StreamedModel

# Tokens that go through a block at once. Enough to fill the matrix units, few enough for the caches of a CPU.
_BATCH_TOKENS = 2048

# Through a block of more parameters half as many, for the sake of memory: gradients need a gigabyte of activations.
_LARGE_BLOCK = 2**26

# Up to so many parameters a block runs on several batches at a time, a thread for each: threads that share the small
# products of one wait for each other, five times as long as that takes where other programs run beside them. A larger
# one would be widened to float32 by each of many threads.
_SMALL_BLOCK = 2**24

# Hidden states are saved so often, and never for more than a twentieth of the time.
_SAVE_SECONDS, _SAVE_SHARE = 60.0, 20

# Where memory is scarce, so many batches may leave holes in it before these are given back.
_BETWEEN = 4

BlockStatistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def calibration_batches(windows: torch.Tensor, blocks: Iterable[nn.Module]) -> tuple[torch.Tensor, ...]:
    """Calibration windows as they go through a block together: (windows, tokens) ids each."""
    return windows.split(batch_tokens(windows.shape[1], max(map(_size, blocks))) // windows.shape[1])


def batch_tokens(window_length: int, block_parameters: int) -> int:
    """How many tokens go together through a block of that size, in whole windows."""
    most = _BATCH_TOKENS if block_parameters <= _LARGE_BLOCK else _BATCH_TOKENS // 2
    return window_length * batch_size_for(window_length, 1, most)


def _size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


class HiddenStates:
    """One tensor a batch, (windows, tokens, hidden size), the model's dtype; each can be exchanged for another.

    Args:
        batches: taken one at a time.
        folder: where files without a name hold them, and memory only what is looked at; None: in memory.

    Attributes:
        held: the tensors, on the CPU where files hold them.
    """

    def __init__(self, batches: Iterable[torch.Tensor], folder: Path | None = None) -> None:
        self.folder = folder
        self.held: list[torch.Tensor] = []
        self._maps: list[mmap.mmap] = []
        self._device = torch.device("cpu")
        for batch in batches:
            self.append(batch)

    def append(self, batch: torch.Tensor) -> None:
        """One more."""
        self._device = batch.device
        if self.folder is not None:
            self._maps.append(_in_file(batch.cpu(), self.folder))
            batch = torch.frombuffer(self._maps[-1], dtype=batch.dtype).view(batch.shape)
        self.held.append(batch)

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, number: int) -> torch.Tensor:
        # A copy of what a file holds: that may be overwritten while the batch is in use.
        batch = self.held[number].to(self._device, copy=self.folder is not None)
        self._forget(number)
        return batch

    def __setitem__(self, number: int, batch: torch.Tensor) -> None:
        if self.folder is None:
            self.held[number] = batch
        else:
            self.held[number].copy_(batch)
            self._forget(number)

    def _forget(self, number: int) -> None:
        """What was read or written stays in its file, and in memory only where the system has no use for that."""
        if self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[number].madvise(mmap.MADV_DONTNEED)
        if self._maps and not number % _BETWEEN:
            return_memory()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))


def _in_file(batch: torch.Tensor, folder: Path) -> mmap.mmap:
    """The same values, mapped from a file that has no name, so that nothing is left of it."""
    values: Any = batch.contiguous().flatten().view(torch.uint8).numpy()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(memoryview(values))  # written, not mapped first, so that a full disk is an error
        file.flush()
        return mmap.mmap(file.fileno(), 0)


class Stream:
    """Hidden states of a text on their way through the blocks.

    Args:
        model: a model in eval mode, of which only what lies outside the blocks is read; a block of another model may be
            run in the place of its own.
        batches: (windows, tokens) ids each.
        spill: folder for files that hold the hidden states; None: memory does.

    Attributes:
        hidden: what the next block is given.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[torch.Tensor], spill: Path | None = None) -> None:
        self._model = model
        self._arguments: dict[torch.Size, list[_Arguments]] = {}
        moved = (batch.to(model.device) for batch in batches)
        self.hidden = HiddenStates(_enter_blocks(model, moved, self._arguments), spill)

    @property
    def config(self) -> PreTrainedConfig:
        """Of the model."""
        return self._model.config

    def at(self, hidden: Iterable[torch.Tensor]) -> "Stream":
        """The same text with other hidden states, or a copy of these, held where these are."""
        return self.over(HiddenStates(hidden, self.hidden.folder))

    def over(self, hidden: HiddenStates) -> "Stream":
        """The same text with these hidden states themselves, not a copy."""
        other = copy.copy(self)
        other.hidden = hidden
        return other

    def outputs(self, block: nn.Module, index: int) -> Iterator[torch.Tensor]:
        """What a block makes of the hidden states, batch by batch; `index` is its place in the model."""
        widened = Widened()
        return (self._output(block, index, inputs, widened) for inputs in self.hidden)

    def _output(self, block: nn.Module, index: int, inputs: torch.Tensor, widened: Widened) -> torch.Tensor:
        args, kwargs = self._arguments[inputs.shape[:2]][index]
        with torch.no_grad(), fast_half(self._model, widened):
            return block_output(block(inputs, *args, **kwargs))

    def inputs(self, block: nn.Module, index: int, path: str) -> Iterator[torch.Tensor]:
        """What a module within a block is given, batch by batch; what the block computes after that is left out."""

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(args[0])

        handle, widened = block.get_submodule(path).register_forward_pre_hook(stop), Widened()
        try:
            for inputs in self.hidden:
                args, kwargs = self._arguments[inputs.shape[:2]][index]
                try:
                    with torch.no_grad(), fast_half(self._model, widened):
                        block(inputs, *args, **kwargs)
                except _Reached as reached:
                    yield reached.given
        finally:
            handle.remove()

    def backward(
        self,
        block: nn.Module,
        index: int,
        gradients: "HiddenStates",
        paths: Sequence[str],
        last: nn.Linear | None = None,
    ) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Takes gradients by what a block puts out to those by the hidden states, in place, batch by batch.

        Args:
            block: the block.
            index: its place in the model.
            gradients: by what it puts out.
            paths: of modules within it.
            last: a linear within it whose output it only adds, and need not compute.

        Yields:
            By path of each of these modules within the block: what it was given, and the gradient by what it returned.
        """
        block.requires_grad_(False)  # its weights get no gradient, and need nothing kept for one
        widened = Widened()
        for number, inputs in enumerate(self.hidden):
            args, kwargs = self._arguments[inputs.shape[:2]][index]
            spared = nullcontext() if last is None else held_back(last, self._model, widened)
            with spared, watched(block, paths) as seen, torch.enable_grad(), fast_half(self._model, widened):
                entering = inputs.detach().requires_grad_()
                output = block_output(block(entering, *args, **kwargs))
                returned = [seen[path][1] for path in paths]
                first, *others = torch.autograd.grad(output, [entering, *returned], gradients[number])
            gradients[number] = first
            found = {path: (seen[path][0].detach(), other) for path, other in zip(paths, others, strict=True)}
            del seen, entering, output, returned, first, others  # the graph is as large as the moments it is added to
            yield found

    def advance(self, block: nn.Module, index: int) -> None:
        """The hidden states become what a block makes of them."""
        small, widened = _size(block) <= _SMALL_BLOCK, Widened()
        tasks = (partial(self._output, block, index, inputs, widened) for inputs in self.hidden)
        for number, outputs in enumerate(in_parallel(tasks, workers_of(self._model.device) if small else 1)):
            self.hidden[number] = outputs


class _Reached(Exception):
    """A module's turn has come."""

    def __init__(self, given: torch.Tensor) -> None:
        self.given = given


@torch.no_grad()
def block_means(
    source: StreamedModel,
    windows: torch.Tensor,
    statistics: Mapping[str, BlockStatistic],
    *,
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> dict[str, list[float]]:
    """The means over all tokens of statistics of each block's input and output, by name.

    Args:
        source: a source model.
        windows: (windows, tokens) ids.
        statistics: each (tokens, hidden) float32 inputs X_i and outputs X_{i+1} -> (tokens,) values. X_{i+1} is the
            residual stream before the final norm.
        spill: folder for files that hold the hidden states; None: memory does.
        stage: where the run leaves what it needs to go on after it was killed.
        track: reports each block.

    Returns:
        For each statistic a value for each block; not finite where the model overflows.
    """
    stream = Stream(source.model, calibration_batches(windows, source.blocks), spill)
    saved = SavedStates(stage, stream.hidden)
    done, means = saved.found() or (0, {name: [] for name in statistics})
    for index in track(range(len(source)), "calibrating", len(source)):
        if index < done:
            continue
        source.expect(index + 1)
        totals: dict[str, Any] = dict.fromkeys(statistics, 0.0)
        with source.block(index) as block:
            for number, outputs in enumerate(stream.outputs(block, index)):
                ends = stream.hidden[number].flatten(0, 1).float(), outputs.flatten(0, 1).float()
                for name, statistic in statistics.items():
                    totals[name] += statistic(*ends).sum(dtype=torch.float64)
                stream.hidden[number] = outputs
        for name, total in totals.items():
            means[name].append(total.item() / windows.numel())
        saved.save(index + 1, means)
    return means


def check_means(means: Sequence[float]) -> None:
    """Raises InputError for a mean that is not finite; the message names the block."""
    for index, mean in enumerate(means):
        if not math.isfinite(mean):
            raise overflow(f"the statistics of block {index}")


def overflow(what: str) -> InputError:
    """The error for a model whose numbers grow beyond what can be held."""
    return InputError(
        f"{what} are not finite: the model overflows on this text; give --dtype float32, or another calibration text"
    )


class SavedStates:
    """What a calibration leaves in its stage, where there is one, to go on from."""

    def __init__(self, stage: CachedStage | None, hidden: HiddenStates) -> None:
        self._stage, self._hidden = stage, hidden
        self._latest, self._cost = time.monotonic(), 0.0

    def found(self) -> tuple[int, dict[str, list[float]]] | None:
        """How many blocks are done, and their means; the hidden states are then those behind them."""
        file = None if self._stage is None else self._stage.kept("progress")
        if file is None:
            return None
        done, means, batches = torch.load(file, mmap=True, weights_only=True)
        for number, batch in enumerate(batches):
            self._hidden[number] = batch
        return done, means

    def save(self, done: int, means: dict[str, list[float]]) -> None:
        """Where it is time. The file is complete or what it was."""
        began = time.monotonic()
        if self._stage is None or began - self._latest < max(_SAVE_SECONDS, _SAVE_SHARE * self._cost):
            return
        with self._stage.keeping("progress") as temporary:
            torch.save((done, means, self._hidden.held), temporary)
        self._latest = time.monotonic()
        self._cost = self._latest - began


@contextmanager
def run_through(
    model: StreamedModel,
    batches: Sequence[torch.Tensor],
    stage: str,
    spill: Path | None = None,
    track: Track = silent,
) -> Iterator[None]:
    """Within it the model, called with these batches in this order, finds what its blocks make of them already done.

    They go through the blocks as many at a time as suits these, whatever the batches.

    Args:
        model: a source or compact model.
        batches: (windows, tokens) ids each, as it will be called with.
        stage: name for `track`.
        spill: folder for files that hold the hidden states; None: memory does.
        track: reports each block.
    """
    alike = (torch.stack(list(group)) for _, group in groupby(chain.from_iterable(batches), key=len))
    stream = Stream(
        model.model, [part for windows in alike for part in calibration_batches(windows, model.blocks)], spill
    )
    for index in track(range(len(model)), stage, len(model)):
        model.expect(index + 1)
        with model.block(index) as block:
            stream.advance(block, index)
    windows = chain.from_iterable(stream.hidden)
    with finished_blocks(model, (torch.stack(list(islice(windows, len(batch)))) for batch in batches)):
        yield


@contextmanager
def finished_blocks(model: StreamedModel, hidden: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within it the model, called with the batches of a text in order, gives what it makes of these hidden states."""
    finished = iter(hidden)
    returns_tuple = model.layout.returns_tuple

    def forward_of(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden_states = next(finished) if index == 0 else hidden_states
            return (hidden_states, None) if returns_tuple else hidden_states

        return forward

    with replaced_forwards(model.blocks, forward_of):
        yield


def _enter_blocks(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], arguments: dict[torch.Size, list[_Arguments]]
) -> Iterator[torch.Tensor]:
    """Hidden states entering the first block, one tensor a batch; every block's other arguments go into `arguments`.

    By the shape of the batch. The model itself prepares them (masks and position embeddings differ by block in Gemma 3,
    for one): it runs with blocks that pass their input through.
    """
    entering: list[torch.Tensor] = []

    def pass_through(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                entering.append(hidden_states)
            seen = arguments.setdefault(hidden_states.shape[:2], [])
            if len(seen) == index:
                seen.append((args, kwargs))
            return (hidden_states, None) if layout.returns_tuple else hidden_states

        return forward

    layout = layout_of(model)
    for batch in batches:
        with torch.no_grad(), replaced_forwards(layout.blocks, pass_through):
            model.get_decoder()(input_ids=batch, use_cache=False)
        yield entering.pop()
