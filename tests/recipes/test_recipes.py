"""Recipes: the shipped ones fit the commands; small ones of our own are cached, resumed, and say what is wrong."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer

from conftest import Run
from flexigpt.cli import app

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "recipes" / "run"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FORMS = pytest.mark.parametrize("form", [(), ("--small",)], ids=["real", "small"])
EACH = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture
def recipes(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `python recipes/run` in this process: exit code, stdout, stderr."""
    main = runpy.run_path(str(RUNNER))["main"]

    def command(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@FORMS
@EACH
def test_every_command_of_a_shipped_recipe_is_one_that_flexigpt_takes(
    path: Path, form: tuple[str, ...], recipes: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    code, printed, _ = recipes(path.stem, *form, "--work", tmp_path, "--dry-run")
    assert code == 0
    made: set[str] = set()
    for state, command in zip(*[iter(printed.splitlines())] * 2, strict=True):
        assert state.endswith(": to be run")
        assert "{" not in command
        program, *words = shlex.split(command)
        folders = [word for word in words if word.startswith(f"{tmp_path}/")]
        read = folders if "--json" in words else folders[:-1]
        assert set(read) <= made
        made |= set(folders)
        if program == "python":
            assert Path(words[0]).is_file()
            continue
        name, *arguments = words[words.index("flexigpt") + 1 :] if program == "torchrun" else words
        typer.main.get_command(app).commands[name].make_context(name, arguments)


@EACH
def test_nothing_in_a_shipped_recipe_is_idle(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipe = runpy.run_path(str(RUNNER / "recipe.py"))["read_recipe"]
    forms = [recipe(path, small, []) for small in (False, True)]
    assert {stage for form in forms for stage in form.order()} == set(forms[0].stages)
    assert [name for name in forms[0].settings if f"{{{name}}}" not in text] == []


@pytest.mark.slow
@EACH
def test_every_small_recipe_measures_every_figure_that_it_does_not_quote(
    path: Path, recipes: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    code, printed, complaint = recipes(path.stem, "--small", "--work", tmp_path)
    assert (code, complaint) == (0, "")
    page = tmp_path / f"{path.stem}-small.md"
    assert printed.endswith(f"table written to {page}\n")
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    ours = [line for line in table if "| here |" in line]
    assert len(ours) == len(re.findall(r"^    stage: ", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert all("|  |" not in line.removeprefix("|  |") for line in ours)
    assert table


def write(path: Path, content: str) -> Path:
    path.write_text(textwrap.dedent(content), encoding="utf-8")
    return path


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """A script that prints the numbers that it is given as JSON, and says on stderr that it ran."""
    return write(
        tmp_path / "figures.py",
        """
        import json, sys
        print(json.dumps({"runs": [{"name": "n", "share": float(number)} for number in sys.argv[1:]]}))
        """,
    )


@pytest.fixture
def shown(figures: Path, tmp_path: Path) -> Path:
    """A recipe whose two stages measure 0.5 and 0.25."""
    return write(
        tmp_path / "shown.yaml",
        f"""
        title: Shown
        paper: table 0
        settings: {{first: 0.5, numbers: "{{first}} 0.75"}}
        small: {{first: 0.75}}
        stages:
          quarter: python {figures} 0.25
          idle: python nothing.py {{stage:half}}
          half: python {figures} {{numbers}}
        columns:
          share: {{title: share, value: runs.name=n.share, scale: 100}}
        rows:
          - {{label: a, stage: half, paper: {{share: 40}}}}
          - {{label: b, stage: quarter, paper: {{share: 60}}}}
          - {{label: c, stage: quarter, paper: {{share: 20}}}}
          - {{label: quoted, paper: {{share: 99}}}}
        """,
    )


def ran(printed: str) -> list[str]:
    """The stages that were run, in order."""
    return re.findall(r"^\[\d+/\d+\] (\S+): .+\ntook", printed, re.MULTILINE)


def test_a_dry_run_prints_what_would_be_run_in_order(mini: Path, text: Path, recipes: Run, tmp_path: Path) -> None:
    code, printed, complaint = recipes(mini, "--work", tmp_path / "work", "--dry-run", "--set", "model=a b")
    assert (code, complaint) == (0, "")
    trained = f"--data {text} --epochs 9 --tokens 8192 --batch-tokens 128 --window-length 32 --train replicas"
    assert re.sub(r"-[0-9a-f]{12}\b", "-HASH", printed) == textwrap.dedent(f"""\
        # pruned: to be run
        flexigpt prune 'a b' {tmp_path}/work/pruned-HASH --blocks 2,4 --rank 4 --preset paper
        # recovered: to be run
        flexigpt recover {tmp_path}/work/pruned-HASH {tmp_path}/work/recovered-HASH {trained}
        # shown: to be run
        python {tmp_path}/last_loss.py {tmp_path}/work/recovered-HASH
        """)
    assert not (tmp_path / "work").exists()


def test_figures_stand_beside_the_papers_and_stages_run_once(
    shown: Path, figures: Path, recipes: Run, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    code, printed, complaint = recipes(shown, "--work", work)
    assert (code, complaint) == (0, "")
    assert ran(printed) == ["half", "quarter"]
    page = (work / "shown.md").read_text(encoding="utf-8")
    assert "| a | paper | 40.00 |\n|  | here | 50.00 |\n| b | paper | 60.00 |\n|  | here | 25.00 |\n" in page
    assert "| quoted | paper | 99.00 |\n\n" in page
    # a > b and b = c here; of the three pairs only a > c stands as in the paper.
    assert "- share: 1 of 3 pairs of rows stand in the paper's order" in page
    assert f"python {figures} 0.5 0.75\npython {figures} 0.25\n```" in page
    assert f"table written to {work / 'shown.md'}" in printed

    assert ran(recipes(shown, "--work", work)[1]) == []
    assert (work / "shown.md").read_text(encoding="utf-8") == page
    other = write(tmp_path / "other.yaml", shown.read_text(encoding="utf-8"))
    assert ran(recipes(other, "--work", work)[1]) == []  # recipes share stages
    assert ran(recipes(shown, "--work", work, "--set", "first=0.1")[1]) == ["half"]
    assert ran(recipes(shown, "--work", work, "--small")[1]) == ["half"]
    assert "|  | here | 75.00 |" in (work / "shown-small.md").read_text(encoding="utf-8")
    figures.write_text(figures.read_text() + "# changed\n")
    assert ran(recipes(shown, "--work", work)[1]) == ["half", "quarter"]


def test_stages_that_are_the_same_command_are_run_once(shown: Path, recipes: Run, tmp_path: Path) -> None:
    code, printed, _ = recipes(shown, "--work", tmp_path / "work", "--set", "numbers=0.25")
    assert code == 0
    assert ran(printed) == ["half"]


def test_a_stage_that_fails_says_its_command_its_last_line_and_its_log(
    shown: Path, figures: Path, recipes: Run, tmp_path: Path
) -> None:
    code, _, complaint = recipes(shown, "--work", tmp_path / "work", "--set", "first=abc")
    (log,) = (tmp_path / "work").glob("half-*.log")
    assert code == 2
    assert complaint == (
        f"recipes: stage half failed: {shlex.join(['python', str(figures), 'abc', '0.75'])}: "
        f"ValueError: could not convert string to float: 'abc' (all of it: {log})\n"
    )
    assert "Traceback" in log.read_text()
    assert not list((tmp_path / "work").glob("half-*/"))


def test_a_stage_that_prints_no_json_fails_each_time(shown: Path, figures: Path, recipes: Run, tmp_path: Path) -> None:
    figures.write_text("print('half done')\n")
    for _ in range(2):
        code, _, complaint = recipes(shown, "--work", tmp_path / "work")
        (log,) = (tmp_path / "work").glob("half-*.log")
        assert (code, complaint) == (2, f"recipes: stage half has no {{out}} and printed no JSON: see {log}\n")
        assert log.read_text() == "half done\n"


def test_a_sigterm_reaches_the_stage(shown: Path, figures: Path, tmp_path: Path) -> None:
    started, saved = tmp_path / "started", tmp_path / "saved"
    figures.write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(2)))\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, str(RUNNER), str(shown), "--work", str(tmp_path / "work")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        _, complaint = process.communicate()
    assert process.returncode == 2
    assert complaint == "recipes: interrupted: the same command goes on from here\n"
    assert saved.exists()


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        (("title: Shown", "titel: Shown"), (), "title: Field required; titel: Extra inputs are not permitted"),
        (("{numbers}", "{nubmers}"), (), "in stage half: nubmers is unknown; did you mean numbers?"),
        (("0.25\n", "{stage:haf}\n"), (), "in stage quarter: stage:haf is unknown; did you mean stage:half?"),
        (("stage: half", "stage: hafl"), (), "stage hafl is unknown; did you mean half?"),
        (("{numbers}\n", "{stage:half}\n"), (), "stages use each other: half -> half"),
        (("title: Shown", "title: [Shown"), (), "expected ',' or ']'"),
        (("half: python", "half: rm"), (), "stage half is no command: rm is unknown; give flexigpt, torchrun, python"),
        (("half: python", "half: python '"), (), "stage half: No closing quotation"),
        (("{share: 40}", "{share: high}"), (), "rows.0.paper.share: Input should be a valid number"),
        (("{share: 40}", "{share: nan}"), (), "rows.0.paper.share: Input should be a finite number"),
        (("{share: 40}", "{shaer: 40}"), (), "row a: column shaer is unknown; did you mean share?"),
        (("{first: 0.75}", "{frist: 0.75}"), ("--small",), "small: frist is unknown; did you mean first?"),
        (("small: {first: 0.75}", ""), ("--small",), "has no small form: leave --small out"),
        (("settings: {", "settings: [{"), (), "expected ',' or ']'"),
        (("", ""), ("--set", "frist=1"), "--set frist is unknown; did you mean first?"),
        (("", ""), ("--set", "first"), "--set first cannot be read: give NAME=VALUE, as tokens=100K"),
        (("figures.py 0.25", "figurse.py"), (), "figurse.py is not there: run this in the repository's folder"),
    ],
)
def test_bad_input_is_one_line(
    change: tuple[str, str], options: tuple[str, ...], complaint: str, shown: Path, recipes: Run, tmp_path: Path
) -> None:
    shown.write_text(shown.read_text().replace(*change, 1))
    code, printed, said = recipes(shown, "--work", tmp_path / "work", "--dry-run", *options)
    assert (code, printed) == (2, "")
    assert said.startswith("recipes: ")
    assert complaint in said
    assert said.count("\n") == 1


def test_a_recipe_that_is_not_there_and_a_figure_that_no_stage_measured(
    shown: Path, recipes: Run, tmp_path: Path
) -> None:
    assert recipes("tabel4")[::2] == (2, "recipes: recipe tabel4 is unknown; did you mean table4?\n")
    shown.write_text(shown.read_text().replace("name=n.share", "name=n.loss"))
    code, _, said = recipes(shown, "--work", tmp_path / "work")
    assert (code, said) == (2, "recipes: half.runs.name=n.loss was not measured: there is no loss\n")


@pytest.fixture
def mini(tiny_source: Path, text: Path, tmp_path: Path) -> Path:
    """A recipe of a prune, a recovery and a script on the tiny source."""
    script = write(
        tmp_path / "last_loss.py",
        """
        import json, sys
        record = json.load(open(sys.argv[1] + "/record.json"))
        print(json.dumps({"loss": record["recovery"]["history"][-1]["loss"]}))
        """,
    )
    return write(
        tmp_path / "mini.yaml",
        f"""
        title: A small recipe
        paper: table 0
        settings:
          model: {tiny_source}
          trained: --data {text} --epochs 9 --tokens 8192 --batch-tokens 128 --window-length 32 --train replicas
        stages:
          shown: python {script} {{stage:recovered}}
          recovered: flexigpt recover {{stage:pruned}} {{out}} {{trained}}
          pruned: flexigpt prune {{model}} {{out}} --blocks 2,4 --rank 4 --preset paper
        columns:
          loss: {{title: last loss, value: loss}}
        rows:
          - {{label: ours, stage: shown, paper: {{loss: 1.5}}}}
        """,
    )


@pytest.mark.slow
def test_a_recovery_that_is_interrupted_and_killed_goes_on_to_the_same_bytes(
    mini: Path, recipes: Run, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, printed, _ = recipes(mini, "--work", whole)
    assert code == 0
    assert ran(printed) == ["pruned", "recovered", "shown"]
    for told in (signal.SIGTERM, signal.SIGKILL):
        stop_in_recovery(mini, killed, told)
        assert not list(killed.glob("recovered-*/record.json"))
    assert list(killed.glob("recovered-*.recovery/checkpoint-*"))
    code, printed, _ = recipes(mini, "--work", killed)
    assert ran(printed) == ["recovered", "shown"]
    assert (killed / "mini.md").read_text().split("`here`")[0] == (whole / "mini.md").read_text().split("`here`")[0]
    weights = [next(work.glob("recovered-*/model.safetensors")).read_bytes() for work in (whole, killed)]
    assert weights[0] == weights[1]


def stop_in_recovery(recipe: Path, work: Path, told: signal.Signals) -> None:
    """Runs the recipe and sends the signal to the runner (SIGKILL: to all) once its recovery has made a step."""
    for log in work.glob("recovered-*.log"):
        log.unlink()
    command = [sys.executable, str(RUNNER), str(recipe), "--work", str(work)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any("step " in log.read_text() for log in work.glob("recovered-*.log")):
        assert process.poll() is None
        time.sleep(0.02)
    if told == signal.SIGKILL:
        os.killpg(process.pid, told)
    else:
        process.send_signal(told)
    process.wait()
