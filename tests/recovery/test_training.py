"""A step of training against the textbook's loop, and the precisions."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import textbook
from families import tiny_model, token_ids
from flexigpt import RecoverOptions, recover
from flexigpt.recovery import training as steps_of_training
from flexigpt.recovery.trainable import TRAIN, prepare_training, trained_parameters
from flexigpt.recovery.training import PRECISIONS, NotFiniteError, Settings, Training
from flexigpt.runtime import ALONE, choices_of

pytestmark = pytest.mark.usefixtures("few_logits")

CPU = torch.device("cpu")
WINDOW, WINDOWS, STEPS = 16, 4, 8
SETTINGS = Settings(
    steps=STEPS,
    batch_windows=4,
    micro_batch=2,
    window_length=WINDOW,
    lr=1e-2,
    replica_share=1.0,
    warmup_steps=2,
    dtype=torch.float32,
    fsdp=False,
    activation_checkpointing=False,
    distill_weight=0.0,
    draft_weight=0.0,
    seed=0,
)


def options(text: Path, **given: Any) -> RecoverOptions:
    asked = {"tokens": str(STEPS * WINDOWS * WINDOW), "window_length": WINDOW, "batch_tokens": WINDOWS * WINDOW}
    return RecoverOptions(data=str(text), device="cpu", **(asked | given))


def mark_trained(model: Any, train: str, lora_rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What is trained, marked by hand; of LoRA, the two factors of each kept linear, by the linear's weight's name."""
    if train == "replicas+kept":
        prepare_training(model, train, lora_rank, seed=0)
        named = dict(model.named_parameters())
        ends = (".lora_A.default.weight", ".lora_B.default.weight")
        linears = [name.removesuffix(ends[0]) for name in named if name.endswith(ends[0])]
        return {f"{linear}.weight": (named[linear + ends[0]], named[linear + ends[1]]) for linear in linears}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train == "all" or "adapter_" in name or "output_norm" in name)
    return {}


@pytest.mark.parametrize(
    ("train", "windows_at_a_time", "replica_lr"),
    [("replicas+kept", 1, None), ("replicas+kept", 4, 3e-4), ("replicas", 3, 0.7), ("all", 2, 1e-2)],
)
def test_recovery_is_the_textbooks_loop(
    tiny_compact: Path,
    single: Path,
    tmp_path: Path,
    train: str,
    windows_at_a_time: int,
    replica_lr: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a step's 4 windows 1, 2 or 4 go through at a time. Where replicas alone are trained, --lr is theirs."""
    monkeypatch.setitem(steps_of_training._PASS_TOKENS, "cpu", windows_at_a_time * WINDOW)
    monkeypatch.setattr(steps_of_training, "_CLIP", 0.1)
    given = options(single, train=train, warmup=0.25, lr=2e-3, replica_lr=replica_lr)
    record = recover(str(tiny_compact), tmp_path / "out", given)
    assert record is not None
    assert record["recovery"]["micro_batch"] == {1: 1, 2: 2, 3: 2, 4: 4}[windows_at_a_time]
    asked = {"lr": 2e-3, "clip": 0.1, "replica_lr": None if train == "replicas" else replica_lr}
    model = textbook.opened(tiny_compact)
    factors = mark_trained(model, train, lora_rank=4)
    batches = textbook.batches_of(textbook.text_ids(single, tiny_compact), WINDOWS, WINDOW, STEPS)
    history = textbook.train(model, batches, steps=STEPS, warmup=2, **asked)
    for found, expected in zip(record["recovery"]["history"], history, strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert history[0]["gradient_norm"] > 0.1, "nothing was clipped"
    merged = {name.replace(".base_layer", ""): tensor.detach() for name, tensor in model.named_parameters()}
    for name, (first, second) in factors.items():
        merged[name] = merged[name] + (second @ first).detach()
    for name, tensor in textbook.weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, merged[name], atol=2e-5, rtol=1e-3, msg=name)
    with torch.no_grad():
        found, expected_logits = (m(input_ids=batches[0]).logits for m in (textbook.opened(tmp_path / "out"), model))
    torch.testing.assert_close(found, expected_logits, atol=1e-4, rtol=1e-3)


def test_each_choice_has_what_it_stands_for() -> None:
    kinds = RecoverOptions.__annotations__
    assert choices_of(kinds["train"]) == tuple(TRAIN)
    assert choices_of(kinds["precision"]) == tuple(PRECISIONS)


def test_trying_out_a_window_leaves_no_trace() -> None:
    """By it a GPU finds how many windows it holds; a CPU goes by its caches."""
    plain, tried = training(torch.float32), training(torch.float32)
    tried._try_window()
    tried.fit_memory()
    assert tried.settings == plain.settings
    windows = token_ids(4, WINDOW + 1)
    assert tried.step(0, windows) == plain.step(0, windows)
    expected = trained_parameters(plain.model)
    assert all(torch.equal(p, expected[name]) for name, p in trained_parameters(tried.model).items())


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    settings = replace(SETTINGS, steps=12, warmup_steps=4, lr=8.0)
    rates = [settings.lr_at(step) for step in range(13)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[8] == pytest.approx(4.0)
    assert rates[6] == pytest.approx(4.0 * (1 + math.sqrt(0.5)))
    assert rates[11] == pytest.approx(8.0 * math.sin(math.pi / 16) ** 2)
    assert rates[12] == 0.0
    assert replace(settings, warmup_steps=0).lr_at(0) == 8.0


@pytest.mark.parametrize("train", TRAIN)
def test_activation_checkpointing_changes_no_bit(tiny_compact: Path, text: Path, tmp_path: Path, train: str) -> None:
    found = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        recover(str(tiny_compact), out, options(text, train=train, activation_checkpointing=checkpointing))
        found.append(textbook.weights(out))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def training(dtype: torch.dtype, **given: Any) -> Training:
    model = tiny_model("llama-gqa")
    prepare_training(model, "replicas+kept", 4, seed=0)
    return Training(model, replace(SETTINGS, dtype=dtype, **given), ALONE, CPU, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_learns_and_holds_what_is_trained_in_float32(dtype: torch.dtype) -> None:
    run = training(dtype, steps=40)
    windows = token_ids(4, WINDOW + 1)
    losses = [run.step(number, windows)["loss"] for number in range(20)]
    exact = training(torch.float32, steps=40)
    assert losses[0] == pytest.approx(exact.step(0, windows)["loss"], rel=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    assert {p.dtype for p in trained_parameters(run.model).values()} == {torch.float32}
    assert {p.dtype for p in run.model.parameters() if not p.requires_grad} == {dtype}


def scaled(run: Training, loss_scale: float) -> Training:
    run.restore(run.tensors(), {"scale": {"loss_scale": loss_scale, "since": 0, "skipped": 0}})
    return run


def test_an_fp16_step_that_overflows_is_skipped_and_the_scale_halves() -> None:
    run = scaled(training(torch.float16), 2.0**30)
    before = {name: p.detach().clone() for name, p in trained_parameters(run.model).items()}
    windows = token_ids(4, WINDOW + 1)
    values = run.step(0, windows)
    assert math.isfinite(values["loss"])
    json.dumps(values, allow_nan=False)
    assert run.state()["scale"]["loss_scale"] == 2.0**29
    assert all(torch.equal(before[name], p) for name, p in trained_parameters(run.model).items())
    scaled(run, 2.0**12).step(1, windows)
    assert run.state()["scale"]["loss_scale"] == 2.0**12
    assert not all(torch.equal(before[name], p) for name, p in trained_parameters(run.model).items())


def test_the_loss_scale_does_not_change_the_step() -> None:
    windows = token_ids(4, WINDOW + 1)
    norms = [scaled(training(torch.float16), 2.0**power).step(0, windows)["gradient_norm"] for power in (8, 12)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert norms[0] == pytest.approx(training(torch.float32).step(0, windows)["gradient_norm"], rel=2e-2)


def test_fp16_gives_up_when_no_scale_helps() -> None:
    run = scaled(training(torch.float16), 2.0**60)
    windows = token_ids(4, WINDOW + 1)
    for number in range(15):
        run.step(number, windows)
    with pytest.raises(NotFiniteError, match="gradients of step 16 are not finite"):
        run.step(15, windows)


def test_a_loss_that_is_not_finite_leaves_the_parameters() -> None:
    run = training(torch.float32)
    with torch.no_grad():
        run.model.get_input_embeddings().weight[5] = torch.nan
    before = {name: p.detach().clone() for name, p in trained_parameters(run.model).items()}
    with pytest.raises(NotFiniteError, match="loss of step 3 is not finite"):
        run.step(2, torch.full((4, WINDOW + 1), 5))
    assert all(torch.equal(before[name], p) for name, p in trained_parameters(run.model).items())
