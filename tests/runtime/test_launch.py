"""How a process was started, and what signals do."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flexigpt.runtime import launched, launched_rank, on_signals


def test_a_signal_calls_the_handler_and_afterwards_what_it_called_before() -> None:
    # A shell has its background jobs ignore SIGINT, and so may this process.
    before, heard = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)), threading.Event()
    with on_signals(heard.set, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(10)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_the_handler_raises_is_raised_and_the_handlers_are_put_back() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), on_signals(interrupt, signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_other_threads_which_may_not_set_handlers_nothing_changes() -> None:
    def run() -> object:
        with on_signals(lambda: None, signal.SIGTERM):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() is signal.getsignal(signal.SIGTERM)


def test_torchrun_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched(), launched_rank()) == (False, 0)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (launched(), launched_rank()) == (True, 3)
