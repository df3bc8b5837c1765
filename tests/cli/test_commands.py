"""What the commands are made of: options classes, help, progress; and that help waits for nothing."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from conftest import Run
from flexigpt.cli.commands import (
    BenchmarkOptions,
    ChatOptions,
    EvalOptions,
    ExportOptions,
    ExtendOptions,
    FrontierOptions,
    GenerateOptions,
    PruneOptions,
    QuantizeOptions,
    SampleOptions,
)
from flexigpt.cli.commands import RecoverOptions as Recover
from flexigpt.cli.console import Lines
from flexigpt.cli.effects import refuse_idle
from flexigpt.cli.main import app
from flexigpt.cli.options import descriptions
from flexigpt.runtime import flag
from flexigpt.serving import ServeOptions

COMMANDS = typer.main.get_command(app).commands
CLASSES = {
    "prune": PruneOptions,
    "frontier": FrontierOptions,
    "extend": ExtendOptions,
    "recover": Recover,
    "eval": EvalOptions,
    "generate": GenerateOptions,
    "chat": ChatOptions,
    "serve": ServeOptions,
    "quantize": QuantizeOptions,
    "sample": SampleOptions,
    "benchmark": BenchmarkOptions,
    "export": ExportOptions,
}


def options_of(command: str) -> list[typer.core.TyperOption]:
    """Those that a command has beside its help."""
    found = [parameter for parameter in COMMANDS[command].params if parameter.param_type_name == "option"]
    return [option for option in found if option.name not in ("help", "help_all")]


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_described_and_is_an_option_or_pythons_alone(name: str) -> None:
    by_name = {option.name: option for option in options_of(name)}
    described = descriptions(CLASSES[name])
    for field in dataclasses.fields(CLASSES[name]):
        assert field.name in described
        assert (field.name in by_name) == field.metadata["command"]
        if field.metadata["command"]:
            assert flag(field.name) in by_name[field.name].opts
            assert by_name[field.name].help.startswith(described[field.name].rstrip("."))


@pytest.mark.parametrize("name", CLASSES)
def test_no_value_of_an_option_is_a_traceback(run: Run, name: str) -> None:
    """Of any option, of which many are numbers; those that are allowed end at a model that is not there."""
    needed = {"prune": ["out", "--ratio", "0.4"], "extend": ["out", "--blocks", "1:2"], "recover": ["out"]}
    needed |= {"frontier": ["out", "--perplexity", "no/such/text"]}
    needed |= {"eval": ["--perplexity", "no/such/text"], "generate": ["--prompt", "Hi"], "sample": ["own.jsonl"]}
    needed |= {"export": ["out", "--to", "stock"]}
    needed["quantize"] = ["out", "--bits", "8"]
    for option in options_of(name):
        if option.is_flag:
            continue
        for value in ("", "-1", "nan", "1e400", "1e-320", "\u00b2", "9" * 400, "9" * 5000, "x" * 300):
            code, printed, errors = run(name, "no/such/model", *needed.get(name, []), f"{option.opts[0]}={value}")
            assert (code, printed, errors.count("\n")) == (2, "", 1), (option.opts[0], value[:40], errors)


def test_there_are_not_too_many_options() -> None:
    assert sum(len(options_of(name)) for name in COMMANDS) <= 123


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_short_help_shows_six_options_at_most_and_breaks_no_word(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = set()
    for width in ("200", "80"):
        monkeypatch.setenv("COLUMNS", width)
        code, short, _ = run(name, "-h")
        assert code == 0
        assert run(name, "--help")[1] == short
        everything = run(name, "--help-all")[1]
        assert len(re.findall(r"^  --", short, re.MULTILINE)) <= 6
        assert all(len(line) <= int(width) for line in everything.splitlines() if not line.startswith("  flexigpt"))
        assert "Example:\n  flexigpt " in short
        for option in options_of(name):
            assert re.search(rf"^  {option.opts[0]}\b", everything, re.MULTILINE)
        words.add(" ".join(sorted(set(everything.split()))))
    assert len(words) == 1, "a word is broken, or cut, at 80 columns"


def test_the_short_help_of_prune_fits_a_screen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert len(run("prune", "--help")[1].splitlines()) <= 60


@pytest.mark.parametrize("arguments", ["--version", "--help", "prune --help-all", "prun a b", "prune a b --rnk 3", ""])
def test_help_version_and_usage_errors_load_neither_torch_nor_transformers(arguments: str) -> None:
    code = (
        "import sys\nfrom flexigpt.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


WITHOUT_EFFECT = {
    "prune S O --preset paper --blocks 2 --windows 3": "--windows without effect, since no calibration text is read",
    "prune S O --preset paper --blocks 2 --seed 3": "--seed without effect, since nothing is drawn at random",
    "prune S O --blocks 2 --preset paper --block-score angular": "--block-score without effect, since --blocks names",
    "prune S O --ratio 0.4 --rank 4 --base-distance frobenius --block-score angular --adapter-init zero "
    "--output-norm none": "--rank, --base-distance, --block-score, --adapter-init, --output-norm without effect, since",
    "prune S O --ratio 0.4 --remove --preset paper --rank 4": "--rank without effect, since --remove makes no replica",
    "prune S O --ratio 0.4 --plan-only --perplexity T": "--perplexity without effect, since --plan-only makes no model",
    "prune S O --ratio 0.4 --plan-only --no-refit-kept": "--refit-kept without effect, since --plan-only makes no",
    "extend S O --blocks 1:3 --window-length 9": "--window-length without effect, since no text is read",
    "recover S O --distill-weight 0.2": "--distill-weight without effect, since there is no --teacher",
    "recover S O --data T --replica-lr 0.1": "--replica-lr without effect, since the model has no replicas",
    "recover S O --train all --lora-rank 2": "--lora-rank without effect, since kept blocks get no LoRA",
    "eval S --tasks piqa --against S": "--against without effect, since there is no --perplexity",
    "eval S --perplexity T --limit 2": "--limit without effect, since there are no --tasks",
    "quantize S O --bits 8 --window-length 9": "--window-length without effect, since there is no --perplexity",
    "generate S --prompt a --seed 3": "--seed without effect, since there is no --temperature",
    "chat S --top-p 0.5": "--top-p without effect, since there is no --temperature",
}


@pytest.mark.parametrize("command", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_an_error(
    run: Run, command: str, tiny_source: Path, text: Path, tmp_path: Path
) -> None:
    places = {"S": tiny_source, "O": tmp_path / "out", "T": text}
    code, printed, errors = run(*(places.get(word, word) for word in command.split()))
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"flexigpt: {WITHOUT_EFFECT[command]}")
    assert re.search(": leave (it|them) out\n$", errors)
    assert not (tmp_path / "out").exists()


def test_the_text_that_a_plans_loss_is_measured_on_has_an_effect() -> None:
    refuse_idle("plan", {"perplexity": "a.txt"}, PruneOptions(max_loss="10%", perplexity="a.txt"))


def test_quiet_prints_the_result_alone(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    for number, quiet in enumerate((("-q", "prune"), ("prune", "--quiet"))):
        asked = (tiny_source, tmp_path / f"out{number}", "--blocks", "2", "--rank", "4", "--preset", "paper")
        code, printed, errors = run(*quiet, *asked)
        assert (code, errors) == (0, "")
        assert "checkpoint written to" in printed


def test_a_stage_reports_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """At its beginning, while a single item takes its time, and at its end; one of two takes as long as is left."""
    waited = []
    for item in Lines(seconds=0.01)(["a", "b"], "measuring", 2):
        while item == "b" and "1 of 2" not in "".join(waited):
            waited.append(capsys.readouterr().err)
            time.sleep(0.005)
    lines = ("".join(waited) + capsys.readouterr().err).splitlines()
    assert lines[0] == "measuring: begins"
    running = [line for line in lines[1:-1] if not line.startswith("measuring: 0 of 2 after ")]  # on a busy machine
    assert running
    for line in running:
        assert re.fullmatch(r"measuring: 1 of 2 after (\d:\d\d:\d\d), some \1 left", line)
    assert re.fullmatch(r"measuring: done in \d:\d\d:\d\d", lines[-1])


def test_a_tilde_that_the_shell_left_is_a_home(
    run: Run, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    os.symlink(tiny_source, tmp_path / "source")
    assert run("prune", "~/source", "~/out", "--blocks", "2", "--rank", "4", "--preset", "paper")[0] == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert run("inspect", "~/out")[0] == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_options_and_choices(shell: str) -> None:
    def completed(words: str) -> str:
        environment = os.environ | {
            "_FLEXIGPT_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": f"flexigpt {words}",
            "COMP_CWORD": str(len(words.split(" "))),
            "_TYPER_COMPLETE_ARGS": f"flexigpt {words}",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        ran = subprocess.run(
            [Path(sys.executable).with_name("flexigpt")], env=environment, capture_output=True, text=True, check=False
        )
        return ran.stdout

    assert "recover" in completed("rec")
    assert "--block-score" in completed("prune --block-s")
    assert "removal-perplexity" in completed("prune --block-score rem")
