"""What was recorded of one model's blocks, plan and size -> figures. Nothing is computed again."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from flexigpt.model import REPLICA_PARTS
from flexigpt.record import Recorded, find_in
from flexigpt.report.drawing import (
    DASHES,
    WIDTH,
    Drawn,
    colour,
    key,
    line_key,
    new_figure,
    plain_axes,
    plan_figure,
    ramp,
    series,
    style,
    swatch,
)

_MOST_TICKS, _MOST_KEYS = 40, 10


def figures_of(recorded: Recorded, prefix: str = "") -> dict[str, Drawn]:
    """What can be drawn of one model, by name.

    Args:
        recorded: what its folder holds.
        prefix: of the figures' names, so that those of several models differ.
    """
    makers: dict[str, Callable[[Recorded], Drawn | None]] = {
        "influence": influence_figure,
        "costs": costs_figure,
        "plan": _plan,
        "distances": distances_figure,
        "adapters": adapters_figure,
        "storage": storage_figure,
    }
    with style():
        drawn = {name: make(recorded) for name, make in makers.items()}
    return {name: replace(one, name=f"{prefix}{name}") for name, one in drawn.items() if one is not None}


def number_ranges(blocks: Iterable[int]) -> str:
    """2-4, 7 of 2, 3, 4, 7."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}\u2013{b}" for a, b in runs)


def _plan(recorded: Recorded) -> Drawn | None:
    if recorded.plan is None:
        return None
    origins, units = (find_in(recorded.record, key) for key in ("source_blocks", "mlp_units"))
    return plan_figure(recorded.plan, source_blocks=origins, units=units)


def influence_figure(recorded: Recorded) -> Drawn | None:
    """The score of each block as a bar; a bar that would dwarf the others is cut off, its value written in it."""
    scores, name = find_in(recorded.record, "scores"), find_in(recorded.record, "block_score")
    if not scores:
        return None
    pruned = {block for block in recorded.pruned if block < len(scores)}
    kept_scores = [score for block, score in enumerate(scores) if block not in pruned]
    lowest = pruned and kept_scores and max(scores[block] for block in pruned) <= min(kept_scores)
    what = "removed" if recorded.removed else "pruned"
    title = f"The {len(pruned)} blocks of least {name} are {what}" if lowest else f"{name.capitalize()} of each block"
    figure = new_figure(WIDTH, 2.7, title)
    axes = figure.add_subplot()
    middle = sorted(scores)[len(scores) // 2]
    top = min(max(scores), 3 * middle) * 1.08 if middle > 0 else None
    for block, score in enumerate(scores):
        shade = colour("orange") if block in pruned else colour("kept")
        (bar,) = axes.bar(block, score, width=0.78, color=shade)
        bar.set_gid(f"score-{block}-{'pruned' if block in pruned else 'kept'}")
    cut = [f"{block} ({score:.3g})" for block, score in enumerate(scores) if top is not None and score > top]
    if cut:
        axes.set_title(f"cut off at the top: {', '.join(cut)}", size=8, color=colour("muted"), loc="right")
    axes.set(xlabel="block", ylabel=name, ylim=(0, top), xlim=(-0.7, len(scores) - 0.3))
    _block_ticks(axes, len(scores))
    key(figure, [(what, swatch(colour("orange"))), ("kept", swatch(colour("kept")))], 2)
    alt = f"Bars: {name} of {len(scores)} blocks. Pruned: {number_ranges(pruned) or 'none'}."
    return Drawn(name="influence", alt=alt, figure=figure)


def costs_figure(recorded: Recorded) -> Drawn | None:
    """What leaving out each attention and each MLP would cost, as bars; where costs differ much by their logarithm."""
    costs = find_in(recorded.record, "sublayer_costs")
    if not costs or recorded.plan is None or not recorded.plan.sublayers:
        return None
    changed = {(one.sublayer, one.block) for one in recorded.plan.sublayers}
    figure = new_figure(WIDTH, 4.2, "What it would cost to leave out the attention or the MLP of each block")
    panels: Any = figure.subplots(2, 1, sharex=True, sharey=True)
    positive = [cost for values in costs.values() for cost in values if cost > 0]
    for (sublayer, name), axes in zip((("attention", "attention"), ("mlp", "MLP")), panels, strict=True):
        for block, cost in enumerate(costs[sublayer]):
            is_changed = (sublayer, block) in changed
            (bar,) = axes.bar(block, cost, width=0.78, color=colour("orange" if is_changed else "kept"))
            bar.set_gid(f"cost-{sublayer}-{block}-{'pruned' if is_changed else 'kept'}")
        axes.set_title(name)
        axes.set_ylabel("cost (nats a token)")
    if positive and max(positive) > 30 * min(positive):
        panels[0].set_yscale("log", nonpositive="clip")
        panels[0].set_ylim(min(positive) / 2)
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[1].set(xlabel="block", xlim=(-0.7, len(costs["mlp"]) - 0.3))
    _block_ticks(panels[1], len(costs["mlp"]))
    key(figure, [("narrowed or gone", swatch(colour("orange"))), ("kept whole", swatch(colour("kept")))], 2)
    first = {name: sorted(range(len(costs[name])), key=costs[name].__getitem__)[:3] for name in ("attention", "mlp")}
    told = "; ".join(
        f"{shown} cheapest in {number_ranges(first[name])}"
        for name, shown in (("attention", "attention"), ("mlp", "MLP"))
    )
    alt = f"Bars: cost of leaving out attention and MLP, of {len(costs['mlp'])} blocks. {told}."
    return Drawn(name="costs", alt=alt, figure=figure)


def distances_figure(recorded: Recorded) -> Drawn | None:
    """Distance of every pruned block to every candidate, by the candidate and by how far apart the two stand."""
    rows, bases = recorded.distances, recorded.bases
    if not rows:
        return None
    figure = new_figure(WIDTH, 2.85, _distances_title(rows, bases))
    by_index, by_gap = figure.subplots(1, 2, sharey="row")
    shades = _shades(sorted(rows))
    for i, row in rows.items():
        _draw_row(by_index, sorted(row.items()), bases.get(i), shades[i])
        for side, dashes in ((-1, "-"), (1, DASHES)):
            gaps = {abs(i - j): distance for j, distance in row.items() if (j - i) * side > 0}
            base = bases.get(i, i)
            marked = abs(i - base) if (base - i) * side > 0 else None
            _draw_row(by_gap, sorted(gaps.items()), marked, shades[i], dashes)
    name = find_in(recorded.record, "base_distance")
    by_index.set(xlabel="candidate", ylabel="distance")
    by_index.set_title(f"{name} distance, chose the bases", weight="bold")
    by_gap.set_xlabel("steps apart, |i \u2212 j|")
    for axes in (by_index, by_gap):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    sides = [("candidate before it", line_key(colour("muted"))), ("after it", line_key(colour("muted"), DASHES))]
    key(figure, [*_block_keys(shades), ("its base", _dot(colour("ink"))), *sides], 7)
    alt = f"Lines: distance of each pruned block ({number_ranges(rows)}) to each kept block, by {name}."
    return Drawn(name="distances", alt=alt, figure=figure)


def _distances_title(rows: dict[int, dict[int, float]], bases: dict[int, int]) -> str:
    found = {i: bases[i] for i in rows if i in bases}
    if not found:
        return "Distances to the candidates"
    if len(found) > 1 and len(set(found.values())) == 1:
        return f"Block {next(iter(found.values()))} is the base of all {len(found)} pruned blocks"
    nearest = sum(abs(i - j) == min(abs(i - other) for other in rows[i]) for i, j in found.items())
    return f"A nearest kept block is the base of {nearest} of {len(found)} pruned blocks"


def _draw_row(axes: Axes, row: list[tuple[int, float]], marked: int | None, shade: str, dashes: Any = "-") -> None:
    """Distances of one pruned block, its base marked."""
    axes.plot([x for x, _ in row], [distance for _, distance in row], color=shade, linewidth=1.3, linestyle=dashes)
    for x, distance in row:
        if x == marked:
            axes.plot([x], [distance], "o", color=shade, markersize=5.5, markeredgecolor=colour("ink"))


def adapters_figure(recorded: Recorded) -> Drawn | None:
    """What share of |W_i - W_j|_F^2 an adapter's first directions mend; a panel for each linear."""
    spectra = find_in(recorded.record, "adapter_spectra")
    if not spectra or find_in(recorded.record, "fitted"):  # older records have them of adapters that ignore the weights
        return None
    linears = list(dict.fromkeys(linear for block in spectra.values() for linear in block))
    columns = min(4, len(linears))
    lines = -(-len(linears) // columns)
    finals = [spectrum["mended"][-1] for block in spectra.values() for spectrum in block.values()]
    ranks = {spectrum["ranks"][-1] for block in spectra.values() for spectrum in block.values()}
    kind = f"Rank-{max(ranks)} adapters" if len(ranks) == 1 else f"Adapters of rank {min(ranks)} to {max(ranks)}"
    title = f"{kind} mend {_percents(finals)} of the squared difference to the base"
    figure = new_figure(WIDTH, 0.95 + 1.75 * lines, title)
    grid: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    shades = _shades(sorted(spectra))
    for axes in grid.flat[len(linears) :]:
        plain_axes(axes)
    for linear, axes in zip(linears, grid.flat, strict=False):
        found = {block: own[linear] for block, own in spectra.items() if linear in own}
        for block, spectrum in found.items():
            (line,) = axes.plot(spectrum["ranks"], spectrum["mended"], color=shades[block], linewidth=1.3, marker=".")
            line.set_gid(f"mended-{block}-{linear}")
        last = [spectrum["mended"][-1] for spectrum in found.values()]
        axes.axhspan(max(last), 1, color=colour("rest"), linewidth=0)
        axes.text(0.04, 0.95, f"mended {_percents(last)}\nlost: the rest", transform=axes.transAxes, va="top", size=8)
        axes.set_title(linear)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in grid[-1][: len(linears) - columns * (lines - 1)]:
        axes.set_xlabel("first r directions")
    key(figure, _block_keys(shades), 11)
    alt = f"Lines: share of the squared difference to the base that r directions mend, for {', '.join(linears)}."
    return Drawn(name="adapters", alt=alt, figure=figure)


def storage_figure(recorded: Recorded) -> Drawn | None:
    """Stored bytes by part, a bar for each state of the model."""
    sizes = [size for size in recorded.sizes if size.parts]
    if not sizes:
        return None
    parts = list(dict.fromkeys(part for size in sizes for part in size.parts))
    first, last = sizes[0], sizes[-1]
    scale, unit = (1e9, "GB") if max(size.bytes for size in sizes) >= 1e9 else (1e6, "MB")
    title = f"Stored: {first.bytes / scale:.2f} {unit} became {last.bytes / scale:.2f} {unit}"
    figure = new_figure(WIDTH, 1.35 + 0.42 * len(sizes) + 0.22 * (-(-len(parts) // 3)), title)
    axes = figure.add_subplot()
    for row, size in enumerate(sizes):
        left = 0.0
        for number, part in enumerate(parts):
            width = size.bytes_of(part) / scale
            (bar,) = axes.barh(row, width, left=left, height=0.62, color=_part_shade(part, number))
            bar.set_gid(f"stored-{row}-{part.replace(' ', '-').replace(',', '')}")
            left += width
        share = "" if row == 0 else f" ({size.bytes / first.bytes:.1%})"
        axes.annotate(f"{size.bytes / scale:.2f}{share}", (left, row), (4, 0), textcoords="offset points", va="center")
    removal = find_in(recorded.record, "plain_removal")
    if removal:
        x = removal["parameters"] * first.itemsize / scale
        axes.axvline(x, color=colour("ink"), linewidth=1, linestyle=DASHES)
    axes.set(ylim=(len(sizes) - 0.5, -0.5), xlabel=unit)
    axes.set_yticks(range(len(sizes)), [f"\u2009{size.label}" for size in sizes], size=9)
    axes.set_xlim(0, 1.17 * max(size.bytes for size in sizes) / scale)
    axes.grid(False)
    entries = [(part, swatch(_part_shade(part, number))) for number, part in enumerate(parts)]
    if removal:
        dashed = line_key(colour("ink"), DASHES)
        entries.append(("plain removal would store", dashed))
    key(figure, entries, 3)
    told = ", ".join(f"{size.label} {size.bytes / scale:.2f} {unit}" for size in sizes)
    return Drawn(name="storage", alt=f"Stacked bars: stored bytes by part. {told}.", figure=figure)


def _part_shade(part: str, number: int) -> str:
    """What dominates is quiet, what is new stands out."""
    replicas = dict.fromkeys(REPLICA_PARTS.values())
    known = dict(zip(replicas, ("orange", "red", "purple"), strict=True)) | {
        "embeddings": "sky",
        "output head": "slate",
        "kept blocks, linears": "kept",
        "kept blocks, norms and biases": "muted",
        "replicas, norms and biases": "amber",
        "outside the blocks, other": "green",
    }
    return colour(known[part]) if part in known else series(number)


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    step = 1 if num_blocks <= _MOST_TICKS else 5
    axes.set_xticks(range(0, num_blocks, step))


def _shades(blocks: Sequence[int]) -> dict[int, str]:
    """From dark to bright by their order."""
    return {block: ramp(number / max(1, len(blocks) - 1)) for number, block in enumerate(blocks)}


def _block_keys(shades: dict[int, str]) -> list[tuple[str, Line2D]]:
    """All blocks of a ramp, or some of them spread evenly."""
    blocks = list(shades)
    if len(blocks) > _MOST_KEYS:
        blocks = [blocks[round(n * (len(blocks) - 1) / (_MOST_KEYS - 2))] for n in range(_MOST_KEYS - 1)]
    return [(f"block {block}" if n == 0 else str(block), line_key(shades[block])) for n, block in enumerate(blocks)]


def _dot(shade: str) -> Line2D:
    return Line2D([], [], color=colour("paper"), marker="o", markersize=5.5, markeredgecolor=shade, linestyle="none")


def _percents(shares: Sequence[float]) -> str:
    low, high = (f"{share:.0%}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low[:-1]}\u2013{high}"
