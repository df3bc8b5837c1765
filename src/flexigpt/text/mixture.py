"""Several texts in shares: their windows take turns, so that after every window the shares are as near as can be."""

from collections.abc import Sequence
from fractions import Fraction

from flexigpt.runtime import InputError
from flexigpt.text.names import TextNames, shares_of


def turns(shares: Sequence[Fraction], given: Sequence[int], count: int) -> list[int]:
    """Which texts give the next `count` windows: each time the one furthest behind its share.

    Args:
        shares: of each text, 1 in all.
        given: windows that each has given before.
        count: how many follow.
    """
    found: list[int] = []
    so_far = list(given)
    for total in range(sum(given) + 1, sum(given) + count + 1):
        behind = [share * total - had for share, had in zip(shares, so_far, strict=True)]
        text = behind.index(max(behind))
        so_far[text] += 1
        found.append(text)
    return found


def order_of_windows(texts: TextNames, windows: int) -> tuple[list[str], list[int]]:
    """The texts of a mixture, and which of them, by number, gives each of so many windows.

    Raises:
        InputError: a text whose share is less than one window.
    """
    shares = shares_of(texts)
    names, order = list(shares), turns(list(shares.values()), [0] * len(shares), windows)
    for number, name in enumerate(names):
        if number not in order:
            raise InputError(f"the share of {name} is less than one of {windows} windows: give a larger one")
    return names, order
