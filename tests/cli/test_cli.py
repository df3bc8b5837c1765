"""The commands as a user meets them: output, exit codes, one clear line for bad input, nothing half-written."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Hooked, Run
from flexigpt import EvalOptions, evaluate
from flexigpt.cli.main import main
from forks import Forks


@pytest.fixture(scope="module")
def compact(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compact") / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["prune", str(tiny_source), str(out), "--blocks", "2,4", "--rank", "4", "--preset", "paper"])
    assert not stopped.value.code
    return out


def test_prune_prints_the_plan_the_cost_and_the_place(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, progress = run(
        *("prune", tiny_source, out, "--ratio", "0.4", "--rank", "4", "--calibration", text),
        *("--window-length", "64", "--windows", "4", "--perplexity", text, "--preset", "paper"),
    )
    assert code == 0
    record = json.loads((out / "record.json").read_text())
    for shown in ("influence", "distance", "adapters of rank ", "output norms", f"checkpoint written to {out}"):
        assert shown in printed
    for side in ("source", "compact"):
        assert f"{record[side]['parameters']:,}" in printed
        assert f"{record['perplexity'][side]['perplexity']:.2f}" in printed
    for stage in ("measuring distances", "initialising replicas"):
        assert stage in progress
    assert "influence on 4 windows of 64 tokens of" in printed
    assert record["command"].startswith("flexigpt ")
    assert f"{record['scores'][0]:.4f}" in (out / "README.md").read_text()


def test_a_text_that_is_too_short_for_the_windows_is_told(
    run: Run, tiny_source: Path, text: Path, tmp_path: Path
) -> None:
    asked = ("--ratio", "0.4", "--calibration", text, "--window-length", "100", "--windows", "1000")
    _, printed, _ = run("prune", tiny_source, tmp_path / "out", *asked)
    windows = json.loads((tmp_path / "out" / "record.json").read_text())["calibration"]["windows"][0]
    assert f"the text is {1000 - windows} windows short of the 1000 asked for" in printed


def test_a_plan_can_be_made_edited_and_applied(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    code, printed, _ = run(
        *("prune", tiny_source, tmp_path / "plan", "--plan-only", "--ratio", "0.4", "--rank", "4"),
        *("--preset", "paper"),
        *("--calibration", text, "--window-length", "64", "--windows", "4"),
    )
    assert code == 0
    assert "apply it with --plan" in printed
    assert sorted(file.name for file in (tmp_path / "plan").iterdir()) == ["plan.json", "record.json"]
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    plan["replicas"] = [{"block": 1, "base": 5, "rank": 3}]
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    calibrated = ("--calibration", text, "--window-length", "64", "--windows", "4")
    assert run("prune", tiny_source, tmp_path / "out", "--plan", tmp_path / "edited.json", *calibrated)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["replicas"] == plan["replicas"]


@pytest.mark.parametrize("which", ["source", "compact"])
def test_inspect(run: Run, tiny_source: Path, compact: Path, which: str) -> None:
    folder = tiny_source if which == "source" else compact
    code, printed, _ = run("inspect", folder, "--json")
    assert code == 0
    found = json.loads(printed)
    weights = load_file(folder / "model.safetensors")
    stored = sum(tensor.numel() for tensor in weights.values())
    assert found["parameters"]["stored"] == stored == sum(part["parameters"] for part in found["parts"].values())
    assert found["bytes"]["stored"] == 4 * stored
    assert found["bytes"]["files"] == (folder / "model.safetensors").stat().st_size
    adapters = sum(tensor.numel() for name, tensor in weights.items() if "adapter" in name)
    shared = 0 if which == "source" else 2 * 32 * (64 + 32 + 32 + 64 + 3 * 48)
    assert found["parameters"]["effective"] == stored + shared
    assert found["parts"].get("replicas, adapters", {"parameters": 0})["parameters"] == adapters
    assert (found["plan"] is None) == (which == "source")
    code, printed, _ = run("inspect", folder)
    assert code == 0
    assert f"{stored:,}" in printed


@pytest.mark.parametrize("which", ["source", "compact"])
def test_eval(run: Run, tiny_source: Path, compact: Path, text: Path, which: str) -> None:
    folder = tiny_source if which == "source" else compact
    arguments = ("eval", folder, "--perplexity", text, "--window-length", "64")
    code, printed, _ = run(*arguments, "--json")
    assert code == 0
    expected = evaluate(str(folder), EvalOptions(perplexity=str(text), window_length=64))
    assert json.loads(printed) == expected | {"command": shlex.join(["flexigpt", *map(str, arguments), "--json"])}
    code, printed, _ = run(*arguments)
    measured = expected["models"][0]["perplexity"]
    for shown in (f"{measured['perplexity']:.4f}", f"{measured['bits_per_byte']:.4f}", "windows of 64"):
        assert shown in printed


@pytest.mark.parametrize("which", ["source", "compact"])
def test_generate_streams_what_stock_generate_makes(run: Run, tiny_source: Path, compact: Path, which: str) -> None:
    folder = tiny_source if which == "source" else compact
    code, printed, _ = run("generate", folder, "--prompt", "It was a dark", "--max-new-tokens", "12")
    assert code == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("It was a dark", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=2)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert printed == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_sampling_repeats_with_its_seed(run: Run, tiny_source: Path) -> None:
    sample = ("generate", tiny_source, "--prompt", "It was", "--max-new-tokens", "8", "--temperature", "2", "--seed")
    first, again, other = (run(*sample, seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other


def bad_sources(tiny_source: Path, folder: Path) -> None:
    """Sources that cannot be pruned, each in a folder of its own."""
    for name in ("nan", "overflows", "truncated", "mixtral", "longer"):
        shutil.copytree(tiny_source, folder / name)
    weights = load_file(tiny_source / "model.safetensors")
    weights["model.layers.4.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    weights = load_file(tiny_source / "model.safetensors")
    weights["model.norm.weight"] *= 3e38
    weights["lm_head.weight"] *= 1e30
    save_file(weights, folder / "overflows" / "model.safetensors", metadata={"format": "pt"})
    whole = (tiny_source / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "mixtral" / "config.json").write_text('{"model_type": "mixtral"}')
    AutoTokenizer.from_pretrained(tiny_source, additional_special_tokens=["<more>"]).save_pretrained(folder / "longer")
    shutil.copytree(tiny_source, folder / "notokenizer", ignore=shutil.ignore_patterns("tokenizer*"))


def bad_plans(folder: Path) -> None:
    for name, row in {
        "missing": {"block": 9, "base": 1, "rank": 2},
        "itself": {"block": 3, "base": 3, "rank": 2},
        "pruned": {"block": 3, "base": 2, "rank": 2},
        "rank": {"block": 3, "base": 1, "rank": 99},
    }.items():
        rows = [{"block": 2, "base": 1, "rank": 2}, row]
        plan = {"format_version": 1, "num_blocks": 6, "replicas": rows}
        (folder / f"{name}.json").write_text(json.dumps(plan))


BAD_INPUT = {
    "prune nowhere out --ratio 0.4": "no such folder here",
    "prune SOURCE out": "give exactly one of --ratio",
    "prune SOURCE out --ratio 0": "--ratio 0.0 is out of range: give a share above 0 and below 1, as 0.3",
    "prune SOURCE out --ratio 1": "--ratio 1.0 is out of range",
    "prune SOURCE out --ratio 25": "--ratio 25.0 is out of range: give a share above 0 and below 1, as 0.25",
    "prune SOURCE out --ratio 30%": "--ratio 30% cannot be read: give a number",
    "prune SOURCE out --ratio 0.4 --windows 1.5": "--windows 1.5 cannot be read: give a whole number",
    "prune SOURCE out --max-loss 0% --perplexity TEXT": "--max-loss 0% cannot be used: give by how much",
    "prune SOURCE out --max-loss 150% --perplexity TEXT": "may rise, as 10%, above 0% and below 100%",
    "prune SOURCE out --ratio 0.4 --calibration a.txt=1.7": "a.txt=1.7 has a share out of range: give more than 0",
    "prune SOURCE out --ratio 0.4 --calibration a.txt=70%": "a.txt=70% has a share out of range: give more than 0",
    "prune SOURCE out --ratio 0.1 --preset paper": "prunes nothing: give at least 0.167",
    "prune SOURCE out --ratio lots": "--ratio lots cannot be read: give a number",
    "prune SOURCE out --blocks 1,x --preset paper": "--blocks 1,x cannot be read",
    "prune SOURCE out --blocks 0,1,2,3,4,5 --preset paper": "leaves none",
    "prune SOURCE out --blocks 2 --rank 33 --preset paper": "rank 33 is above the size of self_attn.q_proj (64 x 32)",
    "prune SOURCE out --target-size huge": "size 'huge' cannot be read",
    "prune SOURCE out --ratio 0.4 --rnk 3": "No such option: --rnk",
    "prune SOURCE out --ratio 0.4 --calibration nowhere.jsonl": "text file nowhere.jsonl is not there",
    "prune SOURCE out --ratio 0.4 --calibration TEXT#body": "has no column 'body': its columns",
    "prune SOURCE out --blocks 2 --output-norm nan --preset paper": "--output-norm nan cannot be used",
    "prune SOURCE out --ratio 0.4 --preset quick": "--preset quick is unknown: give default, paper",
    "prune SOURCE out --blocks 2 --remove --plan-only": "--remove makes no plan",
    "prune SOURCE out --blocks 2 --rank 0 --preset paper": "--rank 0 is too small",
    "prune SOURCE out --blocks 2 --rank 300% --preset paper": "--rank 300% cannot be used",
    "prune SOURCE out --blocks 2 --adapter-init magic --preset paper": "--adapter-init magic is unknown: give svd",
    "prune SOURCE out --blocks 2": "--blocks names whole blocks",
    "prune ./nowhere/at/all out --blocks 2 --preset paper": "no such folder: nowhere/at/all",
    "prune ~/nowhere-at-all out --blocks 2 --preset paper": "no such folder",
    "prune SOURCE out --ratio 0.4 --calibration empty.txt": "text file empty.txt is empty",
    "prune SOURCE out --ratio 0.4 --calibration short.txt --window-length 64": "fewer than one window of 64",
    "prune SOURCE out --ratio 0.4 --calibration TEXT --device cuda:9": "device cuda:9 cannot be used here",
    "prune SOURCE out --ratio 0.4 --calibration latin.txt": "; save it as UTF-8",
    "prune SOURCE out --plan nowhere.json": "the plan nowhere.json cannot be read",
    "prune SOURCE out --plan missing.json": "names block 9, but the model has blocks 0 to 5",
    "prune SOURCE out --plan itself.json": "makes block 3 its own base",
    "prune SOURCE out --plan pruned.json": "base 2, which is itself pruned",
    "prune SOURCE out --plan rank.json": "rank 99 is above the size",
    "prune SOURCE full --blocks 2 --preset paper": "full is not empty: give another folder, or --overwrite",
    "prune SOURCE precious --blocks 2 --overwrite --preset paper": "precious was not written by flexigpt",
    "prune SOURCE / --blocks 2 --preset paper": "cannot be replaced by a new folder",
    "prune SOURCE out --ratio 0.4 --calibration TEXT --seed -1": "--seed -1 is out of range",
    "prune SOURCE out --ratio 0.4 --calibration ''": "the name of the text is empty",
    "prune SOURCE out --target-size 9e999B": "cannot be read",
    "prune notokenizer out --blocks 2 --rank 4 --preset paper": "the tokenizer of notokenizer cannot be opened",
    "prune notokenizer out --blocks 2 --preset paper": "the tokenizer of notokenizer cannot be opened",
    "extend notokenizer out --blocks 1:4": "the tokenizer of notokenizer cannot be opened",
    "generate SOURCE --prompt Hi --temperature 1 --seed -1": "--seed -1 is out of range",
    "generate SOURCE --prompt Hi --temperature nan": "--temperature nan is out of range",
    "prune COMPACT out --blocks 2 --preset paper": "is a compact model already",
    "prune nan out --blocks 2 --rank 4 --preset paper": "NaN or infinity in block 4",
    "prune truncated out --blocks 2 --rank 4 --preset paper": "the weights of truncated are damaged",
    "prune mixtral out --blocks 2 --preset paper": "mixtral is a mixture of experts",
    "extend SOURCE out --blocks 4": "--blocks 4 cannot be repeated: give ranges within 0:6",
    "extend SOURCE out --blocks 4:9": "give ranges within 0:6",
    "extend SOURCE out --blocks 4:4": "give ranges within 0:6",
    "extend SOURCE out --blocks 3:5,1:2": "give ranges within 0:6",
    "extend SOURCE out --blocks 1:4,3:5": "give ranges within 0:6",
    "extend SOURCE out --blocks 1:4 --times 1": "--times 1 is too small: give at least 2",
    "extend SOURCE out --blocks 1:4 --pattern zigzag": "--pattern zigzag is unknown: give block, sequential",
    "extend SOURCE out --blocks 1:4 --rank 33": "rank 33 is above the size",
    "extend SOURCE out": "Missing option '--blocks'",
    "extend COMPACT out --blocks 1:4": "is a compact model already",
    "prune SOURCE out --remove": "give exactly one of --ratio",
    "prune SOURCE out --remove --ratio 0.4 --blocks 2": "got --ratio and --blocks",
    "prune SOURCE out --remove --blocks two": "--blocks two cannot be read",
    "prune SOURCE out --remove --blocks 9": "blocks 9 cannot be pruned: name some of 0 to 5",
    "prune SOURCE out --remove --blocks 0,1,2,3,4,5": "leaves none",
    "prune SOURCE out --remove --target-size 1K": "out of reach: the least is",
    "prune SOURCE full --remove --blocks 2": "full is not empty: give another folder, or --overwrite",
    "prune notokenizer out --remove --blocks 2": "the tokenizer of notokenizer cannot be opened",
    "prune COMPACT out --remove --blocks 2": "is a compact model already",
    "inspect nowhere": "no such folder here",
    "inspect mixtral": "mixtral is a mixture of experts",
    "eval SOURCE --perplexity TEXT --window-length 9999": "window length 9999 does not fit: give 2 to 128",
    "eval SOURCE --perplexity nowhere.txt": "text file nowhere.txt is not there",
    "generate SOURCE --prompt ''": "--prompt is empty",
    "generate SOURCE --prompt Hi --temperature 1 --top-p 1.5": "--top-p 1.5 is out of range",
    "generate SOURCE --prompt Hi --max-new-tokens 9999": "exceed the context of 128",
    "generate nan --prompt Hi --max-new-tokens 3": "the weights hold NaN or infinity in nan, in model.",
    "generate overflows --prompt Hi --max-new-tokens 3 --temperature 1": "logits are not finite after this prompt",
    "generate overflows --prompt Hi --max-new-tokens 3": "logits are not finite after this prompt: give --dtype",
    "generate longer --prompt Hi": "ids up to 4,096, but its embeddings have 4,096 rows: put the tokenizer there that",
    "prune longer out --ratio 0.4 --calibration TEXT --window-length 64": "has ids up to 4,096, but its embeddings",
    "prune longer out --blocks 2 --preset paper --perplexity TEXT --window-length 64": "has ids up to 4,096, but",
    "extend longer out --blocks 1:3 --perplexity TEXT --window-length 64": "has ids up to 4,096, but its embeddings",
    "eval longer --perplexity TEXT": "the tokenizer of longer has ids up to 4,096, but its embeddings have 4,096",
    "benchmark longer": "the tokenizer of longer has ids up to 4,096, but its embeddings have 4,096",
    "recover longer out --data TEXT --tokens 1K --window-length 64": "the tokenizer of longer has ids up to 4,096",
    "extend SOURCE out --blocks 1:4 --times 1000000000": "--times 1000000000 is too large: give at most 1,000",
    "generate SOURCE --prompt Hi --temperature 1e-45": "--temperature 1e-45 is out of range: give 0, or 0.0001 to",
    "prune SOURCE out --target-size 1e305TB": "size '1e305TB' cannot be read",
    "inspect 'a[/b]'": "no such folder: a[/b]",
    "inspect \udcff": "'\\udcff' is not valid UTF-8: rename the file, or type it again",
    "prune SOURCE SOURCE/out --ratio 0.4": "lies in the model",
    "frontier SOURCE SOURCE/out --perplexity TEXT": "lies in the model",
    "extend SOURCE SOURCE --blocks 1:4": "which is to be replaced",
    "recover COMPACT COMPACT/out --data TEXT --tokens 1K": "lies in the model",
    "quantize COMPACT COMPACT/out --bits 8": "lies in the model",
    "export COMPACT COMPACT/.. --to stock": "which is to be replaced",
    "prun SOURCE out": "No such command 'prun'",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    run: Run,
    command: str,
    tiny_source: Path,
    compact: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    bad_sources(tiny_source, tmp_path)
    bad_plans(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "latin.txt").write_text("caf\u00e9", encoding="latin-1")
    for folder, name in (("full", "config.json"), ("precious", "diary.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    places = {"SOURCE": tiny_source, "COMPACT": compact, "TEXT": text}
    words = [re.fullmatch("(.*?)([#/].*)?", word).groups("") for word in shlex.split(command)]
    code, printed, errors = run(*(f"{places.get(word, word)}{rest}" for word, rest in words))
    lines = [
        line
        for line in errors.splitlines()
        if not line.startswith(("writes", "checking", "calibrating", "measuring", "init"))
    ]
    assert code == 2
    assert printed == ""
    assert len([line for line in lines if line.strip()]) == 1
    assert lines[-1].startswith("flexigpt: ")
    assert BAD_INPUT[command] in lines[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyError("plan"), OSError(5, "Input/output error", "a file"), RuntimeError("a\nb")])
def test_a_fault_of_ours_is_one_line_that_says_so(
    run: Run, tiny_source: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def faulty(*_: object) -> None:
        raise error

    monkeypatch.setattr("flexigpt.record.inspect_model", faulty)
    code, printed, errors = run("inspect", tiny_source)
    assert (code, printed, errors.count("\n")) == (1, "", 1)
    assert errors.startswith(f"flexigpt: {type(error).__name__}: ")
    assert "This is a fault of flexigpt, please report it (-v shows where it is)" in errors
    assert errors in (verbose := run("inspect", tiny_source, "-v")[2])
    assert "Traceback" in verbose
    assert "in faulty" in verbose


def test_too_little_memory_is_no_fault(run: Run, tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("flexigpt.record.inspect_model", faulty)
    code, _, errors = run("inspect", tiny_source)
    assert (code, errors.count("\n")) == (2, 1)
    assert "memory does not suffice" in errors


def test_brackets_in_a_path_are_shown_as_they_are(run: Run, compact: Path, tmp_path: Path) -> None:
    """Where rich would take them for markup."""
    folder = tmp_path / "a[" / "b]"
    shutil.copytree(compact, folder)
    code, printed, _ = run("inspect", folder)
    assert code == 0
    assert "a[/b] (" in "".join(printed.splitlines()[:3])


def test_extend_prints_the_plan_and_the_cost(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(
        *("extend", tiny_source, out, "--blocks", "1:3,4:5", "--times", "3", "--pattern", "sequential", "--rank", "2"),
        *("--perplexity", text, "--window-length", "64"),
    )
    assert code == 0
    record = json.loads((out / "record.json").read_text())
    assert record["source_blocks"] == [0, 1, 2, 1, 2, 1, 2, 3, 4, 4, 4, 5]
    for shown in ("source block", "adapters of rank 2, output norms", f"checkpoint written to {out}"):
        assert shown in printed
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 12


def test_overwrite_replaces_a_checkpoint(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("prune", tiny_source, out, "--rank", "4", "--preset", "paper", "--blocks")
    assert run(*arguments, "2")[0] == 0
    assert run(*arguments, "3")[0] == 2
    assert run(*arguments, "3", "--overwrite")[0] == 0
    assert json.loads((out / "config.json").read_text())["replicas"][0]["block"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MASKED = """try: os.kill(os.getpid(), {}); sum(range(9))
        except KeyboardInterrupt: raise ValueError("no number") from None"""


@pytest.mark.parametrize(
    ("event", "name", "how"),
    [
        ("os.rename", "cache/sublayers-*", f"os.kill(os.getpid(), {signal.SIGINT.value})"),
        ("open", "made/.out*/new/*", f"os.kill(os.getpid(), {signal.SIGTERM.value})"),
        *(("open", "made/.out*/new/*", MASKED.format(number.value)) for number in (signal.SIGINT, signal.SIGTERM)),
    ],
)
def test_an_interrupted_run_leaves_nothing(
    hooked: Hooked,
    forks: Forks,
    tiny_source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    event: str,
    name: str,
    how: str,
) -> None:
    """At the end of calibration, and where the first file of the checkpoint is opened.

    Also where a library makes an error of its own of the interruption, as torch does within a conversion.
    """
    (tmp_path / "made").mkdir()
    arguments = ["prune", tiny_source, tmp_path / "made" / "out", "--ratio", "0.4"]
    arguments += ["--calibration", text, "--window-length", "64", "--windows", "4"]
    environment = hooked(event, str(tmp_path / name), how) | {"FLEXIGPT_CACHE": str(tmp_path / "cache")}
    ran = forks.run("-m", "flexigpt", *arguments, env=environment)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == "flexigpt: interrupted: nothing was written"
    assert "Traceback" not in ran.stderr
    assert list((tmp_path / "made").iterdir()) == []


def test_ctrl_c_during_the_imports_is_one_line(hooked: Hooked, early_forks: Forks, tiny_source: Path) -> None:
    environment = hooked("import", "transformers", f"os.kill(os.getpid(), {signal.SIGINT.value})")
    ran = early_forks.run("-m", "flexigpt", "inspect", tiny_source, env=environment)
    assert ran.returncode == 2
    assert ran.stderr == "flexigpt: interrupted: nothing was written\n"


def test_a_damaged_text_is_one_line(early_forks: Forks, tiny_source: Path, tmp_path: Path) -> None:
    """`datasets` logs what it raises."""
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    ran = early_forks.run("-m", "flexigpt", "eval", tiny_source, "--perplexity", tmp_path / "broken.jsonl")
    assert ran.returncode == 2
    assert ran.stderr.startswith("flexigpt: text cannot be read from ")
    assert ran.stderr.count("\n") == 1


def test_a_full_disk_behind_stdout_is_one_line(forks: Forks, tiny_source: Path, tmp_path: Path) -> None:
    streams = ("/dev/null", "/dev/full", tmp_path / "said")
    assert forks.start("-m", "flexigpt", "inspect", tiny_source, "--json", streams=streams).wait() == 2
    assert (tmp_path / "said").read_text() == "flexigpt: the output cannot be printed: No space left on device\n"


@pytest.mark.parametrize(("arguments", "closed"), [("SOURCE", 1), ("SOURCE --json", 1), ("nowhere", 2)])
def test_where_nobody_reads_it_ends_in_silence(tiny_source: Path, arguments: str, closed: int) -> None:
    """As after `head`: 128 and the number of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    words = arguments.replace("SOURCE", str(tiny_source)).split()
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams[("stdout", "stderr")[closed - 1]] = writing
    ran = subprocess.run([sys.executable, "-m", "flexigpt", "inspect", *words], **streams, text=True, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stdout or "", ran.stderr or "") == (141, "", "")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"flexigpt {version('flexigpt')}\n", "")


@pytest.mark.parametrize("arguments", [("--version", "--verbose"), ("-v", "--version")])
def test_the_version_for_a_report_of_a_fault(run: Run, arguments: tuple[str, str]) -> None:
    code, printed, _ = run(*arguments)
    ours, python, libraries, cpu, *gpus = printed.splitlines()
    assert (code, ours) == (0, f"flexigpt {version('flexigpt')}")
    assert python.startswith(f"Python {platform.python_version()}, ")
    assert f"torch {torch.__version__}, transformers {version('transformers')}" in libraries
    assert re.fullmatch(r"cpu: .+, \d+ threads, \d+ GB, \w+: .*float32.*", cpu)
    assert len(gpus) == max(torch.cuda.device_count(), 1)


def test_help_lists_the_commands(run: Run) -> None:
    code, printed, _ = run("--help")
    assert code == 0
    assert all(command in printed for command in ("prune", "recover", "inspect", "eval", "generate"))
