"""Prompts through chat templates, from standard input, answered by nothing; and conversations."""

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Run
from flexigpt import InputError
from flexigpt.decoding import ChatOptions, Conversation
from forks import Forks
from talking import expected


def type_in(monkeypatch: pytest.MonkeyPatch, typed: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))


def test_a_prompt_is_a_users_message_unless_raw(run: Run, talker: Path) -> None:
    asked = ("generate", talker, "--prompt", "It was a dark", "--max-new-tokens", 8)
    assert run(*asked) == (0, expected(talker, "user: It was a dark\nassistant:", 8) + "\n", "")
    raw = run(*asked, "--raw")
    assert raw == (0, expected(talker, "It was a dark", 8) + "\n", "")
    assert raw != run(*asked)


def test_a_prompt_comes_from_standard_input(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's last line end is not part of it; others are."""
    type_in(monkeypatch, "Né\n\nin\n".encode())
    asked = ("generate", talker, "--raw", "--max-new-tokens", 4, "--prompt", "-")
    assert run(*asked) == (0, expected(talker, "Né\n\nin", 4) + "\n", "")
    for typed, refusal in ((b"\n", "--prompt is empty"), (b"a\xff", "standard input is not valid UTF-8 at byte 1")):
        type_in(monkeypatch, typed)
        code, printed, errors = run(*asked)
        assert (code, printed, errors.count("\n")) == (2, "", 1)
        assert refusal in errors


def test_nothing_generated_is_said_and_why(run: Run, talker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(talker, folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("It was a dark", return_tensors="pt").input_ids
    first = int(model(ids).logits[0, -1].argmax())
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(first)})
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, first]}))
    code, printed, errors = run("generate", folder, "--raw", "--prompt", "It was a dark", "--max-new-tokens", 4)
    assert (code, printed) == (0, "\n")
    assert errors.startswith("nothing was generated: the model's first token is ")
    assert errors.endswith(", which ends the text\n")


def test_a_chat_remembers_until_it_is_reset(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, b"Hello\nAgain\n\n/reset\nAgain")
    code, printed, errors = run("chat", talker, "--max-new-tokens", 6)
    first = expected(talker, "user: Hello\nassistant:", 6)
    second = expected(talker, f"user: Hello\nassistant: {first}\nuser: Again\nassistant:", 6)
    alone = expected(talker, "user: Again\nassistant:", 6)
    assert second != alone
    assert (code, printed) == (0, f"{first}\n{second}\n{alone}\n")
    cut = "cut off after 6 tokens"
    assert errors.splitlines() == [cut, cut, "what was said is forgotten", cut]


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(talker: Path) -> None:
    conversation, heard = Conversation(str(talker), ChatOptions(max_new_tokens=12)), list[str]()

    def hear(piece: str) -> None:
        heard.append(piece)
        if "".join(heard).strip():
            raise KeyboardInterrupt

    assert conversation.answer("Hello", hear) == "interrupted"
    so_far, after = "".join(heard), list[str]()
    conversation.answer("Again", after.append)
    assert "".join(after) == expected(talker, f"user: Hello\nassistant: {so_far}\nuser: Again\nassistant:", 12)


def test_a_full_context_is_said_and_can_be_left(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, b"a " * 200 + b"\nHello\n")
    code, printed, errors = run("chat", talker, "--max-new-tokens", 2)
    assert (code, printed) == (0, expected(talker, "user: Hello\nassistant:", 2) + "\n")
    assert "tokens fill the model's context of 128: /reset begins anew" in errors.splitlines()[0]


def test_samples_repeat_after_a_reset(talker: Path) -> None:
    options = ChatOptions(temperature=2.0, seed=5, max_new_tokens=8)
    conversation, answers = Conversation(str(talker), options), list[str]()
    for _ in range(2):
        pieces: list[str] = []
        conversation.answer("Hello", pieces.append)
        answers.append("".join(pieces))
        torch.rand(1)
        conversation.reset()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("broken", ["{{ messages[9].content }}", "{% for m in"])
def test_a_template_that_fails_is_one_line(run: Run, talker: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(talker, tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text(broken)
    code, printed, errors = run("generate", tmp_path / "broken", "--prompt", "Hi", "--max-new-tokens", 2)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert "the tokenizer's chat template fails: " in errors
    assert "generate --raw" in errors


def test_nobody_talks_to_a_model_without_a_template(tiny_compact: Path) -> None:
    with pytest.raises(InputError, match="has no chat template, so nobody can talk to it: use flexigpt generate"):
        Conversation(str(tiny_compact), ChatOptions())


def read_until(end: int, mark: bytes) -> bytes:
    """What a terminal shows up to there, or in a minute, or until nobody writes to it."""
    seen = b""
    while mark not in seen and select.select([end], [], [], 60)[0]:
        try:
            seen += os.read(end, 4096)
        except OSError:
            break
    return seen


def test_a_terminal_has_a_sign_and_control_d_ends(talker: Path, forks: Forks) -> None:
    ours, theirs = pty.openpty()
    asked = ("-m", "flexigpt", "chat", talker, "--max-new-tokens", "3")
    talking = forks.start(*asked, streams=[os.ttyname(theirs)] * 3)
    try:
        assert b"Ctrl-D ends" in read_until(ours, b"> ")
        os.close(theirs)  # the program has opened it
        os.write(ours, b"Hello\n")
        assert b"cut off after 3 tokens" in read_until(ours, b"3 tokens")
        read_until(ours, b"> ")
        os.write(ours, b"\x04")
        assert talking.wait() == 0
    finally:
        talking.send_signal(signal.SIGKILL)
        os.close(ours)
