import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerBase

from flexigpt import InputError
from flexigpt.text import calibration_windows, check_window_length, tokenize_text
from flexigpt.text.windows import Documents, Separators, read_documents

DOCUMENTS = ["It was the best of times.", "Call me Ishmael.\nSome years ago -- never mind how long.", "Ça alors!"]


@pytest.fixture(scope="module")
def tokenizer(example: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(example)


def write(folder: Path, kind: str, documents: list[str], column: str = "text") -> str:
    path = folder / f"documents{kind}"
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents))
    if kind == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(documents))), column: documents}), path)
    else:
        path.write_text("\n".join(documents), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_rows_are_documents(tmp_path: Path, kind: str, column: str) -> None:
    path = write(tmp_path, kind, [*DOCUMENTS, ""], column)
    assert list(read_documents(path, column)) == DOCUMENTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path, ".txt", DOCUMENTS))) == ["\n".join(DOCUMENTS)]


def test_a_seed_shuffles_the_documents(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", [str(i) for i in range(50)])
    first, again, other = (list(read_documents(path, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(read_documents(path))


def test_names_are_not_patterns(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.jsonl").write_text(json.dumps({"text": "starred"}))
    (tmp_path / "a1x.jsonl").write_text(json.dumps({"text": "other"}))
    assert list(read_documents(str(tmp_path / "a[1]*.jsonl"))) == ["starred"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jsonl", None, "is not there"),
        ("empty.jsonl", b"", "is empty"),
        ("empty.txt", b"", "is empty"),
        ("words.docx", b"words", "unknown kind"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read from"),
        ("broken.parquet", b"PAR1 and nothing else", "cannot be read from"),
        ("broken.jsonl.gz", b"not gzip", "cannot be read from"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "cannot be read from"),
        ("other.jsonl", b'{"body": "a", "title": "b"}\n', "no column 'text': its columns are 'body', 'title'"),
        ("numbers.jsonl", b'{"text": 3}\n', "holds int: expected text"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_text_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        list(read_documents(str(tmp_path / name)))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet", ".txt"])
def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path, kind: str) -> None:
    for name, document in zip("cab", DOCUMENTS, strict=True):
        (tmp_path / name).mkdir()
        Path(write(tmp_path / name, kind, [document])).rename(tmp_path / f"{name}{kind}")
    (tmp_path / "README.md").write_text("not a text to read")
    expected = [DOCUMENTS[1], DOCUMENTS[2], DOCUMENTS[0]]
    assert list(read_documents(str(tmp_path))) == expected
    assert list(read_documents(str(tmp_path / f"[ab]*{kind}"))) == expected[:2]
    assert list(read_documents(str(tmp_path / f"?{kind}"))) == expected
    if kind != ".parquet":  # `datasets` sleeps for five seconds after shuffling several of them
        shuffled = list(read_documents(str(tmp_path), seed=1))
        assert shuffled == list(read_documents(str(tmp_path), seed=1))
        assert sorted(shuffled) == sorted(expected)


@pytest.mark.parametrize("kind", [".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("rows", [(0, 2, 0, 1), (1, 0), (0, 0)])
def test_files_without_rows_give_nothing(tmp_path: Path, kind: str, rows: tuple[int, ...]) -> None:
    for number, count in enumerate(rows):
        path = tmp_path / f"{number}{kind}"
        if kind == ".parquet":
            pq.write_table(pa.table({"text": pa.array([str(number)] * count, pa.string())}), path)
        else:
            path.write_bytes(gzip.compress(f'{{"text": "{number}"}}\n'.encode() * count, mtime=0))
    if kind == ".parquet" or sum(rows):
        expected = [str(number) for number, count in enumerate(rows) for _ in range(count)]
        assert list(read_documents(str(tmp_path))) == expected
    else:
        with pytest.raises(InputError, match="holds no text"):
            list(read_documents(str(tmp_path)))


ROW = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("contents", "pattern", "reason"),
    [
        ({"a.jsonl": ROW, "b.jsonl": b""}, "", r"b\.jsonl is empty: remove it or"),
        ({"a.jsonl": ROW, "b.jsonl": b""}, "*.jsonl", r"b\.jsonl is empty: remove it or"),
        ({"a.jsonl": ROW, "b.txt": b"b"}, "", r"different kinds \(a\.jsonl, b\.txt\): give files of one kind"),
        ({"a.jsonl": ROW, "a.jsonl.gz": gzip.compress(ROW)}, "a*", "different kinds"),
        ({"a.jsonl": ROW, "b.md": b"b"}, "*", r"b\.md is of an unknown kind"),
        ({"a.jsonl": ROW}, "*.parquet", r"no text file is in or matches .*\*\.parquet: give \.txt, \.jsonl"),
        ({"README.md": b"a"}, "", r"no text file is in or matches"),
        ({"a.jsonl": ROW, "b.jsonl": b'{"body": "b"}\n'}, "", r"from .*b\.jsonl \(of .*: .*because column names"),
        ({"a.jsonl": b'{"text": null}\n', "b.jsonl": ROW}, "", r"from .*b\.jsonl \(of .*string to null"),
        ({"a.jsonl.gz": gzip.compress(ROW), "b.jsonl.gz": gzip.compress(ROW * 999)[:-20]}, "?.*", r"b\.jsonl\.gz \(of"),
    ],
)
def test_files_that_cannot_be_used_together_are_one_clear_line(
    tmp_path: Path, contents: dict[str, bytes], pattern: str, reason: str
) -> None:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        list(read_documents(str(tmp_path / pattern)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet", ".txt"])
def test_documents_go_on_from_a_kept_place(tmp_path: Path, kind: str) -> None:
    for number, count in enumerate([1] * 4 if kind == ".txt" else [1, 5, 3]):
        (tmp_path / str(number)).mkdir()
        path = write(tmp_path / str(number), kind, [f"{number}-{row}" for row in range(count)])
        Path(path).rename(tmp_path / f"{number}{kind}")
    expected = list(Documents(str(tmp_path)))
    for place in range(len(expected) + 1):
        documents = Documents(str(tmp_path))
        assert list(islice(documents, place)) == expected[:place]
        # The place is kept while the reading goes on, and in a file.
        other = Documents(str(tmp_path))
        other.load_state_dict(json.loads(json.dumps(documents.state_dict())))
        assert list(other) == expected[place:]


def test_a_hub_data_set_that_cannot_be_reached_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="nobody/nothing") as raised:
        list(read_documents("nobody/nothing:config@train"))
    assert "\n" not in str(raised.value)


def test_documents_stand_between_separators(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = tokenize_text(write(tmp_path, ".jsonl", DOCUMENTS), tokenizer, column="text", window_length=2)
    expected = [
        token for document in DOCUMENTS for token in (1, *tokenizer(document, add_special_tokens=False)["input_ids"], 2)
    ]
    assert text.ids.tolist() == expected
    assert text.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_one_token_that_begins_and_ends_separates_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 and GPT-NeoX use one token for both; tokenizers without a beginning token only end."""
    assert Separators.of(tokenizer) == Separators(before=[1], after=[2])
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path, bos_token="</s>")
    assert Separators.of(other) == Separators(before=[2], after=[])
    other.bos_token = None
    assert Separators.of(other) == Separators(before=[], after=[2])


def test_calibration_windows_are_the_shuffled_text_cut(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    windows = calibration_windows(str(text), tokenizer, column="text", windows=5, window_length=64, seed=3)
    assert windows.shape == (5, 64)
    assert windows.dtype == torch.int64
    joined = [
        token
        for document in read_documents(str(text), seed=3)
        for token in (1, *tokenizer(document, add_special_tokens=False)["input_ids"], 2)
    ]
    assert windows.flatten().tolist() == joined[: 5 * 64]


def test_a_short_text_gives_fewer_windows(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    tokens = len(tokenize_text(str(text), tokenizer, column="text", window_length=2).ids)
    windows = calibration_windows(str(text), tokenizer, column="text", windows=10**6, window_length=100, seed=0)
    assert windows.shape == (tokens // 100, 100)


def test_fewer_tokens_than_a_window_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", DOCUMENTS[:1])
    with pytest.raises(InputError, match=r"tokens, fewer than one window of 64.*--window-length"):
        calibration_windows(path, tokenizer, column="text", windows=1, window_length=64, seed=0)
    with pytest.raises(InputError, match="fewer than one window of 64"):
        tokenize_text(path, tokenizer, column="text", window_length=64)


def test_text_of_empty_documents_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", ["", ""])
    with pytest.raises(InputError, match="holds no text"):
        calibration_windows(path, tokenizer, column="text", windows=1, window_length=64, seed=0)


def test_window_length_fits_the_context() -> None:
    assert check_window_length(None, LlamaConfig(max_position_embeddings=512)) == 512
    assert check_window_length(None, LlamaConfig(max_position_embeddings=131072)) == 2048
    assert check_window_length(100, GPT2Config(n_positions=1024)) == 100
    for length in (1, 1025):
        with pytest.raises(InputError, match="give 2 to 1024"):
            check_window_length(length, GPT2Config(n_positions=1024))
