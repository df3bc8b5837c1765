"""Text -> tokens -> windows."""

import glob
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flexigpt.errors import InputError

DEFAULT_TEXT = "JeanKaddour/minipile"
DEFAULT_SPLIT = "validation"
DEFAULT_WINDOW_LENGTH = 2048
_READERS = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
_SHUFFLE_BUFFER = 10_000


def read_documents(text: str, column: str = "text", seed: int | None = None) -> Iterator[str]:
    """Documents of a text file or of a data set on the hub, streamed; empty ones are passed over.

    Args:
        text: a .txt file (one document), a .jsonl, .jsonl.gz or .parquet file (one document a row), or a data set on
            the hub as NAME, NAME@SPLIT or NAME:CONFIG@SPLIT (the split is `validation` unless told).
        column: the column that holds the text; a .txt file has only `text`.
        seed: shuffles the documents (in a buffer of 10,000); None leaves them in order.

    Raises:
        InputError: a file that is missing, empty, of another kind or not valid; a column that is not there.
    """
    from datasets import disable_progress_bars  # noqa: PLC0415 - a second of import that only reading text needs
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError  # noqa: PLC0415

    disable_progress_bars()
    try:
        rows = _open_rows(text)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for row in rows:
            if column not in row:
                raise InputError(f"{text} has no column {column!r}: its columns are {', '.join(map(repr, row))}")
            if row[column] is not None and not isinstance(row[column], str):
                raise InputError(f"column {column!r} of {text} holds {type(row[column]).__name__}: expected text")
            if row[column]:
                yield row[column]
    except (DatasetGenerationError, DatasetNotFoundError, OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        hint = "" if Path(text).exists() else "; check the name and the connection, or give a file"
        raise InputError(f"text cannot be read from {text}: {reason}{hint}") from error


def _open_rows(text: str) -> Any:
    """A stream of rows (dictionaries)."""
    from datasets import load_dataset  # noqa: PLC0415

    if not text:
        raise InputError("the name of the text is empty: give a file or a data set on the hub")
    path = Path(text)
    reader = next((_READERS[suffix] for suffix in _READERS if text.lower().endswith(suffix)), None)
    if path.exists() or reader is not None or path.is_absolute():
        if not path.is_file():
            raise InputError(f"text file {text} is not there: give {', '.join(_READERS)} or a data set on the hub")
        if reader is None:
            raise InputError(f"text file {text} is of an unknown kind: expected {', '.join(_READERS)}")
        if path.stat().st_size == 0:
            raise InputError(f"text file {text} is empty: give a file with text in it")
        extra = {"sample_by": "document"} if reader == "text" else {}
        return load_dataset(reader, data_files=glob.escape(str(path)), split="train", streaming=True, **extra)
    name, _, split = text.partition("@")
    name, _, config = name.partition(":")
    return load_dataset(name, config or None, split=split or DEFAULT_SPLIT, streaming=True)


@dataclass(frozen=True, kw_only=True)
class Separators:
    """The tokens around each document, as most models saw them in training.

    Attributes:
        before: the beginning-of-sequence token, where the tokenizer has one.
        after: the end-of-sequence token, where it has one that differs.
    """

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Separators":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        return cls(before=[] if bos is None else [bos], after=[] if eos is None or eos == bos else [eos])


def tokenize_documents(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each document's token ids between its separators."""
    separators = Separators.of(tokenizer)
    for document in documents:
        # Not verbose: a document longer than the model's context is expected here.
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        yield separators.before + ids + separators.after


def check_window_length(window_length: int | None, config: PreTrainedConfig) -> int:
    """The window length in tokens: as given, or the model's context, at most 2,048.

    Raises:
        InputError: shorter than 2 tokens or longer than the model's context.
    """
    context = getattr(config, "max_position_embeddings", None)
    if window_length is None:
        return min(context or DEFAULT_WINDOW_LENGTH, DEFAULT_WINDOW_LENGTH)
    if window_length < 2 or (context and window_length > context):
        raise InputError(f"window length {window_length} does not fit: give 2 to {context or 'any number of'} tokens")
    return window_length


def calibration_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, column: str, windows: int, window_length: int, seed: int
) -> torch.Tensor:
    """Windows for calibration: the documents shuffled by seed, joined and cut. (windows, window_length) int64.

    Returns fewer windows where the text has fewer.

    Raises:
        InputError: text that cannot be read, or that has fewer tokens than one window.
    """
    wanted = windows * window_length
    tokens: list[int] = []
    for ids in tokenize_documents(read_documents(text, column, seed), tokenizer):
        tokens.extend(ids)
        if len(tokens) >= wanted:
            break
    available = min(len(tokens), wanted) // window_length
    if available == 0:
        raise _too_short(text, len(tokens), window_length)
    return torch.tensor(tokens[: available * window_length]).view(available, window_length)


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """A whole text, in order.

    Attributes:
        ids: (tokens,) int64, separators included.
        num_bytes: UTF-8 bytes of the documents, separators not counted.
    """

    ids: torch.Tensor
    num_bytes: int


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase, *, column: str, window_length: int) -> TokenizedText:
    """All documents of a text, joined.

    Raises:
        InputError: text that cannot be read, or that has fewer tokens than one window.
    """
    num_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes
        for document in read_documents(text, column):
            num_bytes += len(document.encode())
            yield document

    ids = torch.tensor(list(chain.from_iterable(tokenize_documents(counted(), tokenizer))), dtype=torch.int64)
    if len(ids) < window_length:
        raise _too_short(text, len(ids), window_length)
    return TokenizedText(ids=ids, num_bytes=num_bytes)


def _too_short(text: str, num_tokens: int, window_length: int) -> InputError:
    if num_tokens == 0:
        return InputError(f"{text} holds no text: give a file with text in it")
    return InputError(
        f"{text} has {num_tokens} tokens, fewer than one window of {window_length}: "
        "give more text or a smaller --window-length"
    )


def batch_size_for(window_length: int, floats_per_token: int, budget: int) -> int:
    """Windows in one batch so that a tensor of `floats_per_token` for each token stays within `budget` numbers."""
    return max(1, math.floor(budget / (window_length * floats_per_token)))
