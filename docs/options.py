"""Writes the tables of options into the pages: between `<!-- options: COMMAND -->` and `<!-- end -->`.

python docs/options.py
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

from flexigpt.cli.options import descriptions
from flexigpt.decoding import BenchmarkOptions, GenerateOptions, SampleOptions
from flexigpt.evaluation import EvalOptions
from flexigpt.export import ExportOptions
from flexigpt.pruning import ExtendOptions, FrontierOptions, PruneOptions
from flexigpt.recovery import RecoverOptions
from flexigpt.runtime import choices_of, flag

COMMANDS: dict[str, Any] = {
    "prune": PruneOptions,
    "frontier": FrontierOptions,
    "extend": ExtendOptions,
    "recover": RecoverOptions,
    "eval": EvalOptions,
    "generate": GenerateOptions,
    "sample": SampleOptions,
    "benchmark": BenchmarkOptions,
    "export": ExportOptions,
}
PLACE = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(command: str) -> str:
    """The options of a command as a table in Markdown: those of Python alone by their fields' names."""
    options = COMMANDS[command]
    described, kinds = descriptions(options), get_type_hints(options)
    rows = ["| option | default | what |", "| --- | --- | --- |"]
    for field in dataclasses.fields(options):
        shown = f"`{flag(field.name)}`" if field.metadata["command"] else f"`{field.name}=` (Python)"
        default = "" if field.default in (None, dataclasses.MISSING) else f"`{field.default}`"
        choices = ", ".join(f"`{choice}`" for choice in choices_of(kinds[field.name]))
        text = described[field.name] + (f" One of {choices}." if choices else "")
        rows.append(f"| {shown} | {default} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def with_tables(page: str) -> str:
    """A page with its tables as they should be."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.md")):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
