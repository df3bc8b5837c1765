"""Experiment trackers: TensorBoard, W&B, Trackio and what else accelerate knows."""

from pathlib import Path
from typing import Any

from flexigpt.runtime import InputError


def _names(report_to: str | None) -> list[str]:
    return [name.strip() for name in report_to.split(",")] if report_to else []


def check_trackers(report_to: str | None) -> None:
    """Refuses trackers before the work begins.

    Args:
        report_to: names with commas between, or None.

    Raises:
        InputError: a tracker that accelerate does not know, or whose package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: PLC0415 - slow to import

    installed = {tracker.value for tracker in get_available_trackers()}
    for name in _names(report_to):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--report-to {name} is unknown: give {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise InputError(f"--report-to {name} needs a package that is not installed: pip install {name}")


class Trackers:
    """Sends numbers to every tracker named; none named, nowhere.

    Args:
        report_to: names with commas between, or None.
        run: name of the run.
        folder: where those that write files put them.
        options: what to show beside the curves.
    """

    def __init__(self, report_to: str | None, *, run: str, folder: Path, options: dict[str, Any]) -> None:
        from accelerate import PartialState  # noqa: PLC0415
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415

        self._trackers: list[Any] = []
        if report_to:
            PartialState()  # or the trackers' own log messages are errors
        for name in _names(report_to):
            tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": str(folder)} if tracker_class.requires_logging_directory else {}
            tracker = tracker_class(run, **place)
            tracker.main_process_only = False  # only the first process makes Trackers: nothing to ask accelerate for
            tracker.start()
            tracker.store_init_configuration({key: str(value) for key, value in options.items()})
            self._trackers.append(tracker)

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, after so many steps."""
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Lets the trackers write what they hold."""
        for tracker in self._trackers:
            tracker.finish()
