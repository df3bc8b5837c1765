"""What the stages of a recipe measured, beside the paper's figures: lines of Markdown."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from recipe import Recipe, RecipeError, Row

Results = Mapping[str, Any]  # what each stage measured, by its name


def table(recipe: Recipe, results: Results) -> Iterator[str]:
    """Figures, how many pairs of rows stand in the paper's order, and the nearest candidate base by each distance.

    Raises:
        RecipeError: a figure that a stage did not measure.
    """
    rows = [(row, _measured(recipe, row, results)) for row in recipe.rows]
    if rows:
        yield from _lines(["", "", *(column.title for column in recipe.columns.values())], _figures(recipe, rows))
    for name, column in recipe.columns.items():
        both = [(row.paper[name], measured[name]) for row, measured in rows if name in row.paper and name in measured]
        pairs = [(low, high) for low, high in combinations(sorted(both), 2) if low[0] < high[0]]
        if pairs:
            kept = sum(low[1] < high[1] for low, high in pairs)
            yield f"- {column.title}: {kept} of {len(pairs)} pairs of rows stand in the paper's order"
    if recipe.distances:
        headings = ["pruned block", *(f"nearest base, {stage}" for stage in recipe.distances)]
        yield from _lines(headings, _bases([_find(results, f"{stage}.distances") for stage in recipe.distances]))


def _measured(recipe: Recipe, row: Row, results: Results) -> dict[str, float]:
    if row.stage is None:
        return {}
    measured = {}
    for name, column in recipe.columns.items():
        path = f"{row.stage}.{recipe.fill(row.values.get(name, column.value))}"
        figure = _find(results, path)
        if not isinstance(figure, int | float):
            raise RecipeError(f"{path} is no number")
        measured[name] = figure * column.scale
    return measured


def _find(measured: Any, path: str) -> Any:
    """What stands at a path of keys with dots between; in a list, 0 is the first entry, `batch_size=8` that with it."""
    for key in path.split("."):
        name, equals, value = key.partition("=")
        try:
            if equals:
                measured = next(entry for entry in measured if str(entry[name]) == value)
            else:
                measured = measured[int(key) if isinstance(measured, list) else key]
        except (LookupError, TypeError, ValueError, StopIteration):
            raise RecipeError(f"{path} was not measured: there is no {key}") from None
    return measured


def _figures(recipe: Recipe, rows: list[tuple[Row, dict[str, float]]]) -> Iterator[list[str]]:
    for row, measured in rows:
        label = row.label
        for side, figures in (("paper", row.paper), ("here", measured)):
            if figures:
                yield [label, side, *(f"{figures[name]:,.2f}" if name in figures else "" for name in recipe.columns)]
                label = ""


def _bases(tables: list[dict[str, dict[str, float]]]) -> Iterator[list[str]]:
    for block in tables[0]:
        nearest = [min(table[block].items(), key=lambda candidate: candidate[1]) for table in tables]
        yield [block, *(f"{base} at {distance:.4g}" for base, distance in nearest)]


def _lines(headings: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    for cells in (headings, ["---"] + ["---:"] * (len(headings) - 1), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""
