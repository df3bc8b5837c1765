"""Recipes: the shipped ones fit the commands; a small one of our own is cached, resumed, and told what is wrong."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import typer

from conftest import Run
from flexigpt.cli import app
from flexigpt.errors import InputError
from flexigpt.reproduce import ReproduceOptions, planned, reproduce

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("small", [False, True], ids=["real", "small"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_shipped_recipe_is_one_that_flexigpt_takes(
    path: Path, small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    recipe, stages = planned(path, ReproduceOptions(small=small, work=tmp_path))
    assert recipe.name == path.stem
    assert stages
    for stage in stages.values():
        program, *words = stage.command
        if program == "python":
            assert Path(words[0]).is_file()
            continue
        name, *arguments = words[words.index("flexigpt") + 1 :] if program == "torchrun" else words
        typer.main.get_command(app).commands[name].make_context(name, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_small_recipe_measures_every_figure_of_the_paper_that_it_does_not_quote(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    found, folder = reproduce(path, ReproduceOptions(small=True, work=tmp_path), print)
    assert (folder / "table.md").is_file()
    run = [row for row in found["rows"] if row["measured"]]
    assert run or found["bases"]
    assert all(set(row["paper"]) <= set(row["measured"]) for row in run)


@pytest.fixture
def mini(tiny_source: Path, text: Path, tmp_path: Path) -> Path:
    """A recipe of a prune, a recovery and a script on the tiny source."""
    script = tmp_path / "last_loss.py"
    script.write_text(
        "import json, sys\n"
        "record = json.load(open(sys.argv[1] + '/record.json'))\n"
        "loss = record['recovery']['history'][-1]['loss']\n"
        "print(json.dumps({'loss': loss, 'times': loss * float(sys.argv[2])}))\n"
    )
    return write(
        tmp_path / "mini.yaml",
        f"""
        name: mini
        title: A small recipe
        paper: table 0
        settings:
          model: {tiny_source}
          data: {text}
          factor: 2
        stages:
          shown: python {script} {{stage:recovered}} {{factor}}
          recovered: >
            flexigpt recover {{stage:pruned}} {{out}} --data {{data}} --tokens 1024 --batch-tokens 128
            --window-length 32 --save-every 1 --train replicas
          pruned: flexigpt prune {{model}} {{out}} --blocks 2,4 --rank 4 --preset paper
        columns:
          loss: {{title: last loss, value: loss, better: lower}}
          times: {{title: times factor, value: times}}
        rows:
          - {{label: the paper's worst, paper: {{loss: 9}}}}
          - {{label: ours, stage: shown, paper: {{loss: 1.5}}}}
        """,
    )


def write(path: Path, content: str) -> Path:
    path.write_text(textwrap.dedent(content), encoding="utf-8")
    return path


def ran(told: list[str]) -> list[str]:
    """The stages that were run, in order."""
    return [line.split()[1].rstrip(":") for line in told if "took" in line]


def test_stages_run_once_for_what_they_depend_on_and_go_on_after_a_kill(mini: Path, tmp_path: Path) -> None:
    work, killed = tmp_path / "work", tmp_path / "killed"
    told: list[str] = []
    found, folder = reproduce(mini, ReproduceOptions(work=work), told.append)
    assert ran(told) == ["pruned", "recovered", "shown"]
    recovered = next(work.glob("recovered-*/record.json"))
    loss = json.loads(recovered.read_text())["recovery"]["history"][-1]["loss"]
    assert found["rows"][0]["measured"] == {}
    assert found["rows"][1]["measured"] == {"loss": loss, "times": 2 * loss}
    assert json.loads((folder / "table.json").read_text()) == found
    page = (folder / "table.md").read_text()
    assert f"| ours | paper | 1.50 |  |\n|  | here | {loss:.2f} | {2 * loss:.2f} |" in page
    assert "| the paper's worst | paper | 9.00 |  |" in page

    told.clear()
    again, _ = reproduce(mini, ReproduceOptions(work=work), told.append)
    assert ran(told) == []
    assert again == found

    changed, _ = reproduce(mini, ReproduceOptions(work=work, settings=["factor=10"]), told.append)
    assert ran(told) == ["shown"]
    assert changed["rows"][1]["measured"]["times"] == 10 * loss

    # The same recovery, killed as a whole after its first checkpoint; the pruned model is there already.
    killed.mkdir()
    for pruned in work.glob("pruned-*"):
        if pruned.is_dir():
            shutil.copytree(pruned, killed / pruned.name)
    command = [sys.executable, "-m", "flexigpt", "reproduce", str(mini), "--work", str(killed)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("recovered-*.recovery/checkpoint-*[0-9]")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(killed.glob("recovered-*/record.json"))
    told.clear()
    resumed, _ = reproduce(mini, ReproduceOptions(work=killed), told.append)
    assert ran(told) == ["recovered", "shown"]
    assert "--resume" in next(killed.glob("recovered-*.log")).read_text()
    assert resumed["rows"] == found["rows"]
    weights = [next(place.glob("recovered-*/model.safetensors")).read_bytes() for place in (work, killed)]
    assert weights[0] == weights[1]


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """A script that prints the numbers that it is given as JSON."""
    script = tmp_path / "figures.py"
    script.write_text("import json, sys\nprint(json.dumps({'runs': [{'share': float(n)} for n in sys.argv[1:]]}))\n")
    return script


def shown(figures: Path, rows: str, more: str = "") -> str:
    """A recipe whose two stages print 0.5 and 0.25."""
    return (
        textwrap.dedent(f"""
        name: shown
        title: Shown
        paper: table 0
        settings: {{first: 0.5}}
        {more}
        stages:
          half: python {figures} {{first}}
          quarter: python {figures} 0.25
        columns:
          share: {{title: share, value: runs.0.share, unit: percent, better: higher}}
        rows:
        """)
        + rows
    )


def test_the_order_of_the_rows_is_held_against_the_papers(figures: Path, tmp_path: Path, run: Run) -> None:
    rows = """
  - {label: a, stage: half, paper: {share: 40}}
  - {label: b, stage: quarter, paper: {share: 60}}
  - {label: c, stage: quarter, paper: {share: 20}}
  - {label: quoted, paper: {share: 99}}
"""
    recipe = write(tmp_path / "shown.yaml", shown(figures, rows))
    code, printed, _ = run("reproduce", recipe, "--work", tmp_path / "work")
    assert code == 0
    # a > b and b = c here; of the three pairs only a > c stands as in the paper.
    assert "share: 1 of 3 pairs of rows stand in the paper's order; not:" in printed
    assert "a and b: 40.00 < 60.00 in the paper, 50 > 25 here" in printed
    assert "c and b: 20.00 < 60.00 in the paper, 25 = 25 here" in printed
    assert "quoted" in printed
    assert f"table written to {tmp_path / 'work' / 'shown' / 'table.md'}" in printed
    code, printed, _ = run("reproduce", recipe, "--work", tmp_path / "work", "--set", "first=0.1", "--dry-run")
    assert [line for line in printed.splitlines() if line.startswith("#")] == [
        "# half: to be run",
        "# quarter: there already",
    ]


def test_a_file_counts_by_its_content(figures: Path, tmp_path: Path, run: Run) -> None:
    recipe = write(
        tmp_path / "shown.yaml", shown(figures, "  - {label: a, stage: half}\n  - {label: b, stage: quarter}")
    )
    options = ReproduceOptions(work=tmp_path / "work")
    told: list[str] = []
    reproduce(recipe, options, told.append)
    figures.write_text(figures.read_text() + "# changed\n")
    reproduce(recipe, options, told.append)
    assert ran(told) == ["half", "quarter"] * 2


def test_recipes_share_stages_that_are_the_same_command(figures: Path, tmp_path: Path) -> None:
    content = shown(figures, BOTH)
    told: list[str] = []
    for name, recipe in (("one", content), ("two", content.replace("half", "other").replace("quarter", "half"))):
        reproduce(write(tmp_path / f"{name}.yaml", recipe), ReproduceOptions(work=tmp_path / "work"), told.append)
    assert ran(told) == ["half", "quarter"]
    assert len([path for path in (tmp_path / "work").iterdir() if path.is_dir()]) == 3


def test_a_stage_that_fails_is_told_with_its_command_its_last_line_and_its_log(
    figures: Path, tmp_path: Path, run: Run
) -> None:
    recipe = write(
        tmp_path / "shown.yaml", shown(figures, "  - {label: a, stage: half}\n  - {label: b, stage: quarter}")
    )
    code, _, complaint = run("reproduce", recipe, "--work", tmp_path / "work", "--set", "first=abc")
    (log,) = (tmp_path / "work").glob("half-*.log")
    assert code == 2
    assert complaint == (
        f"flexigpt: stage half failed: {shlex.join(['python', str(figures), 'abc'])}: "
        f"ValueError: could not convert string to float: 'abc' (all of it: {log})\n"
    )
    assert "Traceback" in log.read_text()
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_a_sigterm_reaches_the_stage(tmp_path: Path) -> None:
    script, started, saved = tmp_path / "waits.py", tmp_path / "started", tmp_path / "saved"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(2)))\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    recipe = write(
        tmp_path / "shown.yaml", shown(script, "  - {label: a, stage: half}\n  - {label: b, stage: quarter}")
    )

    def terminate() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(InputError, match="interrupted: the same command goes on from here"):
        reproduce(recipe, ReproduceOptions(work=tmp_path / "work"), print)
    assert saved.exists()


ROW = "  - {label: a, stage: half}\n"
BOTH = ROW + "  - {label: b, stage: quarter}\n"


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        (("name: shown", "nmae: shown"), (), "key nmae is unknown: did you mean name?"),
        (("title: Shown\n", ""), (), "title is missing"),
        (("{first}", "{frist}"), (), "in stage half, placeholder frist is unknown: did you mean first?"),
        (
            ("0.25\n", "{stage:haf}\n"),
            (),
            "in stage quarter, placeholder stage:haf is unknown: did you mean stage:half?",
        ),
        (("stage: half", "stage: hafl"), (), "in row a, stage hafl is unknown: did you mean half?"),
        (("{first}", "{first} {stage:quarter}"), (), "nothing"),
        (("name: shown", "name: [shown"), (), "is not YAML"),
        (("name: shown", "name: shown\nname: again"), (), "name is there twice"),
        (("{first: 0.5}", "{first: 0.5, second: 1}"), (), "nothing that is shown depends on second: leave it out"),
        (("python", "rm"), (), "stage half is no command: begin it with flexigpt, torchrun, python"),
        (("python", "python '"), (), "stage half: No closing quotation"),
        (("better: higher", "better: more"), (), "better of column share more is unknown"),
        (("label: a,", "label: a, paper: {share: high},"), (), "paper of row a: could not convert string to float"),
        (("label: a,", "label: a, paper: {shaer: 1},"), (), "in row a, column shaer is unknown: did you mean share?"),
        (("{first: 0.5}", "[0.5]"), (), "settings is no mapping of names to values"),
        (("", ""), ("--set", "frist=1"), "--set frist is unknown: did you mean first?"),
        (("", ""), ("--set", "first"), "--set first cannot be read: give NAME=VALUE, as tokens=100K"),
        (("", ""), ("--small",), "has no small form: leave --small out"),
        (("figures.py", "figurse.py"), (), "figurse.py is not there"),
    ],
)
def test_bad_input_is_told_in_one_line(
    change: tuple[str, str], options: tuple[str, ...], complaint: str, figures: Path, tmp_path: Path, run: Run
) -> None:
    content = shown(figures, BOTH).replace(*change, 1)
    if complaint == "nothing":
        content = content.replace("0.25\n", "{stage:half}\n", 1)
        complaint = "stages use each other: half -> quarter -> half"
    recipe = write(tmp_path / "shown.yaml", content)
    code, printed, told = run("reproduce", recipe, "--work", tmp_path / "work", "--dry-run", *options)
    assert (code, printed) == (2, "")
    assert told.startswith("flexigpt: ")
    assert complaint in told
    assert told.count("\n") == 1


def test_a_recipe_that_is_not_there_and_a_figure_that_no_stage_measured(
    figures: Path, tmp_path: Path, run: Run
) -> None:
    code, _, told = run("reproduce", tmp_path / "none.yaml")
    assert (code, told) == (
        2,
        f"flexigpt: the recipe {tmp_path / 'none.yaml'} cannot be read: No such file or directory\n",
    )
    recipe = write(tmp_path / "shown.yaml", shown(figures, BOTH).replace("runs.0.share", "runs.0.loss"))
    code, _, told = run("reproduce", recipe, "--work", tmp_path / "work")
    assert code == 2
    assert told == "flexigpt: stage half measured no runs.0.loss: where loss is looked for, there is share\n"


def test_a_setting_that_only_the_other_form_reads_has_no_effect(figures: Path, tmp_path: Path, run: Run) -> None:
    more = "flags: {numbers: '{first}'}\nsmall: {numbers: '0.75'}\n"
    content = (
        shown(figures, BOTH, more="MORE").replace("MORE", more).replace("figures.py {first}", "figures.py {numbers}")
    )
    recipe = write(tmp_path / "shown.yaml", content)
    code, printed, _ = run("reproduce", recipe, "--dry-run", "--small")
    assert code == 0
    assert printed.splitlines()[1].endswith("figures.py 0.75")
    code, _, told = run("reproduce", recipe, "--dry-run", "--small", "--set", "first=1")
    assert code == 2
    assert "--set first has no effect" in told
