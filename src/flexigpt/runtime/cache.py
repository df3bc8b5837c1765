"""What long stages gave, kept in a folder by what they depend on: found again, and continued where they were killed."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flexigpt.runtime.errors import InputError
from flexigpt.runtime.files import digest, replace_json, replaced_file
from flexigpt.runtime.machine import versions

CACHE_VARIABLE = "FLEXIGPT_CACHE"

_SAVE_SECONDS = 10.0


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
        key = json.dumps([self._depends, depends], sort_keys=True, default=str)
        place = self.folder / f"{name}-{digest(key.encode())}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                folder = place
                try:
                    opened.enter_context(FileLock(place.with_suffix(".lock")).acquire(blocking=False))
                except Timeout:
                    folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=self.folder)))
                stage = CachedStage(place.with_suffix(".json"), folder)
                yield stage
                if stage.result is not None and folder is place:
                    stage.discard()
        except OSError as error:
            raise InputError(
                f"{self.folder}, where flexigpt keeps what it measured, cannot be used ({error.strerror}): free space "
                f"or give another folder by {CACHE_VARIABLE}"
            ) from error


class CachedStage:
    """A stage of a flow.

    Attributes:
        result: JSON-ready; None until it is finished.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self._file, self._folder = file, folder
        self.result: Any = None
        with contextlib.suppress(OSError, ValueError):
            self.result = json.loads(file.read_text(encoding="utf-8"))

    @property
    def folder(self) -> Path:
        """Where the stage leaves what it needs to continue."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def note(self, name: str) -> Any:
        """What `keep_note` left in the folder; None: nothing that can be read."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return None

    def keep_note(self, name: str, data: Any) -> None:
        """Leaves JSON-ready data in the folder, complete or as it was."""
        replace_json(self.folder / f"{name}.json", data)

    def numbers(self, measures: Mapping[str, Callable[[], float]]) -> Iterator[None]:
        """Measures what no earlier run has, one by one, and yields after each; the result then has them all.

        What was measured is left in the folder every ten seconds, for a run that is killed.

        Args:
            measures: key -> what measures its number.
        """
        known: dict[str, float] = (self.result or {}) | (self.note("numbers") or {})
        saved = time.monotonic()
        for key, measure in measures.items():
            if key not in known:
                known[key] = measure()
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self.keep_note("numbers", known)
                    saved = time.monotonic()
            yield
        self.finish(known)

    def tensors(self, name: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors that a killed run left in the folder, or new ones, left there: views of a file, on the CPU."""
        file = self.folder / f"{name}.safetensors"
        with contextlib.suppress(SafetensorError, OSError):
            return load_file(file)
        with replaced_file(file) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in make().items()}, temporary)
        return load_file(file)

    def discard(self) -> None:
        """Removes the folder: what it holds is of no more use."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # Windows lets nobody remove what is open
            self._file.with_suffix(".lock").unlink()

    def finish(self, result: Any) -> Any:
        """Keeps the result and returns it as the next run will find it."""
        replace_json(self._file, result)
        self.result = json.loads(json.dumps(result))
        return self.result
