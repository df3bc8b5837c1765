"""Experiment trackers: TensorBoard, W&B, Trackio and what else accelerate knows."""

from pathlib import Path
from typing import Any

from flexigpt.runtime import InputError


def tracker_classes(report_to: str | None) -> list[Any]:
    """Accelerate's classes of the trackers named.

    Args:
        report_to: names with commas between, or None.

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


class Trackers:
    """Sends numbers to trackers.

    Args:
        classes: of the trackers, as `tracker_classes` gives them.
        run: name of the run.
        folder: where those that write files put them.
        options: what to show beside the curves.
    """

    def __init__(self, classes: list[Any], *, run: str, folder: Path, options: dict[str, Any]) -> None:
        from accelerate import PartialState  # noqa: PLC0415

        self._trackers: list[Any] = []
        for kind in classes:
            PartialState()  # or the trackers' own log messages are errors
            tracker = kind(run, **({"logging_dir": str(folder)} if kind.requires_logging_directory else {}))
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
