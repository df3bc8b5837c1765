"""benchmarks/pretrain.py: a tiny model from scratch, opened, resumed after a kill, refused."""

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Hooked
from forks import Forks

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pretrain.py"
TINY = ("--blocks", "2", "--hidden-size", "64", "--intermediate-size", "64", "--window-length", "32")
# Short enough to be quick, long enough to be killed in the third epoch.
RUN = (
    *TINY,
    "--batch-tokens",
    "256",
    "--tokens",
    "4K",
    "--epochs",
    "4",
    "--device",
    "cpu",
    "--attention-dropout",
    "0.1",
)

Pretrain = Callable[..., None]


@pytest.fixture(scope="session")
def pretrain() -> Pretrain:
    main = runpy.run_path(str(SCRIPT))["main"]
    return lambda *words: main([str(word) for word in words])


@pytest.fixture(scope="session")
def texts(text: Path, single: Path) -> tuple[str, ...]:
    return ("--data", str(text), "--validation", str(single))


@pytest.fixture(scope="session")
def whole(pretrain: Pretrain, texts: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its beginning to its end."""
    out = tmp_path_factory.mktemp("pretrain") / "whole"
    pretrain(out, *texts, *RUN)
    return out


def measured(out: Path) -> dict:
    return json.loads((out / "training.json").read_text())


def test_it_learns_and_says_what_it_measured(whole: Path) -> None:
    told = measured(whole)
    losses = [epoch["loss"] for epoch in told["history"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 8.4  # ln 4096 is 8.32: no knowledge
    assert losses[-1] < 7.7
    assert told["steps"] == 4 * (4000 // 256)
    assert told["best"] == min(told["history"], key=lambda epoch: epoch["perplexity"])
    assert not whole.with_name("whole.recovery").exists()


@torch.no_grad()
def test_the_checkpoint_is_an_ordinary_one_of_the_best_epoch(whole: Path, single: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.num_attention_heads) == ("llama", 2, 2)
    assert measured(whole)["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    ids = torch.tensor([1, *tokenizer(single.read_text(), add_special_tokens=False, verbose=False).input_ids, 2])
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    found = torch.tensor(total / (len(ids) - 1)).exp().item()
    assert found == pytest.approx(measured(whole)["best"]["perplexity"], rel=1e-4)


def test_resumed_after_a_kill_it_comes_to_the_same(
    pretrain: Pretrain,
    hooked: Hooked,
    forks: Forks,
    texts: tuple[str, ...],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed between the third epoch's OUT and its checkpoint."""
    out = tmp_path / "killed"
    environment = hooked("os.rename", "*/checkpoint-3", "os.kill(os.getpid(), signal.SIGKILL)")
    assert forks.run(SCRIPT, out, *texts, *RUN, env=environment).returncode == -9
    assert out.with_name("killed.recovery").exists()
    AutoModelForCausalLM.from_pretrained(out)  # what is there is complete

    refused(pretrain, capsys, "--resume", out, *texts, *RUN, "--lr", "1e-3", says="lr = 0.002, now it is 0.001")
    refused(pretrain, capsys, out, *texts, *RUN, says="--resume")
    pretrain(out, *texts, *RUN, "--resume")
    printed = capsys.readouterr().out
    assert "epoch 3/4" in printed
    assert "epoch 2/4" not in printed
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for mine, uninterrupted in zip(measured(out)["history"], measured(whole)["history"], strict=True):
        assert (mine["loss"], mine["perplexity"]) == (uninterrupted["loss"], uninterrupted["perplexity"])


def refused(pretrain: Pretrain, capsys: pytest.CaptureFixture[str], *words: object, says: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        pretrain(*words)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert says in error[-1], error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl is not there"),
        (("--data", f"{SCRIPT.parents[1]}/examples/novel16/recovery.parquet#story"), "no column 'story'"),
        (("--hidden-size", "65"), "give a multiple of 64"),
        (("--blocks", "0"), "at least 1"),
        (("--attention-dropout", "1"), "below 1"),
        (("--window-length", "513"), "give 2 to 512"),
        (("--batch-tokens", "250"), "give 224 or 256"),
        (("--tokens", "100"), "less than one step"),
        (("--tokens", "1M"), "fewer --tokens"),
        (("--epochs", "0"), "give at least 1"),
        (("--lr", "fast"), "invalid float value"),
        (("--resume",), "no run to resume"),
        (("--device", "abacus"), "cannot be used here"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    pretrain: Pretrain,
    texts: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, ...],
    says: str,
) -> None:
    refused(pretrain, capsys, tmp_path / "out", *texts, *RUN, *change, says=says)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_another_origin_is_never_replaced(
    pretrain: Pretrain, texts: tuple[str, ...], tiny_source: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(pretrain, capsys, tiny_source, *texts, *RUN, "--overwrite", says="is there")
    refused(pretrain, capsys, whole, *texts, *RUN, says="is there")


def test_what_the_script_wrote_is_replaced_if_asked(pretrain: Pretrain, texts: tuple[str, ...], tmp_path: Path) -> None:
    short = (*texts, *RUN, "--tokens", "512", "--epochs", "1")
    pretrain(tmp_path / "out", *short)
    pretrain(tmp_path / "out", *short, "--seed", "1", "--overwrite")
    assert measured(tmp_path / "out")["run"]["seed"] == 1
    assert os.listdir(tmp_path) == ["out"]


def test_the_deep_shape_has_about_30_million_parameters() -> None:
    script = runpy.run_path(str(SCRIPT))
    arguments = script["parse"](["out", "--data", "a", "--validation", "b", "--shape", "deep"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(script["shape_of"](arguments))
    assert model.config.num_hidden_layers == 24
    assert model.num_parameters() == pytest.approx(30e6, rel=0.05)
