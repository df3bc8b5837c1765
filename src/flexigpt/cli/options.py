"""Options of the commands."""

import re

from rich.markup import escape

from flexigpt.runtime import InputError


def field_help(options: type) -> dict[str, str]:
    """The help of each option: the description of the field in the class's docstring, or in that of a class above."""
    described: dict[str, str] = {}
    for cls in reversed(options.__mro__[:-1]):
        found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", cls.__doc__ or "", re.MULTILINE)
        described |= {name: escape(" ".join(text.split())) for name, text in found}  # or rich would drop [@SPLIT]
    return described


def block_numbers(blocks: str, flag: str = "--blocks") -> tuple[int, ...]:
    """The blocks in 12,13.

    Raises:
        InputError: what cannot be read.
    """
    try:
        return tuple(int(block) for block in blocks.split(","))
    except ValueError:
        raise InputError(f"{flag} {blocks} cannot be read: give numbers with commas between them, as 12,13") from None
