"""Bad input to recovery: one clear line before any work, nothing written."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import textbook
from conftest import Run
from flexigpt import InputError, RecoverOptions, recover

QUICK = "--data TEXT --tokens 640 --window-length 16 --batch-tokens 64"
BAD_INPUT = {
    "nowhere out": "the model nowhere cannot be opened",
    "COMPACT out --tokens 10": "--tokens 10 is less than one step of 64 tokens: give more, or fewer --batch-tokens",
    "COMPACT out --tokens lots": "--tokens lots cannot be read",
    "COMPACT out --tokens 0": "--tokens 0 cannot be read",
    "COMPACT out --tokens 1M": "give --epochs 188, fewer --tokens, or more text",
    "COMPACT out --epochs 0": "--epochs 0 is too small",
    "COMPACT out --batch-tokens 100": "no multiple of 16 tokens x 1 processes: give 96 or 112",
    "COMPACT out --train some": "--train some is unknown: give replicas+kept, replicas, all",
    "COMPACT out --precision int8": "--precision int8 is unknown: give fp32, bf16, fp16",
    "COMPACT out --fsdp": "start torchrun --nproc-per-node N -m flexigpt",
    "COMPACT out --data nowhere.jsonl": "text file nowhere.jsonl is not there",
    "COMPACT out --data empty.txt": "text file empty.txt is empty",
    "COMPACT out --data shards": "text file shards/b.txt is empty: remove it or",
    "COMPACT out --data blank.jsonl": "holds no text",
    "COMPACT out --data shards/a.txt#body": "shards/a.txt has no column 'body': its columns are 'text'",
    "COMPACT out --data shards/a.txt#": "shards/a.txt# names no column: give shards/a.txt#COLUMN, or leave the # out",
    "COMPACT out --perplexity nowhere.txt": "text file nowhere.txt is not there",
    "COMPACT out --perplexity short.txt": "fewer than one window of 16",
    "COMPACT out --window-length 999": "window length 999 does not fit: give 2 to 128",
    "COMPACT out --lr 0": "--lr 0 is out of range: give a number above 0",
    "COMPACT out --lr nan": "--lr nan is out of range",
    "COMPACT out --lr fast": "--lr fast is out of range: give a number above 0 and below 1000, or auto",
    "COMPACT out --lr auto": "tries up to 4 rates for 5 steps each, more than the run's 10: give --lr X, more --tokens",
    "COMPACT out --replica-lr 0": "--replica-lr 0.0 is out of range",
    "COMPACT out --seed -1": "--seed -1 is out of range",
    "COMPACT out --device cuda:9": "device cuda:9 cannot be used here",
    "COMPACT out --lora-rank 0": "--lora-rank 0 is too small: give at least 1",
    "COMPACT out --lora-rank 99": "a LoRA of rank 99 does not fit the linears: give --lora-rank 1 to 32",
    "COMPACT out --teacher SOURCE --distill-weight 0": "--distill-weight 0.0 is out of range: give a number above 0",
    "COMPACT out --draft-weight 1.5": "--draft-weight 1.5 is out of range: give a number of 0 to 1",
    "COMPACT out --teacher nowhere": "the model nowhere cannot be opened",
    "COMPACT out --teacher COMPACT": "is a compact model",
    "COMPACT out --teacher othertokenizer": "the teacher othertokenizer has another tokenizer than the model",
    "COMPACT out --teacher othervocabulary": "has a vocabulary of 4,100, the model one of 4,096",
    "SOURCE out --train replicas": "trains nothing, since the model has no replicas",
    "COMPACT out --report-to nowhere": "--report-to nowhere is unknown: give aim",
    "COMPACT out --report-to tensorboard,wandb": "--report-to wandb needs a package that is not installed",
    "COMPACT out --resume": "there is no run to resume in out.recovery: leave --resume out",
    "COMPACT full": "full is not empty: give another folder, or --overwrite",
    "COMPACT full --overwrite --data full/config.json#text": "full/config.json lies in full, which is to be replaced",
    "COMPACT COMPACT --overwrite": "lies in",
}


@pytest.fixture(scope="module")
def workplace(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("Too short.")
    (folder / "blank.jsonl").write_text('{"text": ""}\n')
    (folder / "shards").mkdir()
    (folder / "shards" / "a.txt").write_text("Some words. " * 500)
    (folder / "shards" / "b.txt").touch()
    (folder / "full").mkdir()
    (folder / "full" / "config.json").write_text("{}")
    shutil.copytree(tiny_source, folder / "othertokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tiny_source)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder / "othertokenizer")
    shutil.copytree(tiny_source, folder / "othervocabulary")
    config = AutoConfig.from_pretrained(tiny_source, vocab_size=4100)
    config.save_pretrained(folder / "othervocabulary")
    weights = load_file(tiny_source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][[*range(4096), 0, 0, 0, 0]]
    save_file(weights, folder / "othervocabulary" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    run: Run,
    command: str,
    workplace: Path,
    tiny_source: Path,
    tiny_compact: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace)
    before = sorted(workplace.rglob("*"))
    places = {"SOURCE": tiny_source, "COMPACT": tiny_compact, "TEXT": text}
    words = [places.get(word, word) for word in shlex.split(command)]
    quick = [places.get(word, word) for word in QUICK.split()]
    code, printed, errors = run("recover", *words[:2], *quick, *words[2:])
    assert code == 2
    assert printed == ""
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert line.startswith("flexigpt: ")
    assert BAD_INPUT[command] in line
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"warmup": 1.0}, "--warmup 1.0 is out of range: give a number of 0 or more, below 1"),
        ({"tokens": "many"}, "--tokens many cannot be read"),
        ({"draft_weight": -0.1}, "--draft-weight -0.1 is out of range"),
    ],
)
def test_options_are_checked_when_they_are_made(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        RecoverOptions(**given)


@pytest.mark.parametrize("model", ["compact", "source"])
def test_settings_without_effect_change_nothing(
    model: str, tiny_source: Path, tiny_compact: Path, text: Path, tmp_path: Path
) -> None:
    """Without a teacher, with replicas alone trained, or in a model without any, to which --replica-lr is refused."""
    folder, train = (tiny_compact, "replicas") if model == "compact" else (tiny_source, "replicas+kept")
    asked = {"data": str(text), "tokens": "128", "window_length": 16, "batch_tokens": 64, "train": train}
    idle = {"distill_weight": 0.9, "draft_weight": 0.5} | ({"lora_rank": 2} if train == "replicas" else {})
    if model == "source":
        with pytest.raises(InputError, match="--replica-lr without effect"):
            recover(str(folder), tmp_path / "out", RecoverOptions(**asked, replica_lr=0.3))
    for name, given in (("plain", {}), ("idle", idle)):
        recover(str(folder), tmp_path / name, RecoverOptions(**asked, **given))
    plain, other = (textbook.weights(tmp_path / name) for name in ("plain", "idle"))
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items())


def test_the_record_holds_what_every_option_stood_for(tiny_compact: Path, text: Path, tmp_path: Path) -> None:
    options = RecoverOptions(data=str(text), tokens="128", window_length=16, batch_tokens=64)
    record = recover(str(tiny_compact), tmp_path / "out", options)
    assert record is not None
    expected = {name: value for name, value in asdict(options).items() if value is not None}
    expected |= {"lora_rank": 4, "replica_lr": 4e-3, "precision": "fp32"}
    assert record["options"] == expected


def test_the_options_load_no_torch() -> None:
    code = (
        "from flexigpt.recovery import RecoverOptions; RecoverOptions(); import sys; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
