"""The folder beside OUT in which a recovery keeps what it needs to go on: complete checkpoints, the newest two."""

import contextlib
import json
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from flexigpt.runtime import InputError, World, one_line

# Between two checkpoints, which a killed run loses at most; as much more as writing one takes longer than `_QUICK`.
SECONDS, _QUICK = 300.0, 15.0

_IDENTITY, _STATE, _KEPT = "run.json", "state.json", 2

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
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True)
                _write(self.path / _IDENTITY, identity)

        self._world.lead(make)

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint, by this process's clock."""
        return time.monotonic() - self._since >= SECONDS * max(1.0, self._took / _QUICK)

    def check(self, identity: dict[str, Any]) -> None:
        """Refuses to resume a run of another identity.

        Raises:
            InputError: no run to resume, or the first thing in which it differs.
        """
        try:
            started = json.loads((self.path / _IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"there is no run to resume in {self.path}: leave --resume out") from error
        given = json.loads(json.dumps(identity))
        for name in [*started, *given]:
            was, became = started.get(name), given.get(name)
            if was != became:
                differs = f"the run in {self.path} was started with {name} = {was}, now it is {became}"
                raise InputError(f"{differs}: resume with the same, or start again with --overwrite")

    def steps(self) -> list[int]:
        """The steps after which a complete checkpoint lies here, ascending."""
        found = [path.name.removeprefix("checkpoint-") for path in self.path.glob("checkpoint-*")]
        return sorted(int(step) for step in found if step.isdigit())

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
        self._world.lead(lambda: shutil.rmtree(partial, ignore_errors=True))
        with self._writing("saved", partial), _quietly():
            save_tensors(tensors, checkpoint_id=partial, no_dist=not self._world.joined)
        self._world.lead(lambda: self._complete(step, partial, state))
        self._since = time.monotonic()
        self._took = self._since - began

    def _complete(self, step: int, partial: Path, state: dict[str, Any]) -> None:
        with self._writing("saved", partial):
            _write(partial / _STATE, state)
            final = self.path / f"checkpoint-{step}"
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self.steps()[:-_KEPT]:
                shutil.rmtree(self.path / f"checkpoint-{old}", ignore_errors=True)

    def load(self, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """Reads a checkpoint into these tensors, whatever number of processes wrote it, and returns its state.

        Raises:
            InputError: a checkpoint that is damaged.
        """
        folder = self.path / f"checkpoint-{step}"
        try:
            with _quietly():
                load_tensors(tensors, checkpoint_id=folder, no_dist=not self._world.joined)
            state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except (CheckpointException, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            advice = "remove it to go on from the checkpoint before"
            raise InputError(f"{folder} cannot be read ({_reason(error)}): {advice}") from error
        return state

    def remove(self) -> None:
        """Removes the folder: what it was for has been written."""
        if self._world.leads:
            shutil.rmtree(self.path, ignore_errors=True)

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


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
