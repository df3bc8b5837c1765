"""What the stages of a recipe measured, beside the paper's figures."""

import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import combinations
from typing import Any

import torch
from rich.table import Table

from flexigpt.errors import InputError
from flexigpt.recipe import Column, Recipe, Row, fill
from flexigpt.stages import PAGE, Stage

_SCALES = {"": 1.0, "percent": 100.0, "MB": 1e-6, "M": 1e-6}
_LISTED_PAIRS = 4
_SMALL = "This is the small form: the example model in place of the paper's, and few tokens."

Results = Mapping[str, dict[str, Any]]


def compare(recipe: Recipe, stages: Mapping[str, Stage], results: Results) -> dict[str, Any]:
    """Rows, order, commands, versions and machine. JSON-ready.

    Args:
        recipe: in the form and with the settings that were run.
        stages: by name.
        results: what they measured, by name.

    Raises:
        InputError: a figure that a stage did not measure.
    """
    rows = [
        {"label": row.label, "paper": dict(row.paper), "measured": _measured(recipe, row, results)}
        for row in recipe.rows
    ]
    found: dict[str, Any] = {
        "name": recipe.name,
        "title": recipe.title,
        "paper": recipe.paper,
        "note": recipe.note,
        "settings": {name: recipe.settings[name] for name in recipe.settings if name in recipe.used_settings()},
        "columns": {column.name: {"title": column.title, "better": column.better} for column in recipe.columns},
        "rows": rows,
        "order": [line for column in recipe.columns if column.better for line in _order(column, rows)],
    }
    if recipe.distances is not None:
        found["bases"] = _bases(results[recipe.distances])
    if recipe.report is not None:
        found["report"] = str(stages[recipe.report].folder / PAGE)
    return found | {
        "commands": {name: shlex.join(stage.command) for name, stage in stages.items()},
        "versions": {name: version(name) for name in ("flexigpt", "torch", "transformers")},
        "machine": _machine(),
    }


def _measured(recipe: Recipe, row: Row, results: Results) -> dict[str, float]:
    if row.stage is None:
        return {}
    measured = {}
    for column in recipe.columns:
        path = fill(row.values.get(column.name, column.value), recipe.settings)
        if path:
            measured[column.name] = _look_up(results[row.stage], path, row.stage) * _SCALES[column.unit]
    return measured


def _look_up(result: Any, path: str, stage: str) -> float:
    at = result
    for key in path.split("."):
        try:
            at = at[int(key)] if isinstance(at, list) else at[key]
        except (KeyError, IndexError, TypeError, ValueError):
            there = ", ".join(at) if isinstance(at, dict) else type(at).__name__
            raise InputError(f"stage {stage} measured no {path}: where {key} is looked for, there is {there}") from None
    if not isinstance(at, int | float):
        raise InputError(f"{path} of stage {stage} is no number")
    return float(at)


def _order(column: Column, rows: list[dict[str, Any]]) -> Iterator[str]:
    """How many pairs of rows stand as in the paper, and which do not; pairs that are equal in the paper count not."""
    both = [row for row in rows if column.name in row["paper"] and column.name in row["measured"]]
    pairs = list(combinations(both, 2))
    pairs = [(a, b) for a, b in pairs if a["paper"][column.name] != b["paper"][column.name]]
    if not pairs:
        return
    turned = []
    for a, b in pairs:
        first, second = (a, b) if a["paper"][column.name] < b["paper"][column.name] else (b, a)
        if not first["measured"][column.name] < second["measured"][column.name]:
            turned.append((first, second))
    if not turned:
        yield f"{column.title}: the rows stand in the paper's order"
        return
    yield f"{column.title}: {len(pairs) - len(turned)} of {len(pairs)} pairs of rows stand in the paper's order; not:"
    for first, second in turned[:_LISTED_PAIRS]:
        figures = [
            (one[side][column.name], other[side][column.name])
            for side, one, other in (("paper", first, second), ("measured", first, second))
        ]
        (low, high), (mine, theirs) = figures
        sign = ">" if mine > theirs else "="
        yield (
            f"  {first['label']} and {second['label']}: {low:,.2f} < {high:,.2f} in the paper, "
            f"{mine:,.5g} {sign} {theirs:,.5g} here"
        )
    if len(turned) > _LISTED_PAIRS:
        yield f"  and {len(turned) - _LISTED_PAIRS} more"


def _bases(record: dict[str, Any]) -> list[dict[str, Any]]:
    """By pruned block and distance: the nearest candidate, and how far it and the next one are."""
    try:
        distances = {record["base_distance"]: record["distances"]} | record["compared_distances"]
    except KeyError as error:
        raise InputError(f"the stage of distances recorded no {error}: let it be a prune") from None
    rows = []
    for block in record["distances"]:
        row: dict[str, Any] = {"block": int(block)}
        for name, table in distances.items():
            (first, near), *others = sorted(table[block].items(), key=lambda item: item[1])
            row[name] = {"base": int(first), "distance": near, "next": others[0][1] if others else None}
        rows.append(row)
    return rows


def _machine() -> str:
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores{device}"


def _lines(found: dict[str, Any]) -> Iterator[list[str]]:
    """The cells of each line: label, whose figures, figures."""
    columns = found["columns"]
    for row in found["rows"]:
        label = row["label"]
        for side in ("paper", "measured"):
            if row[side]:
                figures = [f"{row[side][name]:,.2f}" if name in row[side] else "" for name in columns]
                yield [label, "paper" if side == "paper" else "here", *figures]
                label = ""


def _base_lines(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in found["bases"][0] if name != "block"]
    headings = ["block", *(f"base by {name} (distance, next)" for name in names)]
    lines = []
    for row in found["bases"]:
        cells = [str(row["block"])]
        for name in names:
            nearest = row[name]
            beyond = "" if nearest["next"] is None else f", {nearest['next']:.4g}"
            cells.append(f"{nearest['base']} ({nearest['distance']:.4g}{beyond})")
        lines.append(cells)
    return headings, lines


def _tables(found: dict[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    if found["rows"]:
        yield ["", "", *(column["title"] for column in found["columns"].values())], list(_lines(found))
    if found.get("bases"):
        yield _base_lines(found)


def comparison_tables(found: dict[str, Any]) -> Iterator[Table]:
    """For a terminal."""
    for headings, lines in _tables(found):
        table = Table(title=found["title"])
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        yield table


def comparison_page(found: dict[str, Any]) -> str:
    """As a page of Markdown."""
    of_paper = f"`paper` is its {found['paper']}; `here` is our run." if found["rows"] else f"After {found['paper']}."
    lines = [f"# {found['title']}", "", f"`{found['command']}`", "", of_paper]
    lines += [_SMALL] if found["small"] else []
    lines += ["", found["note"]] if found["note"] else []
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines += ["", f"{versions}; {found['machine']}.", ""]
    for headings, rows in _tables(found):
        rules = ["---" if number < 2 else "---:" for number in range(len(headings))]
        lines += [f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows)] + [""]
    lines += [f"- {line}" if not line.startswith(" ") else f"  - {line.strip()}" for line in found["order"]]
    lines += [f"Drawn in `{found['report']}`."] if "report" in found else []
    lines += ["", "Settings:", ""]
    lines += [f"- {name}: {value}" for name, value in found["settings"].items()]
    lines += ["", "Commands:", "", "```sh", *found["commands"].values(), "```"]
    return "\n".join(lines) + "\n"
