"""Bad input to recovery: one clear line before any work, nothing written."""

import shlex
import shutil
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from conftest import Run
from flexigpt import RecoverOptions
from flexigpt.cli.main import app
from flexigpt.cli.options import field_help

QUICK = "--data TEXT --tokens 640 --window-length 16 --batch-tokens 64"
BAD_INPUT = {
    "nowhere out": "the model nowhere cannot be opened",
    "COMPACT out --tokens 10": "--tokens 10 is less than one step of 64 tokens: give more, or fewer --batch-tokens",
    "COMPACT out --tokens lots": "--tokens lots cannot be read",
    "COMPACT out --tokens 0": "--tokens 0 cannot be read",
    "COMPACT out --tokens 1M": "give --epochs 188, fewer --tokens, or more text",
    "COMPACT out --epochs 0": "--epochs 0 is too small",
    "COMPACT out --batch-tokens 100": "no multiple of 16 tokens x 1 processes: give 96 or 112",
    "COMPACT out --micro-batch 5": "--micro-batch 5 is more than the 4 windows a process has in a step",
    "COMPACT out --train some": "--train some is unknown: give replicas+kept, replicas, all",
    "COMPACT out --precision int8": "--precision int8 is unknown: give fp32, bf16, fp16",
    "COMPACT out --fsdp": "start it with torchrun --nproc-per-node N -m flexigpt",
    "COMPACT out --data nowhere.jsonl": "text file nowhere.jsonl is not there",
    "COMPACT out --data empty.txt": "text file empty.txt is empty",
    "COMPACT out --data shards": "text file shards/b.txt is empty: remove it or",
    "COMPACT out --data blank.jsonl": "holds no text",
    "COMPACT out --data shards/a.txt#body": "shards/a.txt has no column 'body': its columns are 'text'",
    "COMPACT out --data shards/a.txt#": "shards/a.txt# names no column: give shards/a.txt#COLUMN, or leave the # out",
    "COMPACT out --perplexity nowhere.txt": "text file nowhere.txt is not there",
    "COMPACT out --perplexity short.txt": "fewer than one window of 16",
    "COMPACT out --window-length 999": "window length 999 does not fit: give 2 to 128",
    "COMPACT out --lr 0": "--lr 0.0 is out of range",
    "COMPACT out --lr nan": "--lr nan is out of range",
    "COMPACT out --replica-lr 0": "--replica-lr 0.0 is out of range",
    "COMPACT out --replica-lr 1e-3 --train replicas": "--replica-lr has no effect with --train replicas, since --lr",
    "SOURCE out --replica-lr 1e-3": "has no replicas: leave it out",
    "COMPACT out --warmup 1": "--warmup 1.0 is out of range",
    "COMPACT out --clip 0": "--clip 0.0 is out of range",
    "COMPACT out --seed -1": "--seed -1 is out of range",
    "COMPACT out --device cuda:9": "device cuda:9 cannot be used here",
    "COMPACT out --lora-rank 99": "a LoRA of rank 99 does not fit the linears: give --lora-rank 1 to 32",
    "COMPACT out --lora-rank 2 --train all": "--lora-rank has no effect with --train all",
    "COMPACT out --eval-every 2": "--eval-every has no effect without --perplexity",
    "COMPACT out --distill-weight 0.5": "--distill-weight has no effect without --teacher",
    "COMPACT out --teacher SOURCE --distill-weight 0": "--distill-weight 0.0 is outside (0, 1]",
    "COMPACT out --draft-weight 0": "--draft-weight 0.0 is outside (0, 1]",
    "COMPACT out --draft-weight 1.5": "--draft-weight 1.5 is outside (0, 1]",
    "COMPACT out --draft-weight 0.5 --train replicas": "--draft-weight has no effect with --train replicas",
    "SOURCE out --draft-weight 0.5": "has no replicas and so no draft: leave it out",
    "COMPACT out --teacher nowhere": "the model nowhere cannot be opened",
    "COMPACT out --teacher COMPACT": "is a compact model",
    "COMPACT out --teacher othertokenizer": "the teacher othertokenizer has another tokenizer than the model",
    "COMPACT out --teacher othervocabulary": "has a vocabulary of 4,100, the model one of 4,096",
    "COMPACT out --match SOURCE": "--match is for a model without replicas",
    "SOURCE out --match SOURCE": "names a compact model",
    "SOURCE out --match COMPACT --lora-rank 2": "--match has no effect beside --lora-rank",
    "SOURCE out --match COMPACT --train all": "--match has no effect with --train all",
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


def test_every_option_is_a_flag_with_its_fields_help() -> None:
    flags = {parameter.name: parameter for parameter in typer.main.get_command(app).commands["recover"].params}
    described = field_help(RecoverOptions)
    assert set(described) == set(RecoverOptions.__dataclass_fields__)
    assert {name: flags[name].help for name in described} == described
