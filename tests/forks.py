"""Programs in processes that are forked from one that has imported everything: quick to start, free to fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What transformers imports, and takes most of the time; and what commands import.
BENEATH = (
    *("accelerate.utils", "datasets", "pandas", "scipy.optimize", "sklearn.metrics", "sympy", "torch._dynamo"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.export", "torch.fx.experimental.symbolic_shapes"),
)
EVERYTHING = (
    *(*BENEATH, "flexigpt.cli.main", "flexigpt.decoding.chat", "flexigpt.evaluation.evaluate"),
    *("flexigpt.pruning.prune", "flexigpt.recovery.recover", "flexigpt.report.report"),
    *("matplotlib.backends.backend_agg", "peft", "scipy.linalg", "transformers.models.llama.modeling_llama"),
)

# Each program has a parent that waits for it and says how it ended.
_SERVER = """
import gc, importlib.util, json, os, resource, runpy, signal, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
waiting = 0
for line in sys.stdin:
    if os.fork():
        waiting += 1
        while waiting and os.waitpid(-1, os.WNOHANG)[0]:
            waiting -= 1
        continue
    asked = json.loads(line)
    pid = os.fork()
    if pid:
        os.write(1, f"{pid}\\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(asked["ended"] + ".part", "w") as file:
            file.write(str(code))
        os.rename(asked["ended"] + ".part", asked["ended"])
        os._exit(0)
    break
else:
    for _ in range(waiting):
        os.wait()
    os._exit(0)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.alarm(asked["seconds"])
resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
os.environ.clear()
os.environ.update(asked["environment"])
os.chdir(asked["folder"])
for stream, place in enumerate(asked["streams"]):
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if stream else os.O_RDONLY
    os.dup2(os.open(place, flags), stream)
sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace", buffering=1)
sys.path[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]
importlib.invalidate_caches()
sys.modules.pop("sitecustomize", None)
if importlib.util.find_spec("sitecustomize"):
    import sitecustomize
how, what, *sys.argv[1:] = asked["words"]
if how == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
elif how == "-c":
    sys.argv[0] = "-c"
    exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
"""

_SECONDS, _MEMORY = 300, 2**34


class Forked:
    """A program that runs."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self._folder = pid, folder

    def send_signal(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, how)

    def wait(self) -> int:
        """The exit code; one that takes minutes ends by SIGALRM."""
        while not (self._folder / "ended").exists():
            time.sleep(0.005)
        return int((self._folder / "ended").read_text())


class Forks:
    """Starts programs, given as to Python: `-m MODULE ARGUMENTS` or `-c CODE ARGUMENTS`."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self._server, self._folder, self._count = server, folder, 0

    def start(
        self,
        *words: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        streams: Sequence[Path | str] = ("/dev/null", "/dev/null", "/dev/null"),
    ) -> Forked:
        """With files for its standard streams."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        asked = {
            "words": [str(word) for word in words],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "streams": [str(stream) for stream in streams],
            "ended": str(folder / "ended"),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked | {"seconds": _SECONDS, "memory": _MEMORY}) + "\n")
        self._server.stdin.flush()
        return Forked(int(self._server.stdout.readline()), folder)

    def run(self, *words: object, **places: Any) -> "subprocess.CompletedProcess[str]":
        """What came of one; `streams` are not for giving here."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            printed, said = Path(name, "printed"), Path(name, "said")
            code = self.start(*words, streams=("/dev/null", printed, said), **places).wait()
            return subprocess.CompletedProcess(words, code, printed.read_text(), said.read_text(errors="replace"))


@contextlib.contextmanager
def forking(folder: Path, imported: Sequence[str] = EVERYTHING) -> Iterator[Forks]:
    """Within it programs can be run so."""
    command = [sys.executable, "-c", _SERVER, *imported]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        yield Forks(server, folder)
