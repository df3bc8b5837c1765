"""A recipe: the commands behind a table or figure of the paper, and the paper's figures to put beside theirs."""

import difflib
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

FOLDER = Path(__file__).parents[1]
_PROGRAMS = ("flexigpt", "torchrun", "python")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class RecipeError(ValueError):
    """What a user can put right, in one line."""


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Checked):
    """One figure of a table: `value` says where it stands in what a stage measured, which `scale` multiplies."""

    title: str
    value: str
    scale: float = 1


class Row(_Checked):
    """One row of a table; one without a stage is quoted from the paper. `values` go before those of the columns."""

    label: str
    stage: str | None = None
    values: dict[str, str] = {}
    paper: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}


class Recipe(_Checked):
    """How a table or figure is made; recipes/README.md says what each key means."""

    title: str
    paper: str
    note: str = ""
    settings: dict[str, str]
    small: dict[str, str] = {}
    stages: dict[str, str]
    columns: dict[str, Column] = {}
    rows: list[Row] = []
    distances: list[str] = []
    report: str | None = None

    def fill(self, text: str) -> str:
        """The text with its settings filled in, and the settings in those; what is no setting stays in its braces."""
        for _ in range(3):
            text = _PLACEHOLDER.sub(lambda found: self.settings.get(found[1], found[0]), text)
        return text

    def uses(self, stage: str) -> list[str]:
        """The stages whose output a stage reads."""
        check_known("stage", stage, self.stages)
        names = [name for name in _PLACEHOLDER.findall(self.fill(self.stages[stage])) if name != "out"]
        for name in names:
            check_known(
                f"in stage {stage}:", name, ["out", *self.settings, *(f"stage:{other}" for other in self.stages)]
            )
        return [name.removeprefix("stage:") for name in names]

    def order(self) -> list[str]:
        """The stages that what is shown depends on, each after those that it uses."""
        graph: dict[str, list[str]] = {}
        waiting = [*(row.stage for row in self.rows), *self.distances, self.report]
        for name in waiting:
            if name is not None and name not in graph:
                graph[name] = self.uses(name)
                waiting += graph[name]
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise RecipeError(f"stages use each other: {' -> '.join(error.args[1])}") from error

    def command(self, stage: str, places: Mapping[str, str]) -> list[str]:
        """The words of a stage's command; `places` has a folder for `out`, its own, and for each `stage:NAME`."""
        text = _PLACEHOLDER.sub(lambda found: shlex.quote(places[found[1]]), self.fill(self.stages[stage]))
        try:
            words = shlex.split(text) or ["nothing"]
        except ValueError as error:
            raise RecipeError(f"stage {stage}: {error}") from error
        check_known(f"stage {stage} is no command:", words[0], _PROGRAMS)
        return words


def find_recipe(table: str) -> Path:
    """The file of a recipe, which is named (table4) or given by its path."""
    paths = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    path = paths.get(table, Path(table).expanduser())
    if not path.is_file():
        check_known("recipe", table, paths)
    return path


def read_recipe(path: Path, small: bool, changes: Sequence[str]) -> Recipe:
    """The recipe in the form and with the settings (NAME=VALUE) that are asked for.

    Raises:
        RecipeError: a file that is no recipe; a setting or column that is unknown.
    """
    try:
        # BaseLoader reads texts only: 1e-2 stays as it is written.
        recipe = Recipe.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader))
    except ValidationError as error:
        said = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise RecipeError(f"{path}: {'; '.join(said)}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    for row in recipe.rows:
        for name in (*row.values, *row.paper):
            check_known(f"row {row.label}: column", name, recipe.columns)
    if small and not recipe.small:
        raise RecipeError(f"{path} has no small form: leave --small out")
    for name in recipe.small:
        check_known("small:", name, recipe.settings)
    settings = recipe.settings | (recipe.small if small else {})
    for change in changes:
        name, equals, value = change.partition("=")
        check_known("--set", name, settings)
        if not equals:
            raise RecipeError(f"--set {change} cannot be read: give NAME=VALUE, as tokens=100K")
        settings[name] = shlex.quote(value)
    return recipe.model_copy(update={"settings": settings})


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """Raises RecipeError for a name that is none of those known; it offers the nearest."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        offer = f"did you mean {near[0]}?" if near else f"give {', '.join(known) or 'none'}"
        raise RecipeError(f"{what} {name} is unknown; {offer}")
