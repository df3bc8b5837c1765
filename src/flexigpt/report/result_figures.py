"""What was recorded of training and evaluation, of one or several models -> figures. Nothing is computed again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flexigpt.record import Recorded, fidelities, held_out
from flexigpt.report.drawing import DASHES, Drawn, colour, key, line_key, new_figure, series, style

_POSITIONS = 16  # at most: of more each would be noise

# What tells series apart besides their colours; dashes are the source's.
_MARKS, _LINES = "osD^vP", ("-", "-.", ":", (0, (6, 1)), (0, (1, 1, 4, 1)), (0, (8, 2, 2, 2)))


def shared_figures(models: Sequence[Recorded]) -> dict[str, Drawn]:
    """What is drawn of one or several models together, by name."""
    with style():
        drawn = [*recovery_figures(models), positions_figure(models), block_errors_figure(models)]
        points = [point for model in models for point in model.frontier]
        if points:
            drawn.append(frontier_figure(points))
    return {one.name: one for one in drawn if one is not None}


def frontier_figure(points: Sequence[Mapping[str, Any]]) -> Drawn:
    """Perplexity against stored bytes, a line for each series, with a mark of its own.

    Args:
        points: in any order, each with `series` (what was done to the model: the line's name), `bytes` stored,
            `perplexity`, and `chosen`: true of the one that is recommended. A series of one point, such as the source,
            is a mark without a line.
    """
    names = list(dict.fromkeys(point["series"] for point in points))
    scale, unit = (1e9, "GB") if max(point["bytes"] for point in points) >= 1e9 else (1e6, "MB")
    figure = new_figure(2.9, "Perplexity by stored size")
    axes = figure.add_subplot()
    entries = []
    for number, name in enumerate(names):
        its = sorted((point["bytes"] / scale, point["perplexity"]) for point in points if point["series"] == name)
        look: dict[str, Any] = {"color": series(number), "marker": _MARKS[number % len(_MARKS)], "markersize": 4.5}
        (line,) = axes.plot([x for x, _ in its], [y for _, y in its], linewidth=1.4, **look)
        line.set_gid(f"frontier-{number}")
        entries.append((name, Line2D([], [], linewidth=1.4 if len(its) > 1 else 0, **look)))
    for point in points:
        if point.get("chosen"):
            at = (point["bytes"] / scale, point["perplexity"])
            ring: dict[str, Any] = {
                "linestyle": "none",
                "marker": "o",
                "markersize": 11,
                "markerfacecolor": "none",
                "markeredgecolor": colour("ink"),
            }
            axes.plot(*at, **ring)
            entries.append((f"knee: {at[0]:.3g} {unit}, {at[1]:.1f}", Line2D([], [], **ring)))
    finite = [point["perplexity"] for point in points if 0 < point["perplexity"] < math.inf]
    if finite and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set(xlabel=f"stored {unit}", ylabel="perplexity (lower is better)")
    key(figure, entries, 2)
    told = "; ".join(
        f"{point['series']} {point['bytes'] / scale:,.1f} {unit}: {point['perplexity']:.2f}" for point in points
    )
    return Drawn(name="frontier", alt=f"Curves: perplexity by stored size. {told}.", figure=figure)


def recovery_figures(models: Sequence[Recorded]) -> list[Drawn]:
    """Held-out perplexity, loss, learning rate and speed over the tokens trained on, a figure each."""
    trained = [model for model in models if model.record.get("recovery", {}).get("history")]
    if not trained:
        return []
    histories = [model.record["recovery"]["history"] for model in trained]
    measured = [model for model in trained if "perplexity" in model.record]
    panels = {"perplexity": _recovery_title(measured, len(trained))} if measured else {}
    panels["cross_entropy"] = "Training loss (cross-entropy, nats a token)"
    if any(step["divergence"] for history in histories for step in history):
        panels["divergence"] = "Divergence from the teacher (nats a token)"
    panels |= {"lr": "Learning rate", "tokens_per_second": "Tokens a second"}
    return [_recovery_figure(field, title, trained) for field, title in panels.items()]


def _recovery_figure(field: str, title: str, trained: Sequence[Recorded]) -> Drawn:
    figure = new_figure(2.2, title)
    axes = figure.add_subplot()
    entries = []
    for number, model in enumerate(trained):
        _draw_history(axes, model, field, number)
        measured = field == "perplexity" and field in model.record
        last = f": {held_out(model)[-1][1]:.2f}" if measured else ""
        entries.append((f"{model.name}{last}", line_key(series(number), _LINES[number % len(_LINES)])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("tokens trained on")
    if len(trained) > 1:
        key(figure, entries, 1)
    names = ", ".join(model.name for model in trained)
    name = f"recovery-{field.replace('_', '-')}"
    return Drawn(name=name, alt=f"Curves of recovery training of {names}: {title}.", figure=figure)


def _recovery_title(measured: Sequence[Recorded], trained: int) -> str:
    if trained == 1 and measured:
        (_, was), *_, (_, became) = held_out(measured[0])
        return f"Held-out perplexity: {was:.2f} became {became:.2f}"
    return "Held-out perplexity"


def _draw_history(axes: Axes, model: Recorded, field: str, number: int) -> None:
    if field == "perplexity":
        if "perplexity" not in model.record:
            return
        points = held_out(model)
        marker, width = "o", 1.5
    else:
        points = [(step["tokens"], step[field]) for step in model.record["recovery"]["history"]]
        marker, width = "", 1.3
    line = axes.plot([tokens for tokens, _ in points], [value for _, value in points], color=series(number))[0]
    line.set(marker=marker, markersize=3.5, linewidth=width, linestyle=_LINES[number % len(_LINES)])
    if field in ("lr", "tokens_per_second"):
        axes.set_ylim(bottom=0)
    if field == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def positions_figure(models: Sequence[Recorded]) -> Drawn | None:
    """How much higher the loss is than the source's, by position in the window, of each evaluated model."""
    found = [(name, one) for name, one in fidelities(models) if one.get("positions") and name != one["against"]]
    if not found:
        return None
    figure = new_figure(2.7, "Loss above the source's, by position in the window")
    axes = figure.add_subplot()
    axes.axhline(0, color=colour("ink"), linestyle=DASHES, linewidth=1)
    entries = [(found[0][1]["against"], line_key(colour("ink"), DASHES))]
    for number, (name, fidelity) in enumerate(found):
        positions, dashes = fidelity["positions"], _LINES[number % len(_LINES)]
        more = [model - source for model, source in zip(positions["model"], positions["source"], strict=True)]
        width = -(-len(more) // _POSITIONS)
        starts = range(0, len(more), width)
        means = [sum(more[start : start + width]) / len(more[start : start + width]) for start in starts]
        (line,) = axes.plot(positions["position"][::width], means, color=series(number), lw=1.6, linestyle=dashes)
        line.set_gid(f"positions-{number}")
        entries.append((name, line_key(series(number), dashes)))
    axes.set(xlabel="position in the window (tokens before it)", ylabel="nats a token")
    key(figure, entries, 2)
    alt = f"Curves: loss above the source's by position in the window, of {', '.join(name for name, _ in found)}."
    return Drawn(name="positions", alt=alt, figure=figure)


def block_errors_figure(models: Sequence[Recorded]) -> Drawn | None:
    """How far each replica's output is from its pruned block's, on the source's own inputs."""
    found = [(name, fidelity["blocks"]) for name, fidelity in fidelities(models) if fidelity.get("blocks")]
    if not found:
        return None
    title = "How far each replica's output is from that of the block it stands in for"
    figure = new_figure(0.9 + 1.9 * len(found), title)
    grid: Any = figure.subplots(len(found), 1, sharex=True, squeeze=False)
    numbers = sorted({block for _, blocks in found for block in blocks})
    for number, (name, blocks) in enumerate(found):
        axes = grid[number][0]
        for block, measured in sorted(blocks.items()):
            error = measured["output"]
            shown = error if math.isfinite(error) else 0
            (bar,) = axes.bar(numbers.index(block), shown, width=0.7, color=series(number))
            bar.set_gid(f"error-{number}-{block}")
            if len(numbers) <= 9:
                axes.text(numbers.index(block), shown, f"{error:.2f}", ha="center", va="bottom", size=8)
        axes.axhline(1, color=colour("ink"), linewidth=1, linestyle=DASHES)
        axes.set_title(f"\u2009{name}")
        axes.set_ylabel("relative error")
        axes.margins(y=0.15)
    last = grid[-1][0]
    step = -(-len(numbers) // 16)
    last.set_xticks(range(0, len(numbers), step), [str(block) for block in numbers[::step]])
    last.set_xlabel("replica")
    dashed = line_key(colour("ink"), DASHES)
    key(figure, [("1: as far as with nothing in its place", dashed)], 1)
    alt = f"Bars: error of each replica's output, of {', '.join(name for name, _ in found)}."
    return Drawn(name="block-errors", alt=alt, figure=figure)


def _short_count(value: float) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"
