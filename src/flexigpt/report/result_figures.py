"""What was recorded of training and evaluation, of one or several models -> figures. Nothing is computed again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flexigpt.record import Recorded, fidelities, held_out
from flexigpt.report.drawing import DASHES, WIDTH, Drawn, colour, key, line_key, new_figure, plain_axes, series, style


def shared_figures(models: Sequence[Recorded]) -> dict[str, Drawn]:
    """What is drawn of one or several models together, by name."""
    makers: dict[str, Callable[[Sequence[Recorded]], Drawn | None]] = {
        "recovery": recovery_figure,
        "positions": positions_figure,
        "block-errors": block_errors_figure,
    }
    with style():
        drawn = {name: make(models) for name, make in makers.items()}
    return {name: one for name, one in drawn.items() if one is not None}


def recovery_figure(models: Sequence[Recorded]) -> Drawn | None:
    """Loss, held-out perplexity, learning rate and speed over the tokens trained on."""
    trained = [model for model in models if model.record.get("recovery", {}).get("history")]
    if not trained:
        return None
    histories = {model.name: model.record["recovery"]["history"] for model in trained}
    measured = [model for model in trained if "perplexity" in model.record]
    panels = [("cross_entropy", "training loss (cross-entropy, nats a token)")]
    if any(step["divergence"] for history in histories.values() for step in history):
        panels.append(("divergence", "divergence from the teacher (nats a token)"))
    if measured:
        panels.append(("perplexity", "held-out perplexity"))
    panels += [("lr", "learning rate"), ("tokens_per_second", "tokens a second")]
    lines = -(-len(panels) // 2)
    figure = new_figure(WIDTH, 0.8 + 2.1 * lines, _recovery_title(measured, len(trained)))
    grid: Any = figure.subplots(lines, 2, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        plain_axes(axes)
    for (field, heading), axes in zip(panels, grid.flat, strict=False):
        axes.set_title(heading)
        for number, model in enumerate(trained):
            _draw_history(axes, model, field, series(number))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("tokens trained on" if axes in grid[-1] else "")
    entries = []
    for number, model in enumerate(trained):
        last = f": {held_out(model)[-1][1]:.2f}" if model in measured else ""
        entries.append((f"{model.name}{last}", line_key(series(number))))
    if len(trained) > 1:
        key(figure, entries, 2)
    alt = f"Curves of recovery training of {', '.join(histories)}: {', '.join(heading for _, heading in panels)}."
    return Drawn(name="recovery", alt=alt, figure=figure)


def _recovery_title(measured: Sequence[Recorded], trained: int) -> str:
    if trained == 1 and measured:
        (_, was), *_, (_, became) = held_out(measured[0])
        return f"Held-out perplexity went from {was:.2f} to {became:.2f} in recovery"
    return "Recovery training" if trained == 1 else f"Recovery training of {trained} models"


def _draw_history(axes: Axes, model: Recorded, field: str, shade: str) -> None:
    if field == "perplexity":
        if "perplexity" not in model.record:
            return
        points = held_out(model)
        marker, width = "o", 1.5
    else:
        points = [(step["tokens"], step[field]) for step in model.record["recovery"]["history"]]
        marker, width = "", 1.3
    line = axes.plot([tokens for tokens, _ in points], [value for _, value in points], color=shade)[0]
    line.set(marker=marker, markersize=3.5, linewidth=width)
    if field in ("lr", "tokens_per_second"):
        axes.set_ylim(bottom=0)
    if field == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def positions_figure(models: Sequence[Recorded]) -> Drawn | None:
    """Loss by position in the window, of each evaluated model and of what it was compared with."""
    found = [(name, fidelity) for name, fidelity in fidelities(models) if fidelity.get("positions")]
    if not found:
        return None
    figure = new_figure(WIDTH, 3.0, "Loss by position in the window")
    axes = figure.add_subplot()
    entries = []
    sources: list[list[float]] = []
    for number, (name, fidelity) in enumerate(found):
        positions = fidelity["positions"]
        if positions["source"] not in sources:
            sources.append(positions["source"])
            axes.plot(positions["position"], positions["source"], color=colour("ink"), linestyle=DASHES, linewidth=1)
            entries.append((fidelity["against"], line_key(colour("ink"), DASHES)))
        (line,) = axes.plot(positions["position"], positions["model"], color=series(number), linewidth=1.6)
        line.set_gid(f"positions-{number}")
        entries.append((name, line_key(series(number))))
    axes.set(xlabel="position in the window (tokens before it)", ylabel="loss (nats a token)")
    key(figure, entries, 3)
    alt = f"Curves: mean loss by position in the window, of {', '.join(name for name, _ in found)} and the source."
    return Drawn(name="positions", alt=alt, figure=figure)


def block_errors_figure(models: Sequence[Recorded]) -> Drawn | None:
    """How far each replica's output is from its pruned block's, on the source's own inputs."""
    found = [(name, fidelity["blocks"]) for name, fidelity in fidelities(models) if fidelity.get("blocks")]
    if not found:
        return None
    title = "How far each replica's output is from that of the block it stands in for"
    figure = new_figure(WIDTH, 0.9 + 1.9 * len(found), title)
    grid: Any = figure.subplots(len(found), 1, sharex=True, squeeze=False)
    numbers = sorted({block for _, blocks in found for block in blocks})
    for number, (name, blocks) in enumerate(found):
        axes = grid[number][0]
        for block, measured in sorted(blocks.items()):
            error = measured["output"]
            shown = error if math.isfinite(error) else 0
            (bar,) = axes.bar(numbers.index(block), shown, width=0.7, color=series(number))
            bar.set_gid(f"error-{number}-{block}")
            if len(numbers) <= 16:
                axes.text(numbers.index(block), shown, f"{error:.2f}", ha="center", va="bottom", size=8)
        axes.axhline(1, color=colour("ink"), linewidth=1, linestyle=DASHES)
        axes.set_title(f"\u2009{name}")
        axes.set_ylabel("relative error")
        axes.margins(y=0.15)
    last = grid[-1][0]
    last.set_xticks(range(len(numbers)), [str(block) for block in numbers])
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
