"""Programs in processes that are forked from one that has imported everything: quick to start, free to fail."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What transformers imports, and takes most of the time; and what commands import.
BENEATH = (
    *("pandas", "scipy.optimize", "sklearn.metrics", "sympy", "torch._dynamo"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.export", "torch.fx.experimental.symbolic_shapes"),
)
EVERYTHING = (
    *(
        *BENEATH,
        "accelerate.utils",
        "datasets",
        "flexigpt.cli.main",
        "flexigpt.decoding.chat",
        "flexigpt.evaluation.evaluate",
    ),
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
how, *sys.argv[1:] = asked["words"]
if how == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
elif how == "-c":
    exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
else:
    sys.argv[0] = how
    sys.path.insert(0, os.path.dirname(how))
    runpy.run_path(how, run_name="__main__")
"""

_SECONDS, _MEMORY = 300, 2**34


def free_ports(count: int) -> list[int]:
    """Below those that systems give to sockets that ask for any: whoever waits for a port must not be given it."""
    ports: set[int] = set()
    draw = random.SystemRandom()  # others seed the shared one, and another run draws the same ports then
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", draw.randrange(15000, 32000))) as found:
            ports.add(found.getsockname()[1])
    return list(ports)


class Forked:
    """A program that runs."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self._folder = pid, folder

    def send_signal(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, how)

    def poll(self) -> int | None:
        """The exit code, or None."""
        ended = self._folder / "ended"
        return int(ended.read_text()) if ended.exists() else None

    def wait(self) -> int:
        """The exit code; one that takes minutes ends by SIGALRM."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def result(self) -> "subprocess.CompletedProcess[str]":
        """What came of it, once it has ended."""
        code = self.wait()
        told = ((self._folder / name).read_text(errors="replace") for name in ("printed", "said"))
        return subprocess.CompletedProcess((), code, *told)


class Forks:
    """Starts programs, given as to Python: `-m MODULE`, `-c CODE` or a file, and arguments."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self._server, self._folder, self._count = server, folder, 0

    def start(
        self,
        *words: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        streams: Sequence[Path | str] = (),
    ) -> Forked:
        """With files for its standard streams, or what `result` reads."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        asked = {
            "words": [str(word) for word in words],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "streams": [str(stream) for stream in streams or ("/dev/null", folder / "printed", folder / "said")],
            "ended": str(folder / "ended"),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked | {"seconds": _SECONDS, "memory": _MEMORY}) + "\n")
        self._server.stdin.flush()
        return Forked(int(self._server.stdout.readline()), folder)

    def run(self, *words: object, **places: Any) -> "subprocess.CompletedProcess[str]":
        """What came of one that was started so."""
        return self.start(*words, **places).result()

    def run_two(self, *words: object) -> list["subprocess.CompletedProcess[str]"]:
        """What came of two at the same time, each told of the other as torchrun would."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
        both = os.environ | place | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        started = [self.start(*words, env=both | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        return [one.result() for one in started]


class Runner:
    """Runs commands in a folder `work` of a folder of their own, with a cache beside it."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def __call__(
        self, place: Path, arguments: list[str], how: signal.Signals | None = None, after: float = 0.0
    ) -> tuple[int, str, str]:
        """The exit code and what was printed and said, of a command that may get a signal after so many seconds."""
        environment = os.environ | {"FLEXIGPT_CACHE": str(place / "cache")}
        started = self._forks.start("-m", "flexigpt", *arguments, env=environment, cwd=place / "work")
        if how is not None:
            time.sleep(after)
            started.send_signal(how)
        ran = started.result()
        return ran.returncode, ran.stdout, ran.stderr


@contextlib.contextmanager
def forking(folder: Path, imported: Sequence[str] = EVERYTHING) -> Iterator[Forks]:
    """Within it programs can be run so."""
    command = [sys.executable, "-c", _SERVER, *imported]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        yield Forks(server, folder)
