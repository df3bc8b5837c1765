"""Files and folders, complete or untouched; what tells one from another."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


RECORD = "record.json"


def check_output(out: str | Path, inputs: Iterable[str | Path | None], overwrite: bool) -> None:
    """Refuses an output folder before the work begins.

    Args:
        out: the folder.
        inputs: what the work reads: names of models and texts, some of them perhaps paths.
        overwrite: whether what flexigpt wrote there before may be replaced.

    Raises:
        InputError: a place that cannot be written to; a folder that is not empty (without `overwrite`), that flexigpt
            did not write (with it), or in which an input lies.
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
        if not out.is_dir() or not any(out.iterdir()):
            return
        # A text may be FILE#COLUMN.
        parts = (part for name in inputs if name for part in (name, str(name).rpartition("#")[0]) if part)
        for path in (Path(part).expanduser() for part in parts):
            if path.exists() and path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{path} lies in {out}, which is to be replaced: give another folder to write to")
        if not overwrite:
            raise InputError(f"{out} is not empty: give another folder, or --overwrite to replace it")
        if not (out / RECORD).is_file():
            raise InputError(f"{out} was not written by flexigpt ({RECORD} is not there): give another folder")
    except OSError as error:
        raise InputError(f"{out} cannot be written to: {error.strerror}") from error


def existing_parent(out: Path) -> Path:
    return next((folder for folder in out.absolute().parents if folder.exists()), Path("/"))


@contextlib.contextmanager
def replaced_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error, or vanishes.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    out = Path(out).expanduser().resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        _swap(content, out, temporary / "old")
    except (OSError, SafetensorError) as error:
        raise _write_error(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    if full or any(sign in str(error) for sign in ("No space left", "File too large", "StorageFull")):
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
def replaced_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that takes its place when the block ends without an error, or vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_json(path: Path, data: Any) -> None:
    """Writes JSON-ready data; the file is complete or what it was."""
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Writes a text; the file is complete or what it was.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    path = path.expanduser().resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _write_error(path, error) from error
