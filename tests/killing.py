"""Work that is killed in this process."""

from collections.abc import Iterable, Iterator


class Killed(Exception):
    """Stands for a signal that ends the process."""


class KillingTrack:
    """Ends the work at some item of some stage; counts the items of all stages."""

    def __init__(self, stage: str | None = None, at: int = 0) -> None:
        self.stage, self.at = stage, at
        self.seen: dict[str, int] = {}

    def __call__(self, items: Iterable[object], stage: str, total: int) -> Iterator[object]:
        for number, item in enumerate(items):
            if stage == self.stage and number == self.at:
                raise Killed
            self.seen[stage] = self.seen.get(stage, 0) + 1
            yield item
