"""The stages of a recipe: commands in processes of their own, each run once for what it depends on."""

import glob
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipe import Recipe, RecipeError

_STARTS = {"flexigpt": ["-m", "flexigpt"], "torchrun": ["-m", "torch.distributed.run"], "python": []}
_FILES = (".jsonl", ".parquet", ".txt", ".py")  # a word that ends so can be nothing but a file
_PRINTED = "printed.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command, as a user would type it.

    Attributes:
        name: of the stage.
        command: one word each.
        folder: that is there once the command has ended well: what it wrote, or the JSON that it printed.
        writes: whether it writes the folder, rather than printing JSON.
    """

    name: str
    command: list[str]
    folder: Path
    writes: bool

    def measured(self) -> dict[str, Any] | None:
        """What was measured, nothing by a report; None: the stage has to be run, or its training fell apart."""
        for name in ("record.json", _PRINTED):
            if (self.folder / name).is_file():
                found: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
                return None if "stopped" in found.get("recovery", {}) else found
        return {} if (self.folder / "report.html").is_file() else None

    def run(self) -> None:
        """Runs the command; a recovery that was interrupted goes on.

        Raises:
            RecipeError: a command that fails, or is interrupted.
        """
        log = self.folder.with_suffix(".log")
        words = [sys.executable, *_STARTS[self.command[0]], *self.command[1:], *self._resuming()]
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        with log.open("w", encoding="utf-8") as file:
            # On a terminal the command draws its progress itself.
            errors = None if sys.stderr.isatty() else file
            code, printed = _finish(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True))
            file.write("" if code else printed)
        if code:
            said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            last = said[-1].removeprefix("flexigpt: ") if said else f"exit code {code}"
            raise RecipeError(f"stage {self.name} failed: {shlex.join(self.command)}: {last} (all of it: {log})")
        if not self.writes:
            if not printed.lstrip().startswith("{"):
                raise RecipeError(f"stage {self.name} has no {{out}} and printed no JSON: see {log}")
            self.folder.mkdir()
            write(self.folder / _PRINTED, printed)
        if self.measured() is None:
            raise RecipeError(f"stage {self.name} wrote no result, or its training fell apart: see {log}")

    def _resuming(self) -> list[str]:
        begun = self.folder.with_suffix(".recovery")
        if "recover" in self.command and (begun / "run.json").is_file():
            return ["--resume"]
        shutil.rmtree(begun, ignore_errors=True)
        return []


def stages_of(recipe: Recipe, work: Path) -> dict[str, Stage]:
    """The stages by name, in order. Those that are the same command share the folder of the first.

    A folder's name has a hash of all that its content depends on: the command, the content of the files that it names,
    the stages that it uses, and flexigpt's version. Models and data sets on the hub count by their names.

    Raises:
        RecipeError: a file that is not there.
    """
    stages: dict[str, Stage] = {}
    folders = {"out": "{out}"}
    content = cache(_content)  # the same files are named again and again
    for name in recipe.order():
        words = recipe.command(name, folders)
        identity = [version("flexigpt"), words, [content(word) for word in words[1:]]]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        own = next((folder for folder in folders.values() if folder.endswith(key)), f"{name}-{key}")
        folders[f"stage:{name}"] = own
        places = {place: str(work / folder) for place, folder in folders.items()} | {"out": str(work / own)}
        writes = "{out}" in recipe.fill(recipe.stages[name])
        stages[name] = Stage(name=name, command=recipe.command(name, places), folder=work / own, writes=writes)
    return stages


def write(path: Path, text: str) -> None:
    """Writes a file that is complete or not there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _content(word: str) -> str:
    """A hash of the file, folder or files that a word of a command names; "": it names none."""
    name = word.partition("#")[0]
    found = Path(name).rglob("*") if Path(name).is_dir() else map(Path, glob.glob(name))
    files = sorted(path for path in found if path.is_file())
    if not files and Path(name).suffix in _FILES:
        raise RecipeError(f"{name} is not there: run this in the repository's folder, or name another file with --set")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else ""


def _finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code and what was printed. When we are interrupted, the process may end first: a recovery saves."""
    try:
        printed, _ = process.communicate()
        return process.returncode, printed
    except (KeyboardInterrupt, SystemExit) as interruption:
        if isinstance(interruption, SystemExit):  # a SIGTERM, which unlike Ctrl-C has not reached the process
            process.terminate()
        process.communicate()
        raise RecipeError("interrupted: the same command goes on from here") from None
