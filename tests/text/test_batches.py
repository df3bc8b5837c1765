import gzip
import json
import random
import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexigpt import InputError
from flexigpt.text import EndOfText, TrainingStream, batches, check_enough, iterate, text_fingerprint

KINDS = [".jsonl", ".jsonl.gz", ".parquet", ".txt"]
LENGTH = 8
# Of 0 to 25 words: some end within a window, some fill several, one is passed over.
DOCUMENTS = [" ".join(f"word{j}" for j in range(i * 7 % 26)) for i in range(26)]


@pytest.fixture(scope="module")
def tokenizer(example: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(example)


def write(path: Path, documents: list[str]) -> None:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), path, row_group_size=3)
    else:
        (document,) = documents
        path.write_text(document)


@pytest.fixture
def single(tmp_path: Path) -> str:
    """One file of all the documents."""
    write(tmp_path / "single.jsonl", DOCUMENTS)
    return str(tmp_path / "single.jsonl")


def write_several(folder: Path, kind: str) -> str:
    """Files of some, of no and of many rows; of a document each for .txt."""
    folder.mkdir()
    cuts = [0, 1, 5, 26] if kind in (".jsonl", ".txt") else [0, 1, 1, 5, 26, 26]
    parts = [[d] for d in DOCUMENTS if d] if kind == ".txt" else [DOCUMENTS[a:b] for a, b in pairwise(cuts)]
    for number, documents in enumerate(parts):
        write(folder / f"part-{number:02}{kind}", documents)
    return str(folder)


def take(stream: TrainingStream, count: int = 1) -> list[list[list[int]]]:
    """Batches of `count` windows until the text ends."""
    taken = []
    while True:
        try:
            taken.append(stream.next_windows(count).tolist())
        except EndOfText:
            return taken


def reference(tokenizer: PreTrainedTokenizerBase, seed: int, epochs: int, run_documents: int) -> list[list[int]]:
    """The windows by slicing one list of all tokens."""
    tokens = []
    for epoch in range(epochs):
        documents = [document for document in DOCUMENTS if document]
        for run, start in enumerate(range(0, len(documents), run_documents)):
            part = documents[start : start + run_documents]
            random.Random(f"{seed} {epoch} {run}").shuffle(part)
            for document in part:
                tokens += [1, *tokenizer(document, add_special_tokens=False)["input_ids"], 2]
    return [tokens[k : k + LENGTH + 1] for k in range(0, len(tokens) - LENGTH, LENGTH)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("run_documents", [4, 10_000])
def test_windows_are_the_shuffled_documents_joined_and_cut(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str, several: bool, run_documents: int
) -> None:
    if several or kind == ".txt":
        text = write_several(tmp_path / "parts", kind)
    else:
        text = str(tmp_path / f"documents{kind}")
        write(Path(text), DOCUMENTS)
    stream = TrainingStream(text, tokenizer, window_length=LENGTH, seed=5, epochs=2, run_documents=run_documents)
    first = stream.next_windows(3)
    assert first.shape == (3, LENGTH + 1)
    assert first.dtype == torch.int64
    windows = [*first.tolist(), *(batch[0] for batch in take(stream))]
    assert windows == reference(tokenizer, 5, 2, run_documents)


def test_every_token_but_the_first_is_predicted_once(single: str, tokenizer: PreTrainedTokenizerBase) -> None:
    windows = [batch[0] for batch in take(TrainingStream(single, tokenizer, window_length=LENGTH, seed=0))]
    predicted = [token for window in windows for token in window[1:]]
    inputs = [token for window in windows for token in window[:-1]]
    assert predicted[:-1] == inputs[1:]
    every = [t for d in DOCUMENTS if d for t in (1, *tokenizer(d, add_special_tokens=False)["input_ids"], 2)]
    assert len(every) - LENGTH <= len(predicted) + 1 <= len(every)
    assert max(predicted.count(token) - every.count(token) for token in set(predicted)) == 0


def test_the_order_is_of_the_seed_and_the_epoch(single: str, tokenizer: PreTrainedTokenizerBase) -> None:
    def windows(seed: int, count: int = 1) -> list[list[int]]:
        stream = TrainingStream(single, tokenizer, window_length=LENGTH, seed=seed, epochs=3, run_documents=9)
        return [window for batch in take(stream, count) for window in batch]

    assert windows(1) == windows(1)
    assert windows(1) != windows(2)
    # Taken four at a time, up to three at the end are too few for a batch.
    assert windows(1, 4) == windows(1)[: len(windows(1)) // 4 * 4]
    text = tokenizer.decode([token for window in windows(1) for token in window[:-1]])
    documents = [document.removesuffix("</s>").strip() for document in text.split("<s>")[1:]]
    number = sum(1 for document in DOCUMENTS if document)
    first, second = documents[:number], documents[number : 2 * number]
    assert sorted(first) == sorted(second) == sorted(filter(None, DOCUMENTS))
    assert first != second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run_documents", [4, 10_000])
def test_resumed_anywhere_equals_uninterrupted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str, run_documents: int
) -> None:
    text = write_several(tmp_path / "parts", kind)

    def new() -> TrainingStream:
        return TrainingStream(text, tokenizer, window_length=LENGTH, seed=3, epochs=2, run_documents=run_documents)

    stream = new()
    states, expected = [stream.state_dict()], []
    while len(expected) < 10**6:
        try:
            expected.append(stream.next_windows(3).tolist())
        except EndOfText:
            break
        states.append(stream.state_dict())
    assert len(expected) > 30
    resumed = new()
    for step, state in enumerate(states):
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        assert take(resumed, 3) == expected[step:], step
    assert max(len(json.dumps(state)) for state in states) < 1000


def test_resumed_again_and_again_equals_uninterrupted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = write_several(tmp_path / "parts", ".parquet")

    def new() -> TrainingStream:
        return TrainingStream(text, tokenizer, window_length=LENGTH, seed=3, epochs=2, run_documents=2)

    expected = take(new(), 5)
    state, resumed = new().state_dict(), []
    for _ in expected:
        stream = new()
        stream.load_state_dict(state)
        resumed.append(stream.next_windows(5).tolist())
        state = json.loads(json.dumps(stream.state_dict()))
    assert resumed == expected


def test_a_run_ends_early_where_documents_are_long(
    single: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_RUN_CHARACTERS", 1)
    windows = [batch[0] for batch in take(TrainingStream(single, tokenizer, window_length=LENGTH, seed=0))]
    assert windows == reference(tokenizer, 0, 1, run_documents=1)


def test_the_end_of_the_text_is_told(single: str, tokenizer: PreTrainedTokenizerBase) -> None:
    every = [t for d in DOCUMENTS if d for t in (1, *tokenizer(d, add_special_tokens=False)["input_ids"], 2)]
    for epochs in (1, 3):
        stream = TrainingStream(single, tokenizer, window_length=LENGTH, seed=0, epochs=epochs)
        expected = reference(tokenizer, 0, epochs, 10_000)
        stream.next_windows(len(expected) - 1)
        reason = (
            f"single.jsonl ends after {len(every) * epochs:,} tokens with --epochs {epochs}: give --epochs {epochs + 1}"
        )
        with pytest.raises(EndOfText, match=reason):
            stream.next_windows(2)
        # A batch that is too large takes nothing.
        assert stream.next_windows(1).tolist() == expected[-1:]
        with pytest.raises(EndOfText, match=reason):
            stream.next_windows(1)


def test_more_epochs_go_on_after_the_end(single: str, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TrainingStream(single, tokenizer, window_length=LENGTH, seed=0)
    first = take(stream)
    longer = TrainingStream(single, tokenizer, window_length=LENGTH, seed=0, epochs=2)
    longer.load_state_dict(stream.state_dict())
    assert [window for batch in first + take(longer) for window in batch] == reference(tokenizer, 0, 2, 10_000)


def test_a_text_shorter_than_a_window_is_refused_at_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "short.jsonl"
    write(path, ["", ""])
    with pytest.raises(InputError, match=r"short.jsonl holds no text"):
        TrainingStream(str(path), tokenizer, window_length=LENGTH, seed=0, epochs=9)
    write(path, ["It was the best of times."])
    tokens = 2 + len(tokenizer("It was the best of times.", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match=rf"has {tokens} tokens, fewer than one window of {tokens} .*--window-length"):
        TrainingStream(str(path), tokenizer, window_length=tokens, seed=0, epochs=9)
    stream = TrainingStream(str(path), tokenizer, window_length=tokens - 1, seed=0)
    assert stream.next_windows(1).shape == (1, tokens)


def test_errors_of_reading_leave_the_stream_where_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "b.jsonl").write_text('{"body": "another column"}\n')
    stream = TrainingStream(str(tmp_path), tokenizer, window_length=LENGTH, seed=0, run_documents=10)
    expected = reference(tokenizer, 0, 1, 10)
    taken: list[list[list[int]]] = []

    def take_all() -> None:
        while True:
            states.append(stream.state_dict())
            taken.append(stream.next_windows(1).tolist())

    states = [stream.state_dict()]
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be read from") as raised:
            take_all()
        assert not isinstance(raised.value, EndOfText)
        assert stream.state_dict() == states[-1]
    assert len(taken) > 5
    assert [batch[0] for batch in taken] == expected[: len(taken)]


@pytest.fixture
def stream(single: str, tokenizer: PreTrainedTokenizerBase) -> TrainingStream:
    return TrainingStream(single, tokenizer, window_length=LENGTH, seed=0, run_documents=4)


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flexigpt")]


def test_iterating_gives_batches_and_the_states_after_them(
    stream: TrainingStream, single: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = reference(tokenizer, 0, 1, 4)
    given = list(iterate(stream, 2, 5))
    assert [window for windows, _ in given for window in windows.tolist()] == expected[:10]
    assert stream.state_dict() == given[-1][1]
    other = TrainingStream(single, tokenizer, window_length=LENGTH, seed=0, run_documents=4)
    for step, (_, state) in enumerate(given, start=1):
        other.load_state_dict(state)
        assert other.next_windows(1).tolist() == [expected[2 * step]]
    assert not our_threads()
    assert list(iterate(stream, 2, 0)) == []


def test_the_next_batch_is_prepared_while_the_caller_computes(
    stream: TrainingStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = [threading.Event() for _ in range(4)]
    events, original = iter(prepared), stream.next_windows

    def noted(count: int) -> torch.Tensor:
        windows = original(count)
        next(events).set()
        return windows

    monkeypatch.setattr(stream, "next_windows", noted)
    running = iterate(stream, 1, 4)
    next(running)
    assert prepared[1].wait(60)
    assert not prepared[2].is_set()
    running.close()
    assert not our_threads()


def test_an_error_comes_out_at_its_batch(stream: TrainingStream, tokenizer: PreTrainedTokenizerBase) -> None:
    windows = len(reference(tokenizer, 0, 1, 4))
    assert len(list(iterate(stream, 1, windows))) == windows
    running = iterate(stream, 1, 2)
    with pytest.raises(EndOfText):
        next(running)
    assert not our_threads()


def test_the_last_batch_comes_before_the_end(single: str, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TrainingStream(single, tokenizer, window_length=LENGTH, seed=0)
    windows = len(reference(tokenizer, 0, 1, 10_000))
    running = iterate(stream, 1, windows + 5)
    assert len(list(islice(running, windows))) == windows
    with pytest.raises(EndOfText):
        next(running)
    assert not our_threads()


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    def of(folder: str, **contents: bytes) -> str:
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / f"{name}.txt").write_bytes(content)
        return text_fingerprint(str(tmp_path / folder))

    mib = 2**20
    long = b"x" * (3 * mib)
    same = of("first", a=b"one", b=b"two")
    assert of("moved", b=b"two", a=b"one") == same
    assert text_fingerprint(str(tmp_path / "first" / "*.txt")) == same
    assert len(same) == 16
    others = [
        of("content", a=b"one", b=b"twx"),
        of("name", a=b"one", c=b"two"),
        of("fewer", a=b"one"),
        of("swapped", a=b"two", b=b"one"),
        of("long", a=long),
        of("longer", a=long + b"x"),
        of("head", a=b"y" + long[1:]),
        of("tail", a=long[1:] + b"y"),
        text_fingerprint("nobody/nothing"),
        text_fingerprint("nobody/nothing@train"),
    ]
    assert len({same, *others}) == 1 + len(others)
    with pytest.raises(InputError, match="is not there"):
        text_fingerprint(str(tmp_path / "missing.txt"))


def test_too_little_text_is_refused_before_the_work(single: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = sum(2 + len(tokenizer(d, add_special_tokens=False)["input_ids"]) for d in DOCUMENTS if d)

    def check(wanted: int, epochs: int) -> None:
        check_enough(single, tokenizer, tokens=wanted, epochs=epochs)

    check(tokens - 1, 1)
    check(3 * tokens - 1, 3)
    with pytest.raises(InputError, match=rf"single.jsonl has {tokens:,} tokens and the first is not .* --epochs 2, "):
        check(tokens, 1)
    with pytest.raises(InputError, match=rf"{tokens:,} tokens, {tokens + 5:,} are asked for: give --epochs 2, few"):
        check(tokens + 5, 1)
    with pytest.raises(InputError, match=r"are asked for in 2 epochs: give --epochs 4, fewer --tokens, or more text"):
        check(3 * tokens, 2)
    # The number of epochs it tells is the smallest that the stream, with windows of one token, agrees with.
    for epochs, enough in ((3, False), (4, True)):
        stream = TrainingStream(single, tokenizer, window_length=1, seed=0, epochs=epochs)
        if enough:
            stream.next_windows(3 * tokens)
        else:
            with pytest.raises(EndOfText):
                stream.next_windows(3 * tokens)


def test_no_more_is_counted_than_needed(
    single: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> Iterator[Iterator[str]]:
        yield iter(["It was the best of times, it was the worst of times"])
        pytest.fail("read on")

    monkeypatch.setattr(batches.Documents, "pieces", forbidden)
    check_enough(single, tokenizer, tokens=8, epochs=1)
    check_enough("nobody/nothing", tokenizer, tokens=10**9, epochs=1)
    monkeypatch.setattr(batches, "_COUNTED_BYTES", 10)
    check_enough(single, tokenizer, tokens=10**9, epochs=1)


def test_no_text_is_not_enough(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "empty.jsonl", [""])
    with pytest.raises(InputError, match="holds no text"):
        check_enough(str(tmp_path / "empty.jsonl"), tokenizer, tokens=1, epochs=1)
