"""Files and folders, complete or untouched; what tells one from another."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from flexigpt.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    import torch


_MIB = 2**20

# NAME or OWNER/NAME.
_HUB_NAME = re.compile(r"(\w[\w.-]{,95}/)?\w[\w.-]{,95}", re.ASCII)


def digest(*parts: "bytes | torch.Tensor | None") -> str:
    """16 hexadecimal digits that tell these bytes, or values and shapes on the CPU, from others; None adds nothing."""
    found = hashlib.sha256()
    for part in parts:
        if part is not None:
            found.update(part if isinstance(part, bytes) else f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
    return found.hexdigest()[:16]


def fingerprint(name: str, files: Sequence[Path]) -> str:
    """16 hexadecimal digits of these files' names without folders, sizes, first and last MiB, or of `name` alone."""
    parts = [] if files else [name.encode()]
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            parts += [f"{file.name}\n{size}\n".encode(), opened.read(_MIB)]
            opened.seek(max(0, size - _MIB))
            parts.append(opened.read(_MIB))
    return digest(*parts)


def local_path(name: str | Path, what: str = "folder") -> Path | None:
    """The path that a user's name means, `~` expanded; None: nothing here is called so, it may be a name of the hub.

    Raises:
        InputError: what can only be a path, and is not there: the hub has no such names, or it names something in a
            folder that is there.
    """
    path, given, beside = Path(name), str(name).replace(os.sep, "/"), False
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, the ~ of nobody here, a NUL
        path = path.expanduser()
        if path.exists():
            return path
        beside = "/" in given and path.parent.is_dir()
    if beside or not _HUB_NAME.fullmatch(given):
        raise InputError(f"no such {what}: {path}")
    return None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises InputError for one with the same name twice, which `json` takes in silence."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"names {name} twice")
        found[name] = value
    return found


def check_output(out: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuses a place for an output folder before the work begins.

    Args:
        out: the folder.
        inputs: what the work reads: names of models and texts, some of them perhaps paths.

    Raises:
        InputError: a place that cannot be written to, a folder in which an input lies, or one in a model that is read.
    """
    out = Path(out).expanduser()
    try:
        parent = existing_parent(out)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{parent} is no folder that can be written to: give another one")
        if out.is_symlink() and not out.exists():
            raise InputError(f"{out} is a link to nowhere: give another folder to write to")
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file: give a folder to write to")
        if out.exists() and (os.path.ismount(out) or out.resolve() == Path.cwd()):
            raise InputError(f"{out} cannot be replaced by a new folder: give a folder inside it")
        # A text may be FILE#COLUMN.
        parts = (part for name in inputs if name for part in (name, str(name).rpartition("#")[0]) if part)
        for path in (Path(part).expanduser() for part in parts):
            if path.exists() and path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{path} lies in {out}, which is to be replaced: give another folder to write to")
            if (path / "config.json").is_file() and out.resolve().is_relative_to(path.resolve()):
                raise InputError(f"{out} lies in the model {path}, which is read: give a folder outside it")
    except OSError as error:
        raise InputError(f"{out} cannot be written to: {error.strerror}") from error


def existing_parent(out: Path) -> Path:
    return next((folder for folder in out.absolute().parents if folder.exists()), Path("/"))


@contextlib.contextmanager
def claimed(out: str | Path) -> Iterator[Path]:
    """Within it no other process writes `out`; a folder beside it, gone at the end, takes what is not finished.

    What a killed process left in that folder goes at once, and an `out` that it had moved there comes back. Nested in
    one thread, the outermost counts.

    Args:
        out: a folder or a file.

    Raises:
        InputError: another process holds it, or a disk that cannot be written to.
    """
    out = Path(out).expanduser().resolve()
    aside = out.with_name(f".{out.name}.writing")
    holder, lock = aside / "holder", FileLock(aside / "lock", is_singleton=True)
    if lock.is_locked:
        yield aside
        return
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        try:
            aside.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            _clear(aside, out)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {platform.node()} since {since}", encoding="utf-8")
        except Timeout as error:
            by = _held_by(holder)
            raise InputError(
                f"{out} is being written by {by}: wait until it has ended, or give another place"
            ) from error
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}") from error
        yield aside
    finally:
        with contextlib.suppress(OSError):  # of the lock, where it is another's (Timeout is one, too)
            lock.acquire(blocking=False)  # or an interruption came first
            _clear(aside, out)
            holder.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Windows does not remove what is open
                (aside / "lock").unlink()
                aside.rmdir()
            for folder in missing:  # still empty where nothing was written
                folder.rmdir()
        lock.release(force=True)


def _clear(aside: Path, out: Path) -> None:
    """Removes what is not finished; where `out` was moved aside and nothing took its place, it comes back."""
    new, old = aside / "new", aside / "old"
    if old.exists() and not out.exists():
        old.rename(out)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.unlink(missing_ok=True)


def _held_by(holder: Path) -> str:
    found = ""
    with contextlib.suppress(OSError, ValueError):
        found = holder.read_text(encoding="utf-8")[:200]
    return found if found.isprintable() and found else "another process"


@contextlib.contextmanager
def replaced_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error, or vanishes.

    Raises:
        InputError: a disk that is full or cannot be written to, or another process that writes there.
    """
    out = Path(out).expanduser().resolve()
    with claimed(out) as aside:
        content = aside / "new"
        try:
            content.mkdir()
            yield content
            _swap(content, out, aside / "old")
        except (OSError, SafetensorError) as error:
            raise _write_error(out, error) from error
        finally:
            _clear(aside, out)


def _swap(new: Path, out: Path, old: Path) -> None:
    """Two renames; whatever comes between them, Ctrl-C included, the old folder is put back."""
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _write_error(out: Path, error: Exception) -> InputError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    signs = "No space left|File too large|StorageFull|[0-9]+ requested and [0-9]+ written"  # the last one is NumPy's
    if full or re.search(signs, str(error)):
        return InputError(f"the disk of {out.parent} is full: nothing was written; free space or give another folder")
    return InputError(f"{out} cannot be written: {one_line(error)}")


def check_space(out: str | Path, num_bytes: int, what: str = "the checkpoint needs") -> None:
    """Raises InputError where the disk that `out` will lie on has less free space than a checkpoint needs."""
    folder = existing_parent(Path(out).expanduser())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, {what} {num_bytes / 1e6:,.0f} MB: "
            "free space or give another folder"
        )


@contextlib.contextmanager
def replaced_file(path: Path, scratch: Path) -> Iterator[Path]:
    """A name for a file that takes the place of `path` when the block ends without an error, or vanishes.

    Args:
        path: of the file.
        scratch: folder on the same disk into which nobody else writes; what a killed process left there is replaced.
    """
    temporary = scratch / f"{path.name}.part"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a text, or bytes; the file is complete or what it was.

    Raises:
        InputError: a disk that is full or cannot be written to, or another process that writes it.
    """
    path = path.expanduser().resolve()
    with claimed(path) as aside:
        try:
            (aside / "new").write_bytes(content.encode() if isinstance(content, str) else content)
            (aside / "new").replace(path)
        except OSError as error:
            raise _write_error(path, error) from error


def replace_sealed(path: Path, data: Any, scratch: Path) -> None:
    """Writes JSON-ready data that `read_sealed` tells from what was damaged or changed since; as `replaced_file`."""
    content = json.dumps(data)
    with replaced_file(path, scratch) as temporary:
        temporary.write_text(json.dumps({"digest": digest(content.encode()), "data": data}) + "\n", encoding="utf-8")


def read_sealed(path: Path) -> Any:
    """What `replace_sealed` wrote.

    Raises:
        OSError: a file that is not there or cannot be read.
        ValueError: one that is not as it was written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["digest"] == digest(json.dumps(found["data"]).encode()):
            return found["data"]
    except (KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path.name} is not as it was written")


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
