"""How long work reports its progress without knowing who listens."""

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
