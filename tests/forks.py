"""Commands in processes that are forked from one that has imported everything: quick to start, free to fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# A kill would otherwise mostly meet imports, which write nothing.
_FORKS = """
import json, os, resource, signal, sys
from flexigpt.cli.main import main
import flexigpt.evaluation.evaluate, flexigpt.pruning.prune, flexigpt.recovery.recover, flexigpt.report.report
import transformers.models.llama.modeling_llama, scipy.linalg, torch._dynamo, matplotlib.backends.backend_agg
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(asked["seconds"])
        resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        os.dup2(os.open("../printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open("../errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        main(asked["arguments"])
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

_SECONDS, _MEMORY = 300, 2**34


class Runner:
    """Runs commands in a folder `work` of a folder of their own, with a cache beside it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(
        self, place: Path, arguments: list[str], how: signal.Signals | None = None, after: float = 0.0
    ) -> tuple[int, str, str]:
        """The exit code and what was printed and said, of a command that gets a signal after so many seconds, or none.

        One that takes minutes ends by SIGALRM.
        """
        environment = {"FLEXIGPT_CACHE": str(place / "cache")}
        asked = {"folder": str(place / "work"), "arguments": arguments, "environment": environment}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked | {"seconds": _SECONDS, "memory": _MEMORY}) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if how is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, how)
        code = int(self._process.stdout.readline())
        return code, *((place / name).read_text(errors="replace") for name in ("printed", "errors"))


@contextlib.contextmanager
def forking() -> Iterator[Runner]:
    """Within it commands can be run so."""
    with subprocess.Popen(
        [sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        yield Runner(process)
        process.kill()
