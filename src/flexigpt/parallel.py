"""Independent pieces of work, each on one core: matrices of a few hundred rows do not fill several."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


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
