"""Recipes: the commands behind a table or figure of the paper, and the paper's figures to put beside theirs."""

import difflib
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flexigpt.errors import InputError

OUT = "out"
STAGE = "stage:"
UNITS = ("", "percent", "MB", "M")
BETTER = ("", "lower", "higher")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_PROGRAMS = ("flexigpt", "torchrun", "python")
_NEEDED = ("name", "title", "paper", "settings", "stages")
_KEYS = (*_NEEDED, "note", "small", "flags", "columns", "rows", "distances", "report")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of a table.

    Attributes:
        name: how rows refer to it.
        title: what is printed above it.
        value: where it stands in what a stage measured: keys with dots between them, numbers for places in lists.
        unit: "" as it is, percent (measured as a share), MB (measured in bytes), M (millions).
        better: lower, higher, or "" where the order of the rows means nothing.
    """

    name: str
    title: str
    value: str
    unit: str
    better: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    Attributes:
        label: what it is called.
        stage: whose measurements it shows; None: other people's method, quoted from the paper.
        values: by column, where the figure stands, if not where the column says.
        paper: the paper's figures by column.
    """

    label: str
    stage: str | None
    values: Mapping[str, str]
    paper: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a table or figure is made.

    Attributes:
        name: of its results' folder.
        title: what it shows.
        paper: where it stands in the paper.
        note: what to know about it.
        settings: values that `--set` changes, by name.
        flags: groups of words of a command, by name; they may hold settings.
        small: settings and flags that replace those above when it is shrunk to the example model.
        stages: command templates by name. {setting}, {flags}, {out} for the stage's own output folder, {stage:NAME} for
            another's. One without {out} prints JSON, which is kept. Those that nothing shown depends on are not run.
        columns: of the table.
        rows: of the table.
        distances: the stage whose recorded distances are shown block by block, in a figure's recipe.
        report: the stage that draws them, a `flexigpt report`.
    """

    name: str
    title: str
    paper: str
    note: str
    settings: Mapping[str, str]
    flags: Mapping[str, str]
    small: Mapping[str, str]
    stages: Mapping[str, str]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    distances: str | None
    report: str | None

    def used_settings(self) -> set[str]:
        """The settings that what is shown depends on."""
        texts = [self.stages[name] for name in ordered_stages(self)] + [column.value for column in self.columns]
        texts += [value for row in self.rows for value in row.values.values()]
        texts += [self.flags[name] for text in texts for name in placeholders(text) if name in self.flags]
        return {name for text in texts for name in placeholders(text)} & set(self.settings)


class _Loader(yaml.BaseLoader):
    """YAML without types: 1e-2 and 30_000 stay as they are written. A key twice is an error, not the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def read_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        InputError: a file that cannot be read or is not YAML; anything missing or unknown in it.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"the recipe {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        recipe = _parse(data)
        forms = (recipe, shrunk(recipe))
        for form in forms:
            _check(form)
        idle = [name for name in recipe.settings if all(name not in form.used_settings() for form in forms)]
        idle += [name for name in recipe.stages if all(name not in ordered_stages(form) for form in forms)]
        if idle:
            raise InputError(f"nothing that is shown depends on {idle[0]}: leave it out")
    except InputError as error:
        raise InputError(f"the recipe {path}: {error}") from error
    return recipe


def _parse(data: Any) -> Recipe:
    given = _mapping(data, "it")
    _known("key", given, _KEYS)
    missing = [key for key in _NEEDED if key not in given]
    if missing:
        raise InputError(f"{missing[0]} is missing: a recipe has {', '.join(_NEEDED)}")
    texts = {key: _texts(given.get(key) or {}, key) for key in ("settings", "flags", "small", "stages")}
    columns = _mapping(given.get("columns") or {}, "columns")
    rows = given.get("rows") or []
    if not isinstance(rows, list):
        raise InputError("rows is no list")
    name = str(given["name"])
    if not _NAME.fullmatch(name):
        raise InputError(f"the name {name!r} is to be of small letters, digits, - and _")
    return Recipe(
        name=name,
        title=str(given["title"]),
        paper=str(given["paper"]),
        note=" ".join(str(given.get("note", "")).split()),
        settings=texts["settings"],
        flags=texts["flags"],
        small=texts["small"],
        stages=texts["stages"],
        columns=tuple(_column(column, columns[column]) for column in columns),
        rows=tuple(_row(row) for row in rows),
        distances=_name(given, "distances"),
        report=_name(given, "report"),
    )


def _name(given: dict[str, Any], key: str) -> str | None:
    return str(given[key]) if key in given else None


def _column(name: str, data: Any) -> Column:
    given = _texts(data, f"column {name}")
    _known(f"key of column {name}", given, ("title", "value", "unit", "better"))
    if "value" not in given:
        raise InputError(f"column {name} has no value: say where in a stage's record the figure stands")
    unit, better = given.get("unit", ""), given.get("better", "")
    _known(f"unit of column {name}", [unit], UNITS)
    _known(f"better of column {name}", [better], BETTER)
    return Column(name=name, title=given.get("title", name), value=given["value"], unit=unit, better=better)


def _row(data: Any) -> Row:
    given = _mapping(data, "a row")
    label = str(given.get("label", ""))
    if not label:
        raise InputError("a row has no label")
    _known(f"key of row {label}", given, ("label", "stage", "values", "paper"))
    paper = _texts(given.get("paper") or {}, f"paper of row {label}")
    try:
        figures = {column: float(figure) for column, figure in paper.items()}
    except ValueError as error:
        raise InputError(f"paper of row {label}: {error}") from None
    if not all(map(math.isfinite, figures.values())):
        raise InputError(f"paper of row {label} holds a figure that is not finite")
    values = _texts(given.get("values") or {}, f"values of row {label}")
    return Row(label=label, stage=_name(given, "stage"), values=values, paper=figures)


def _mapping(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{what} is no mapping of names to values")
    return {str(key): value for key, value in data.items()}


def _texts(data: Any, what: str) -> dict[str, str]:
    given = _mapping(data, what)
    for key, value in given.items():
        if not isinstance(value, str):
            raise InputError(f"{key} in {what} is no single value")
    return given


def _known(what: str, names: Iterable[str], possible: Iterable[str]) -> None:
    choices = list(possible)
    for name in names:
        if name not in choices:
            raise unknown(what, name, choices)


def unknown(what: str, name: str, possible: Sequence[str]) -> InputError:
    """The error for a name that is not one of those possible; it offers the nearest."""
    near = difflib.get_close_matches(name, possible, n=1)
    offer = f"did you mean {near[0]}?" if near else f"give {', '.join(p or 'nothing' for p in possible) or 'none'}"
    return InputError(f"{what} {name} is unknown: {offer}")


def placeholders(text: str) -> list[str]:
    """The names in braces."""
    return _PLACEHOLDER.findall(text)


def used_stages(recipe: Recipe, stage: str) -> list[str]:
    """The stages whose output a stage reads."""
    found = []
    for name in placeholders(recipe.stages[stage]):
        names = placeholders(recipe.flags[name]) if name in recipe.flags else [name]
        found += [n.removeprefix(STAGE) for n in names if n.startswith(STAGE)]
    return found


def _check(recipe: Recipe) -> None:
    both = set(recipe.settings) & set(recipe.flags)
    if both:
        raise InputError(f"{sorted(both)[0]} is a setting and flags: rename one of them")
    for name in (*recipe.settings, *recipe.flags, *recipe.stages):
        if not _NAME.fullmatch(name) or name == OUT:
            raise InputError(f"the name {name!r} is to be of small letters, digits, - and _, and not {OUT}")
    stages = [STAGE + name for name in recipe.stages]
    for name, text in recipe.flags.items():
        _known(f"in the flags {name}, placeholder", placeholders(text), [*recipe.settings, *stages])
    for name, text in recipe.stages.items():
        _known(f"in stage {name}, placeholder", placeholders(text), [*recipe.settings, *recipe.flags, *stages, OUT])
        words = expand(recipe, name, {word: word for word in (OUT, *stages)})
        if not words or words[0] not in _PROGRAMS:
            raise InputError(f"stage {name} is no command: begin it with {', '.join(_PROGRAMS)}")
    for column in recipe.columns:
        _known(f"in column {column.name}, placeholder", placeholders(column.value), list(recipe.settings))
    columns = [column.name for column in recipe.columns]
    for row in recipe.rows:
        _known(f"in row {row.label}, stage", [] if row.stage is None else [row.stage], recipe.stages)
        _known(f"in row {row.label}, column", (*row.paper, *row.values), columns)
        for value in row.values.values():
            _known(f"in row {row.label}, placeholder", placeholders(value), list(recipe.settings))
    for key, stage in (("distances", recipe.distances), ("report", recipe.report)):
        _known(f"stage of {key}", [] if stage is None else [stage], recipe.stages)
    if not recipe.rows and recipe.distances is None:
        raise InputError("it shows nothing: give rows, or distances")
    ordered_stages(recipe)


def ordered_stages(recipe: Recipe) -> list[str]:
    """The stages that what is shown depends on, each after those that it uses.

    Raises:
        InputError: stages that use each other.
    """
    done: list[str] = []

    def visit(stage: str, path: tuple[str, ...]) -> None:
        if stage in path:
            raise InputError(f"stages use each other: {' -> '.join((*path[path.index(stage) :], stage))}")
        if stage not in done:
            for used in used_stages(recipe, stage):
                visit(used, (*path, stage))
            done.append(stage)

    shown = {row.stage for row in recipe.rows} | {recipe.distances, recipe.report}
    for stage in recipe.stages:
        if stage in shown:
            visit(stage, ())
    return done


def expand(recipe: Recipe, stage: str, places: Mapping[str, str]) -> list[str]:
    """The words of a stage's command; `places` says what stands for {out} and each {stage:NAME}.

    Raises:
        InputError: quotes that are not closed; flags within a word.
    """
    values = dict(recipe.settings) | dict(places)
    words: list[str] = []
    for word in _split(recipe.stages[stage], f"stage {stage}"):
        names = placeholders(word)
        if len(names) == 1 and names[0] in recipe.flags and word == f"{{{names[0]}}}":
            words += [fill(w, values) for w in _split(recipe.flags[names[0]], f"flags {names[0]}")]
        elif any(name in recipe.flags for name in names):
            raise InputError(f"in stage {stage}, flags stand within {word}: let them be a word of their own")
        else:
            words.append(fill(word, values))
    return words


def _split(text: str, what: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with its placeholders filled in."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


def shrunk(recipe: Recipe) -> Recipe:
    """The recipe for the example model.

    Raises:
        InputError: a name in `small` that is neither a setting nor flags.
    """
    _known("in small,", recipe.small, [*recipe.settings, *recipe.flags])
    settings = {name: recipe.small.get(name, value) for name, value in recipe.settings.items()}
    flags = {name: recipe.small.get(name, value) for name, value in recipe.flags.items()}
    return replace(recipe, settings=settings, flags=flags)


def with_settings(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with settings changed as `--set` gives them, NAME=VALUE.

    Raises:
        InputError: what cannot be read, a setting that is unknown or that no stage of this form of the recipe uses.
    """
    settings = dict(recipe.settings)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change} cannot be read: give NAME=VALUE, as tokens=100K")
        if name not in settings:
            raise unknown("--set", name, list(settings))
        if name not in recipe.used_settings():
            raise InputError(f"--set {name} has no effect, since no stage uses it in this form of the recipe")
        settings[name] = value
    return replace(recipe, settings=settings)
