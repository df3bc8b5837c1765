"""Conversations as text: what the model reads is what its chat template writes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import Run
from flexigpt import InputError
from flexigpt.text import Documents, TrainingStream, calibration_windows, tokenize_text

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}[{{ message.role }}] {{ message.content | trim }}"
    "{% if message.tool_calls is defined %}CALLS{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONVERSATIONS = [
    [
        {"role": "user", "content": "Who is Ahab?"},
        {"role": "assistant", "content": "A captain, and a hunter of whales."},
    ],
    [{"role": "user", "content": "Call me Ishmael."}],
]


@pytest.fixture
def tokenizer(example: Path) -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(example)
    found.chat_template = TEMPLATE
    return found


def write(path: Path, column: str, conversations: list[list[dict[str, str]]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(conversations))), column: conversations}), path)
    else:
        path.write_text("".join(json.dumps({"id": 1, column: one}) + "\n" for one in conversations))
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("column", "named"), [("messages", ""), ("chats", "#chats")])
def test_the_template_writes_them(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str, column: str, named: str
) -> None:
    """Its special tokens alone: none is put around what already has its own."""
    path = write(tmp_path / f"chats{kind}", column, CONVERSATIONS) + named
    expected = [tokenizer.apply_chat_template(one, tokenize=True, return_dict=False) for one in CONVERSATIONS]
    found = tokenize_text(path, tokenizer, window_length=4)
    assert found.ids.tolist() == expected[0] + expected[1]
    assert found.num_bytes == sum(len(tokenizer.apply_chat_template(one, tokenize=False)) for one in CONVERSATIONS)
    windows = calibration_windows(path, tokenizer, windows=99, window_length=4, seed=0)
    assert windows[0].tolist() in [one[:4] for one in expected]
    trained = TrainingStream(path, tokenizer, window_length=4, seed=0).next_windows(2).tolist()
    assert trained[0] in [one[:5] for one in (expected[0] + expected[1], expected[1] + expected[0])]


def test_text_comes_before_conversations_and_keys_of_others_are_not_there(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    called = [{"role": "assistant", "content": "Wait.", "tool_calls": "look"}]
    rows = [{"text": "Ahoy.", "messages": CONVERSATIONS[0]}, {"text": "", "messages": called}]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(Documents(str(tmp_path / "both.jsonl"))) == ["Ahoy."]
    ids = tokenize_text(f"{tmp_path / 'both.jsonl'}#messages", tokenizer, window_length=4).ids
    assert tokenizer.decode(ids).count("CALLS") == 1


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([{"role": "judge", "content": "Order!"}], "refuses a conversation of judge: only user and assistant"),
        ([{"role": "user", "content": None, "more": "x"}], "holds list: expected text, or lists of {role, content}"),
        ([{"from": "user", "value": "Hi"}], "holds list: expected text, or lists of {role, content}"),
    ],
)
def test_what_is_no_conversation_is_one_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, conversation: list[dict[str, str]], reason: str
) -> None:
    path = write(tmp_path / "chats.jsonl", "messages", [conversation])
    with pytest.raises(InputError) as raised:
        tokenize_text(path, tokenizer, window_length=4)
    assert reason in str(raised.value)


def test_a_tokenizer_without_a_template_is_one_line(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", "messages", CONVERSATIONS)
    code, printed, errors = run("eval", tiny_source, "--perplexity", path)
    lines = [line for line in errors.splitlines() if "chat template" in line]
    assert (code, printed, len(lines)) == (2, "", 1)
