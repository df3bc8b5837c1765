"""How long work reports its progress without knowing who listens."""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps the items of one stage; the command line draws a bar with the time left for it."""

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        """Yields `items` one by one; `total` is how many there will be."""
        ...


def silent(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
    """Tracks nothing: the default of the Python API."""
    return iter(items)


class Timed:
    """A track that also times the stages.

    Args:
        track: told of each stage.

    Attributes:
        seconds: of each stage so far, by its name.
    """

    def __init__(self, track: Track) -> None:
        self._track, self._began = track, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        """Yields `items` one by one; `total` is how many there will be."""
        began = time.perf_counter()
        yield from self._track(items, stage, total)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - began, 3)

    @property
    def total(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._began
