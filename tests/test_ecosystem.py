"""What transformers does with any model, done with compact ones; and the page that says what works with what."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, pipeline
from transformers.generation.streamers import BaseStreamer

from compacts import narrow, shared
from families import tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, materialize
from flexigpt.export.stock import unshrunk

ROOT = Path(__file__).parents[1]
STATES = ("works", "works with effort", "does not")

# Ways to generate, and what each is asked for.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=[narrow, shared])
def both(request: pytest.FixtureRequest) -> tuple[FlexiGPTForCausalLM, PreTrainedModel]:
    """A compact model, and one of the source's own class that computes the same."""
    compact = request.param(tiny_model("llama-gqa"))
    whole = request.param(tiny_model("llama-gqa"))
    stock = unshrunk(materialize(whole) if whole.config.replicas else whole).eval()
    assert type(stock).__name__ == "LlamaForCausalLM"
    return compact, stock


def generated(model: PreTrainedModel, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    torch.manual_seed(0)
    made = model.generate(ids, **({"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | more))
    assert isinstance(made, torch.Tensor)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_generate_is_the_stock_models(way: str, both: tuple[Any, Any]) -> None:
    ids = token_ids(batch=1, tokens=12)
    found, expected = (generated(model, ids, eos_token_id=None, **WAYS[way]) for model in both)
    assert torch.equal(found, expected)
    assert found.shape[1] == 20


def test_a_padded_batch_is_as_each_text_alone(both: tuple[Any, Any]) -> None:
    ids = token_ids(batch=2, tokens=12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    together = generated(both[0], ids, attention_mask=mask, eos_token_id=None)
    for row, start in ((0, 0), (1, 5)):
        alone = generated(both[0], ids[row : row + 1, start:], eos_token_id=None)
        assert torch.equal(together[row, 12:], alone[0, -8:])


def test_an_ordinary_model_drafts_for_a_compact_one_and_the_other_way_round(both: tuple[Any, Any]) -> None:
    ids = token_ids(batch=1, tokens=12)
    for model, helper in (both, both[::-1]):
        expected = generated(model, ids, eos_token_id=None)
        assert torch.equal(generated(model, ids, eos_token_id=None, assistant_model=helper), expected)


def test_tokens_are_streamed(both: tuple[Any, Any]) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    kept = Kept()
    made = generated(both[0], token_ids(batch=1, tokens=12), eos_token_id=None, streamer=kept)
    assert kept.tokens == [*made[0].tolist(), -1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_the_stock_models(attention: str, both: tuple[Any, Any]) -> None:
    ids, asked = token_ids(), {"output_hidden_states": True, "output_attentions": attention == "eager"}
    for model in both:
        model.set_attn_implementation(attention)
    found, expected = (model(input_ids=ids, **asked) for model in both)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-5)
    if attention == "eager":
        gone = {row["block"] for row in both[0].config.sublayers if row["sublayer"] == "attention"}
        wanted = tuple(its for block, its in enumerate(expected.attentions) if block not in gone)
        torch.testing.assert_close(found.attentions, wanted, rtol=1e-4, atol=1e-5)


def test_a_pipeline_writes_what_generate_does(tiny_compact: Path) -> None:
    writer = pipeline("text-generation", model=str(tiny_compact), device="cpu")
    asked = {"max_new_tokens": 6, "do_sample": False}
    (made,) = writer("It was a dark", return_full_text=False, **asked)
    tokenizer = AutoTokenizer.from_pretrained(tiny_compact)
    given = tokenizer("It was a dark", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tiny_compact)
    ids = model.generate(**given, **asked)[0, given["input_ids"].shape[1] :]
    assert made["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore")  # of accelerate's own calls
@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_saves_and_opens_it(
    checkpointing: bool, tiny_compact: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_compact)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(batch=4, tokens=16)]
    asked = {"max_steps": 2, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(str(tmp_path), gradient_checkpointing=checkpointing, disable_tqdm=True, **asked)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ids = token_ids()
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_table_of_tokens_grows(tiny_compact: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_compact).eval()
    ids, size = token_ids(), model.config.get_text_config().vocab_size
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.resize_token_embeddings(size + 8, mean_resizing=False)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        found = again(input_ids=ids).logits
    assert found.shape[-1] == size + 8
    torch.testing.assert_close(found[..., :size], before)


def test_every_row_of_the_page_is_held_by_a_test_that_is_there_or_waits_for_a_gpu() -> None:
    page = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] != "what" and not set(row[0]) <= set("- :")]
    assert len(rows) >= 40
    for what, state, since, sharing, test in rows:
        if state == "needs a GPU":
            assert test == "none yet", what
            continue
        assert state in STATES, what
        assert since, what
        assert sharing in ("kept", "not kept", "-"), what
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
        assert named, f"{what}: {test}"
        tree = ast.parse((ROOT / named[1]).read_text(encoding="utf-8"))
        assert named[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{what}: {test}"
