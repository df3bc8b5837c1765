"""Commands started to be killed, and work that is killed in this process."""

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class Killed(Exception):
    """Stands for a signal that ends the process."""


class KillingTrack:
    """Ends the work at some item of some stage; counts the items of all stages."""

    def __init__(self, stage: str | None = None, at: int = 0) -> None:
        self.stage, self.at = stage, at
        self.seen: dict[str, int] = {}

    def __call__(self, items: Iterable[object], stage: str, total: int) -> Iterator[object]:
        for number, item in enumerate(items):
            if stage == self.stage and number == self.at:
                raise Killed
            self.seen[stage] = self.seen.get(stage, 0) + 1
            yield item


def run_apart(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that hears SIGINT, which a test run in the background would ignore."""
    return subprocess.run(
        [Path(sys.executable).with_name("flexigpt"), *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
