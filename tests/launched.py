"""Recoveries one after another in each of two processes, as torchrun would start them.

Its argument is a JSON file of jobs; what came of them goes beside it, a file for each process.
"""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from flexigpt import InputError, RecoverOptions, recover
from flexigpt.cli.main import main
from flexigpt.recovery import checkpoints, head, training
from flexigpt.weights import open as opened


def command(words: list[str]) -> str:
    """The exit code of a command."""
    try:
        main(words)
    except SystemExit as stopped:
        return str(stopped.code)
    return "none"


def run(job: dict[str, Any]) -> str | None:
    """One recovery; the error's message, or None.

    With `stop_after` the first process is told to stop then; `often` saves after every step; `one_by_one` lets a window
    through at a time.
    """
    if "poisoned" in job["model"]:  # weights that are not finite, as if training had brought them there
        opened.check_numbers = lambda *_: None
    checkpoints.SECONDS = 0.0 if job["often"] else 300.0
    head._LEAST_TOKENS, head._CHUNK_BUDGET["cpu"] = 13, 1  # as the fixture few_logits does
    training._PASS_TOKENS["cpu"] = 16 if job["one_by_one"] else 1024

    def log(values: dict[str, float], steps: int) -> None:
        if values["step"] == job.get("stop_after"):
            os.kill(os.getpid(), signal.SIGTERM)

    options = RecoverOptions(**job["options"])
    try:
        recover(job["model"], job["out"], options, resume=job.get("resume", False), log=log)
    except InputError as error:
        return str(error)
    return None


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)  # who waits for whom
    path = Path(sys.argv[1])
    came_of: dict[str, str | None] = {}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it serves one process group only
    for name, asked in json.loads(path.read_text()).items():
        os.environ["MASTER_PORT"] = str(asked["port"])
        came_of[name] = command(asked["command"]) if "command" in asked else run(asked)
    path.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(came_of))
