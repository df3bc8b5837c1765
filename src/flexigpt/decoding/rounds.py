"""What a run of sampling has finished so far: a file beside its output, from which it goes on after it was killed."""

import json
import os
from pathlib import Path
from typing import Any

from flexigpt.runtime import InputError, replace_file

Kept = list[tuple[dict[str, Any], int]]


class Rounds:
    """The finished rounds of a run: a line each, after one that says what was asked.

    Args:
        out: file that is to be written in the end.
        asked: all that the result depends on, JSON-ready.

    Attributes:
        done: what each round kept.
    """

    def __init__(self, out: Path, asked: dict[str, Any]) -> None:
        self._path, self._asked = out.with_name(f"{out.name}.part"), asked
        self.done: list[dict[str, Any]] = []

    @property
    def begun(self) -> int:
        """Drafts that were begun in all rounds: which prompt is next."""
        return sum(int(one["begun"]) for one in self.done)

    @property
    def tokens(self) -> int:
        """Tokens of what was kept."""
        return sum(tokens for one in self.done for _, tokens in one["kept"])

    def open(self, resume: bool, overwrite: bool) -> None:
        """Takes over what there is, or begins.

        Raises:
            InputError: an unfinished run, neither to go on with nor to replace; none to resume, or one of another kind.
        """
        there = self._path.exists()
        if there and not resume and not overwrite:
            unfinished = f"{self._path} holds an unfinished run"
            raise InputError(f"{unfinished}: go on with --resume, or start again with --overwrite")
        if there and resume:
            self._take_over()
        elif resume:
            raise InputError(f"there is no unfinished run {self._path}: leave out --resume")
        replace_file(self._path, "".join(json.dumps(line) + "\n" for line in [self._asked, *self.done]))

    def _take_over(self) -> None:
        try:
            *whole, _ = self._path.read_text(encoding="utf-8").split("\n")  # the last one may be torn
            asked, *done = (json.loads(line) for line in whole)
            if not isinstance(asked, dict) or any({"kept", "begun"} - set(round_) for round_ in done):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._path} is damaged: start again with --overwrite") from error
        other = [name for name in self._asked if asked.get(name) != self._asked[name]]
        if other:
            another = f"{self._path} is of a run with another {', '.join(other)}"
            raise InputError(f"{another}: start again with --overwrite")
        self.done = done

    def add(self, kept: Kept, begun: int) -> None:
        """Keeps a finished round."""
        self.done.append({"kept": kept, "begun": begun})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self._path} cannot be written: {error.strerror}; --resume goes on") from error

    def lines(self) -> list[str]:
        """All documents, as lines of JSON."""
        return [json.dumps(row, ensure_ascii=False) + "\n" for one in self.done for row, _ in one["kept"]]

    def remove(self) -> None:
        """Once the output is written."""
        self._path.unlink(missing_ok=True)
