"""Files written piece by piece: those that `save_pretrained` writes, byte for byte, in little memory."""

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tiny_model
from flexigpt import InputError
from flexigpt.weights import write_shards
from flexigpt.weights.files import FILE_DTYPES, StoredTensor, open_weights
from flexigpt.weights.shards import Piece


def copies(source: Path, dtype: torch.dtype | None = None) -> list[Piece]:
    """All tensors of a checkpoint, to be copied."""
    stored = open_weights(str(source)).tensors.values()
    return [Piece(tensor.name, dtype or tensor.dtype, tensor.shape, tensor) for tensor in stored]


def values_of(model: PreTrainedModel) -> list[Piece]:
    return [Piece(name, t.dtype, tuple(t.shape), t) for name, t in model.state_dict().items()]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model in one file, in several, and with a limit that some tensors alone exceed, by the limit."""
    folders = {limit: tmp_path_factory.mktemp("saved") / str(limit) for limit in (10**9, 50_000, 5_000)}
    for limit, folder in folders.items():
        tiny_model("llama-gqa").save_pretrained(folder, max_shard_size=limit)
    return folders


@pytest.mark.parametrize("limit", [10**9, 50_000, 5_000])
@pytest.mark.parametrize("copied", [True, False])
def test_the_files_are_those_of_save_pretrained(
    saved: dict[int, Path], tmp_path: Path, limit: int, copied: bool
) -> None:
    model = tiny_model("llama-gqa")
    pieces = values_of(model)
    if copied:
        by_name = {piece.name: piece for piece in copies(saved[50_000])}
        pieces = [by_name[piece.name] for piece in pieces]
    write_shards(tmp_path, pieces, limit)
    written = contents(tmp_path)
    assert written == contents(saved[limit])
    assert (len(written) == 1) == (limit == 10**9)
    (tmp_path / "config.json").write_bytes((saved[limit] / "config.json").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], values) for name, values in model.state_dict().items())
    (tmp_path / "again").mkdir()
    write_shards(tmp_path / "again", pieces, limit)
    assert contents(tmp_path / "again") == written


@pytest.mark.parametrize("copied", [True, False])
def test_every_dtype_and_form_is_written_as_safetensors_writes_it(tmp_path: Path, copied: bool) -> None:
    weights = {f"a.{name}": torch.ones(3).to(dtype) for name, dtype in FILE_DTYPES.items()}
    weights |= {
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        'Zoë "\\\n': torch.ones(2, 1, 3),
        "halves": torch.randn(5, 7).to(torch.bfloat16),
        "odd": torch.arange(3).to(torch.int8),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    pieces = [Piece(name, t.dtype, tuple(t.shape), t) for name, t in weights.items()]
    write_shards(tmp_path / "out", copies(tmp_path) if copied else pieces, 10**9)
    assert contents(tmp_path / "out") == contents(tmp_path)


@pytest.mark.parametrize("origin", ["file", "tensor", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
def test_other_dtypes_are_what_torch_makes_of_them(tmp_path: Path, origin: str, dtype: torch.dtype) -> None:
    """9 million numbers, so that there is more than one slice."""
    values = (torch.arange(9_000_002, dtype=torch.float32) * 0.37 % 97).view(2, -1)
    save_file({"a": values, "none": torch.zeros(0)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pieces = copies(tmp_path, dtype)
    if origin != "file":
        given = values if origin == "tensor" else values.T.contiguous().T
        pieces = [Piece("a", dtype, (2, 4_500_001), given), Piece("none", dtype, (0,), torch.zeros(0))]
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "out", pieces, 10**9)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["a"].dtype == written["none"].dtype == dtype
    assert torch.equal(written["a"], values.to(dtype))
    assert written["none"].shape == (0,)


def refused(number: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_copy_file_range_raises_the_bytes_go_through_memory(
    saved: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """No file system at hand refuses it: here the system call, and that for setting space aside, does."""
    monkeypatch.setattr(os, "copy_file_range", refused(number))
    monkeypatch.setattr(os, "posix_fallocate", refused(errno.EOPNOTSUPP))
    write_shards(tmp_path, copies(saved[10**9]), 10**9)
    assert contents(tmp_path) == contents(saved[10**9])


def test_where_copy_file_range_gives_up_or_copies_little_the_rest_is_copied(
    saved: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = os.copy_file_range, []

    def copy_little(source: int, target: int, count: int, from_offset: int, to_offset: int) -> int:
        calls.append(count)
        return copy(source, target, min(count, 1000), from_offset, to_offset) if len(calls) % 7 else 0

    monkeypatch.setattr(os, "copy_file_range", copy_little)
    write_shards(tmp_path, copies(saved[10**9]), 10**9)
    assert contents(tmp_path) == contents(saved[10**9])
    assert len(calls) > 7


def test_from_one_file_system_to_another(saved: dict[int, Path], tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    folder = memory / f"flexigpt-{os.getpid()}"
    folder.mkdir()
    try:
        write_shards(folder, copies(saved[50_000]), 50_000)
        assert {**load_all(folder)}.keys() == load_all(saved[50_000]).keys()
        assert all(torch.equal(load_all(folder)[name], t) for name, t in load_all(saved[50_000]).items())
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", ["truncated", "gone"])
def test_a_source_that_shrinks_is_told(tmp_path: Path, dtype: torch.dtype, cut: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100_000), "b": torch.ones(100_000)}, file)
    pieces = copies(tmp_path, dtype)
    file.unlink() if cut == "gone" else os.truncate(file, 500_000)
    (tmp_path / "out").mkdir()
    reason = "cannot be read any more: No such file" if cut == "gone" else "became shorter while b was being copied"
    with pytest.raises(InputError, match=reason):
        write_shards(tmp_path / "out", pieces, 10**9)


def test_files_get_the_mode_of_any_new_file(saved: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_shards(tmp_path, copies(saved[50_000]), 50_000)
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_progress_is_told_of_every_piece(saved: dict[int, Path], tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def track(items, stage, total):  # type: ignore[no-untyped-def]
        for item in items:
            told.append((stage, total))
            yield item

    pieces = copies(saved[50_000])
    write_shards(tmp_path, pieces, 50_000, track)
    assert told == [("writing weights", len(pieces))] * len(pieces)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    save_file({"a": torch.zeros(75_000_000)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def anonymous_memory() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 8e6), (torch.bfloat16, 64e6)])
@pytest.mark.parametrize("copied", [True, False])
def test_memory_stays_small_whatever_the_size_of_a_tensor(
    large: Path, tmp_path: Path, dtype: torch.dtype, limit: float, copied: bool
) -> None:
    """Of 300 MB: nothing where the kernel copies, a slice and what it is converted to elsewhere."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells the anonymous memory")
    pieces, weights = copies(large, dtype), open_weights(str(large))
    if not copied:
        pieces = [piece._replace(origin=weights.read([piece.name])[piece.name]) for piece in pieces]
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    write_shards(tmp_path, pieces, 10**9)
    done.set()
    watcher.join()
    assert (tmp_path / "model.safetensors").stat().st_size > 75_000_000 * dtype.itemsize
    assert max(peak) < limit


def test_a_full_disk_is_told_before_anything_is_copied(saved: dict[int, Path], tmp_path: Path) -> None:
    """The process may not write files above 100 KB, and the last of them is larger."""

    def track(items, stage, total):  # type: ignore[no-untyped-def]
        raise AssertionError("the work has begun")

    last = Piece("last", torch.int8, (1_000_000,), torch.zeros(1_000_000, dtype=torch.int8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            write_shards(tmp_path, [*copies(saved[50_000]), last], 50_000, track)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG


def test_pieces_must_be_what_they_say(tmp_path: Path) -> None:
    """Slips of the caller, not of a user."""
    wrong = StoredTensor("a", tmp_path / "x", torch.float32, (3,), 0, 12)
    with pytest.raises(AssertionError):
        write_shards(tmp_path, [Piece("a", torch.float32, (4,), wrong)], 10**9)
    with pytest.raises(AssertionError):
        write_shards(tmp_path, [Piece("a", torch.float32, (3,), wrong)] * 2, 10**9)
