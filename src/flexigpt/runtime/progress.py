"""How long work reports its progress without knowing who listens."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Track(Protocol):
    """Wraps the items of one stage; the command line draws a bar with the time left for it."""

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        """Yields `items` one by one; `total` is how many there will be."""
        ...


def silent(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
    """Tracks nothing: the default of the Python API."""
    return iter(items)


def bars(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
    """A track for Python: tqdm's bars, in a notebook its widgets where ipywidgets is installed."""
    from tqdm.auto import tqdm  # noqa: PLC0415 - it asks the notebook what it can show

    return iter(tqdm(items, desc=stage, total=total))


class Timed:
    """A track that also times the stages.

    Args:
        track: reports each stage.

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


def workers_of(device: torch.device) -> int:
    """How many pieces of work run at a time: one for each of torch's threads on a CPU, one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@torch.no_grad()
def in_parallel(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """Runs tasks and yields what they return, in their order; no more than `workers` are begun and not yet yielded.

    Each runs on a single thread of torch's and without gradients, so that results do not depend on the number of
    workers. What a task raises, this raises.
    """
    if workers == 1:
        for task in tasks:
            yield task()
        return
    begun: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for task in tasks:
            begun.append(pool.submit(torch.no_grad()(task)))
            if len(begun) == workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
