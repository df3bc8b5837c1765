"""Numbers as people write them: sizes, tokens, shares."""

import re
from collections.abc import Mapping

from flexigpt.runtime.errors import InputError

_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9}

_BYTES = {"KB": 10**3, "KIB": 2**10, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


# Beyond it no number of tokens, parameters or bytes means anything.
_MOST = 1e18


def _read(text: str, units: Mapping[str, float]) -> float:
    """A number times its unit; 0 for what cannot be read, or is meant by nobody."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Z%]*)", text.strip().upper())
    number = float(match[1]) * units.get(match[2], 0) if match else 0.0
    if match and not match[2] and not number.is_integer():  # 3.2 of what?
        return 0.0
    return number if number <= _MOST else 0.0


def parse_size(size: str, itemsize: int) -> int:
    """Parameters in a size that people write: a number of parameters (4.8B, 350M) or of bytes (3.2GB, 900MiB).

    Args:
        size: the size.
        itemsize: bytes of one parameter.

    Raises:
        InputError: a size that cannot be read.
    """
    found = _read(size, {"": 1, **_COUNTS} | {unit: scale / itemsize for unit, scale in _BYTES.items()})
    if found < 1:
        raise InputError(f"size {size!r} cannot be read: give parameters (4.8B, 350M) or bytes (3.2GB, 900MiB)")
    return int(found)


def parse_share(
    share: str, name: str = "--rank", instead: str = "a number, as 12, or a share of the source's parameters, as 3.7%"
) -> float:
    """A share of a whole as people write it, 3.7%, as 0.037, of an option that says what to give instead.

    Raises:
        InputError: what cannot be read, or is not between 0 and 100%.
    """
    value = _read(share, {"%": 1}) / 100
    if not 0 < value < 1:
        raise InputError(f"{name} {share} cannot be used: give {instead}, above 0% and below 100%")
    return value


def parse_tokens(tokens: str) -> int:
    """Tokens as people write them: 1B, 600M, 100K, 4096.

    Raises:
        InputError: what cannot be read, or less than one token.
    """
    count = int(_read(str(tokens), {"": 1, "T": 10**12, **_COUNTS}))
    if count < 1:
        raise InputError(f"--tokens {tokens} cannot be read: give a number of tokens, as 1B, 600M or 100000")
    return count


def megabytes(num_bytes: int) -> str:
    """10^6 bytes, as disks are sold."""
    return f"{num_bytes / 1e6:,.2f}"


def parse_numbers(text: str, name: str, example: str) -> tuple[int, ...]:
    """The whole numbers in 12,13, of the option of that name.

    Raises:
        InputError: what cannot be read.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{name} {text} cannot be read: give numbers with commas between them, as {example}") from None


def size_in_words(num_bytes: float) -> str:
    """1.2 GB, 350 MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
