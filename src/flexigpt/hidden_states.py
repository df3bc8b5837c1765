"""Hidden states of a text on their way through the blocks, in memory or in a file."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch


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
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            if self._file is not None:
                self._file.flush()
                self._file.seek(0)
                shutil.copyfileobj(self._file, file, 2**24)
            else:
                for batch in self._tensors:
                    file.write(_bytes(batch.cpu()))
        temporary.replace(path)

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
