"""The stages of a recipe: commands in processes of their own, each run once for what it depends on, and resumed."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from flexigpt.data import fingerprint
from flexigpt.errors import InputError
from flexigpt.recipe import OUT, STAGE, Recipe, expand, ordered_stages, placeholders, used_stages
from flexigpt.writing import RECORD, replaced_folder

OUTPUT = "output.json"
PAGE = "report.html"
_DIGITS = 12
_TAIL_BYTES = 2**16
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_STARTS = {
    "flexigpt": (sys.executable, "-m", "flexigpt"),
    "torchrun": (sys.executable, "-m", "torch.distributed.run"),
    "python": (sys.executable,),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command with everything filled in.

    Attributes:
        name: of the stage; stages that are the same command share the name of the first.
        command: as a user would type it, one word each.
        folder: what it makes: named after the stage and all that the result depends on.
        prints: whether its result is the JSON that it prints, kept as output.json in the folder.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    prints: bool

    @property
    def log(self) -> Path:
        """What the command prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def result(self) -> dict[str, Any] | None:
        """What the stage measured, nothing for a report; None: it is not done, or its training ceased to be finite."""
        if not self.prints and (self.folder / PAGE).is_file():
            return {}
        try:
            text = (self.folder / (OUTPUT if self.prints else RECORD)).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{self.folder} cannot be read: {error.strerror}") from error
        try:
            result: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise InputError(f"the result of stage {self.name} in {self.folder} is damaged: remove it") from error
        return None if "stopped" in result.get("recovery", {}) else result


def resolve_stages(recipe: Recipe, work: Path) -> dict[str, Stage]:
    """The stages of a recipe by name, each after those that it uses.

    A stage's key is a hash of its command, the keys of the stages that it uses, the content of the files and folders
    that its words name, and flexigpt's version. Models and data sets on the hub count by their names.

    Raises:
        InputError: a word that names a file that is not there.
    """
    keys: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    by_key: dict[str, Stage] = {}
    for name in ordered_stages(recipe):
        used = used_stages(recipe, name)
        words = expand(recipe, name, {OUT: "{out}"} | {STAGE + other: f"stage {keys[other]}" for other in used})
        identity = {"flexigpt": version("flexigpt"), "command": words, "inputs": _inputs(words)}
        key = keys[name] = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:_DIGITS]
        there = [path for path in sorted(work.glob(f"*-{key}")) if path.is_dir()]  # another recipe's stage, perhaps
        folder = there[0] if there else work / f"{name}-{key}"
        places = {OUT: str(folder)} | {STAGE + other: str(stages[other].folder) for other in used}
        command = tuple(expand(recipe, name, places))
        stage = Stage(name=name, command=command, folder=folder, prints=OUT not in placeholders(recipe.stages[name]))
        stages[name] = by_key.setdefault(key, stage)
    return stages


def _inputs(words: list[str]) -> dict[str, str]:
    """What tells the files and folders apart that words of a command name, by word."""
    inputs = {}
    for word in words[1:]:
        path = Path(word)
        try:
            found = path.rglob("*") if path.is_dir() else [path, *map(Path, glob.glob(word))]
            files = sorted({file for file in found if file.is_file()})
            if files:
                inputs[word] = fingerprint(word, files)
        except OSError as error:
            raise InputError(f"{word} cannot be read: {error.strerror}") from error
        if not files and path.suffix in (".jsonl", ".parquet", ".txt", ".py") and not word.startswith("-"):
            raise InputError(f"{word} is not there: run this where it is, or give another with --set")
    return inputs


def run_stage(stage: Stage) -> None:
    """Runs a stage's command and waits for it; its folder is complete or untouched.

    A recovery that was killed goes on. SIGTERM is passed on, so that a recovery saves where it is.

    Raises:
        InputError: a command that fails or is interrupted; the message says why, and where its log is.
    """
    command = [*stage.command, *_resuming(stage)]
    with _errors_told(stage):
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        if stage.folder.exists():  # of a run that is not to be trusted: see `result`
            shutil.rmtree(stage.folder)
        with stage.log.open("w", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            code, printed, complaint = _run([*_STARTS[command[0]], *command[1:]], log, stage.prints)
    if code:
        raise InputError(f"stage {stage.name} failed: {shlex.join(command)}: {complaint} (all of it: {stage.log})")
    if stage.prints:
        try:
            parsed = json.loads(printed)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise InputError(f"stage {stage.name} has no {{out}} and printed no JSON: see {stage.log}")
        with replaced_folder(stage.folder) as folder:
            (folder / OUTPUT).write_text(printed, encoding="utf-8")
    if stage.result() is None:
        raise InputError(f"stage {stage.name} left no result in {stage.folder}: see {stage.log}")


def _resuming(stage: Stage) -> list[str]:
    """--resume for a recovery that has begun; what a kill left unusable is removed."""
    folder = stage.folder.with_name(f"{stage.folder.name}.recovery")
    if "recover" not in stage.command or not folder.exists():
        return []
    try:
        json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # killed in its very first moments
        shutil.rmtree(folder, ignore_errors=True)
        return []
    return ["--resume"]


def _run(words: list[str], log: IO[str], prints: bool) -> tuple[int, str, str]:
    """Exit code, what was printed where it is wanted, and the last line of what went to stderr."""
    shown = sys.stderr.isatty()
    environment = os.environ | ({"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"} if shown else {})
    tail, printed = bytearray(), bytearray()
    piped = subprocess.PIPE if prints else log
    with subprocess.Popen(words, env=environment, stdout=piped, stderr=subprocess.PIPE) as process:
        readers = [threading.Thread(target=_pass_on, args=(process.stderr, tail, None if shown else log))]
        if prints:
            readers.append(threading.Thread(target=_collect, args=(process.stdout, printed)))
        with _passing_signals(process):
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            code = process.wait()
    output = printed.decode(errors="replace")
    if prints:
        log.write(output)
    lines = _ESCAPES.sub("", tail.decode(errors="replace")).replace("\r", "\n").splitlines()
    spoken = [line.strip() for line in lines if line.strip()]
    complaint = spoken[-1].removeprefix("flexigpt: ") if spoken else f"exit code {code}"
    return code, output, complaint


def _pass_on(stream: IO[bytes], tail: bytearray, log: IO[str] | None) -> None:
    """A command's stderr: to a terminal as it is, progress bars included, otherwise to the log; the last of it kept."""
    while chunk := os.read(stream.fileno(), 4096):
        tail += chunk
        del tail[:-_TAIL_BYTES]
        if log is None:
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
        else:
            log.write(chunk.decode(errors="replace"))
            log.flush()


def _collect(stream: IO[bytes], printed: bytearray) -> None:
    while chunk := os.read(stream.fileno(), 4096):
        printed += chunk


@contextlib.contextmanager
def _passing_signals(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Within it a SIGTERM goes to the process, and Ctrl-C, which a terminal sends to both, is left to it.

    Raises:
        InputError: after either, once the process has ended.
    """
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, *_: object) -> None:
        told.append(number)
        if number == signal.SIGTERM and process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise InputError("interrupted: the same command goes on from here")


@contextlib.contextmanager
def _errors_told(stage: Stage) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"stage {stage.name} cannot be run in {stage.folder.parent}: {error.strerror}") from error
