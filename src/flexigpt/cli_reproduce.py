"""The command that makes the paper's tables anew: a function that `cli.py` registers; no logic."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flexigpt.comparison import comparison_tables
from flexigpt.console import field_help, stdout
from flexigpt.reproduce import ReproduceOptions, planned, reproduce

_REPRODUCE = field_help(ReproduceOptions)


def reproduce_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; recipes/ has the paper's.")],
    small: Annotated[bool, typer.Option("--small", help=_REPRODUCE["small"])] = ReproduceOptions.small,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help=_REPRODUCE["settings"], metavar="NAME=VALUE")
    ] = None,
    work: Annotated[Path, typer.Option(help=_REPRODUCE["work"])] = ReproduceOptions.work,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and their commands, and run nothing.")
    ] = False,
) -> None:
    """Run a recipe and print what it measured beside the paper's figures."""
    options = ReproduceOptions(small=small, settings=settings or [], work=work)
    if dry_run:
        for name, stage in planned(recipe, options)[1].items():
            state = "to be run" if stage.result() is None else "there already"
            print(f"# {name}: {state}\n{shlex.join(stage.command)}")
        return
    found, folder = reproduce(recipe, options, lambda line: print(line, flush=True), context.obj)
    for table in comparison_tables(found):
        stdout.print(table)
    for line in found["order"]:
        print(line)
    if "report" in found:
        print(f"drawn in {found['report']}")
    print(f"table written to {folder / 'table.md'}")
