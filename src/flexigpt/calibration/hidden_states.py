"""Text through the blocks, one block after the other; statistics are running sums.

Only the current hidden states are kept: (windows, tokens, hidden size) in the model's dtype, in a file where they are
many. Nothing grows with the number of blocks or with the square of the tokens.
"""

import copy
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from transformers import PreTrainedModel

from flexigpt.model import (
    block_output,
    fast_half,
    layout_of,
    replaced_forwards,
    watched,
)
from flexigpt.runtime import CachedStage, InputError, Track, replaced_file, silent
from flexigpt.text import batch_size_for
from flexigpt.weights import StreamedModel

# Tokens that go through a block at once. Enough to fill the matrix units, few enough for the caches of a CPU.
_BATCH_TOKENS = 2048

# Hidden states are saved so often, and never for more than a twentieth of the time.
_SAVE_SECONDS, _SAVE_SHARE = 60.0, 20

BlockStatistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def calibration_batches(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Calibration windows as they go through a block together: (windows, tokens) ids each."""
    return windows.split(batch_size_for(windows.shape[1], 1, _BATCH_TOKENS))


class Stream:
    """Hidden states of a text on their way through the blocks.

    Args:
        model: a model in eval mode, of which only what lies outside the blocks is read; a block of another model may be
            run in the place of its own.
        batches: (windows, tokens) ids each.
        spill: folder for a file that holds the hidden states; None: memory does.

    Attributes:
        hidden: (windows, tokens, hidden size) in the model's dtype, one tensor a batch: what the next block is given.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[torch.Tensor], spill: Path | None = None) -> None:
        self._model = model
        self._arguments: dict[torch.Size, list[_Arguments]] = {}
        moved = (batch.to(model.device) for batch in batches)
        self.hidden = HiddenStates(_enter_blocks(model, moved, self._arguments), spill)

    def copy(self, spill: Path | None = None) -> "Stream":
        """Another stream that goes on from here, in memory or in a file in that folder."""
        other = copy.copy(self)
        other.hidden = HiddenStates(self.hidden, spill)
        return other

    def outputs(self, block: nn.Module, index: int) -> Iterator[torch.Tensor]:
        """What a block makes of the hidden states, batch by batch; `index` is its place in the model."""
        for inputs in self.hidden:
            args, kwargs = self._arguments[inputs.shape[:2]][index]
            with torch.no_grad(), fast_half(self._model):
                yield block_output(block(inputs, *args, **kwargs))

    def gradients(self, block: nn.Module, index: int, paths: Sequence[str]) -> Iterator[list[torch.Tensor]]:
        """J^T v for each of these modules, batch by batch: J is the derivative of a block's output by what one returns.

        v is a random direction for each batch, normal, of variance one. One pass forward and one backward, of this
        block alone.
        """
        generator = torch.Generator().manual_seed(0)
        for inputs in self.hidden:
            args, kwargs = self._arguments[inputs.shape[:2]][index]
            with watched(block, paths) as seen, torch.enable_grad(), fast_half(self._model):
                output = block_output(block(inputs.detach().requires_grad_(), *args, **kwargs))
                direction = torch.randn(output.shape, generator=generator).to(output)
                returned = [seen[path][1] for path in paths]
                gradients = torch.autograd.grad(output, returned, direction)
            yield list(gradients)

    def advance(self, block: nn.Module, index: int) -> None:
        """The hidden states become what a block makes of them."""
        for number, outputs in enumerate(self.outputs(block, index)):
            self.hidden[number] = outputs


def block_means(
    sources: Sequence[StreamedModel],
    windows: torch.Tensor,
    statistics: Mapping[str, BlockStatistic],
    *,
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> dict[str, list[float]]:
    """The means over all tokens of statistics of each block's input and output, by name.

    Args:
        sources: a source model; or the same on several devices, which share the windows.
        windows: (windows, tokens) ids.
        statistics: each (tokens, hidden) float32 inputs X_i and outputs X_{i+1} -> (tokens,) values. X_{i+1} is the
            residual stream before the final norm.
        spill: folder for files that hold the hidden states; None: memory does.
        stage: where the run leaves what it needs to go on after it was killed.
        track: told of each block.

    Returns:
        For each statistic a value for each block; not finite where the model overflows.
    """
    batches = calibration_batches(windows)
    shares = [batches[number :: len(sources)] for number in range(len(sources))]
    pairs = [(source, share) for source, share in zip(sources, shares, strict=True) if share]
    streams = [Stream(source.model, share, spill) for source, share in pairs]
    means: dict[str, list[float]] = {name: [] for name in statistics}
    progress = None if stage is None else _Progress(stage, streams)
    done = 0
    if progress is not None:
        done, means = progress.resumed(means)
    with ThreadPoolExecutor(len(streams)) as pool:
        for index in track(range(len(sources[0])), "calibrating", len(sources[0])):
            if index < done:
                continue
            sums = [pool.submit(_sums, pairs[k][0], streams[k], statistics, index) for k in range(len(streams))]
            for name in statistics:
                means[name].append(sum(found.result()[name] for found in sums) / windows.numel())
            if progress is not None:
                progress.save(index + 1, means)
    return means


@torch.no_grad()
def _sums(
    source: StreamedModel, stream: Stream, statistics: Mapping[str, BlockStatistic], index: int
) -> dict[str, float]:
    """Runs a block on a stream, which then stands behind it; sums over tokens."""
    source.expect(index + 1)
    totals = {name: torch.zeros((), dtype=torch.float64, device=source.device) for name in statistics}
    with source.block(index) as block:
        for number, outputs in enumerate(stream.outputs(block, index)):
            ends = stream.hidden[number].flatten(0, 1).float(), outputs.flatten(0, 1).float()
            for name, statistic in statistics.items():
                totals[name] += statistic(*ends).sum(dtype=torch.float64)
            stream.hidden[number] = outputs
    return {name: total.item() for name, total in totals.items()}


def check_means(means: Sequence[float]) -> None:
    """Raises InputError for a mean that is not finite; the message names the block."""
    for index, mean in enumerate(means):
        if not torch.isfinite(torch.tensor(mean)):
            raise InputError(
                f"the statistics of block {index} are not finite: the model overflows on this text; "
                "give --dtype float32, or another calibration text"
            )


class _Progress:
    """What a calibration leaves to go on from."""

    def __init__(self, stage: CachedStage, streams: Sequence[Stream]) -> None:
        self._stage, self._streams = stage, streams
        self._saved, self._cost = time.monotonic(), 0.0

    def resumed(self, means: dict[str, list[float]]) -> tuple[int, dict[str, list[float]]]:
        """The blocks that are done and their means; the streams stand behind them."""
        found = self._stage.note("progress")
        places = [] if found is None else self._places(found["done"])
        if found is None or not all(path.is_file() for _, path in places):
            return 0, means
        for stream, path in places:
            stream.hidden.load(path)
        return found["done"], found["means"]

    def save(self, done: int, means: dict[str, list[float]]) -> None:
        """Where it is time."""
        began = time.monotonic()
        if began - self._saved < max(_SAVE_SECONDS, _SAVE_SHARE * self._cost):
            return
        before = set(self._stage.folder.glob("hidden-*"))
        for stream, path in self._places(done):
            stream.hidden.save(path)
        self._stage.keep_note("progress", {"done": done, "means": means})
        for old in before - {path for _, path in self._places(done)}:
            old.unlink()
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _places(self, done: int) -> list[tuple[Stream, Path]]:
        return [(stream, self._stage.folder / f"hidden-{done}-{k}") for k, stream in enumerate(self._streams)]


@contextmanager
def run_through(
    model: StreamedModel,
    batches: Sequence[torch.Tensor],
    stage: str,
    spill: Path | None = None,
    track: Track = silent,
) -> Iterator[None]:
    """Within it the model, called with these batches in this order, finds what its blocks make of them already done.

    Args:
        model: a source or compact model.
        batches: (windows, tokens) ids each, as it will be called with.
        stage: name for `track`.
        spill: folder for a file that holds the hidden states; None: memory does.
        track: told of each block.
    """
    stream = Stream(model.model, batches, spill)
    for index in track(range(len(model)), stage, len(model)):
        model.expect(index + 1)
        with model.block(index) as block:
            stream.advance(block, index)
    with finished_blocks(model, stream):
        yield


@contextmanager
def finished_blocks(model: StreamedModel, stream: Stream) -> Iterator[None]:
    """Within it the model, called with the batches of a stream in order, gives what it makes of the hidden states."""
    finished = iter(stream.hidden)
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
    decoder = model.get_decoder()
    for batch in batches:
        with torch.no_grad(), replaced_forwards(layout.blocks, pass_through):
            decoder(input_ids=batch, use_cache=False)
        yield entering.pop()


class HiddenStates(Sequence[torch.Tensor]):
    """One tensor a batch, (windows, tokens, hidden size); each can be exchanged for another of its shape.

    Args:
        batches: taken one at a time.
        folder: where a file without a name holds them, and memory only what is looked at; None: in memory.
    """

    def __init__(self, batches: Iterable[torch.Tensor], folder: Path | None = None) -> None:
        self._tensors: list[torch.Tensor] = []  # on the meta device where the file holds their values
        self._devices: list[torch.device] = []
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        for batch in batches:
            self.append(batch)

    def append(self, batch: torch.Tensor) -> None:
        """One more."""
        self._devices.append(batch.device)
        self._tensors.append(batch if self._file is None else batch.to("meta"))
        self[len(self) - 1] = batch

    def __len__(self) -> int:
        return len(self._tensors)

    @overload
    def __getitem__(self, number: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, number: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        if self._file is None:
            return self._tensors[number]
        values = torch.empty_like(self._tensors[number], device="cpu")
        self._file.seek(self._start(number))
        self._file.readinto(_bytes(values))
        return values.to(self._devices[number])

    def __setitem__(self, number: int, batch: torch.Tensor) -> None:
        if self._file is None:
            self._tensors[number] = batch
        else:
            self._file.seek(self._start(number))
            self._file.write(_bytes(batch.cpu()))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    @property
    def num_bytes(self) -> int:
        """Of all batches."""
        return self._start(len(self))

    def save(self, path: Path) -> None:
        """Writes all batches; the file is complete or what it was."""
        with replaced_file(path) as temporary, temporary.open("wb") as file:
            if self._file is not None:
                self._file.flush()
                self._file.seek(0)
                shutil.copyfileobj(self._file, file, 2**24)
            else:
                for batch in self._tensors:
                    file.write(_bytes(batch.cpu()))

    def load(self, path: Path) -> None:
        """Exchanges all batches for those that `save` wrote, of as many of the same shapes."""
        assert path.stat().st_size == self.num_bytes
        with path.open("rb") as file:
            for number, (batch, device) in enumerate(zip(self._tensors, self._devices, strict=True)):
                values = torch.empty_like(batch, device="cpu")
                file.readinto(_bytes(values))
                self[number] = values.to(device)

    def _start(self, number: int) -> int:
        return sum(batch.numel() * batch.element_size() for batch in self._tensors[:number])


def _bytes(batch: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    values: Any = batch.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)
