"""What long stages gave, kept in a folder by what they depend on: found again, and continued where they were killed."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flexigpt.runtime.errors import InputError
from flexigpt.runtime.files import replace_json

CACHE_VARIABLE = "FLEXIGPT_CACHE"

_DIGITS = 24

_SAVE_SECONDS = 10.0


def default_folder() -> Path:
    """$FLEXIGPT_CACHE, or flexigpt in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexigpt"


class Cache:
    """A folder of results.

    Args:
        folder: made where it is not there; None: the default.
        depends: what every result in it depends on, JSON-ready; versions are added.
    """

    def __init__(self, folder: str | Path | None, **depends: Any) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        self._depends = depends | {name: version(name) for name in ("flexigpt", "torch", "transformers")}

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
        digest = hashlib.sha256(json.dumps([self._depends, depends], sort_keys=True, default=str).encode())
        place = self.folder / f"{name}-{digest.hexdigest()[:_DIGITS]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                folder = place
                if not _locked(opened.enter_context(place.with_suffix(".lock").open("w"))):
                    folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=self.folder)))
                stage = CachedStage(place.with_suffix(".json"), folder)
                yield stage
                if stage.result is not None and folder is place:
                    stage.discard()
        except OSError as error:
            raise InputError(
                f"{self.folder}, where flexigpt keeps what it measured, cannot be used ({error.strerror}): free space "
                f"or give another folder by --cache or {CACHE_VARIABLE}"
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
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({key: value.detach().cpu().contiguous() for key, value in make().items()}, temporary)
        temporary.replace(file)
        return load_file(file)

    def discard(self) -> None:
        """Removes the folder: what it holds is of no more use."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._file.with_suffix(".lock").unlink(missing_ok=True)

    def finish(self, result: Any) -> Any:
        """Keeps the result and returns it as the next run will find it."""
        replace_json(self._file, result)
        self.result = json.loads(json.dumps(result))
        return self.result


def _locked(file: IO[str]) -> bool:
    """Whether no other process holds the file; held until it is closed, however this process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
