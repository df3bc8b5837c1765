"""What the pages say is run: every bash and python block, in order, page by page; sh blocks are parsed."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import flexigpt
from flexigpt.cli.main import app, main
from flexigpt.model import ARCHITECTURES
from forks import Forks

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "flexigpt"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
SLOW = ("docs/pruning.md", "docs/decoding.md")  # a minute each
PAGES += ["examples/novel16/README.md", "examples/benchmarks/README.md", "recipes/README.md"]

# Libraries that pages use and that need not be installed.
OPTIONAL = ("trl",)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def make_recipe(target: str) -> list[str]:
    """The last command that make would run for a target; it fails for a target that is not there."""
    # Within `make test`, make would take these for the settings of a make that it is called by.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ran = subprocess.run(["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return shlex.split(ran.stdout.splitlines()[-1])


def run_flexigpt(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code


def run_python(page: str, content: str) -> None:
    """Runs a block, unless it uses a library that is not there."""
    optional = [name for name in OPTIONAL if f"from {name} " in content]
    if all(find_spec(name) for name in optional):
        with warnings.catch_warnings():
            if optional:
                warnings.simplefilter("ignore")  # of their own calls
            exec(compile(content, page, "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped example, its texts cut to one document each, in which `make demo` has run."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("examples", "recipes"):
        shutil.copytree(ROOT / name, folder / name)
    for name, least in (("calibration", 7000), ("validation", 3000)):
        path = folder / "examples" / "novel16" / f"{name}.jsonl"
        documents = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text(min((row for row in documents if len(row) > least), key=len), encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        program, *arguments = make_recipe("demo")
        assert program.endswith("bin/flexigpt")
        run_flexigpt(arguments)
    finally:
        os.chdir(before)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES])
def test_every_block_of_a_page_runs(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for language, content in blocks(page):
        if language == "python":
            run_python(page, content)
            continue
        assert language in ("bash", "sh")
        for line in content.splitlines():
            program, *arguments = shlex.split(line, comments=True) or ["#"]
            if program == "make":
                assert make_recipe(arguments[0])
            elif program == "flexigpt" and language == "bash":
                run_flexigpt(arguments)
            elif (program, *arguments[:1]) == ("python", "recipes/run"):
                dry = ["--dry-run"] if language == "sh" else []
                subprocess.run([sys.executable, *arguments, *dry], check=True)
            elif program in ("flexigpt", "torchrun"):
                arguments = arguments[arguments.index("flexigpt") + 1 :] if program == "torchrun" else arguments
                typer.main.get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])
            else:
                assert language == "sh"


def test_the_two_commands_of_the_readme_are_make_targets() -> None:
    first, second = [content.strip() for language, content in blocks("README.md") if language == "bash"][:2]
    assert (first, second) == ("make demo", "make test")
    assert make_recipe("test")[0].endswith("bin/pytest")
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_model_cards_snippet_runs_where_flexigpt_is_not_installed(
    workplace: Path, tmp_path: Path, early_forks: Forks
) -> None:
    card = (workplace / "out" / "novel16-30" / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    code = "import sys; sys.modules['flexigpt'] = None\n" + snippet[1] + "print(type(model).__name__)"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    ran = early_forks.run("-c", code, cwd=workplace / "out" / "novel16-30", env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("\nFlexiGPTForCausalLM\n")


def test_the_tables_of_options_are_those_of_the_commands() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "options.py"))
    found = set()
    for path in (ROOT / "docs").glob("*.md"):
        page = path.read_text(encoding="utf-8")
        assert pages["with_tables"](page) == page, "run: python docs/options.py"
        found |= {command for _, command, _ in pages["PLACE"].findall(page)}
    assert found == set(pages["COMMANDS"])


def test_the_site_has_every_page_and_every_public_name() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": docs/{path.name}\n" in navigation for path in ROOT.glob("docs/*.md"))
    described = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs/site/api.md").read_text(), re.MULTILINE)
    for place, name in described:
        assert getattr(flexigpt, name) is getattr(import_module(place), name)
    assert sorted(name for _, name in described) == flexigpt.__all__


def test_the_version_is_everywhere_the_same() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0] == version


def test_modules_are_small() -> None:
    for folder in (PACKAGE, ROOT / "tests", ROOT / "benchmarks"):
        for path in folder.rglob("*.py"):
            most = 540 if path.name == "modeling_flexigpt.py" else 500  # which travels with checkpoints in one piece
            assert len(path.read_text(encoding="utf-8").splitlines()) <= most, path


def test_the_page_lists_every_architecture() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    supported = re.search(r"Supported: (.*?) \(", page, re.DOTALL)
    assert supported
    assert set(re.findall(r"`(\w+)`", supported[1])) == set(ARCHITECTURES)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
