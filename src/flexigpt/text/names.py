"""What a text is called: FILE, FOLDER or the NAME of a data set, with #COLUMN, with =SHARE of a mixture. No torch."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

from flexigpt.runtime import InputError, fingerprint, local_path

# A text, or several that are mixed.
TextNames = str | Sequence[str]

# The columns that are read where none is named: of texts, or else of conversations.
COLUMN, _CONVERSATIONS = "text", "messages"

READERS = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


def split_column(text: str) -> tuple[str, str | None]:
    """FILE, its ~ expanded, and COLUMN of the text FILE#COLUMN; None where none is named.

    A # may be part of a path: what is there by its whole name is not split, nor is what no column is called.

    Raises:
        InputError: nothing after the #.
    """
    text = os.path.expanduser(text)
    place, mark, column = text.rpartition("#")
    if not mark or os.path.exists(text) or set(column) & set("/\\*?") or _kind(column) is not None:
        return text, None
    if not column:
        raise InputError(f"{text} names no column: give {place}#COLUMN, or leave the # out")
    return os.path.expanduser(place), column


def column_in(text: str, column: str | None, columns: Iterable[str]) -> str:
    """The column to read: the one that is named, or `text`, or `messages` where there is no `text`.

    Raises:
        InputError: none of them is there.
    """
    there = list(columns)
    for name in [column] if column else [COLUMN, _CONVERSATIONS]:
        if name in there:
            return name
    shown = ", ".join(map(repr, there))
    raise InputError(f"{text} has no column {column or COLUMN!r}: its columns are {shown}; give {text}#COLUMN")


def shares_of(texts: TextNames) -> dict[str, Fraction]:
    """Each text of a mixture, and its share of the tokens; those without =SHARE have equal parts of what is left.

    Raises:
        InputError: no text, one twice, shares that cannot be read or do not come to 1.
    """
    given = [texts] if isinstance(texts, str) else list(texts)
    split = [_split_share(text) for text in given]
    names, shares = [name for name, _ in split], [share for _, share in split if share is not None]
    if not given or len(set(names)) < len(names):
        raise InputError("a text is named twice, or none is: give each once, as a.jsonl and b.parquet=0.3")
    open_ones, left = len(given) - len(shares), Fraction(1) - sum(shares)
    if left < 0 or (left == 0) != (open_ones == 0):
        came_to = f"the shares of {' and '.join(names)} come to {float(sum(shares)):g}"
        raise InputError(f"{came_to}: they have to come to 1, or to less where one of several texts has none")
    return {name: left / open_ones if share is None else share for name, share in split}


def _split_share(text: str) -> tuple[str, Fraction | None]:
    """TEXT and SHARE of TEXT=SHARE; what is there by its whole name is not split, nor is what ends in no number."""
    name, _, share = text.rpartition("=")
    if not name or not re.fullmatch(r"-?[0-9]*\.?[0-9]+%?", share) or os.path.exists(os.path.expanduser(text)):
        return text, None
    if share.endswith("%") or not 0 < Fraction(share) < 1:
        raise InputError(f"{text} has a share out of range: give more than 0 and less than 1, as {name}=0.7")
    return name, Fraction(share)


def shown_texts(texts: TextNames) -> str:
    """A text as it was named, or several with their shares, for records and tables."""
    if isinstance(texts, str):
        return texts
    return " + ".join(f"{float(share):.1%} {name}" for name, share in shares_of(texts).items())


def local_files(text: str) -> list[Path]:
    """The files that a text, with or without a column, names, by name in order; none for a data set on the hub.

    Raises:
        InputError: a file that is missing, empty or of another kind; no files or files of different kinds.
    """
    text, _ = split_column(text)
    if not text:
        raise InputError("the name of the text is empty: give a file or a data set on the hub")
    path = Path(text)
    folder = os.path.isdir(path)
    several = folder or (("*" in text or "?" in text) and not os.path.exists(path))
    if several:
        # A folder may hold other files too; what a pattern matches is meant.
        pattern = os.path.join(glob.escape(text), "*") if folder else text
        found = [Path(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name)]
        files = sorted(file for file in found if _kind(file.name) is not None or not folder)
        if not files:
            raise InputError(f"no text file is in or matches {text}: give {', '.join(READERS)} files")
    elif _kind(text) is not None or os.path.exists(path):
        files = [path]
    else:
        local_path(hub_name(text)[0], "text file or folder")
        return []
    for file in files:
        _check_file(file, several)
    kinds = {_kind(file.name): file.name for file in files}
    if len(kinds) > 1:
        raise InputError(f"{text} has files of different kinds ({', '.join(kinds.values())}): give files of one kind")
    return files


def text_fingerprint(texts: TextNames) -> str:
    """What tells one text from another, without reading all of it: 16 hexadecimal digits, and the column if named.

    Of a mixture those of each, and its share.

    Of local files their names without folders, their sizes, and the first and the last MiB of each; of a data set on
    the hub its name.

    Raises:
        InputError: a file that is missing, empty or of another kind.
    """
    found = []
    for text, share in shares_of(texts).items():
        place, column = split_column(text)
        named = "" if column in (None, COLUMN) else f"#{column}"
        found.append(fingerprint(place, local_files(text)) + named + ("" if share == 1 else f"={share}"))
    return " ".join(found)


def _check_file(file: Path, one_of_several: bool) -> None:
    if not os.path.isfile(file):
        raise InputError(f"text file {file} is not there: give {', '.join(READERS)} or a data set on the hub")
    if _kind(file.name) is None:
        raise InputError(f"text file {file} is of an unknown kind: expected {', '.join(READERS)}")
    if file.stat().st_size == 0:
        remedy = "remove it or " if one_of_several else ""
        raise InputError(f"text file {file} is empty: {remedy}give a file with text in it")


def _kind(name: str) -> str | None:
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)


def hub_name(text: str) -> tuple[str, str, str]:
    """NAME, CONFIG and SPLIT of NAME[:CONFIG][@SPLIT]."""
    name, _, split = text.partition("@")
    name, _, config = name.partition(":")
    return name, config, split


def reader(files: list[Path]) -> str:
    return READERS[_kind(files[0].name) or ""]
