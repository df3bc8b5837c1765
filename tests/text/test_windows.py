import gzip
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexigpt import InputError
from flexigpt.text import calibration_windows, check_window_length, text_fingerprint, tokenize_text
from flexigpt.text import windows as text_windows
from flexigpt.text.windows import Documents, tokenize

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
def test_rows_are_documents(tmp_path: Path, kind: str) -> None:
    assert list(Documents(write(tmp_path, kind, [*DOCUMENTS, ""]))) == DOCUMENTS
    assert list(Documents(write(tmp_path, kind, [*DOCUMENTS, ""], "body") + "#body")) == DOCUMENTS


def test_a_column_is_part_of_the_name_of_a_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """In whatever way files are named, for all that is made of a text."""
    path = write(tmp_path, ".jsonl", DOCUMENTS, "a body")
    for name in (path, str(tmp_path), str(tmp_path / "*.jsonl")):
        assert list(Documents(f"{name}#a body")) == DOCUMENTS
    for made in (
        tokenize_text(f"{path}#a body", tokenizer, window_length=8).ids[:8],
        calibration_windows(f"{path}#a body", tokenizer, windows=1, window_length=8, seed=0)[0],
    ):
        assert made[0] == 1
        assert len(made) == 8
    fingerprints = {text_fingerprint(name) for name in (path, f"{path}#a body", f"{path}#other")}
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    "place", ["part#1.jsonl", "chapters#1", "chapters#1/*.jsonl", "part#?.jsonl", "parts#all/a.jsonl"]
)
def test_a_path_may_hold_what_divides_off_a_column(tmp_path: Path, place: str) -> None:
    (tmp_path / "chapters#1").mkdir()
    (tmp_path / "parts#all").mkdir()
    for name in ("part#1.jsonl", "chapters#1/a.jsonl", "parts#all/a.jsonl"):
        Path(write(tmp_path, ".jsonl", DOCUMENTS)).rename(tmp_path / name)
    assert list(Documents(str(tmp_path / place))) == DOCUMENTS
    assert list(Documents(str(tmp_path / f"{place}#text"))) == DOCUMENTS
    with pytest.raises(InputError, match=r"has no column 'body': its columns are 'id', 'text'; give .*#COLUMN"):
        list(Documents(str(tmp_path / f"{place}#body")))


def test_a_missing_file_with_a_column_is_called_missing(tmp_path: Path) -> None:
    for name in ("nowhere.jsonl#body", "nowhere#1.jsonl", "no#where/a.jsonl"):
        with pytest.raises(InputError, match=r"text file .*\.jsonl is not there"):
            Documents(str(tmp_path / name))
    with pytest.raises(InputError, match=r"names no column: give .*\.jsonl#COLUMN, or leave the # out"):
        Documents(write(tmp_path, ".jsonl", DOCUMENTS) + "#")
    with pytest.raises(InputError, match="the name of the text is empty"):
        Documents("#body")


def test_a_home_folder_that_the_shell_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, or in the middle of a word, as in --perplexity=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = write(tmp_path, ".jsonl", DOCUMENTS, "body")
    for name in ("~/documents.jsonl#body", "~/*.jsonl#body", "~#body"):
        assert list(Documents(name)) == DOCUMENTS
        assert text_fingerprint(name) == text_fingerprint(f"{path}#body")


@pytest.mark.parametrize(
    "name", ["./texts", "~/texts", "here/texts", "a/b/texts", "here/texts#body", "my texts", "x" * 300]
)
def test_a_missing_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=r"^no such text file or folder: .*(texts|xxx)$"):
        Documents(name)


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "x" * 300 + "*", "#".join(["x" * 300] * 2)])
def test_a_name_that_is_too_long_for_a_file_is_one_clear_line(name: str) -> None:
    with pytest.raises(InputError, match=r"is not there: give|no text file is in or|no such text file"):
        Documents(name)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert list(Documents(write(tmp_path, ".txt", DOCUMENTS))) == ["\n".join(DOCUMENTS)]


MARKED = b"\xef\xbb\xbf"
LINES = "One line.\n\nAnother, \u00e0 la fin.\nA last one without an end"


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        (".txt", [LINES.encode()]),
        (".txt", [MARKED + LINES.encode()]),
        (".txt", [MARKED + LINES.replace("\n", "\r\n").encode()]),
        (".txt", [LINES.replace("\n", "\r").encode()]),
        (".txt", [MARKED, MARKED + LINES.encode()]),
        (".jsonl", [json.dumps({"text": LINES}).encode()]),
        (".jsonl", [MARKED + b'\n{"text": ""}\r\n' + json.dumps({"text": LINES}).encode() + b"\r\n\r\n"]),
        (".jsonl", [b'{"text": ""}', MARKED + json.dumps({"text": LINES}, ensure_ascii=False).encode()]),
        (".jsonl.gz", [gzip.compress(MARKED + json.dumps({"text": LINES}).encode())]),
        (".parquet", [pa.array([LINES])]),
        (".parquet", [pa.array(["", None, LINES], pa.large_string())]),
        (".parquet", [pa.array([None, LINES, ""], pa.string_view())]),  # as Polars writes it
        (".parquet", [pa.array([LINES], pa.string_view()), pa.array([""])]),
        (".parquet", [pa.array([LINES]), pa.array([""], pa.string_view())]),
        (".parquet", [pa.array([LINES, LINES]).dictionary_encode().slice(1)]),
    ],
)
def test_the_same_text_is_the_same_in_every_kind_of_file(
    tmp_path: Path, kind: str, contents: list[bytes | pa.Array], seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte order marks and ends of lines are the file's; documents without text are none; other columns are unread."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # after shuffling Parquet files
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}{kind}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            # `datasets` knows no type for what is in the first.
            others = {"map": pa.array([[("a", "b")]] * len(content), pa.map_(pa.string(), pa.string()))}
            pq.write_table(
                pa.table(others | {"view": pa.array([b""] * len(content), pa.binary_view()), "text": content}), path
            )
    documents = Documents(str(tmp_path), seed)
    assert list(documents) == [LINES]
    assert documents.num_bytes == len(LINES.encode())


def byte_level(regex: str | None) -> Tokenizer:
    """As GPT-2's, or, by its regular expression, as LLaMA 3's."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=regex is None, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    return made


def llama_2() -> Tokenizer:
    """The document is not split before merges are made, and begins with a space."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Replace("\u2581", " ")
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return made


LLAMA_3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: byte_level(None),
    "LLaMA 3": lambda: byte_level(LLAMA_3),
    "LLaMA 2": llama_2,
    "unigram": unigram,
}


def trained(name: str, example: Path) -> PreTrainedTokenizerBase:
    """A small tokenizer of that kind; "shipped": the example's."""
    if name == "shipped":
        return AutoTokenizer.from_pretrained(example)
    made = TOKENIZERS[name]()
    special = ["<unk>", "<s>", "</s>"]
    kind = trainers.UnigramTrainer if name == "unigram" else trainers.BpeTrainer
    words = [" ".join(prose(example).split()[:3000])] if name != "LLaMA 2" else prose(example)[:9000].split(" ")
    made.train_from_iterator(
        words, kind(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def prose(example: Path) -> str:
    row = (example / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return json.loads(row)["text"]


@pytest.mark.parametrize("name", ["shipped", *TOKENIZERS])
def test_a_long_document_has_the_tokens_that_it_has_as_a_whole(
    example: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever pieces it is read; even where no end of a word is near, and where a repetition hides the place."""
    tokenizer = trained(name, example)
    odd = [
        "x" * 900,
        " " * 700,
        "\n" * 300,
        "ha" * 400,
        "</s>",
        "e\u0301 \U0001f600\u200d " * 80,
        "12345 " * 150,
        "\t- ",
    ]
    text = "".join(
        part + some
        for part, some in zip([prose(example)[at : at + 700] for at in range(0, 9000, 700)], odd * 2, strict=False)
    )
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    for piece in (700, 1111, 5000):
        monkeypatch.setattr(text_windows, "_PIECE", piece)
        monkeypatch.setattr(text_windows, "_UNSURE", 64)
        found = tokenize_text(str(tmp_path / "text.txt"), tokenizer, window_length=2)
        assert found.ids.tolist() == [1, *expected, 2] == tokenize(text, tokenizer)
        assert found.num_bytes == len(text.encode())


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_no_more_of_a_document_is_tokenised_than_windows_need(
    example: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, sizes = AutoTokenizer.from_pretrained(example), []
    path = write(tmp_path, kind, ["It was the best of times. " * 20_000])
    whole = tokenize_text(path, tokenizer, window_length=2).ids
    original = text_windows._placed

    def noted(text: str, *arguments: object) -> object:
        sizes.append(len(text))
        return original(text, *arguments)

    monkeypatch.setattr(text_windows, "_placed", noted)
    few = calibration_windows(path, tokenizer, windows=2, window_length=64, seed=0)
    assert torch.equal(few.flatten(), whole[:128])
    assert sum(sizes) == text_windows._PIECE
    if kind == ".txt":
        os.truncate(path, 2 * text_windows._PIECE)
        with open(path, "ab") as file:
            file.write(b"\xff and so on")  # is not read
        assert torch.equal(calibration_windows(path, tokenizer, windows=2, window_length=64, seed=0), few)


def test_a_seed_shuffles_the_documents(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", [str(i) for i in range(50)])
    first, again, other = (list(Documents(path, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(Documents(path))


def test_names_are_not_patterns(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.jsonl").write_text(json.dumps({"text": "starred"}))
    (tmp_path / "a1x.jsonl").write_text(json.dumps({"text": "other"}))
    assert list(Documents(str(tmp_path / "a[1]*.jsonl"))) == ["starred"]


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
        list(Documents(str(tmp_path / name)))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet", ".txt"])
def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path, kind: str) -> None:
    for name, document in zip("cab", DOCUMENTS, strict=True):
        (tmp_path / name).mkdir()
        Path(write(tmp_path / name, kind, [document])).rename(tmp_path / f"{name}{kind}")
    (tmp_path / "README.md").write_text("not a text to read")
    expected = [DOCUMENTS[1], DOCUMENTS[2], DOCUMENTS[0]]
    assert list(Documents(str(tmp_path))) == expected
    assert list(Documents(str(tmp_path / f"[ab]*{kind}"))) == expected[:2]
    assert list(Documents(str(tmp_path / f"?{kind}"))) == expected
    if kind != ".parquet":  # `datasets` sleeps for five seconds after shuffling several of them
        shuffled = list(Documents(str(tmp_path), seed=1))
        assert shuffled == list(Documents(str(tmp_path), seed=1))
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
        assert list(Documents(str(tmp_path))) == expected
    else:
        with pytest.raises(InputError, match="holds no text"):
            list(Documents(str(tmp_path)))


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
        list(Documents(str(tmp_path / pattern)))
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
        list(Documents("nobody/nothing:config@train"))
    assert "\n" not in str(raised.value)


def test_documents_stand_between_separators(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = tokenize_text(write(tmp_path, ".jsonl", DOCUMENTS), tokenizer, window_length=2)
    expected = [
        token for document in DOCUMENTS for token in (1, *tokenizer(document, add_special_tokens=False)["input_ids"], 2)
    ]
    assert text.ids.tolist() == expected
    assert text.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_one_token_that_begins_and_ends_separates_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 and GPT-NeoX use one token for both; tokenizers without a beginning token only end."""
    assert tokenize("", tokenizer) == [1, 2]
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path, bos_token="</s>")
    assert tokenize("", other) == [2]
    assert tokenize("A", other)[0] == 2
    other.bos_token = None
    assert tokenize("", other) == [2]
    assert tokenize("A", other)[-1] == 2


def test_calibration_windows_are_the_shuffled_text_cut(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    windows = calibration_windows(str(text), tokenizer, windows=5, window_length=64, seed=3)
    assert windows.shape == (5, 64)
    assert windows.dtype == torch.int64
    joined = [
        token
        for document in Documents(str(text), seed=3)
        for token in (1, *tokenizer(document, add_special_tokens=False)["input_ids"], 2)
    ]
    assert windows.flatten().tolist() == joined[: 5 * 64]


def test_a_short_text_gives_fewer_windows(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    tokens = len(tokenize_text(str(text), tokenizer, window_length=2).ids)
    windows = calibration_windows(str(text), tokenizer, windows=10**6, window_length=100, seed=0)
    assert windows.shape == (tokens // 100, 100)


def test_fewer_tokens_than_a_window_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", DOCUMENTS[:1])
    with pytest.raises(InputError, match=r"tokens, fewer than one window of 64.*--window-length"):
        calibration_windows(path, tokenizer, windows=1, window_length=64, seed=0)
    with pytest.raises(InputError, match="fewer than one window of 64"):
        tokenize_text(path, tokenizer, window_length=64)


def test_text_of_empty_documents_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", ["", ""])
    with pytest.raises(InputError, match="holds no text"):
        calibration_windows(path, tokenizer, windows=1, window_length=64, seed=0)


def test_window_length_fits_the_context() -> None:
    assert check_window_length(None, LlamaConfig(max_position_embeddings=512)) == 512
    assert check_window_length(None, LlamaConfig(max_position_embeddings=131072)) == 2048
    assert check_window_length(100, GPT2Config(n_positions=1024)) == 100
    for length in (1, 1025):
        with pytest.raises(InputError, match="give 2 to 1024"):
            check_window_length(length, GPT2Config(n_positions=1024))


def test_utf_16_without_a_mark_is_not_taken_for_utf_8(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("It was a dark and stormy night.".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"text\.txt holds NUL characters.*: save it as UTF-8"):
        list(Documents(str(tmp_path / "text.txt")))
