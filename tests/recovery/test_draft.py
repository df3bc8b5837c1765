"""The draft trained beside the model, against two separate models; what runs once for both; what it is worth."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import assert_same, quick, signal_after
from test_teacher import gradients_of_a_step
from test_training import CPU, SETTINGS, WINDOW
from torch import nn

import textbook
from conftest import Run
from families import NUM_BLOCKS, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import InputError, Plan, RecoverOptions, Replica, recover
from flexigpt.model import plan_of
from flexigpt.record import cost_rows
from flexigpt.recovery.draft import measure_draft
from flexigpt.recovery.teacher import Teacher
from flexigpt.recovery.trainable import prepare_training, trained_parameters
from flexigpt.recovery.training import Training
from flexigpt.runtime import ALONE
from flexigpt.text import TokenizedText

pytestmark = pytest.mark.usefixtures("few_logits")

WEIGHT = 0.3
DRAFTING = replace(SETTINGS, draft_weight=WEIGHT)
APART = Plan(num_blocks=NUM_BLOCKS, replicas=(Replica(block=2, base=1, rank=3), Replica(block=4, base=5, rank=3)))
AT_THE_ENDS = Plan(num_blocks=NUM_BLOCKS, replicas=(Replica(block=0, base=1, rank=3), Replica(block=5, base=1, rank=3)))


def compact_model(family: str, plan: Plan = APART) -> Any:
    source = tiny_model(family)
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.5, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # or no two models could be compared
    return model.eval()


@contextlib.contextmanager
def replicas_undone(model: Any) -> Iterator[None]:
    """Within it every replica runs and its output is thrown away: what entered it goes on."""

    def undo(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return (entered, *output[1:]) if isinstance(output, tuple) else entered

    blocks = [model.block_list[block] for block in plan_of(model.config).pruned]
    handles = [block.register_forward_hook(undo, with_kwargs=True) for block in blocks]
    yield
    for handle in handles:
        handle.remove()


def naive_loss(model: Any, windows: torch.Tensor, **teacher: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of both, and the draft's divergence a token, by two forward passes."""
    with torch.no_grad():
        wanted = model(input_ids=windows[:, :-1]).logits.flatten(0, 1).softmax(-1)
    with replicas_undone(model):
        drafted = model(input_ids=windows[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
    divergence = (wanted * (wanted.log() - drafted)).sum(-1).mean()
    return textbook.batch_loss(model, windows, **teacher) + WEIGHT * divergence, divergence


def assert_trains_as_two_models(model: Any, reference: Any, train: str, **teacher: Any) -> None:
    windows = token_ids(4, WINDOW + 1)
    student_of = Teacher(teacher["folder"], model, torch.float32) if teacher else None
    settings = replace(DRAFTING, distill_weight=teacher.get("weight", 0.0))
    prepare_training(model, train, 4, seed=0)
    values, found = gradients_of_a_step(Training(model, settings, ALONE, CPU, student_of), windows)
    prepare_training(reference, train, 4, seed=0)
    given = {name: teacher[name] for name in ("teacher", "weight") if name in teacher}
    loss, divergence = naive_loss(reference, windows, **given)
    loss.backward()
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["draft_divergence"] == pytest.approx(divergence.item(), rel=1e-5)
    assert divergence > 1e-3
    expected = {name: parameter.grad for name, parameter in trained_parameters(reference).items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("family", "train", "plan"),
    [
        ("llama-gqa", "replicas+kept", APART),
        ("llama-gqa", "all", APART),
        ("llama-gqa", "replicas+kept", AT_THE_ENDS),
        ("llama-biases-tied", "all", AT_THE_ENDS),
        ("opt-norm-before", "replicas+kept", APART),
        ("opt-norm-after", "all", APART),
        ("gemma2", "replicas+kept", APART),
        ("gemma3_text", "all", APART),
        ("gpt2", "replicas+kept", APART),
    ],
)
def test_loss_and_gradients_are_those_of_two_forward_passes(family: str, train: str, plan: Plan) -> None:
    assert_trains_as_two_models(compact_model(family, plan), compact_model(family, plan), train)


def test_with_a_teacher_the_draft_still_learns_from_the_model(tmp_path: Path) -> None:
    source = tiny_model("llama")
    source.save_pretrained(tmp_path)
    teacher = {"folder": str(tmp_path), "teacher": source, "weight": 0.4}
    assert_trains_as_two_models(compact_model("llama"), compact_model("llama"), "replicas+kept", **teacher)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_before_the_first_replica_run_once_and_replicas_only_in_the_model(checkpointing: bool) -> None:
    model = compact_model("llama-gqa")
    prepare_training(model, "replicas+kept", 4, seed=0)
    training = Training(model, replace(DRAFTING, activation_checkpointing=checkpointing), ALONE, CPU, None)
    runs = [0] * NUM_BLOCKS
    for number, block in enumerate(model.block_list):

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        block.mlp.register_forward_pre_hook(count)
    training.step(0, token_ids(4, WINDOW + 1))  # two micro-batches
    again = 2 if checkpointing else 1
    assert runs == [2 * again, 2 * again, 2 * again, 4 * again, 2 * again, 4 * again]


def test_activation_checkpointing_and_the_micro_batch_change_no_gradient() -> None:
    found = []
    for given in ({}, {"activation_checkpointing": True}, {"micro_batch": 1}):
        model = compact_model("llama-gqa")
        prepare_training(model, "replicas+kept", 4, seed=0)
        training = Training(model, replace(DRAFTING, **given), ALONE, CPU, None)
        found.append(gradients_of_a_step(training, token_ids(4, WINDOW + 1)))
    assert found[0][0] == found[1][0]
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
        torch.testing.assert_close(gradient, found[2][1][name], atol=1e-6, rtol=1e-3, msg=name)


@torch.no_grad()
def one_by_one(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Window by window, token by token."""
    rows = []
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW + 1]
        logits = model(window[None, :-1], use_cache=False).logits[0].double()
        with replicas_undone(model):
            drafted = model(window[None, :-1], use_cache=False).logits[0].double()
        for p, q, target in zip(logits.softmax(-1), drafted.softmax(-1), window[1:], strict=True):
            same = float(p.argmax() == q.argmax())
            far = 0.5 * (p - q).abs().sum()
            rows.append([-q[target].log(), (p * (p / q).log()).sum(), same, 1 - far])
    loss, divergence, agreement, acceptance = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    perplexity = torch.tensor(loss).exp().item()
    return {
        "tokens": len(rows),
        "perplexity": perplexity,
        "divergence": divergence,
        "agreement": agreement,
        "acceptance": acceptance,
    }


@pytest.mark.parametrize(
    ("family", "plan"), [("llama", AT_THE_ENDS), ("opt-norm-after", APART), ("gemma2", APART), ("gpt2", APART)]
)
def test_what_a_draft_is_worth_equals_a_loop_over_tokens(family: str, plan: Plan) -> None:
    model = compact_model(family, plan)
    text = TokenizedText(ids=token_ids(1, 3 * WINDOW + 8)[0], num_bytes=1)
    measured = measure_draft(model, text, window_length=WINDOW)
    assert measured == pytest.approx(one_by_one(model, text.ids), rel=1e-4)
    assert 0 < measured["agreement"] < 1


def test_a_model_without_replicas_has_no_draft() -> None:
    text = TokenizedText(ids=token_ids(1, WINDOW)[0], num_bytes=1)
    with pytest.raises(InputError, match="the model has no replicas to skip"):
        measure_draft(tiny_model("llama"), text, window_length=WINDOW)


def trained_for(steps: int, weight: float) -> tuple[dict[str, Any], float]:
    """What the draft is worth on the windows that were trained on, and the whole model's last loss on them."""
    model, windows = compact_model("llama-gqa"), token_ids(4, WINDOW + 1)
    prepare_training(model, "replicas+kept", 4, seed=0)
    training = Training(model, replace(SETTINGS, draft_weight=weight, steps=2 * steps), ALONE, CPU, None)
    for number in range(steps):
        values = training.step(number, windows)
    text = TokenizedText(ids=windows.flatten(), num_bytes=1)
    return measure_draft(model.eval(), text, window_length=WINDOW + 1), values["cross_entropy"]


def test_the_draft_agrees_more_often_than_without() -> None:
    (drafted, loss), (plain, plain_loss) = trained_for(30, 1.0), trained_for(30, 0.0)
    assert drafted["divergence"] < 0.7 * plain["divergence"]
    assert drafted["agreement"] > plain["agreement"] + 0.05
    assert drafted["acceptance"] > plain["acceptance"] + 0.05
    assert loss < plain_loss + 0.5


def drafting(text: Path, single: Path) -> RecoverOptions:
    return quick(text, draft_weight=0.5, perplexity=str(single))


@pytest.fixture
def whole(
    few_logits: None, tiny_compact: Path, text: Path, single: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing interrupted, its logits in as many pieces."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recover(str(tiny_compact), out, drafting(text, single))
    return out


def worth(folder: Path, text: Path) -> dict[str, Any]:
    ids = torch.tensor(textbook.text_ids(text, folder))
    return measure_draft(textbook.opened(folder), TokenizedText(ids=ids, num_bytes=1), window_length=WINDOW)


def test_the_record_says_what_the_draft_was_worth_before_and_after(
    tiny_compact: Path, whole: Path, single: Path
) -> None:
    record = json.loads((whole / "record.json").read_text())
    for side, folder in (("before", tiny_compact), ("after", whole)):
        found, expected = record["perplexity"][side]["draft"], worth(folder, single)
        assert found == pytest.approx(expected, rel=1e-3)
    assert record["options"]["draft_weight"] == 0.5
    for step in record["recovery"]["history"]:
        assert step["loss"] == pytest.approx(step["cross_entropy"] + 0.5 * step["draft_divergence"])


def test_a_run_that_is_stopped_resumes_to_the_same_bits(
    tiny_compact: Path, text: Path, single: Path, tmp_path: Path, whole: Path
) -> None:
    out, options = tmp_path / "out", drafting(text, single)
    with pytest.raises(InputError, match="interrupted after step 7 of 20"):
        recover(str(tiny_compact), out, options, log=signal_after(7))
    for other in (1.0, 0.0):
        with pytest.raises(InputError, match=f"started with draft_weight = 0.5, now it is {other}"):
            recover(str(tiny_compact), out, replace(options, draft_weight=other), resume=True)
    record = recover(str(tiny_compact), out, options, resume=True)
    assert record is not None
    assert_same(out, whole)
    assert record["perplexity"] == json.loads((whole / "record.json").read_text())["perplexity"]


def test_the_command_tells_of_the_draft(run: Run, tiny_compact: Path, single: Path, tmp_path: Path) -> None:
    asked = ("--window-length", 16, "--batch-tokens", 64, "--tokens", 128, "--draft-weight", 0.5)
    words = ("--data", single, "--perplexity", single, *asked)
    code, printed, errors = run("recover", tiny_compact, tmp_path / "out", *words)
    assert code == 0
    first = json.loads((tmp_path / "out" / "record.json").read_text())
    divergence = first["recovery"]["history"][0]["draft_divergence"]
    assert f"draft's divergence {divergence:.4f}" in errors
    draft = first["perplexity"]["after"]["draft"]
    for title, value in (
        ("draft accepted", f"{draft['acceptance']:.1%}"),
        ("draft agrees", f"{draft['agreement']:.1%}"),
    ):
        (line,) = [line for line in printed.splitlines() if title in line]
        assert value in line


def test_a_table_of_a_draft_that_never_agreed_has_no_share_of_it() -> None:
    draft = {"perplexity": 50.0, "agreement": 0.0, "acceptance": 0.25}
    better = {"perplexity": 40.0, "agreement": 0.5, "acceptance": 0.75}
    measured = {"before": {"perplexity": 30.0, "draft": draft}, "after": {"perplexity": 31.0, "draft": better}}
    measured["after"] |= {"tokens": 100, "window_length": 10}
    measured |= {"text": "novels.jsonl"}
    size = {"parameters": 10, "bytes": 20}
    rows = cost_rows({"compared": ["before", "after"], "before": size, "after": size, "perplexity": measured}).rows
    assert rows[-3:] == [
        ["draft's perplexity", "50.00", "40.00", "80.0%"],
        ["draft agrees", "0.0%", "50.0%", ""],
        ["draft accepted", "25.0%", "75.0%", "300.0%"],
    ]
