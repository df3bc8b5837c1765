"""What long stages gave, kept in a folder by what they depend on: found again, and continued where they were killed."""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexigpt.runtime.errors import InputError
from flexigpt.runtime.files import digest, file_digest, read_sealed, replace_sealed, replaced_file
from flexigpt.runtime.machine import versions

CACHE_VARIABLE = "FLEXIGPT_CACHE"

_SAVE_SECONDS = 10.0

# What writing to a disk says that is full, broken or limited.
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


def default_folder() -> Path:
    """$FLEXIGPT_CACHE, or flexigpt in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexigpt"


class Cache:
    """A folder of results.

    Args:
        folder: made where it is not there; None: the default.
        depends: what every result in it depends on, JSON-ready; versions are added.
    """

    def __init__(self, folder: str | Path | None, **depends: Any) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self._depends = depends | versions()

    @contextlib.contextmanager
    def stage(self, name: str, **depends: Any) -> Iterator["CachedStage"]:
        """One stage. What it leaves in its folder stays there if it is killed or fails, and goes when it is finished.

        While another process works on the same stage, this one works in a folder of its own.

        Args:
            name: of the stage.
            depends: what its result depends on besides.

        Raises:
            InputError: a cache folder that cannot be written to.
        """
        entered = False
        key = json.dumps([self._depends, depends], sort_keys=True, default=str)
        place = self.folder / f"{name}-{digest(key.encode())}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                folders = (place if number == 1 else place.with_name(f"{place.name}-{number}") for number in count(1))
                folder = next(folder for folder in folders if _locked(folder, opened))
                stage = CachedStage(place.with_suffix(".json"), folder)
                for lock in list(self.folder.glob(f"{place.name}-*.lock")):
                    with contextlib.ExitStack() as left:
                        if lock.stem != folder.name and _locked(lock.with_suffix(""), left):  # by a process that died
                            _remove(lock.with_suffix(""))
                entered = True
                yield stage
                if stage.result is not None:
                    stage.discard()
        except OSError as error:
            if entered and not self._concerns(error):
                raise
            raise InputError(
                f"{self.folder}, where flexigpt keeps what it measured, cannot be used ({error.strerror}): free space "
                f"or give another folder by {CACHE_VARIABLE}"
            ) from error

    def _concerns(self, error: OSError) -> bool:
        """Whether an error within a stage is of the cache's files; one of a full disk has no name."""
        if error.filename is None:
            return error.errno in _FULL
        return Path(str(error.filename)).is_relative_to(self.folder)


def _locked(folder: Path, held: contextlib.ExitStack) -> bool:
    """Whether nobody else works in the folder: it is then held."""
    try:
        held.enter_context(FileLock(folder.with_suffix(".lock")).acquire(blocking=False))
    except Timeout:
        return False
    return True


def _remove(folder: Path) -> None:
    """Removes a folder that is held, and its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # Windows lets nobody remove what is open
        folder.with_suffix(".lock").unlink()


class CachedStage:
    """A stage of a flow. What is not as it was written counts as not there.

    Attributes:
        result: JSON-ready; None until it is finished.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self._file, self._folder = file, folder
        self.result: Any = _read(file)
        self._sound: set[str] = set()  # files that were read or written whole: each pair of blocks asks for its factors

    @property
    def folder(self) -> Path:
        """Where the stage leaves what it needs to continue."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def kept(self, name: str) -> Path | None:
        """The file of that name that `keeping` left in the folder; None: none that is as it was written."""
        file = self.folder / name
        with contextlib.suppress(OSError):
            if name not in self._sound and _read(self.folder / f"{name}.json") == file_digest(file):
                self._sound.add(name)
        return file if name in self._sound else None

    @contextlib.contextmanager
    def keeping(self, name: str) -> Iterator[Path]:
        """A name for a file that takes its place in the folder when the block ends without an error."""
        with replaced_file(self.folder / name, self.folder) as temporary:
            yield temporary
            replace_sealed(self.folder / f"{name}.json", file_digest(temporary), self.folder)
        self._sound.add(name)

    def numbers(self, measures: Mapping[str, Callable[[], float]]) -> Iterator[None]:
        """Measures what no earlier run has, one by one, and yields after each; the result then has them all.

        What was measured is left in the folder every ten seconds, for a run that is killed.

        Args:
            measures: key -> what measures its number.
        """
        known: dict[str, float] = (self.result or {}) | (_read(self.folder / "numbers.json") or {})
        saved = time.monotonic()
        for key, measure in measures.items():
            if key not in known:
                known[key] = measure()
                if time.monotonic() - saved > _SAVE_SECONDS:
                    replace_sealed(self.folder / "numbers.json", known, self.folder)
                    saved = time.monotonic()
            yield
        self.finish(known)

    def tensors(self, name: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors that a killed run left in the folder, or new ones, left there: views of a file, on the CPU."""
        file = self.kept(f"{name}.safetensors")
        if file is None:
            with self.keeping(f"{name}.safetensors") as temporary:
                save_file({key: value.detach().cpu().contiguous() for key, value in make().items()}, temporary)
            file = self.folder / f"{name}.safetensors"
        return load_file(file)

    def readers(self, name: str, keys: Iterable[str]) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads tensors that `tensors` left under that name, each anew: no memory holds them in between."""
        file = self.folder / f"{name}.safetensors"
        return {key: partial(_read_tensor, file, key) for key in keys}

    def discard(self) -> None:
        """Removes the folder: what it holds is of no more use."""
        _remove(self._folder)

    def finish(self, result: Any) -> Any:
        """Keeps the result and returns it as the next run will find it."""
        replace_sealed(self._file, result, self.folder)
        self.result = json.loads(json.dumps(result))
        return self.result


def _read_tensor(file: Path, key: str) -> torch.Tensor:
    try:
        with safe_open(file, "pt") as opened:
            values: torch.Tensor = opened.get_tensor(key)
    except FileNotFoundError as error:
        raise InputError(
            f"{file}, from which the model was to be read, is gone: leave the cache alone while a model is made, and "
            "write it before its `with` block ends"
        ) from error
    return values


def _read(file: Path) -> Any:
    """What was kept in a file; None: nothing that is as it was written."""
    with contextlib.suppress(OSError, ValueError):
        return read_sealed(file)
    return None
