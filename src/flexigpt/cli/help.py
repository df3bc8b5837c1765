"""Help that is read: the everyday options first, the rest in groups under --help-all; words are never broken."""

import shutil
import textwrap
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

_WIDEST, _NAMES = 100, 30
_EVERYDAY, _LAST = "Everyday options", "Running it"


class Group(TyperGroup):
    """All commands. Flags of its own that are not given are False: for None, typer would load pydantic."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its flags, help among them."""
        flags = super().get_params(ctx)
        for parameter in flags:
            parameter.default = False
        return flags

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Every command with the whole of its first line."""
        rows = [(name, " ".join((command.help or "").split())) for name, command in self.commands.items()]
        formatter.write(f"\n{_section('Commands', rows, _width())}\n")


class HelpCommand(TyperCommand):
    """A command whose help shows its everyday options, or all of them.

    Attributes:
        groups: option -> heading under which all options are shown.
        everyday: the options that the short help shows.
        example: shown at the end.
    """

    groups: ClassVar[dict[str, str]] = {}
    everyday: ClassVar[set[str]] = set()
    example: ClassVar[str] = ""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The short help."""
        formatter.write(self.help_text(ctx))

    def help_text(self, context: Any, everything: bool = False) -> str:
        """The help, with the everyday options or with all."""
        width = _width()
        arguments = [
            (p.metavar or str(p.name).upper(), getattr(p, "help", None) or "")
            for p in self.params
            if p.param_type_name == "argument"
        ]
        places = " ".join(name for name, _ in arguments)
        parts = [f"Usage: {context.command_path} [OPTIONS] {places}"]
        parts.append(textwrap.fill(" ".join((self.help or "").split()), width))
        parts.append(_section("Arguments", arguments, width))
        shown: dict[str, list[tuple[str, str]]] = {_EVERYDAY: []}
        for parameter in self.params:
            record = parameter.get_help_record(context)
            if parameter.param_type_name != "option" or record is None or parameter.name == "help_all":
                continue
            group = _EVERYDAY if parameter.name in self.everyday else self.groups[parameter.name]
            if everything or group == _EVERYDAY:
                shown.setdefault(group, []).append(record)
        headings = sorted(shown, key=lambda heading: heading == _LAST)  # the others in the order of their fields
        parts += [_section(heading, shown[heading], width) for heading in headings]
        parts.append(f"Example:\n  {self.example}")
        if not everything and set(self.groups) - self.everyday:
            parts.append(f"All options: {context.command_path} --help-all. Less or more output: -q, -v.")
        return "\n\n".join(part for part in parts if part) + "\n"


def show_all(context: typer.Context, asked: bool) -> None:
    """Prints the whole help where it is asked for, and ends."""
    if asked and isinstance(context.command, HelpCommand):
        print(context.command.help_text(context, everything=True), end="")
        raise typer.Exit


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _section(heading: str, rows: list[tuple[str, str]], width: int) -> str:
    """Names on the left, what they are on the right; a long name has a line of its own."""
    if not rows:
        return ""
    column = min(max(len(name) for name, _ in rows), _NAMES) + 4
    lines = [f"{heading}:"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False) or [""]
        if len(name) + 4 > column:
            lines.append(f"  {name}")
        else:
            wrapped[0] = f"  {name}".ljust(column) + wrapped[0]
        first = 0 if len(name) + 4 > column else 1
        lines += wrapped[:first] + [" " * column + line for line in wrapped[first:]]
    return "\n".join(lines)
