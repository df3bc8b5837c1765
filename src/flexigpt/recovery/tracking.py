"""Experiment trackers: TensorBoard, W&B, Trackio and what else accelerate knows."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexigpt.runtime import InputError


def tracker_classes(report_to: str | None) -> list[Any]:
    """Accelerate's classes of the trackers named.

    Raises:
        InputError: a tracker that accelerate does not know, or whose package is not installed.
    """
    if report_to is None:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: PLC0415 - slow to import

    installed = {tracker.value for tracker in get_available_trackers()}
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--report-to {name} is unknown: give {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise InputError(f"--report-to {name} needs a package that is not installed: pip install {name}")
    return [LOGGER_TYPE_TO_CLASS[name] for name in names]


@contextlib.contextmanager
def reported(
    report_to: str | None, *, run: str, folder: Path, options: dict[str, Any]
) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Within it numbers by name, after so many steps, go to every tracker named, with commas between, or to none.

    Each shows the run by its name and with its options; those that write files write them to the folder.
    """
    from accelerate import PartialState  # noqa: PLC0415

    trackers: list[Any] = []
    for kind in tracker_classes(report_to):
        PartialState()  # or the trackers' own log messages are errors
        tracker = kind(run, **({"logging_dir": str(folder)} if kind.requires_logging_directory else {}))
        tracker.main_process_only = False  # only the first process reports: nothing to ask accelerate for
        tracker.start()
        tracker.store_init_configuration({key: str(value) for key, value in options.items()})
        trackers.append(tracker)

    def log(values: dict[str, float], step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()
