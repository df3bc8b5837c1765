"""The one exception for what a user can put right."""

from typing import Any


class InputError(ValueError):
    """Bad input, in one line: what was given, what was expected, what to do.

    The command line prints the line and exits with code 2; everything else is a fault of ours, and exits with code 1.
    """


def check_seed(seed: int | None) -> None:
    """Raises InputError for a seed that not every random generator takes."""
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} is out of range: give 0 to {2**32 - 1}")


def flag(field: str) -> str:
    """The flag of an option's field: --batch-tokens of batch_tokens."""
    return f"--{field.replace('_', '-')}"


def one_line(error: Any) -> str:
    """A library's error message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
