"""The folder beside OUT in which a recovery keeps what it needs to go on: complete checkpoints, the newest two."""

import contextlib
import io
import json
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from flexigpt.runtime import InputError, World, file_digest, one_line, read_sealed, replace_sealed

# Between two checkpoints, which a killed run loses at most; as much more as writing one takes longer than `_QUICK`.
SECONDS, _QUICK = 300.0, 15.0

_IDENTITY, _STATE, _METADATA, _KEPT = "run.json", "state.json", ".metadata", 2
_TRIALS = "trials.json"  # learning rates that were tried before the run

# What the metadata that torch writes is pickled of, but for dtypes and paths.
_PICKLED = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}

_DISK_FULL = ("No space left", "File too large", "quota", "file write failed", "PytorchStreamWriter")


class RunFolder:
    """OUT.recovery: what the run is (run.json) and its checkpoints.

    Args:
        out: the folder that the recovered model will be written to.
        world: the processes of the run; each calls every method.
    """

    def __init__(self, out: Path, world: World) -> None:
        self.path = out.with_name(f"{out.name}.recovery")
        self._world = world
        self._since, self._took = time.monotonic(), 0.0

    def start(self, identity: dict[str, Any]) -> None:
        """Makes a new folder for a run of this identity (JSON-ready)."""

        def make() -> None:
            with self._writing("started"):
                self._clear()
                self.path.mkdir(parents=True, exist_ok=True)
                replace_sealed(self.path / _IDENTITY, identity, self.path)

        self._world.lead(make)

    def exists(self) -> bool:
        """Whether a run is here, or something that looks like one."""
        return (self.path / _IDENTITY).exists() or bool(self.steps())

    def identity(self) -> dict[str, Any]:
        """Of the run that is here.

        Raises:
            InputError: none is, or its run.json was changed.
        """
        try:
            return dict(read_sealed(self.path / _IDENTITY))
        except (OSError, ValueError, TypeError) as error:
            reason = "is not there" if isinstance(error, FileNotFoundError) else "is not as it was written"
            raise InputError(
                f"{self.path} holds no run that can be read: its {_IDENTITY} {reason}, or another version of flexigpt "
                "wrote it; remove the folder to start again"
            ) from error

    def trials(self) -> list[dict[str, Any]]:
        """The learning rates tried so far, as they were given to `keep_trials`.

        Raises:
            InputError: what is there was changed.
        """
        path = self.path / _TRIALS
        if not path.exists():
            return []
        try:
            return list(read_sealed(path)["trials"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not as it was written: remove it to try the rates again") from error

    def keep_trials(self, trials: list[dict[str, Any]]) -> None:
        """Keeps these (JSON-ready) for a run that is resumed."""

        def keep() -> None:
            with self._writing("saved"):
                replace_sealed(self.path / _TRIALS, {"trials": trials}, self.path)

        self._world.lead(keep)

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint, by this process's clock."""
        return time.monotonic() - self._since >= SECONDS * max(1.0, self._took / _QUICK)

    def check(self, identity: dict[str, Any]) -> None:
        """Refuses to resume a run of another identity.

        Raises:
            InputError: no run to resume, or the first thing in which it differs.
        """
        if not (self.path / _IDENTITY).exists():
            raise InputError(f"there is no run to resume in {self.path}: leave --resume out")
        started = self.identity()
        given = json.loads(json.dumps(identity))
        for name in [*started, *given]:
            was, became = started.get(name), given.get(name)
            if was != became:
                differs = f"the run in {self.path} was started with {name} = {was}, now it is {became}"
                raise InputError(f"{differs}: resume with the same, or start again with --overwrite")

    def steps(self) -> list[int]:
        """The steps after which a complete checkpoint lies here, ascending."""
        found = [path.name.removeprefix("checkpoint-") for path in self.path.glob("checkpoint-*")]
        return sorted(int(step) for step in found if re.fullmatch("0|[1-9][0-9]*", step))

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Writes a checkpoint beside the ones that are there, then removes all but the newest two.

        Args:
            step: steps done.
            tensors: what every process holds of model and optimizer; sharded tensors are written once each.
            state: JSON-ready, the same on every process.

        Raises:
            InputError: a disk that is full or cannot be written to; the checkpoints before stay.
        """
        began, partial = time.monotonic(), self.path / f"checkpoint-{step}.partial"
        self._world.lead(lambda: shutil.rmtree(self._give_up(step), ignore_errors=True))
        with self._writing("saved", partial), _quietly():
            save_tensors(tensors, checkpoint_id=partial, no_dist=not self._world.joined)
        self._world.lead(lambda: self._complete(step, partial, state))
        self._since = time.monotonic()
        self._took = self._since - began

    def _complete(self, step: int, partial: Path, state: dict[str, Any]) -> None:
        with self._writing("saved", partial):
            files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
            replace_sealed(partial / _STATE, state | {"files": files}, partial)
            partial.rename(self.path / f"checkpoint-{step}")
            for old in self.steps()[:-_KEPT]:
                shutil.rmtree(self._give_up(old), ignore_errors=True)

    def load(self, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """Reads a checkpoint into these tensors, whatever number of processes wrote it, and returns its state.

        Raises:
            InputError: a checkpoint that is damaged.
        """
        folder = self.path / f"checkpoint-{step}"
        self._world.lead(lambda: self._check(folder))
        with self._reading(folder), _quietly():
            given: Any = {"storage_reader": _Reader(folder), "planner": _Planner()}
            load_tensors(tensors, **given, no_dist=not self._world.joined)
            state: dict[str, Any] = read_sealed(folder / _STATE)
        return state

    def _check(self, folder: Path) -> None:
        """Refuses a checkpoint that is not as it was written, before torch reads it, which prints its errors."""
        with self._reading(folder):
            for name, written in read_sealed(folder / _STATE)["files"].items():
                if file_digest(folder / name) != written:
                    raise ValueError(f"{name} is not as it was written")
            _Reader(folder).read_metadata()

    def remove(self) -> None:
        """Removes the run: what it was for has been written."""
        if self._world.leads:
            self._clear()

    def _clear(self) -> None:
        """Removes what a run writes, and nothing else. Killed in the middle, it leaves no run."""
        for step in self.steps():
            self._give_up(step)
        for name in (f"{_TRIALS}.part", _TRIALS, f"{_IDENTITY}.part", _IDENTITY):
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.glob("checkpoint-*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            self.path.rmdir()

    def _give_up(self, step: int) -> Path:
        """Marks a checkpoint as one that is not complete, before it is removed."""
        final, partial = (self.path / f"checkpoint-{step}{ending}" for ending in ("", ".partial"))
        if final.exists():
            shutil.rmtree(partial, ignore_errors=True)
            final.rename(partial)
        return partial

    @contextlib.contextmanager
    def _reading(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            advice = "remove it to go on from the checkpoint before"
            raise InputError(f"{folder} cannot be read ({_reason(error)}): {advice}") from error

    @contextlib.contextmanager
    def _writing(self, what: str, partial: Path | None = None) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException, RuntimeError) as error:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            steps = self.steps()
            safe = f"; the state after step {steps[-1]} is safe, --resume goes on from it" if steps else ""
            raise InputError(f"the run cannot be {what} in {self.path}: {_reason(error)}{safe}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch warns of a single process even where it knows of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, out of what torch wraps it in."""
    failures = [wrapped[0] for wrapped in error.failures.values()] if isinstance(error, CheckpointException) else []
    shown = one_line(failures[0] if failures else error)
    return "the disk is full, free space" if any(sign in shown for sign in _DISK_FULL) else shown[:200]


class _Reader(FileSystemReader):
    """Reads a checkpoint whose metadata is a pickle of a few classes, and of nothing that could run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint consists of."""
        with (Path(self.path) / _METADATA).open("rb") as file:
            try:
                found = _Unpickler(file).load()
                found.storage_meta.load_id = self.load_id
            except Exception as error:  # whatever bytes that are no such pickle lead to
                raise pickle.UnpicklingError(
                    f"{_METADATA} is no metadata of a checkpoint: {one_line(error)}"
                ) from error
        return found


class _Unpickler(pickle.Unpickler):
    """Knows what torch writes as metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is known."""
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath
        if name in _PICKLED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


class _Planner(DefaultLoadPlanner):
    """Takes numbers, strings and the like beside the tensors, and of what is pickled no more."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """One of them; torch would unpickle it, so it is given what is pickled here."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
