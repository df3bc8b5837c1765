"""A conversation in the terminal: what is typed goes to the model, the answer appears as it is made."""

# ruff: noqa: PLC0415 - rich and readline load where somebody talks: help and usage errors do not wait for them

import contextlib
import sys
from typing import TYPE_CHECKING

from flexigpt.runtime import InputError

if TYPE_CHECKING:
    from flexigpt.decoding import Conversation


def converse(conversation: "Conversation") -> None:
    """Talks until the input ends, or is interrupted.

    Raises:
        InputError: input that is not text.
    """
    from rich.console import Console

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False, markup=False)
    sign = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and keys to edit with
        sign = "> "
        notes.print("/reset begins anew, Ctrl-C stops an answer, Ctrl-D ends", style="dim")
    while (said := _said(sign)) is not None:
        if said == "/reset":
            conversation.reset()
            notes.print("what was said is forgotten", style="dim")
        elif said:
            try:
                remark = conversation.answer(said, lambda piece: console.out(piece, end=""))
                console.out("\n", end="")
            except InputError as error:
                remark = str(error)
            if remark is not None:
                notes.print(remark, style="dim")


def _said(sign: str) -> str | None:
    """The next line; None: there is none."""
    try:
        return input(sign).strip()
    except UnicodeDecodeError as error:
        raise InputError(f"the input is not valid UTF-8 ({error.reason}): type it again") from None
    except (EOFError, KeyboardInterrupt):
        if sign:
            print()
        return None
