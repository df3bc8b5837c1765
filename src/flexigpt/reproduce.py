"""Reproduction: a recipe's stages -> what they measured beside the paper's figures."""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexigpt.comparison import compare, comparison_page
from flexigpt.errors import InputError
from flexigpt.recipe import Recipe, read_recipe, shrunk, with_settings
from flexigpt.stages import Stage, resolve_stages, run_stage
from flexigpt.writing import replaced_folder


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """What to make, and where.

    Attributes:
        small: shrunk to the example model that comes with the repository: minutes on a CPU.
        settings: a setting of the recipe to change; may be given several times.
        work: folder for what the stages make, and for the table; what is there already is not made again.
    """

    small: bool = False
    settings: Sequence[str] = field(default_factory=list)
    work: Path = Path("out/reproduce")


# A line about what is going on.
Tell = Callable[[str], None]


def planned(path: str | Path, options: ReproduceOptions) -> tuple[Recipe, dict[str, Stage]]:
    """The recipe in the form and with the settings asked for, and its stages in order; nothing is run.

    Raises:
        InputError: a recipe that cannot be used, a setting that is unknown, or a file that is not there.
    """
    recipe = read_recipe(path)
    if options.small:
        if not recipe.small:
            raise InputError(f"the recipe {path} has no small form: leave --small out")
        recipe = shrunk(recipe)
    recipe = with_settings(recipe, options.settings)
    return recipe, resolve_stages(recipe, options.work)


def reproduce(
    path: str | Path, options: ReproduceOptions, tell: Tell, command: str = ""
) -> tuple[dict[str, Any], Path]:
    """Runs what has not been run yet, and writes table.md and table.json.

    Args:
        path: the recipe.
        options: what to make, and where.
        tell: told of each stage.
        command: that asked for it, for the table.

    Returns:
        Rows, order, commands, versions and machine, JSON-ready; and the folder in which the table lies.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    recipe, stages = planned(path, options)
    results = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        place = f"[{number}/{len(stages)}] {name}"
        result = stage.result()
        if result is not None:
            tell(f"{place}: there already")
        else:
            tell(f"{place}: {shlex.join(stage.command)}")
            started = time.perf_counter()
            run_stage(stage)
            tell(f"{place}: took {time.perf_counter() - started:.0f} s")
            result = stage.result()
            assert result is not None
        results[name] = result
    found = compare(recipe, stages, results) | {"small": options.small, "command": command}
    folder = options.work / (f"{recipe.name}-small" if options.small else recipe.name)
    with replaced_folder(folder) as new:
        (new / "table.md").write_text(comparison_page(found), encoding="utf-8")
        (new / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found, folder
