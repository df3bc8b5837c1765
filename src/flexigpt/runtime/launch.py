"""How this process was started, and what it does when it is asked to stop. No torch."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def launched_rank() -> int:
    """This process's number by torchrun; 0 where it was started without."""
    return int(os.environ["RANK"]) if launched() else 0


@contextmanager
def on_signals(handler: Callable[[], None], *numbers: int) -> Iterator[None]:
    """Within it these signals call the handler; outside the main thread, where Python allows none, nothing changes.

    Args:
        handler: runs in the main thread, between two of its steps; what it raises is raised there.
        numbers: of the signals, such as signal.SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
