"""Files of weights written piece by piece: no model, and never a whole tensor, in memory."""

import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from flexigpt.runtime import InputError, Track, silent
from flexigpt.weights.files import FILE_DTYPES, StoredTensor

# A tensor, or what reads or makes it when it is called for, so that no memory holds it until then.
Reader = Callable[[], torch.Tensor]
Values = torch.Tensor | Reader

_SLICE = 16 * 2**20

# What file systems and kernels say that cannot copy between files, or set space aside.
_NOT_SUPPORTED = frozenset((errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EPERM))

_FILE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}

_RANKS = {dtype: rank for rank, dtype in enumerate(FILE_DTYPES.values())}


class Piece(NamedTuple):
    """One tensor to be written.

    Attributes:
        name: in the file to be written.
        dtype: to be written.
        shape: that of `origin`.
        origin: where its bytes are copied from, its values, or what reads them; converted where their dtype is another.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    origin: StoredTensor | Values

    @property
    def num_bytes(self) -> int:
        """Bytes in the file to be written."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    piece: Piece
    file: Path
    start: int  # bytes before it in the file


def write_shards(folder: Path, pieces: Sequence[Piece], max_shard_size: int, track: Track = silent) -> None:
    """Writes model.safetensors, or shards and their index, named and split as `save_pretrained` does.

    The space of all files is set aside first, so that a full disk is found before the work. Some tens of MiB of
    memory, whatever the sizes of the tensors; one that has yet to be read is held meanwhile. The same pieces give the
    same bytes.

    Args:
        folder: where no such file is yet.
        pieces: the tensors, names unique, in the order in which they are dealt out to shards.
        max_shard_size: largest sum of a file's tensors in bytes; a larger tensor gets a file of its own.
        track: reports every piece.

    Raises:
        InputError: a file to copy from that is gone, or shorter than when it was opened.
        OSError: a disk that is full or cannot be written to.
    """
    by_name = {piece.name: piece for piece in pieces}
    assert pieces
    assert len(by_name) == len(pieces)
    assert all(callable(piece.origin) or piece.shape == tuple(piece.origin.shape) for piece in pieces)
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda piece: piece.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    places: list[_Place] = []
    for file, names in split.filename_to_tensors.items():
        places += _set_aside(folder / file, [by_name[name] for name in names])
    for place in track(places, "writing weights", len(places)):
        with place.file.open("r+b", buffering=0) as out:
            _write_piece(out, place)
    if split.is_sharded:
        _write_index(folder / SAFE_WEIGHTS_INDEX_NAME, pieces, split.tensor_to_filename)


def _write_index(file: Path, pieces: Sequence[Piece], weight_map: Mapping[str, str]) -> None:
    metadata = {
        "total_parameters": sum(math.prod(piece.shape) for piece in pieces),
        "total_size": sum(piece.num_bytes for piece in pieces),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _set_aside(file: Path, pieces: Sequence[Piece]) -> list[_Place]:
    """Creates a file of its full size with its header; the places of its tensors in it."""
    ordered = sorted(pieces, key=lambda piece: (-_RANKS[piece.dtype], piece.name.encode()))  # as safetensors does
    rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for piece in ordered:
        starts.append(end)
        end += piece.num_bytes
        offsets = [starts[-1], end]
        rows[piece.name] = {"dtype": _FILE_NAMES[piece.dtype], "shape": piece.shape, "data_offsets": offsets}
    header = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    before = 8 + len(header)
    with file.open("xb", buffering=0) as out:
        _reserve(out, before + end)
        _write(out, len(header).to_bytes(8, "little") + header)
    return [_Place(piece, file, before + start) for piece, start in zip(ordered, starts, strict=True)]


def _reserve(out: io.FileIO, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(out.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    out.truncate(num_bytes)


def _write_piece(out: io.FileIO, place: _Place) -> None:
    piece, start, origin = place.piece, place.start, place.piece.origin
    if not isinstance(origin, StoredTensor):
        found = values_of(origin)
        assert piece.shape == tuple(found.shape)
        out.seek(start)
        for values in _slices(found, _slice_length(found.dtype, piece.dtype)):
            _write_values(out, values, piece.dtype)
        return
    try:
        file = origin.file.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"the weights in {origin.file} cannot be read any more: {error.strerror}") from error
    with file:
        if origin.dtype == piece.dtype:
            _copy(file, out, origin, start)
        else:
            _convert(file, out, place, origin)


def values_of(given: Values) -> torch.Tensor:
    """A tensor, read now if it has yet to be."""
    return given if isinstance(given, torch.Tensor) else given()


def _slice_length(first: torch.dtype, second: torch.dtype) -> int:
    return _SLICE // max(first.itemsize, second.itemsize)


def _slices(values: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """A tensor's values in order, in views of some `length` numbers; of a strided one in rows."""
    rows = values.detach().view(-1) if values.is_contiguous() else values.detach()
    yield from rows.split(max(1, length // max(1, rows[:1].numel())))


def _write_values(out: io.FileIO, values: torch.Tensor, dtype: torch.dtype) -> None:
    converted = values.to(device="cpu", dtype=dtype).reshape(-1)
    if converted.numel():
        _write(out, converted.view(torch.uint8).numpy().data)


def _convert(file: io.FileIO, out: io.FileIO, place: _Place, origin: StoredTensor) -> None:
    file.seek(origin.start)
    out.seek(place.start)
    length = _slice_length(origin.dtype, place.piece.dtype) * origin.dtype.itemsize
    for stored in _read_slices(file, origin.num_bytes, length, origin):
        _write_values(out, torch.frombuffer(stored, dtype=origin.dtype), place.piece.dtype)


def _copy(file: io.FileIO, out: io.FileIO, origin: StoredTensor, start: int) -> None:
    """Within the kernel, on some file systems without moving a byte; through memory where it cannot."""
    copied = _copy_within_kernel(file, out, origin, start)
    file.seek(origin.start + copied)
    out.seek(start + copied)
    for stored in _read_slices(file, origin.num_bytes - copied, _SLICE, origin):
        _write(out, stored)


def _copy_within_kernel(file: io.FileIO, out: io.FileIO, origin: StoredTensor, start: int) -> int:
    """How many bytes were copied: all, or those before the kernel gave up."""
    copied = 0
    while hasattr(os, "copy_file_range") and copied < origin.num_bytes:
        taken = min(origin.num_bytes - copied, _SLICE)  # not more, so that Ctrl-C is heard
        try:
            done = os.copy_file_range(file.fileno(), out.fileno(), taken, origin.start + copied, start + copied)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            break
        if done == 0:  # the file's end, or a file system that copies nothing: reading will tell
            break
        copied += done
    return copied


def _read_slices(file: io.FileIO, num_bytes: int, length: int, origin: StoredTensor) -> Iterator[memoryview]:
    """The next bytes of a file in slices, each in the memory of the one before."""
    buffer = memoryview(bytearray(min(num_bytes, length)))
    for start in range(0, num_bytes, length):
        wanted = buffer[: num_bytes - start]
        filled = 0
        while filled < len(wanted):
            done = file.readinto(wanted[filled:])
            if not done:
                raise InputError(f"{origin.file} became shorter while {origin.name} was being copied: start again")
            filled += done
        yield wanted


def _write(out: io.FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
