"""Text -> tokens -> windows."""

import glob
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flexigpt.runtime import InputError
from flexigpt.text.conversations import Conversation, render, told_apart
from flexigpt.text.mixture import order_of_windows
from flexigpt.text.names import COLUMN, TextNames, column_in, hub_name, local_files, reader, split_column

# Defaults; tokens in a window where the model takes more.
_SPLIT, _WINDOW_LENGTH = "validation", 2048
_SHUFFLE_BUFFER = 10_000

Document = str | Conversation

# Characters that are tokenised together: each takes some 160 bytes meanwhile. And the tokens at the end of a piece that
# the next characters might change.
_PIECE, _UNSURE = 2**17, 512

# TypeError: what `datasets` raises for a column of other values than in the first rows.
_READING_ERRORS = (OSError, ValueError, EOFError, TypeError, zlib.error)


class Documents:
    """Documents of text files or of a data set on the hub, streamed; empty ones are passed over.

    How a file marks its encoding and its lines is not text: of a .txt file a byte order mark is left out, and its lines
    end in one character, as in Python. The strings in the rows of other files are taken as they are.

    Args:
        text: a .txt file (one document), a .jsonl, .jsonl.gz or .parquet file (one document a row); a folder with such
            files or a pattern (`shards/*.jsonl.gz`) of them, all of one kind, read in the order of their names; or a
            data set on the hub as NAME[:CONFIG][@SPLIT], of which the split is `validation` by default. Each may end
            with #COLUMN, the column that holds text or conversations (lists of {role, content}), by default `text`, or
            `messages` where there is no `text`; a .txt file has no other.
        seed: shuffles the documents (in a buffer of 10,000); None leaves them in order.

    Attributes:
        num_bytes: UTF-8 bytes of what was read so far; of conversations once they were rendered.

    Raises:
        InputError: a file that is missing, empty, of another kind or not valid; a column that is not there. What only
            reading can tell comes when the document is asked for.
    """

    def __init__(self, text: str, seed: int | None = None) -> None:
        self._text, self._column = split_column(text)
        self._files = local_files(text)
        self._beginning: dict[str, Any] | None = None
        self.num_bytes = 0
        with self._errors_told():
            self._rows = _open_rows(self._text, self._column, self._files)
        if seed is not None:
            self._rows = self._rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        else:
            self._beginning = self._rows.state_dict()

    def __iter__(self) -> Iterator[Document]:
        """From the loaded place (the beginning where none was loaded); one iterator at a time."""
        return (found if isinstance(found, list) else "".join(self._counted(found)) for found in self.pieces())

    def pieces(self) -> Iterator[Iterator[str] | Conversation]:
        """The same, a text in pieces of some characters; of a .txt file no more is read than is asked for."""
        text = self._text
        with self._errors_told():
            for row in self._rows:
                column = column_in(text, self._column, row)
                found = told_apart(row[column], f"column {column!r} of {text}")
                if isinstance(found, list):
                    yield found
                    continue
                pieces = self._read(found) if found and self._is_plain else _cut(found)
                first = next(pieces, "")
                if first:
                    yield chain([first], pieces)

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
        """The ids of all documents, as `tokenize` makes them, in pieces; no more is read than is asked for."""
        for found in self.pieces():
            if isinstance(found, list):
                rendered = render(found, tokenizer)
                self.num_bytes += len(rendered.encode())
                yield _ids_of(rendered, tokenizer)
            else:
                yield from _tokenized(self._counted(found), tokenizer)

    def _counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self.num_bytes += len(piece.encode())
            yield piece

    def _read(self, file: str) -> Iterator[str]:
        with self._errors_told(), open(file, encoding="utf-8-sig") as opened:
            for piece in iter(partial(opened.read, _PIECE), ""):
                if "\0" in piece:
                    raise InputError(f"{file} holds NUL characters, as UTF-16 read as UTF-8 does: save it as UTF-8")
                yield piece

    @property
    def _is_plain(self) -> bool:
        return bool(self._files) and reader(self._files) == "text"

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest document, JSON-ready. Exact for documents in order only."""
        state: dict[str, Any] = self._rows.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iterator begins there."""
        self._rows.load_state_dict(state)
        if state != self._beginning:
            # Only from the beginning does the state of `datasets` say which file is being read.
            self._beginning = None

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError  # noqa: PLC0415

        try:
            yield
        except (DatasetGenerationError, DatasetNotFoundError, *_READING_ERRORS) as error:
            if isinstance(error, InputError):
                raise
            lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
            # A failed cast tells the reason in the last of many lines.
            reason = f"{lines[0]} {lines[-1]}" if lines[-1].startswith("because") else lines[0]
            hint = "" if self._files else "; check the name and the connection, or give a file"
            hint = "; save it as UTF-8" if "codec can't decode" in reason else hint
            raise InputError(f"text cannot be read from {self._place()}: {reason}{hint}") from error

    def _place(self) -> str:
        """The text, and which of its several files is being read where `datasets` tells."""
        state = self._rows.state_dict() if self._beginning is not None else None
        while isinstance(state, dict) and "shard_idx" not in state:
            state = state.get("examples_iterable")
        if state is None or len(self._files) < 2:
            return self._text
        return f"{self._files[min(state['shard_idx'], len(self._files) - 1)]} (of {self._text})"


def _open_rows(text: str, column: str | None, files: list[Path]) -> Any:
    """A stream of rows (dictionaries); of .txt files a row says where its text is."""
    from datasets import IterableDataset, disable_progress_bars, load_dataset  # noqa: PLC0415 - a second

    disable_progress_bars()
    if files:
        kind, options = reader(files), {}
        if kind == "text":
            return IterableDataset.from_generator(_names, gen_kwargs={"files": list(map(str, files))})
        if kind == "parquet":
            options = _parquet_options(text, column, files[0])
        escaped = [glob.escape(str(file)) for file in files]
        try:
            return load_dataset(kind, data_files=escaped, split="train", streaming=True, **options)
        except StopIteration:
            # The JSON reader looks at the first row for the columns: there is none in any file.
            raise too_short(text, 0, 0) from None
    name, config, split = hub_name(text)
    return load_dataset(name, config or None, split=split or _SPLIT, streaming=True)


def _names(files: list[str]) -> Iterator[dict[str, str]]:
    return ({COLUMN: file} for file in files)


def _parquet_options(text: str, column: str | None, file: Path) -> dict[str, Any]:
    """Reads the one column, whatever the others hold; as strings where they are views, which cannot be shuffled."""
    import pyarrow as pa  # noqa: PLC0415 - with datasets
    from datasets import Features  # noqa: PLC0415
    from pyarrow.parquet import read_schema  # noqa: PLC0415

    schema = read_schema(file)
    column = column_in(text, column, schema.names)
    kind = schema.field(column).type
    features = Features.from_arrow_schema(pa.schema({column: pa.string() if pa.types.is_string_view(kind) else kind}))
    # Its own batch size is the first row group's, which may be of no rows.
    return {"columns": [column], "features": features, "batch_size": 1000}


def tokenize(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's token ids between the tokens that most models saw around one in training.

    Before it the one for a beginning, after it the one for an end where that is another, as far as there are such. A
    conversation has those of the tokenizer's chat template alone.

    Raises:
        InputError: a conversation that the tokenizer cannot render.
    """
    if isinstance(document, list):
        return _ids_of(render(document, tokenizer), tokenizer)
    return [token for ids in _tokenized(_cut(document), tokenizer) for token in ids]


def _ids_of(rendered: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of what a chat template made, which names its special tokens itself."""
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _cut(document: str) -> Iterator[str]:
    return (document[at : at + _PIECE] for at in range(0, len(document), _PIECE))


def _tokenized(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """`tokenize` of a document in pieces, as soon as they are sure.

    What follows changes the last tokens of a piece only, which wait for the next one. That is tokenised from some
    tokens before them on, and must find those again at their places: from where both agree, both are the document's
    own, as tokenizers work on words, or, those that do not split text first, let no token reach beyond the end of one.
    Otherwise the document is tokenised again from its beginning.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    yield [] if bos is None else [bos]
    text, start, given = "", 0, 0  # the document so far, where it is tokenised from, how many of its ids were given
    sure: list[tuple[int, int]] = []  # the last of those, and their places
    upcoming = iter(pieces)
    piece = next(upcoming, "")
    while piece:
        text += piece
        piece = next(upcoming, "")
        if piece and not getattr(tokenizer, "is_fast", False):  # it does not tell places
            continue
        found = _placed(text, start, tokenizer, bool(piece or sure))
        begin = _behind(sure, found)
        if begin is None:
            start, begin = 0, given
            found = _placed(text, start, tokenizer, bool(piece))
        end = len(found) - (_UNSURE if piece else 0)
        if piece and end < begin + 2 * _UNSURE:
            continue
        yield [token for token, _ in found[begin:end]]
        given += end - begin
        sure, start = found[end - _UNSURE : end], found[end - 2 * _UNSURE][1] if piece else 0
    yield [] if eos in (None, bos) else [eos]


def _placed(text: str, start: int, tokenizer: PreTrainedTokenizerBase, places: bool) -> list[tuple[int, int]]:
    """The ids of a text from some character on, and at which character each begins; 0 where places do not matter."""
    found = tokenizer(
        text[start:],
        add_special_tokens=False,
        verbose=False,  # a document longer than the model's context is expected here
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=places,
    )
    if not places:
        return [(token, 0) for token in found["input_ids"]]
    return [(token, start + at) for token, (at, _) in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def _behind(sure: list[tuple[int, int]], found: list[tuple[int, int]]) -> int | None:
    """Where those that are sure end among the first that were found, at the same places; None: nowhere."""
    ends = range(len(sure), min(len(found), 4 * len(sure)) + 1)
    return next((end for end in ends if found[end - len(sure) : end] == sure), None)


def check_tokenizer(model: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuses a tokenizer with ids for which a model has no embeddings.

    Args:
        model: its name.
        tokenizer: that it is to be fed with.
        config: of the model.

    Raises:
        InputError: such ids.
    """
    rows = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise InputError(
            f"the tokenizer of {model} has ids up to {largest:,}, but its embeddings have {rows:,} rows: put the "
            "tokenizer there that the model was trained with, or resize the embeddings"
        )


def check_window_length(window_length: int | None, config: PreTrainedConfig) -> int:
    """The window length in tokens: as given, or the model's context, at most 2,048.

    Raises:
        InputError: shorter than 2 tokens or longer than the model's context.
    """
    context = getattr(config, "max_position_embeddings", None)
    if window_length is None:
        return min(context or _WINDOW_LENGTH, _WINDOW_LENGTH)
    if window_length < 2 or (context and window_length > context):
        raise InputError(f"window length {window_length} does not fit: give 2 to {context or 'any number of'} tokens")
    return window_length


def calibration_windows(
    text: TextNames, tokenizer: PreTrainedTokenizerBase, *, windows: int, window_length: int, seed: int
) -> torch.Tensor:
    """Windows for calibration: the documents shuffled by seed, joined and cut. (windows, window_length) int64.

    Of several texts each gives its share of the windows, which take turns. Returns fewer windows where a text has
    fewer.

    Raises:
        InputError: text that cannot be read, has fewer tokens than one window, or too small a share for one.
    """
    names, order = order_of_windows(text, windows)
    left = [
        iter(_windows_of(name, tokenizer, order.count(number), window_length, seed))
        for number, name in enumerate(names)
    ]
    taken = (next(left[number], None) for number in order)
    return torch.stack([window for window in taken if window is not None])


def _windows_of(
    text: str, tokenizer: PreTrainedTokenizerBase, windows: int, window_length: int, seed: int
) -> torch.Tensor:
    wanted = windows * window_length
    tokens: list[int] = []
    for ids in Documents(text, seed).tokens(tokenizer):
        tokens += ids
        if len(tokens) >= wanted:
            break
    available = min(len(tokens), wanted) // window_length
    if available == 0:
        raise too_short(text, len(tokens), window_length)
    return torch.tensor(tokens[: available * window_length]).view(available, window_length)


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """A whole text, in order.

    Attributes:
        ids: (tokens,) int64, separators included.
        num_bytes: UTF-8 bytes of the documents, separators not counted.
        piece: where it is a sample of a text, tokens after which another place of the text begins; 0: it is whole.
    """

    ids: torch.Tensor
    num_bytes: int
    piece: int = 0

    def windows(self, window_length: int) -> int:
        """How many full windows it has, each with the token after it."""
        return len(self.ids) // self.piece if self.piece else (len(self.ids) - 1) // window_length

    def sample(self, windows: int, window_length: int) -> "TokenizedText":
        """So many windows, evenly spread, each with the token after it; the text itself where it has no more."""
        there = self.windows(window_length)
        if there <= windows:
            return self
        chosen = torch.arange(windows) * there // windows
        ids = self.ids.unfold(0, window_length + 1, window_length)[chosen].flatten()
        num_bytes = round(self.num_bytes * len(ids) / len(self.ids))
        return TokenizedText(ids=ids, num_bytes=num_bytes, piece=window_length + 1)


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase, *, window_length: int) -> TokenizedText:
    """All documents of a text, joined.

    Raises:
        InputError: text that cannot be read, or that has fewer tokens than one window.
    """
    documents = Documents(text)
    parts = [torch.tensor(ids, dtype=torch.int64) for ids in documents.tokens(tokenizer)]
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    if len(ids) < window_length:
        raise too_short(text, len(ids), window_length)
    return TokenizedText(ids=ids, num_bytes=documents.num_bytes)


def too_short(text: str, num_tokens: int, window_length: int) -> InputError:
    """The error for a text that does not fill one window."""
    if num_tokens == 0:
        return InputError(f"{text} holds no text: give a file with text in it")
    return InputError(
        f"{text} has {num_tokens} tokens, fewer than one window of {window_length}: "
        "give more text or a smaller --window-length"
    )


def window_batches(
    ids: torch.Tensor, starts: range, window_length: int, batch_size: int
) -> list[tuple[torch.Tensor, int]]:
    """(windows, tokens + 1) ids and the first position to score: the overlap has been scored by the window before."""
    overlap = max(0, window_length - starts.step)
    windows = [(ids[start : start + window_length + 1], overlap if start else 0) for start in starts]
    batches: list[tuple[torch.Tensor, int]] = []
    for (_, first), group in groupby(windows, key=lambda window: (len(window[0]), window[1])):
        alike = [ids for ids, _ in group]
        batches += [(torch.stack(alike[i : i + batch_size]), first) for i in range(0, len(alike), batch_size)]
    return batches


def batch_size_for(window_length: int, floats_per_token: int, budget: int) -> int:
    """Windows in one batch so that a tensor of `floats_per_token` for each token stays within `budget` numbers."""
    return max(1, budget // (window_length * floats_per_token))
