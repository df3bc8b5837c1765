"""Commands made from options classes: each field is an option; its type, default and description are the option's.

Nothing here loads torch or transformers: neither do help, completion and usage errors.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from flexigpt.cli.console import Reporting, Verbosity, reporting
from flexigpt.cli.effects import refuse_idle
from flexigpt.cli.help import HelpCommand, show_all
from flexigpt.runtime import InputError, choices_of, flag

Options = type[Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """How the command was called.

    Attributes:
        command: as it was typed, for records.
        verbosity: how much is printed.
    """

    command: str
    verbosity: Verbosity = Verbosity.NORMAL


@dataclasses.dataclass(frozen=True)
class Asked:
    """What was typed of an options class.

    Attributes:
        name: of the command.
        kind: the options class.
        typed: field -> value, of the options that were typed.
        call: how the command was called.
    """

    name: str
    kind: Options
    typed: Mapping[str, Any]
    call: Call

    def options(self, **preset: Any) -> Any:
        """The options: what was typed, before a preset's, before the defaults.

        Raises:
            InputError: values that cannot be, or have no effect beside the others.
        """
        made = self.kind(**preset | dict(self.typed))
        refuse_idle(self.name, self.typed, made)
        return made

    def reporting(self) -> Reporting:
        """Reports progress as loudly as was asked."""
        return reporting(self.call.verbosity)


def add_command(
    app: typer.Typer, name: str, function: Callable[..., None], options: Options | None = None, *, example: str
) -> None:
    """Makes a command of a function and an options class.

    Args:
        app: gets the command.
        name: of the command.
        function: its own parameters are the command's own arguments and options; where there is an options class, the
            first one takes what was `Asked`.
        options: a class whose fields become options; None: the command has its own only.
        example: shown at the end of the help.
    """
    own = _parameters(function)[0 if options is None else 1 :]
    fields = [] if options is None else [field for field in dataclasses.fields(options) if field.metadata["command"]]
    kinds, described = ({}, {}) if options is None else (get_type_hints(options), descriptions(options))

    def call(**given: Any) -> None:
        context = given.pop("context")
        given.pop("help_all")
        values = {field.name: given.pop(field.name) for field in fields}
        expanded = {key: _expanded(value) for key, value in given.items()}
        if options is None:
            function(**expanded)
            return
        typed = {f.name: _value(f, kinds[f.name], values[f.name]) for f in fields if is_given(context, f.name)}
        function(Asked(name, options, typed, context.obj), **expanded)

    made = [_parameter(field, kinds[field.name], described[field.name]) for field in fields]
    every = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    every += [*made, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    every += [_keyword("help_all", bool, typer.Option("--help-all", is_eager=True, callback=show_all), False)]
    call.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    call.__doc__ = function.__doc__
    panels = {parameter.name: _panel(parameter) for parameter in own}
    everyday = {name for name, panel in panels.items() if panel is None}
    look = {
        "groups": {field.name: field.metadata["group"] for field in fields} | panels,
        "everyday": everyday | {field.name for field in fields if field.metadata["everyday"]},
        "example": example,
    }
    settings = {"help_option_names": ["-h", "--help"]}
    app.command(name, cls=type("Command", (HelpCommand,), look), context_settings=settings)(call)


def is_given(context: typer.Context, field: str) -> bool:
    """Whether the user gave that option."""
    return getattr(context.get_parameter_source(field), "name", "") != "DEFAULT"


def descriptions(options: Options) -> dict[str, str]:
    """Field -> its description in the docstring of the options class, or of a class above."""
    described: dict[str, str] = {}
    for cls in reversed(options.__mro__[:-1]):
        found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", cls.__doc__ or "", re.MULTILINE)
        described |= {name: " ".join(text.split()) for name, text in found}
    return described


def _parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())


def _panel(parameter: inspect.Parameter) -> str | None:
    """The heading of an option of the command's own; None: it is an everyday one."""
    return getattr(get_args(parameter.annotation)[1], "rich_help_panel", None)


def _keyword(name: str, kind: Any, shown: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[kind, shown]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _parameter(field: "dataclasses.Field[Any]", kind: Any, description: str) -> inspect.Parameter:
    """The typer parameter of a field. What was not typed is None, so that presets can tell."""
    choices, plain = choices_of(kind), _plain_type(field, kind)
    needed = field.default is dataclasses.MISSING
    if choices:
        description = f"{description.rstrip('.')}: {', '.join(choices)}."
    if not needed and field.default is not None and plain is not bool and "default:" not in description:
        description = f"{description} [default: {field.default}]"
    declared = (
        (flag(field.name), f"--no-{field.name.replace('_', '-')}") if field.default is True else (flag(field.name),)
    )
    shown = typer.Option(
        "/".join(declared),
        help=description,
        metavar=None if plain is bool else field.metadata["metavar"] or _metavar(plain, choices, field.name),
        autocompletion=(lambda: list(choices)) if choices else None,
        show_default=False,
    )
    typed = str if plain in (int, float) else plain  # typer would not say what was given
    return _keyword(field.name, typed if needed else typed | None, shown, inspect.Parameter.empty if needed else None)


def _plain_type(field: "dataclasses.Field[Any]", kind: Any) -> Any:
    """What is typed: a number, a flag, a path, strings, or a string, which `_value` makes the field's value of."""
    kinds = [part for part in get_args(kind) or (kind,) if part is not NoneType]
    if Sequence[str] in kinds and field.metadata["parse"] is None:
        return list[str]
    if field.metadata["parse"] is not None or kinds not in ([bool], [int], [float], [Path]):
        return str
    return kinds[0]


def _metavar(plain: Any, choices: tuple[str, ...], name: str) -> str:
    if choices:
        return name.rpartition("_")[2].upper()
    return {int: "N", float: "X", Path: "PATH"}.get(plain, "TEXT")


def _value(field: "dataclasses.Field[Any]", kind: Any, value: Any) -> Any:
    if Path in get_args(kind):
        return _expanded(value)
    if isinstance(value, list):  # one is one
        return value[0] if len(value) == 1 else tuple(value)
    parse, plain = field.metadata["parse"], _plain_type(field, kind)
    if plain not in (int, float):
        return value if parse is None else parse(value)
    try:
        return plain(value)
    except ValueError:
        wanted = "a whole number" if plain is int else "a number"
        raise InputError(f"{flag(field.name)} {value[:40]} cannot be read: give {wanted}") from None


def _expanded(value: Any) -> Any:
    """A path that begins with ~ as the shell would have it: in --plan=~/a it leaves that to us."""
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    if isinstance(value, str | Path) and str(value).startswith("~/"):
        return type(value)(Path(value).expanduser())
    return value
