"""Several texts in shares, for calibration and training."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import Run
from flexigpt import InputError
from flexigpt.text import EndOfText, MixedStream, TrainingStream, calibration_windows, check_enough, text_fingerprint

LENGTH = 8
WORDS = {"a": "whale", "b": "ship", "c": "captain"}


@pytest.fixture(scope="module")
def tokenizer(example: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(example)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Three texts of one word each, some forty windows long."""
    for name, word in WORDS.items():
        rows = (json.dumps({"text": " ".join([word] * (20 + number))}) for number in range(12))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {name: str(tmp_path / f"{name}.jsonl") for name in WORDS}


def whose(windows: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that each window is from, by its letter."""
    written = [tokenizer.decode(window, skip_special_tokens=True) for window in windows]
    return "".join(next(name for name, word in WORDS.items() if word in text) for text in written)


@pytest.mark.parametrize(
    ("mixture", "windows", "expected"),
    [
        (("a", "b"), 10, {"a": 5, "b": 5}),
        (("a", "b", "c"), 10, {"a": 4, "b": 3, "c": 3}),
        (("a=0.7", "b"), 10, {"a": 7, "b": 3}),
        (("a=0.5", "b=0.3", "c=0.2"), 20, {"a": 10, "b": 6, "c": 4}),
        (("a=0.8", "b", "c"), 20, {"a": 16, "b": 2, "c": 2}),
    ],
)
def test_each_text_gives_its_share_of_every_beginning(
    texts: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    mixture: tuple[str, ...],
    windows: int,
    expected: dict[str, int],
) -> None:
    named = [texts[text[0]] + text[1:] for text in mixture]
    found = calibration_windows(named, tokenizer, windows=windows, window_length=LENGTH, seed=3)
    order = whose(found, tokenizer)
    assert Counter(order) == expected
    for taken in range(1, windows + 1):
        assert all(abs(order[:taken].count(text) - taken * n / windows) < 1 for text, n in expected.items())
    for text, count in expected.items():
        alone = calibration_windows(texts[text], tokenizer, windows=count, window_length=LENGTH, seed=3)
        assert torch.equal(found[[letter == text for letter in order]], alone)
    stream = MixedStream(named, tokenizer, window_length=LENGTH, seed=3)
    assert whose(stream.next_windows(windows), tokenizer) == order


def test_a_text_that_is_short_leaves_the_others_their_windows(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("captain " * LENGTH)
    named = [texts["a"], str(tmp_path / "short.txt")]
    found = calibration_windows(named, tokenizer, windows=12, window_length=LENGTH, seed=0)
    assert 6 < len(found) < 12
    assert whose(found, tokenizer).count("a") == 6


def test_a_training_stream_takes_turns_and_goes_on_where_it_was(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    named = [f"{texts['a']}=0.25", texts["b"]]
    whole = MixedStream(named, tokenizer, window_length=LENGTH, seed=1).next_windows(24)
    for text, first in ((texts["a"], 6), (texts["b"], 18)):
        alone = TrainingStream(text, tokenizer, window_length=LENGTH, seed=1).next_windows(first)
        letter = Path(text).stem
        assert torch.equal(whole[[found == letter for found in whose(whole, tokenizer)]], alone)
    first = MixedStream(named, tokenizer, window_length=LENGTH, seed=1)
    parts = [first.next_windows(5)]
    again = MixedStream(named, tokenizer, window_length=LENGTH, seed=1)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(torch.cat([*parts, again.next_windows(19)]), whole)


def test_the_end_of_one_text_leaves_all_where_they_were(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    stream = MixedStream([f"{texts['a']}=0.9", texts["b"]], tokenizer, window_length=LENGTH, seed=1)
    stream.next_windows(10)
    before = stream.state_dict()
    with pytest.raises(EndOfText, match="jsonl ends after"):
        stream.next_windows(200)
    assert stream.state_dict() == before
    assert len(stream.next_windows(10)) == 10


def test_too_little_of_one_text_is_said_before_any_work(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    named = [f"{texts['a']}=0.1", texts["b"]]
    check_enough(named, tokenizer, tokens=250, epochs=1)
    with pytest.raises(InputError, match=r"b\.jsonl has \d+ tokens.*give --epochs 2"):
        check_enough(named, tokenizer, tokens=500, epochs=1)


def test_all_files_and_shares_make_the_fingerprint(texts: dict[str, str]) -> None:
    a, b = texts["a"], texts["b"]
    mixtures = [a, [a], [a, b], [b, a], [f"{a}=0.5", b], [f"{a}=0.4", b], [a, texts["c"]]]
    found = [text_fingerprint(mixture) for mixture in mixtures]
    assert found[0] == found[1]
    assert found[2] == found[4]
    assert len(set(found)) == 5


@pytest.mark.parametrize(
    ("mixture", "reason"),
    [
        (["a=0.7", "b=0.2"], "come to 0.9"),
        (["a=0.7", "b=0.5"], "come to 1.2"),
        (["a=0.7", "b=0.3", "c"], "come to 1"),
        (["a=0.7"], "come to 0.7"),
        (["a=1.5", "b"], "out of range"),
        (["a=-1", "b"], "out of range"),
        (["a", "a=0.5"], "named twice"),
        ([], "none is"),
        (["a=0.01", "b"], "less than one of 10 windows"),
        (["a=much", "b"], "=much"),
    ],
)
def test_shares_that_cannot_be_are_one_line(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], mixture: list[str], reason: str
) -> None:
    named = [texts[text[0]].removesuffix(".jsonl") + ".jsonl" + text[1:] for text in mixture]
    with pytest.raises(InputError, match=reason) as raised:
        calibration_windows(named, tokenizer, windows=10, window_length=LENGTH, seed=0)
    assert "\n" not in str(raised.value)


def test_a_path_may_hold_what_marks_a_share(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "year=2020"
    folder.mkdir()
    Path(texts["a"]).rename(folder / "a.jsonl")
    for named in (str(folder), f"{folder}/*.jsonl", f"{folder / 'a.jsonl'}"):
        found = calibration_windows([f"{named}=0.75", texts["b"]], tokenizer, windows=8, window_length=LENGTH, seed=0)
        assert Counter(whose(found, tokenizer)) == {"a": 6, "b": 2}


@pytest.mark.usefixtures("often")
def test_commands_take_a_mixture_and_say_so(
    run: Run, tiny_source: Path, text: Path, example: Path, tmp_path: Path
) -> None:
    other = example / "calibration.jsonl"
    calibrated = ("--calibration", f"{text}=0.25", "--calibration", other, "--windows", "4", "--window-length", "32")
    out = tmp_path / "out"
    code, printed, errors = run("prune", tiny_source, out, "--ratio", "0.3", *calibrated)
    assert code == 0, errors
    shown = f"25.0% {text} + 75.0% {other}"
    assert f"4 windows of 32 tokens of {shown}" in " ".join(printed.split())
    assert json.loads((out / "record.json").read_text())["options"]["calibration"] == [f"{text}=0.25", str(other)]
    trained = ("--data", other, "--data", f"{text}=0.25", "--tokens", "512", "--window-length", "32")
    asked = ("recover", out, tmp_path / "again", *trained, "--batch-tokens", "128")
    code, printed, errors = run(*asked)
    assert code == 0, errors
    assert f"512 tokens of 75.0% {other} + 25.0% {text} in 4 steps" in " ".join(printed.split())
    assert run("report", tmp_path / "again")[0] == 0
    assert run("prune", tiny_source, text.parent, "--ratio", "0.3", *calibrated)[2].count("lies in") == 1
