"""Recovery as a user meets it: stopped at any moment and resumed to the same bits; nothing half-written."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import mark_trained

import textbook
from conftest import Hooked, Run
from flexigpt import InputError, RecoverOptions, recover
from flexigpt.recovery import checkpoints as kept
from flexigpt.runtime import ALONE
from flexigpt.text import batches
from forks import Forks

WINDOW, WINDOWS, STEPS = 16, 4, 20
QUICK = ("--window-length", WINDOW, "--batch-tokens", WINDOW * WINDOWS)
TOKENS = ("--tokens", STEPS * WINDOW * WINDOWS)
# In a process of its own.
OFTEN = "from flexigpt.recovery import checkpoints; checkpoints.SECONDS = 0.0"


def quick(text: Path, **given: Any) -> RecoverOptions:
    """What QUICK and TOKENS ask for."""
    asked = {"window_length": WINDOW, "batch_tokens": WINDOW * WINDOWS}
    return RecoverOptions(data=str(text), **({"tokens": str(STEPS * WINDOW * WINDOWS)} | asked | given))


def history(out: Path) -> list[dict[str, float]]:
    """What each step measured, but for its speed."""
    steps = json.loads((out / "record.json").read_text())["recovery"]["history"]
    return [{name: value for name, value in step.items() if name != "tokens_per_second"} for step in steps]


def assert_same(out: Path, other: Path) -> None:
    found, expected = textbook.weights(out), textbook.weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert history(out) == history(other)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.recovery").glob("checkpoint-*"))


def last_line(errors: str) -> str:
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("flexigpt: ")]
    assert line == errors.splitlines()[-1]
    return line


@pytest.fixture(scope="module")
def whole(tiny_compact: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recover(str(tiny_compact), out, quick(text))
    return out


@pytest.fixture(scope="module")
def measured(tiny_compact: Path, text: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with held-out perplexity."""
    out = tmp_path_factory.mktemp("measured") / "out"
    recover(str(tiny_compact), out, quick(text, perplexity=str(single)))
    return out


@pytest.fixture(scope="module")
def long(tiny_compact: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a run, and what it writes when nothing stops it."""
    out = tmp_path_factory.mktemp("long") / "out"
    arguments = [str(word) for word in ("--data", text, *QUICK, "--tokens", 80 * 64)]
    recover(str(tiny_compact), out, quick(text, tokens=str(80 * 64)))
    return arguments, out


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_resumes_to_the_same_bits(
    run: Run,
    hooked: Hooked,
    forks: Forks,
    tiny_compact: Path,
    long: tuple[list[str], Path],
    tmp_path: Path,
    how: signal.Signals,
) -> None:
    """In the moment before a checkpoint is complete."""
    arguments, whole = long
    environment = hooked("os.rename", "*/checkpoint-30", f"os.kill(os.getpid(), {how.value})", OFTEN)
    ran = forks.run("-m", "flexigpt", "recover", tiny_compact, tmp_path / "out", *arguments, env=environment)
    assert not (tmp_path / "out").exists()
    if how is signal.SIGINT:
        assert ran.returncode == 2
        (step,) = re.findall(r"interrupted after step (\d+) of 80: --resume goes on from there$", last_line(ran.stderr))
        assert f"checkpoint-{step}" in checkpoints(tmp_path / "out")
    code, _, errors = run("recover", tiny_compact, tmp_path / "out", *arguments, "--resume")
    assert code == 0
    assert "step 16/80 " not in errors, "it began anew"
    assert_same(tmp_path / "out", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def signal_after(step: int) -> Callable[[dict[str, float], int], None]:
    """A log that has this process told to stop."""

    def log(values: dict[str, float], _: int) -> None:
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return log


def test_sigterm_saves_at_the_step_and_the_held_out_perplexity_goes_on(
    tiny_compact: Path, text: Path, single: Path, tmp_path: Path, measured: Path
) -> None:
    out, options = tmp_path / "out", quick(text, perplexity=str(single))
    for step in (7, 10):
        with pytest.raises(InputError, match=f"interrupted after step {step} of 20"):
            recover(str(tiny_compact), out, options, resume=step > 7, log=signal_after(step))
    assert checkpoints(out) == ["checkpoint-10", "checkpoint-7"]
    record = recover(str(tiny_compact), out, options, resume=True)
    assert record is not None
    assert_same(out, measured)
    expected = json.loads((measured / "record.json").read_text())["perplexity"]
    assert record["perplexity"] == expected
    assert expected["after"]["perplexity"] < expected["before"]["perplexity"]


def test_a_signal_at_the_last_step_lets_the_run_end(
    tiny_compact: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    options = quick(text)
    assert recover(str(tiny_compact), tmp_path / "out", options, log=signal_after(STEPS)) is not None
    assert_same(tmp_path / "out", whole)
    assert signal.getsignal(signal.SIGTERM) is before


def stopped_after(step: int, model: Path, text: Path, out: Path) -> Path:
    """A run that was stopped after that step, a checkpoint after each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kept, "SECONDS", 0.0)
        with pytest.raises(InputError):
            recover(str(model), out, quick(text), log=signal_after(step))
    return out


@pytest.fixture(scope="module")
def unfinished(tiny_compact: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_after(6, tiny_compact, text, tmp_path_factory.mktemp("unfinished") / "out")


OTHER = {
    "--seed 1": "seed = 0, now it is 1",
    "--lr 0.001": "lr = 0.004, now it is 0.001",
    "--replica-lr 0.001": "replica_lr = 0.004, now it is 0.001",
    "--train all": "train = replicas+kept, now it is all",
    "--window-length 32": "window_length = 16, now it is 32",
    "--tokens 640": "steps = 20, now it is 10",
    "--precision bf16": "precision = fp32, now it is bf16",
    "--lora-rank 2": "lora_rank = 4, now it is 2",
    "--teacher SOURCE": "teacher = None",
    "--perplexity TEXT": "perplexity = None",
    "--data SINGLE": "started with data",
    "SOURCE": "started with model",
}


@pytest.mark.parametrize("other", OTHER)
def test_a_run_of_something_else_is_not_resumed(
    run: Run, unfinished: Path, tiny_compact: Path, tiny_source: Path, text: Path, single: Path, other: str
) -> None:
    places = {"SOURCE": tiny_source, "TEXT": text, "SINGLE": single}
    words = [places.get(word, word) for word in other.split()]
    model = words.pop(0) if other == "SOURCE" else tiny_compact
    code, _, errors = run("recover", model, unfinished, "--data", text, *TOKENS, *QUICK, "--resume", *words)
    assert code == 2
    assert OTHER[other] in last_line(errors)
    assert checkpoints(unfinished) == ["checkpoint-5", "checkpoint-6"]


def test_an_unfinished_run_is_resumed_or_replaced_only_when_told(
    run: Run, unfinished: Path, tiny_compact: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(unfinished.parent, tmp_path, dirs_exist_ok=True)
    arguments = ("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK)
    code, _, errors = run(*arguments)
    assert code == 2
    assert "holds an unfinished run: go on with --resume, or start again with --overwrite" in last_line(errors)
    code, _, errors = run(*arguments, "--overwrite")
    assert code == 0
    assert "step 1/20 " in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_refused_before_its_first_checkpoint_is_no_unfinished_one(
    run: Run, tiny_compact: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("It was a dark and stormy night. " * 60)
    (tmp_path / "texts" / "b.txt").write_bytes("Es war ein schöner Tag. ".encode("latin-1") * 900)
    arguments = ("recover", tiny_compact, tmp_path / "out", *TOKENS, *QUICK, "--data")
    code, _, errors = run(*arguments, tmp_path / "texts")
    assert code == 2
    assert "b.txt" in last_line(errors)
    assert run(*arguments, tmp_path / "texts" / "a.txt", "--epochs", "9")[0] == 0


def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(
    run: Run, unfinished: Path, tiny_compact: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    shutil.copytree(unfinished.parent, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "out.recovery" / "checkpoint-6"
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    arguments = ("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK, "--resume")
    code, _, errors = run(*arguments)
    assert code == 2
    assert "remove it to go on from the checkpoint before" in last_line(errors)
    shutil.rmtree(newest)
    assert run(*arguments)[0] == 0
    assert_same(tmp_path / "out", whole)


def test_a_second_run_of_the_same_is_told_which_process_writes(
    hooked: Hooked, forks: Forks, tiny_compact: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    """While the first one writes its checkpoints, and at any other time."""
    arguments = ("-m", "flexigpt", "recover", tiny_compact, tmp_path / "out" / "new", "--data", text)
    there, go_on = tmp_path / "there", tmp_path / "go-on"
    os.mkfifo(go_on)
    waits = f"os.path.exists({str(there)!r}) or (open({str(there)!r}, 'w').close(), open({str(go_on)!r}).close())"
    first = forks.start(*arguments, *TOKENS, *QUICK, env=hooked("os.rename", "*/checkpoint-6.partial", waits, OFTEN))
    while not there.exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = forks.run(*arguments, "--overwrite")
    go_on.write_text("")
    assert first.wait() == 0, first.result().stderr
    (line,) = second.stderr.splitlines()
    told = rf"flexigpt: {tmp_path}/out/new is being written by process {first.pid} on \S+ since [-0-9]+ [:0-9]+: .*"
    assert re.fullmatch(told, line)
    assert_same(tmp_path / "out" / "new", whole)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_the_newest_two_checkpoints_are_kept(
    tiny_compact: Path, text: Path, tmp_path: Path, often: None, whole: Path
) -> None:
    seen: dict[int, list[str]] = {}
    out = tmp_path / "out"
    recover(str(tiny_compact), out, quick(text), log=lambda v, _: seen.__setitem__(int(v["step"]), checkpoints(out)))
    assert [seen[step] for step in (1, 2, 3, 4, 20)] == [
        [],
        ["checkpoint-1"],
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
        ["checkpoint-18", "checkpoint-19"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(out, whole)


@pytest.mark.parametrize(("took", "gap"), [(1.0, 300), (14.0, 300), (60.0, 1200)])
def test_a_checkpoint_is_due_every_five_minutes_or_as_seldom_as_it_takes_long_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took: float, gap: int
) -> None:
    """A killed run loses that much; writing takes a twentieth of the time at most."""
    clock = [0.0]
    monkeypatch.setattr(kept, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def write(tensors: dict[str, Any], *, checkpoint_id: Path, no_dist: bool) -> None:
        checkpoint_id.mkdir()
        clock[0] += took

    monkeypatch.setattr(kept, "save_tensors", write)
    folder = kept.RunFolder(tmp_path / "out", ALONE)
    folder.start({})
    clock[0] = 299
    assert not folder.is_due()
    clock[0] = 300
    assert folder.is_due()
    folder.save(1, {}, {})
    clock[0] += gap - 1
    assert not folder.is_due()
    clock[0] += 1
    assert folder.is_due()


def test_a_disk_that_fills_during_a_checkpoint_leaves_the_one_before(
    run: Run, hooked: Hooked, forks: Forks, tiny_compact: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    arguments = ["recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK]
    filled = "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    ran = forks.run("-m", "flexigpt", *arguments, env=hooked("os.rename", "*/checkpoint-4", filled, OFTEN))
    assert ran.returncode == 2
    line = last_line(ran.stderr)
    assert "the disk is full, free space; the state after step 4 is safe, --resume goes on from it" in line
    assert checkpoints(tmp_path / "out") == ["checkpoint-3", "checkpoint-4"]
    assert run(*arguments, "--resume")[0] == 0
    assert_same(tmp_path / "out", whole)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not finite are loaded, as if training had brought them there."""
    monkeypatch.setattr("flexigpt.weights.open.check_numbers", lambda *_: None)


def poisoned(model: Path, text: Path, folder: Path, step: int) -> Path:
    """The model with an embedding that is not a number, of a token that the text has first in that step."""
    ids = textbook.text_ids(text, model)
    window = WINDOW * WINDOWS
    token = next(token for token in ids[(step - 1) * window : step * window] if token not in ids[: (step - 1) * window])
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    run: Run, tiny_compact: Path, single: Path, tmp_path: Path, often: None, unchecked: None
) -> None:
    """That from which a finite step was taken."""
    model, out = poisoned(tiny_compact, single, tmp_path / "poisoned", step=11), tmp_path / "out"
    arguments = ("recover", model, out, "--data", single, *TOKENS, *QUICK, "--train", "replicas")
    code, printed, errors = run(*arguments)
    assert code == 2
    stopped = f"the loss of step 11 is not finite: {out} holds the state after step 9; lower --lr (it was 0.004)"
    assert stopped in last_line(errors)
    record = json.loads((out / "record.json").read_text())["recovery"]
    assert record["stopped"].startswith(stopped)
    assert record["steps"] == len(record["history"]) == 9
    assert record["tokens"] == 9 * WINDOW * WINDOWS
    assert "9 steps" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "poisoned"]
    trained = textbook.opened(tiny_compact)
    mark_trained(trained, "replicas", 0)
    batches = textbook.batches_of(textbook.text_ids(single, tiny_compact), WINDOWS, WINDOW, 9)
    textbook.train(trained, batches, steps=STEPS, lr=4e-3, warmup=1)
    found = textbook.weights(out)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_at_first_writes_nothing(
    run: Run, tiny_compact: Path, single: Path, tmp_path: Path, unchecked: None
) -> None:
    model = poisoned(tiny_compact, single, tmp_path / "poisoned", step=3)
    code, _, errors = run("recover", model, tmp_path / "out", "--data", single, *TOKENS, *QUICK)
    assert code == 2
    assert "the loss of step 3 is not finite, and no checkpoint was made before it" in last_line(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["poisoned"]


def test_an_absurd_learning_rate_is_told(run: Run, tiny_compact: Path, text: Path, tmp_path: Path, often: None) -> None:
    absurd = ("--lr", "900", "--precision", "fp16", "--train", "all")
    code, _, errors = run("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK, *absurd)
    assert code == 2
    assert re.search(r"step \d+ (is|are) not finite.*; lower --lr \(it was 900", last_line(errors))


def test_a_text_that_ends_early_is_told_before_the_work(
    run: Run, tiny_compact: Path, single: Path, tmp_path: Path
) -> None:
    tokens = len(textbook.text_ids(single, tiny_compact))
    arguments = ("recover", tiny_compact, tmp_path / "out", "--data", single, *QUICK, "--tokens", 3 * tokens)
    code, _, errors = run(*arguments)
    assert code == 2
    assert f"{single} has {tokens:,} tokens" in last_line(errors)
    assert "give --epochs 3" in last_line(errors)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_ends_uncounted_is_told_at_its_end_and_more_epochs_go_on(
    run: Run, tiny_compact: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_COUNTED_BYTES", 0)  # as if the text were too large to be counted
    tokens = len(textbook.text_ids(single, tiny_compact))
    steps = tokens // (WINDOW * WINDOWS)
    asked = ("--data", single, *QUICK, "--tokens", (steps + 6) * WINDOW * WINDOWS)
    code, _, errors = run("recover", tiny_compact, tmp_path / "out", *asked)
    assert code == 2
    assert f"--resume with more --epochs goes on after step {steps}" in last_line(errors)
    assert checkpoints(tmp_path / "out")[-1] == f"checkpoint-{steps}"
    assert run("recover", tiny_compact, tmp_path / "out", *asked, "--epochs", 2, "--resume")[0] == 0
    assert run("recover", tiny_compact, tmp_path / "whole", *asked, "--epochs", 2)[0] == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_no_thread_is_left_behind(tiny_compact: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        recover(str(tiny_compact), tmp_path / "out", quick(text), log=signal_after(2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flexigpt")]


def test_tensorboard_gets_every_step(run: Run, tiny_compact: Path, text: Path, single: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - slow

    reported = ("--report-to", "tensorboard", "--perplexity", single)
    assert run("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK, *reported)[0] == 0
    (events,) = (tmp_path / "logs" / "out").glob("events*")
    written = EventAccumulator(str(events))
    written.Reload()
    for name in ("loss", "lr", "gradient_norm"):
        expected = {step["step"]: step[name] for step in history(tmp_path / "out")}
        assert {event.step: event.value for event in written.Scalars(name)} == pytest.approx(expected)
    assert [event.step for event in written.Scalars("perplexity")] == list(range(2, 20, 2))


@pytest.mark.parametrize(("train", "share"), [("replicas+kept", 0.1), ("replicas", 1.0), ("all", 1.0)])
def test_fitted_replicas_get_a_tenth_of_the_rate(
    tiny_compact: Path, text: Path, tmp_path: Path, train: str, share: float
) -> None:
    """Replicas that an older version fitted to text: the model's record says so, behind a recovery as well."""
    shutil.copytree(tiny_compact, tmp_path / "fitted")
    shutil.copytree(tiny_compact, tmp_path / "paper")
    record = json.loads((tiny_compact / "record.json").read_text())
    (tmp_path / "fitted" / "record.json").write_text(json.dumps(record | {"fitted": True}))
    step = quick(text, train=train, lr=2e-3, tokens=str(WINDOWS * WINDOW))
    for model, expected in (("fitted", share), ("paper", 1.0)):
        first = recover(str(tmp_path / model), tmp_path / f"{model}-1", step)
        again = recover(str(tmp_path / f"{model}-1"), tmp_path / f"{model}-2", step)
        for record in (first, again):
            assert record is not None
            assert record["options"]["replica_lr"] == pytest.approx(2e-3 * expected)


def test_a_damaged_record_of_the_model_is_told(tiny_compact: Path, text: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(tiny_compact, tmp_path / "compact")
    (tmp_path / "compact" / "record.json").write_text("{")
    code, _, errors = run("recover", tmp_path / "compact", tmp_path / "out", "--data", text, *TOKENS, *QUICK)
    assert code == 2
    assert "record.json: invalid JSON" in last_line(errors)
    assert not (tmp_path / "out").exists()
