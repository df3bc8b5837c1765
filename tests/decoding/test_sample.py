"""Text that a model writes itself: the model's own words, in rows that read as text; killed and resumed to the same."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from conftest import EXAMPLE, Run
from families import FAMILIES, compact_of, initialize_replicas, tiny_model
from flexigpt import InputError, Plan
from flexigpt.decoding import SampleOptions, sample
from flexigpt.decoding.drafts import Writer
from flexigpt.decoding.sample import write_round
from flexigpt.model import Replica
from flexigpt.runtime import silent
from flexigpt.text import tokenize_text
from killing import Killed, KillingTrack

LENGTH = 24
UNTRACKED = partial(silent, stage="", total=0)
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


class Script:
    """A draft that begins with given tokens and ends after so many more; notes what was drawn."""

    def __init__(self, given: list[int], more: int) -> None:
        self.given, self.left, self.drawn = list(given), more, []
        self.token = self.given.pop(0)

    def goes_on(self, drawn: int) -> bool:
        if self.given:
            self.token = self.given.pop(0)
            return True
        self.drawn.append(drawn)
        self.token, self.left = drawn, self.left - 1
        return self.left > 0

    def document(self, cut: bool = False) -> dict[str, Any]:
        return {"drawn": self.drawn, "cut": cut}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compact", [False, True], ids=["source", "compact"])
def test_each_document_is_written_as_if_alone(family: str, compact: bool) -> None:
    """As greedy `generate` writes it, wherever in the batch, and after whatever, it stands."""
    model = tiny_model(family)
    if compact:
        plan = Plan(num_blocks=6, replicas=(Replica(block=3, base=1, rank=4),))
        made = compact_of(model, plan)
        initialize_replicas(made, model, plan, adapter_init="svd", norm_init=0.5, seed=0)
        model = made.eval()
    beginnings = [[3, 5, 7], [11], [20, 21], [40, 2, 9, 30], [50, 51], [60], [7, 7, 7]]
    lengths = [4, 9, 3, 8, 5, 7, 6]
    drafts = [Script(ids, more) for ids, more in zip(beginnings, lengths, strict=True)]
    drafts += [Script([1], 99), Script([1], 99)]
    kept, begun = write_round(model, iter(drafts), 2, LENGTH, 1e-6, 0, UNTRACKED)
    settings = GenerationConfig(do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = None  # `generate` would take it from there
    finished = 0
    for draft, ids in zip(drafts, beginnings, strict=False):
        if not draft.drawn:
            continue
        finished += draft.left == 0
        alone = model.generate(torch.tensor([ids]), generation_config=settings, max_new_tokens=len(draft.drawn))
        assert alone[0, len(ids) :].tolist() == draft.drawn
    assert finished >= 5
    assert sum(tokens for _, tokens in kept) == 2 * LENGTH
    assert [document["cut"] for document, _ in kept].count(True) == 2
    assert begun == len(kept)


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    model = tiny_model("llama")
    rows = 3000
    kept, _ = write_round(model, (Script([5], 1) for _ in range(9999)), rows, 1, 1.0, 3, UNTRACKED)
    drawn = [document["drawn"][0] for document, _ in kept if document["drawn"]]
    counts = torch.bincount(torch.tensor(drawn), minlength=96)
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits[0, -1].softmax(-1) * rows
    assert len(drawn) == rows
    chi = ((counts - expected) ** 2 / expected).sum().item()
    assert chi < 96 + 5 * (2 * 96) ** 0.5


def test_top_p_leaves_the_likeliest() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        chances = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    ordered = chances.sort(descending=True)
    allowed, held = set(), 0.0
    for chance, token in zip(ordered.values.tolist(), ordered.indices.tolist(), strict=True):
        if held < 0.5:
            allowed.add(token)
        held += chance
    kept, _ = write_round(model, (Script([5], 1) for _ in range(1999)), 900, 1, 0.5, 3, UNTRACKED)
    assert {document["drawn"][0] for document, _ in kept if document["drawn"]} == allowed


@pytest.fixture(scope="module")
def writing(example: Path) -> SampleOptions:
    return SampleOptions(tokens="500", window_length=40, batch_size=5, seed=5)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(example: Path, writing: SampleOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's own words, by a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "own.jsonl"
    sample(str(example), out, writing)
    return out


def test_documents_are_text_that_the_model_finds_likely(example: Path, whole: Path, run: Run, single: Path) -> None:
    rows = rows_of(whole)
    assert {tuple(row) for row in rows} == {("text",)}
    assert len(rows) >= 12
    assert all(row["text"].strip() and "<s>" not in row["text"] and "\ufffd" not in row["text"] for row in rows)
    perplexity = {}
    for name, path in (("own", whole), ("novels", single)):
        code, printed, _ = run("eval", example, "--perplexity", path, "--window-length", "32", "--json")
        assert code == 0
        perplexity[name] = json.loads(printed)["models"][0]["perplexity"]["perplexity"]
    assert perplexity["own"] < 1.5 * perplexity["novels"]


def test_a_run_that_is_killed_in_each_round_resumes_to_the_same_bytes(
    example: Path, whole: Path, writing: SampleOptions, tmp_path: Path
) -> None:
    out = tmp_path / "own.jsonl"
    for at in range(3):
        track = KillingTrack(f"writing, round {at + 1} of 3", at=20)
        with pytest.raises(Killed):
            sample(str(example), out, writing, resume=at > 0, track=track)
        assert len(track.seen) == (1 if at == 0 else 2), "rounds that were kept are not written again"
        assert not out.exists()
        part = tmp_path / "own.jsonl.part"
        with part.open("a") as file:
            file.write('{"kept": [[{"te')  # what a kill in the middle of writing leaves
        with pytest.raises(InputError, match="unfinished run: go on with --resume, or start again with --overwrite"):
            sample(str(example), out, writing)
    track = KillingTrack()
    sample(str(example), out, writing, resume=True, track=track)
    assert len(track.seen) == 1
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def test_another_run_is_not_resumed(example: Path, writing: SampleOptions, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "own.jsonl"
    with pytest.raises(Killed):
        sample(str(example), out, writing, track=KillingTrack("writing, round 2 of 3"))
    asked = ("sample", example, out, "--tokens", "500", "--window-length", "40", "--batch-size", "5")
    code, _, errors = run(*asked, "--seed", "6", "--top-p", "0.9", "--resume")
    assert code == 2
    assert "is of a run with another top_p, seed: start again with --overwrite" in errors
    assert run("sample", example, out, "--tokens", "64", "--window-length", "40", "--overwrite")[0] == 0
    code, _, errors = run(*asked)
    assert code == 2
    assert f"{out} is there: give another file, or --overwrite to replace a file" in errors
    code, _, errors = run(*asked, "--overwrite", "--resume")
    assert code == 2
    assert "leave out --resume" in errors


@pytest.mark.parametrize("line", ["5", "[]", '{"a": 1}\n7'])
def test_a_damaged_run_is_one_line(example: Path, tmp_path: Path, run: Run, line: str) -> None:
    (tmp_path / "own.jsonl.part").write_text(f"{line}\n")
    code, _, errors = run("sample", example, tmp_path / "own.jsonl", "--tokens", "64", "--resume")
    assert (code, errors.count("\n")) == (2, 1)
    assert "is damaged: start again with --overwrite" in errors


@pytest.fixture(scope="module")
def talker(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a chat template, which it has never seen; it says that its messages end at a full stop."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (stop,) = AutoTokenizer.from_pretrained(example)(".", add_special_tokens=False)["input_ids"][-1:]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    return folder


def test_a_chat_model_writes_conversations(talker: Path, tmp_path: Path, writing: SampleOptions) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(talker)
    stop = GenerationConfig.from_pretrained(talker).eos_token_id[1]
    sample(str(talker), tmp_path / "own.jsonl", writing)
    rows = rows_of(tmp_path / "own.jsonl")
    assert rows
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
        assert all(stop not in tokenizer(message["content"])["input_ids"] for message in row["messages"])
    assert tokenize_text(str(tmp_path / "own.jsonl"), tokenizer, window_length=8).ids[0] == tokenizer.bos_token_id


def test_the_model_reads_its_template_around_what_it_writes(talker: Path) -> None:
    """Token by token what the template would make of the finished conversation, but for the last end."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(talker)
    writer = Writer.of("talker", tokenizer, SampleOptions(), 64)
    user, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Who is Ahab?", "A captain."))
    draft = next(writer.drafts(0))
    read, told = [], [*user, tokenizer.eos_token_id, *answer, tokenizer.eos_token_id]
    before = len(tokenizer("<s>user: ", add_special_tokens=False)["input_ids"])
    between = len(tokenizer("</s><s>assistant: ", add_special_tokens=False)["input_ids"])
    ignored = [0] * (before - 1), [0] * (between - 1)
    for drawn in (*ignored[0], *user, told[len(user)], *ignored[1], *answer, told[-1]):
        read.append(draft.token)
        goes_on = draft.goes_on(drawn)
    assert not goes_on
    messages = [{"role": "user", "content": "Who is Ahab?"}, {"role": "assistant", "content": "A captain."}]
    assert draft.document() == {"messages": messages}
    assert tokenizer.decode(read).replace(" ", "") == "<s>user:WhoisAhab?</s><s>assistant:Acaptain."


def test_prompts_begin_documents_and_conversations(
    example: Path, talker: Path, tmp_path: Path, writing: SampleOptions
) -> None:
    prompts = [f"It was the {word} of times" for word in ("best", "worst", "age", "season", "spring")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    asked = {"tokens": "300", "window_length": 40, "batch_size": 4, "prompts": str(tmp_path / "prompts.jsonl")}
    sample(str(example), tmp_path / "documents.jsonl", SampleOptions(**asked))
    texts = [row["text"] for row in rows_of(tmp_path / "documents.jsonl")]
    begun = [next(prompt for prompt in prompts if text.startswith(prompt)) for text in texts]
    assert set(begun) == set(prompts)
    assert all(len(text) > len(prompt) for text, prompt in zip(texts, begun, strict=True))
    sample(str(talker), tmp_path / "conversations.jsonl", SampleOptions(**asked))
    rows = rows_of(tmp_path / "conversations.jsonl")
    assert {row["messages"][0]["content"] for row in rows} <= set(prompts)
    sample(str(talker), tmp_path / "plain.jsonl", SampleOptions(kind="documents", **asked))
    assert all(row["text"].startswith("It was the ") for row in rows_of(tmp_path / "plain.jsonl"))


def test_a_compact_model_writes_too(run: Run, tiny_compact: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    code, printed, errors = run("sample", tiny_compact, out, "--tokens", "300", "--window-length", "50")
    assert code == 0, errors
    assert "writing, round 1 of 1: begins" in errors
    assert f"tokens/s written to {out}" in printed
    assert len(rows_of(out)) >= 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("own.txt",), "no name of a .jsonl file"),
        (("own.jsonl", "--kind", "conversations"), "chat template, which this tokenizer has not"),
        (("own.jsonl", "--prompts", "missing.jsonl"), "missing.jsonl"),
        (("own.jsonl", "--window-length", "99999"), "window length 99999 does not fit"),
        (("own.jsonl", "--top-p", "0"), "--top-p 0.0 is out of range"),
        (("own.jsonl", "--tokens", "few"), "--tokens few cannot be read"),
        (("own.jsonl", "--resume"), "leave out --resume"),
        ((EXAMPLE / "own.jsonl",), f"lies in the model {EXAMPLE}, which is read: give a file outside it"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str | Path, ...], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run("sample", example, *words)
    assert (code, printed) == (2, "")
    assert reason in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
