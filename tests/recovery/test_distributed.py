"""Two real processes (gloo) against one: same losses, same weights, checkpoints that change hands.

They are started as torchrun does, which would import for seconds; the command under torchrun itself is a slow test.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import checkpoints, history, poisoned, quick, signal_after

import launched
import textbook
from flexigpt import InputError, RecoverOptions, recover
from forks import Forks, free_ports

# Options besides those of `quick`; each process has 2 of a step's 4 windows, which may go through one by one. Often: a
# checkpoint after every step.
RUNS: dict[str, dict[str, Any]] = {
    "ddp-replicas-teacher": {"train": "replicas", "teacher": "SOURCE", "one_by_one": True},
    "ddp-draft": {"draft_weight": 0.5, "perplexity": "TEXT", "one_by_one": True},
    "fsdp-draft-teacher-checkpointing": {
        "fsdp": True,
        "draft_weight": 0.5,
        "teacher": "SOURCE",
        "activation_checkpointing": True,
        "perplexity": "TEXT",
        "one_by_one": True,
    },
    "fsdp-all": {"fsdp": True, "train": "all", "perplexity": "TEXT", "often": True},
    "ddp-auto": {"lr": "auto"},
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"perplexity": "TEXT"},
    "fsdp-draft": {"fsdp": True, "draft_weight": 0.5, "perplexity": "TEXT", "one_by_one": True},
    "fsdp-teacher-checkpointing": {"fsdp": True, "teacher": "SOURCE", "activation_checkpointing": True},
    "ddp-all": {"train": "all", "one_by_one": True},
    "ddp-draft-all-teacher": {"draft_weight": 0.5, "train": "all", "teacher": "SOURCE", "lr": 1e-3},
    "fsdp-draft-all-checkpointing": {
        "fsdp": True,
        "draft_weight": 0.5,
        "train": "all",
        "lr": 1e-3,
        "teacher": "SOURCE",
        "activation_checkpointing": True,
    },
    "fsdp-replicas": {"fsdp": True, "train": "replicas", "one_by_one": True},
    "fsdp-bf16": {"fsdp": True, "precision": "bf16"},
    "fsdp-auto": {"fsdp": True, "lr": "auto", "teacher": "SOURCE"},
}
SETTINGS = ("often", "one_by_one")
STEP = ("--window-length", 16, "--batch-tokens", 64)
# name -> (what is stopped after step 7, what goes on)
RESUMED = {"2 ddp, 1": ("ddp", "one"), "2 fsdp, 2 ddp": ("fsdp", "ddp")}
MORE_RESUMED = {"1, 2 fsdp": ("one", "fsdp"), "2 fsdp, 1": ("fsdp", "one")}
SLOW = pytest.mark.slow


def torchrun(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


class Two:
    """What two processes made of jobs, one after another in one start: a folder for each, and what they were told."""

    def __init__(self, folder: Path, model: Path, places: dict[str, Path]) -> None:
        self.folder, self._model, self._places = folder, model, places
        self._jobs: dict[str, dict[str, Any]] = {}
        self.errors = ""

    def add(self, name: str, job: str = "", **given: Any) -> dict[str, Any]:
        settings = {name: given.pop(name, False) for name in SETTINGS}
        made = {"model": str(self._model), "out": str(self.folder / name), "options": asked(given, self._places)}
        self._jobs[job or name] = made | settings
        return self._jobs[job or name]

    def add_command(self, name: str, *words: object) -> None:
        self._jobs[name] = {"command": [str(word) for word in words]}

    def add_resumed(self, name: str, before: str, after: str) -> None:
        if before == "one":
            options = RecoverOptions(**asked({}, self._places))
            with pytest.raises(InputError):
                recover(str(self._model), self.folder / name, options, log=signal_after(7))
        else:
            self.add(name, f"{name}, stopped", fsdp=before == "fsdp")["stop_after"] = 7
        if after != "one":
            self.add(name, fsdp=after == "fsdp")["resume"] = True

    def start(self, forks: Forks) -> None:
        for job, port in zip(self._jobs.values(), free_ports(len(self._jobs)), strict=True):
            job["port"] = port
        (self.folder / "jobs.json").write_text(json.dumps(self._jobs))
        for ran in forks.run_two(launched.__file__, self.folder / "jobs.json"):
            assert ran.returncode == 0, ran.stderr
            assert "Warning" not in ran.stderr
            self.errors += ran.stderr

    def told(self, job: str) -> list[str | None]:
        """Each process's error, or its exit code."""
        return [json.loads((self.folder / f"jobs.{rank}").read_text())[job] for rank in range(2)]


@pytest.fixture(scope="module")
def places(tiny_source: Path, single: Path) -> dict[str, Path]:
    return {"TEXT": single, "SOURCE": tiny_source}


@pytest.fixture(scope="module")
def two(forks: Forks, tiny_compact: Path, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Two:
    started = Two(tmp_path_factory.mktemp("two"), tiny_compact, places)
    for name, given in RUNS.items():
        started.add(name, **given)
    for name, (before, after) in RESUMED.items():
        started.add_resumed(name, before, after)
    words = ("recover", tiny_compact, started.folder / "short", "--data", places["TEXT"], *STEP, "--tokens", "1M")
    started.add_command("short", *words)
    started.start(forks)
    return started


@pytest.fixture(scope="module")
def more(forks: Forks, tiny_compact: Path, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Two:
    started = Two(tmp_path_factory.mktemp("more"), tiny_compact, places)
    for name, given in MORE_RUNS.items():
        started.add(name, **given)
    for name, (before, after) in MORE_RESUMED.items():
        started.add_resumed(name, before, after)
    model = poisoned(tiny_compact, places["TEXT"], started.folder / "poisoned-model", step=11)
    started.add("poisoned", train="replicas", fsdp=True, often=True)["model"] = str(model)
    started.start(forks)
    return started


def asked(given: dict[str, Any], places: dict[str, Path]) -> dict[str, Any]:
    """The fields of the options."""
    named = {name: str(places.get(value, value)) if isinstance(value, str) else value for name, value in given.items()}
    return asdict(quick(places["TEXT"], **named))


@pytest.fixture(scope="module")
def alone(tiny_compact: Path, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run by one process of the same options."""

    def run(**given: Any) -> Path:
        out = tmp_path_factory.mktemp("alone") / "out"
        of_one = {name: value for name, value in given.items() if name not in SETTINGS} | {"fsdp": False}
        recover(str(tiny_compact), out, RecoverOptions(**asked(of_one, places)))
        return out

    return run


def assert_close(out: Path, one: Path) -> None:
    found, expected = history(out), history(one)
    assert len(found) == len(expected) == 20
    for step, wanted in zip(found, expected, strict=True):
        assert step == pytest.approx(wanted, rel=1e-5, abs=2e-7)  # a divergence of nearly equal models is tiny
    weights, wanted_weights = textbook.weights(out), textbook.weights(one)
    assert weights.keys() == wanted_weights.keys()
    for name, tensor in wanted_weights.items():
        # Where a gradient is next to nothing, Adam makes a whole step of what sums in another order leave of it.
        apart = (weights[name] - tensor).abs()
        assert apart.max() < 1e-3, name
        assert (apart > 1e-4).float().mean() < 1e-4, name


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=SLOW) for name in MORE_RUNS)])
def test_two_processes_train_as_one_does(request: pytest.FixtureRequest, alone: Callable[..., Path], name: str) -> None:
    slow = name in MORE_RUNS
    ran, given = request.getfixturevalue("more" if slow else "two"), (MORE_RUNS if slow else RUNS)[name]
    assert ran.told(name) == [None, None]
    out, one = ran.folder / name, alone(**given)
    if "precision" in given:
        losses, expected = ([step["loss"] for step in history(path)] for path in (out, one))
        assert losses == pytest.approx(expected, rel=1e-3)
        assert losses != pytest.approx([step["loss"] for step in history(alone())], rel=1e-5)
        return
    assert_close(out, one)
    records = [json.loads((path / "record.json").read_text()) for path in (out, one)]
    assert [record["recovery"]["processes"] for record in records] == [2, 1]
    for side in ("before", "after") if "perplexity" in given else ():
        found, expected = (record["perplexity"][side] for record in records)
        drafts = [measured.pop("draft", {}) for measured in (found, expected)]
        assert found == pytest.approx(expected, rel=1e-5)
        assert drafts[0] == pytest.approx(drafts[1], rel=1e-3)
    with torch.no_grad():
        ids = torch.arange(300, 332)[None]
        logits, expected_logits = (textbook.opened(path)(input_ids=ids).logits for path in (out, one))
    torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=0)
    assert not out.with_name(f"{name}.recovery").exists()


@pytest.mark.parametrize("name", [*RESUMED, *(pytest.param(name, marks=SLOW) for name in MORE_RESUMED)])
def test_a_stopped_run_goes_on_with_other_processes(
    request: pytest.FixtureRequest,
    alone: Callable[..., Path],
    tiny_compact: Path,
    places: dict[str, Path],
    name: str,
) -> None:
    ran = request.getfixturevalue("more" if name in MORE_RESUMED else "two")
    before, after = (RESUMED | MORE_RESUMED)[name]
    if before != "one":
        stopped = "interrupted after step 7 of 20: --resume goes on from there"
        assert ran.told(f"{name}, stopped") == [stopped, stopped]
    if after == "one":
        assert checkpoints(ran.folder / name) == ["checkpoint-7"]
        recover(str(tiny_compact), ran.folder / name, RecoverOptions(**asked({}, places)), resume=True)
    else:
        assert ran.told(name) == [None, None]
    assert_close(ran.folder / name, alone())


@SLOW
def test_a_loss_that_is_not_finite_stops_both(more: Two, places: dict[str, Path], tmp_path: Path, often: None) -> None:
    assert more.told("poisoned") == [None, None]
    out = more.folder / "poisoned"
    assert "the loss of step 11 is not finite" in json.loads((out / "record.json").read_text())["recovery"]["stopped"]
    recover(str(more.folder / "model"), tmp_path / "one", RecoverOptions(**asked({"train": "replicas"}, places)))
    found, expected = textbook.weights(out), textbook.weights(tmp_path / "one")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, equal_nan=True, msg=name)


def test_an_error_is_told_once_and_nobody_waits(two: Two) -> None:
    """Only the first process counts the text; the other has to hear of it."""
    assert two.told("short") == ["2", "2"]
    (line,) = [line for line in two.errors.splitlines() if line.startswith("flexigpt: ")]
    assert "fewer --tokens, or more text" in line
    assert not list(two.folder.glob("short*"))


@SLOW
@pytest.mark.parametrize("kind", ["--fsdp", None])
def test_the_command_under_torchrun(
    tiny_compact: Path, single: Path, tmp_path: Path, alone: Callable[..., Path], kind: str | None
) -> None:
    words = ("recover", tiny_compact, tmp_path / "out", "--data", single, *STEP, "--tokens", 1280)
    ran = torchrun("-m", "flexigpt", *words, *([kind] if kind else []))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(f"checkpoint written to {tmp_path / 'out'}") == 1
    assert ran.stderr.count("step 20/20") == 1
    assert "Warning" not in ran.stderr
    assert_close(tmp_path / "out", alone())
    ran = torchrun("-m", "flexigpt", *words)
    assert ran.returncode != 0
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("flexigpt: ")]
    assert "is not empty" in line
