"""What commands print: progress on standard error, results on standard output."""

# ruff: noqa: PLC0415 - rich loads where something is printed: help and usage errors do not wait for it

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, Group

T = TypeVar("T")
# Between two lines of a stage, where there is no terminal.
_LINE_SECONDS = 30.0
_STEP_LINES = 20


class Verbosity(IntEnum):
    """How much is printed beside the result: nothing, progress, or progress and what libraries say."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class Reporting:
    """Reports the progress of stages, and notes beside it; this one says nothing at all."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        """Yields `items` one by one; `total` is how many there will be."""
        return iter(items)

    def note(self, line: str) -> None:
        """Prints a line."""

    def draw(self, picture: str) -> None:
        """Shows a picture of a few lines in the place of the last one, where there is a terminal."""


class _Bars(Reporting):
    """Progress bars on a terminal, one for each stage, with the time left; above them the picture, if there is one.

    Args:
        console: to write to.
    """

    def __init__(self, console: "Console") -> None:
        from rich import progress
        from rich.live import Live

        shown = ("{task.description:22}", progress.BarColumn(), progress.MofNCompleteColumn(), "elapsed")
        columns = (*shown, progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())
        self._console, self._picture = console, ""
        self._progress = progress.Progress(*columns, console=console, auto_refresh=False)
        self._live = Live(console=console, refresh_per_second=10, get_renderable=self._shown)

    def _shown(self) -> "Group":
        """The picture, and the bars that there is room for below it: of the stages that began last."""
        from rich.console import Group
        from rich.text import Text

        room = self._console.height - len(self._picture.splitlines()) - 1
        bars = self._progress.make_tasks_table(self._progress.tasks[-max(1, room) :])
        return Group(*([Text(self._picture, no_wrap=True)] if self._picture else []), bars)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        return iter(self._progress.track(items, total=total, description=stage))

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def draw(self, picture: str) -> None:
        self._picture = picture
        self._live.refresh()


class Lines(Reporting):
    """Plain lines where nobody draws bars (`nohup`, Slurm, a notebook): when a stage begins, while it runs, at its end.

    Args:
        seconds: between two lines of a running stage.
    """

    def __init__(self, seconds: float = _LINE_SECONDS) -> None:
        self._seconds = seconds

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        began, done, ended = time.monotonic(), 0, threading.Event()

        def run() -> None:  # a single item may take minutes
            while not ended.wait(self._seconds):
                passed = time.monotonic() - began
                left = f", some {_clock(passed / done * (total - done))} left" if done else ""
                self.note(f"{stage}: {done} of {total} after {_clock(passed)}{left}")

        self.note(f"{stage}: begins")
        teller = threading.Thread(target=run, daemon=True)
        teller.start()
        try:
            for item in items:
                yield item
                done += 1
        finally:
            ended.set()
            teller.join()
        self.note(f"{stage}: done in {_clock(time.monotonic() - began)}")

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def reporting(verbosity: Verbosity) -> Reporting:
    """Bars on a terminal, lines elsewhere, or nothing."""
    if verbosity is Verbosity.QUIET:
        return Reporting()
    console = _console(stderr=True)
    return _Bars(console) if console.is_terminal else Lines()


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def wants_line(values: dict[str, float], steps: int) -> bool:
    """Whether a step of training is worth a line: some twenty of a run are, and each that measured perplexity."""
    step = int(values["step"])
    return step * _STEP_LINES // steps > (step - 1) * _STEP_LINES // steps or "perplexity" in values


def step_line(values: dict[str, float], steps: int) -> str:
    """What a step of training gave, in one line."""
    parts = [f"step {int(values['step'])}/{steps}", f"loss {values['loss']:.4f}"]
    if values["divergence"]:
        parts.append(f"(cross-entropy {values['cross_entropy']:.4f}, divergence {values['divergence']:.4f})")
    if "draft_divergence" in values:
        parts.append(f"draft's divergence {values['draft_divergence']:.4f}")
    parts += [f"lr {values['lr']:.2e}", f"{values['tokens_per_second']:,.0f} tokens/s"]
    if "perplexity" in values:
        parts.append(f"held-out perplexity {values['perplexity']:.2f}")
    return "  ".join(parts)


def show(*parts: Any) -> None:
    """Tables (`record.Rows`) and lines on standard output."""
    console = _console()
    for part in parts:
        console.print(part if isinstance(part, str) else part.terminal(), markup=False, highlight=False)


def print_json(data: dict[str, Any]) -> None:
    """Data on standard output, for programs."""
    print(json.dumps(data, indent=2))
