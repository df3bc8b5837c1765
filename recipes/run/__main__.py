"""Makes a table of the paper: runs a recipe's stages and puts what they measured beside the paper's figures."""

import argparse
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from recipe import Recipe, find_recipe, read_recipe
from stages import Stage, stages_of, write
from table import table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python recipes/run", description="Make a table of the paper.")
    parser.add_argument("table", metavar="TABLE", help="table1 to table7 or figures2-4, or the file of a recipe")
    parser.add_argument("--small", action="store_true", help="with the example model, in minutes on a CPU")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one of its settings")
    parser.add_argument("--work", type=Path, default=Path("out/recipes"), metavar="DIR", help="default: out/recipes")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    return parser.parse_args(arguments)


def make(recipe: Recipe, stages: dict[str, Stage], command: str) -> str:
    """Runs what has not been run yet and prints the table. Returns it as a page of Markdown."""
    results = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        new, started = stage.measured() is None, time.monotonic()
        print(f"[{number}/{len(stages)}] {name}: {shlex.join(stage.command) if new else 'there already'}", flush=True)
        if new:
            stage.run()
            print(f"took {time.monotonic() - started:.0f} s", flush=True)
        results[name] = stage.measured() or {}
    shown = "\n".join([f"# {recipe.title}", "", recipe.note.strip(), "", *table(recipe, results)])
    Console().print(Markdown(shown))
    devices = {found["device"] for found in results.values() if "device" in found}
    machine = ", ".join([platform.system(), platform.machine(), f"{os.cpu_count()} CPU cores", *sorted(devices)])
    versions = ", ".join(f"{package} {version(package)}" for package in ("flexigpt", "torch", "transformers"))
    about = f"`paper` is its {recipe.paper}; `here` is our run of `{command}`: {versions}; {machine}."
    commands = dict.fromkeys(shlex.join(stage.command) for stage in stages.values())
    return "\n".join([shown, "", about, "", "```sh", *commands, "```", ""])


def main(arguments: Sequence[str]) -> None:
    """Bad input, a stage that fails, and interruption: one line on stderr and exit code 2."""
    given = parse(arguments)
    try:
        path = find_recipe(given.table)
        recipe = read_recipe(path, given.small, given.set)
        stages = stages_of(recipe, given.work)
        if given.dry_run:
            for name, stage in stages.items():
                state = "to be run" if stage.measured() is None else "there already"
                print(f"# {name}: {state}\n{shlex.join(stage.command)}")
            return
        page = make(recipe, stages, shlex.join(["python", "recipes/run", *arguments]))
        written = given.work / f"{path.stem}{'-small' if given.small else ''}.md"
        write(written, page)
        print(f"table written to {written}")
    except (OSError, ValueError) as error:
        print(f"recipes: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    main(sys.argv[1:])
