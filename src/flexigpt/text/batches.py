"""The training stream: text -> shuffled, packed windows; seeded and resumable."""

import math
import random
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flexigpt.runtime import InputError
from flexigpt.text.mixture import turns
from flexigpt.text.names import TextNames, local_files, shares_of
from flexigpt.text.windows import Document, Documents, tokenize, too_short

# Documents that are shuffled together, fewer where they have so many characters together.
_RUN_DOCUMENTS, _RUN_CHARACTERS = 10_000, 2**28

_COUNTED_BYTES = 64 * 2**20


class EndOfText(InputError):
    """The last epoch has no further window."""


class TrainingStream:
    """Windows for training: the documents shuffled by seed, joined and cut, `epochs` times over, without padding.

    Window k holds the tokens k T to k T + T of the stream, T being the window length: T inputs and the token after
    each. So every token but the first is predicted once, and no token is left out at an epoch's end.

    The stream is a function of the text, the tokenizer, the window length and the seed only: processes that share a
    batch each read all of it and take their rows.

    Documents are shuffled within runs of `run_documents`, so that a place in the stream is a few numbers: the
    documents of a run are read again from its beginning and shuffled again. No buffer has to be saved.

    Args:
        text: as `Documents` takes it.
        window_length: T, in tokens.
        seed: of the documents' order, which differs from epoch to epoch.
        epochs: passes over the text, 1 or more.
        run_documents: how many documents are held and shuffled at once; fewer where they are very long.

    Raises:
        InputError: text that cannot be read, or that has fewer tokens than one window.
    """

    def __init__(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window_length: int,
        seed: int,
        epochs: int = 1,
        run_documents: int = _RUN_DOCUMENTS,
    ) -> None:
        assert min(window_length, epochs, run_documents) >= 1
        self._text, self._tokenizer = text, tokenizer
        self._window_length, self._seed, self._epochs = window_length, seed, epochs
        self._run_documents = run_documents
        self._documents = Documents(text)
        self._beginning = self._documents.state_dict()
        self._check_length()
        self._tokens: list[int] = []
        self._last_document = {"epoch": 0, "run": 0, "run_start": self._beginning, "document": 0}
        self._last_length = 0
        self._state: dict[str, Any] = {**self._last_document, "token": 0, "tokens_before": 0}
        self.load_state_dict(self._state)

    def next_windows(self, count: int) -> torch.Tensor:
        """The next `count` (1 or more) windows. (count, window_length + 1) int64.

        Raises:
            EndOfText: the text has fewer windows left; the stream stays where it was, and fewer can still be taken.
            InputError: text that cannot be read.
        """
        assert count >= 1
        taken = count * self._window_length
        try:
            self._fill(taken + 1)
        except InputError:
            self.load_state_dict(self._state)
            raise
        windows = torch.tensor(self._tokens[: taken + 1]).unfold(0, self._window_length + 1, self._window_length)
        del self._tokens[:taken]
        # What is left are the last tokens of the last document, always one or more: without it the windows were not
        # full. That is why a place is a document and a token in it.
        places = {"token": self._last_length - len(self._tokens), "tokens_before": self._state["tokens_before"] + taken}
        self._state = self._last_document | places
        return windows.clone()

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest window: some 500 bytes of JSON, whatever the text."""
        return deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the latest window before `state_dict`, in a stream made with the same arguments.

        Only `epochs` may differ. Reading waits for the next window.
        """
        self._state = deepcopy(state)
        self._tokens = []
        self._incoming = self._tokenized_from(self._state)

    def _fill(self, wanted: int) -> None:
        """Reads documents until `wanted` tokens are there."""
        while len(self._tokens) < wanted:
            document = next(self._incoming, None)
            if document is None:
                ended = f"ends after {self._state['tokens_before'] + len(self._tokens):,} tokens"
                more = f"give --epochs {self._epochs + 1} or more, fewer --tokens, or more text"
                raise EndOfText(f"{self._text} {ended} with --epochs {self._epochs}: {more}")
            self._last_document, ids = document
            self._last_length = len(ids)
            # Only the first document after loading begins in its middle; tokens are there after it.
            self._tokens += ids if self._tokens else ids[self._state["token"] :]

    def _tokenized_from(self, state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Each document's place and its tokens, from the document of `state` to the end of the last epoch."""
        run, run_start, first = state["run"], state["run_start"], state["document"]
        for epoch in range(state["epoch"], self._epochs):
            self._documents.load_state_dict(run_start)
            reader = iter(self._documents)
            while documents := self._read_run(reader):
                run_end = self._documents.state_dict()
                # By a string: its hash seeds the same order in every Python.
                random.Random(f"{self._seed} {epoch} {run}").shuffle(documents)
                for number, document in enumerate(documents[first:], start=first):
                    place = {"epoch": epoch, "run": run, "run_start": run_start, "document": number}
                    yield place, tokenize(document, self._tokenizer)
                run, run_start, first = run + 1, run_end, 0
            run, run_start = 0, self._beginning

    def _read_run(self, reader: Iterator[Document]) -> list[Document]:
        """The documents of the next run; none at the end of the text."""
        documents: list[Document] = []
        characters = 0
        for document in islice(reader, self._run_documents):
            documents.append(document)
            characters += len(document) if isinstance(document, str) else len(str(document))
            if characters >= _RUN_CHARACTERS:
                break
        return documents

    def _check_length(self) -> None:
        num_tokens = _count(self._documents, self._tokenizer, self._window_length + 1)
        if num_tokens == 0:
            raise too_short(self._text, 0, self._window_length)
        if num_tokens <= self._window_length:
            raise InputError(
                f"{self._text} has {num_tokens} tokens, fewer than one window of {self._window_length} and the token "
                "after it: give more text or a smaller --window-length"
            )


class MixedStream:
    """Windows for training from one text or a mixture, whose texts take turns; otherwise as a `TrainingStream`.

    Each text is shuffled, cut and read `epochs` times over by itself.
    """

    def __init__(
        self, texts: TextNames, tokenizer: PreTrainedTokenizerBase, *, window_length: int, seed: int, epochs: int = 1
    ) -> None:
        shares = shares_of(texts)
        self._shares, self._window_length = list(shares.values()), window_length
        given = {"window_length": window_length, "seed": seed, "epochs": epochs}
        self._streams = [TrainingStream(text, tokenizer, **given) for text in shares]

    def next_windows(self, count: int) -> torch.Tensor:
        """The next `count` (1 or more) windows. (count, window_length + 1) int64.

        Raises:
            EndOfText: a text has fewer windows left than its share; the stream stays where it was.
            InputError: text that cannot be read.
        """
        before = self.state_dict()
        order = turns(self._shares, [state["tokens_before"] // self._window_length for state in before["texts"]], count)
        try:
            taken = {number: iter(self._streams[number].next_windows(order.count(number))) for number in set(order)}
        except InputError:
            self.load_state_dict(before)
            raise
        return torch.stack([next(taken[number]) for number in order])

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest window, of each text."""
        return {"texts": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the latest window before `state_dict`, as a `TrainingStream` does."""
        for stream, place in zip(self._streams, state["texts"], strict=True):
            stream.load_state_dict(place)


def iterate(
    stream: TrainingStream | MixedStream, count: int, steps: int
) -> Generator[tuple[torch.Tensor, dict[str, Any]], None, None]:
    """`steps` batches of `count` windows, (count, window_length + 1) int64, each with the stream's state after it.

    The next batch is prepared by a thread while the caller computes; so until the last batch, the stream itself is
    ahead of the caller: keep the states given here. Closing the generator waits for the batch in preparation.

    Raises:
        EndOfText, InputError: those of `next_windows`, when the batch that they belong to is asked for.
    """

    def prepare() -> tuple[torch.Tensor, dict[str, Any]]:
        return stream.next_windows(count), stream.state_dict()

    with ThreadPoolExecutor(1, thread_name_prefix="flexigpt-batches") as executor:
        batches = (executor.submit(prepare) for _ in range(steps))
        upcoming = next(batches, None)
        while upcoming is not None:
            batch = upcoming.result()
            upcoming = next(batches, None)
            yield batch


def check_enough(texts: TextNames, tokenizer: PreTrainedTokenizerBase, *, tokens: int, epochs: int) -> None:
    """Refuses, before any work, a text that ends before its share of `tokens` was predicted in `epochs` passes.

    Counts the tokens of files of 64 MiB together at most, and no further than needed. Larger texts and data sets on
    the hub are not counted: there `EndOfText` says so.

    Raises:
        InputError: too few tokens, with the number of epochs that suffices; text that cannot be read.
    """
    for text, share in shares_of(texts).items():
        _check_enough(text, tokenizer, math.floor(tokens * share), epochs)


def _check_enough(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, epochs: int) -> None:
    files = local_files(text)
    if not files or sum(file.stat().st_size for file in files) > _COUNTED_BYTES:
        return
    # The first token of the stream is not predicted.
    needed = tokens + 1
    num_tokens = _count(Documents(text), tokenizer, math.ceil(needed / epochs))
    if num_tokens * epochs >= needed:
        return
    if num_tokens == 0:
        raise too_short(text, 0, 0)
    passes = "" if epochs == 1 else f" in {epochs} epochs"
    first = " and the first is not predicted" if num_tokens * epochs == tokens else ""
    raise InputError(
        f"{text} has {num_tokens:,} tokens{first}, {tokens:,} are asked for{passes}: "
        f"give --epochs {math.ceil(needed / num_tokens)}, fewer --tokens, or more text"
    )


def _count(documents: Documents, tokenizer: PreTrainedTokenizerBase, enough: int) -> int:
    """Tokens of all documents, or of as many as have `enough`."""
    num_tokens = 0
    for ids in documents.tokens(tokenizer):
        num_tokens += len(ids)
        if num_tokens >= enough:
            break
    return num_tokens
