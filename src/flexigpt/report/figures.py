"""What was recorded of one model's replicas and size -> figures. Nothing is computed again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.lines import Line2D

from flexigpt.model import REPLICA_PARTS
from flexigpt.record import Recorded, Size, find_in
from flexigpt.report.drawing import (
    DASHES,
    Cell,
    Drawn,
    colour,
    heat,
    heat_map,
    key,
    line_key,
    new_figure,
    number_ranges,
    series,
    style,
    swatch,
)
from flexigpt.report.stack import blocks_figure, blocks_title, plan_figure

_ROW, _LEAST_ROWS = 0.21, 4  # inches of a heat map's row, and as many rows as its label needs

# Share of a model below which a part is not told from others, and what these are called.
_SMALL, _REST = 0.005, "the rest"


def figures_of(recorded: Recorded, prefix: str = "") -> dict[str, Drawn]:
    """What can be drawn of one model, by name.

    Args:
        recorded: what its folder holds.
        prefix: of the figures' names, so that those of several models differ.
    """
    makers: dict[str, Callable[[Recorded], Drawn | None]] = {
        "plan": _plan,
        "blocks": blocks_figure,
        "distances": distances_figure,
        "adapters": adapters_figure,
        "adapter-ranks": adapter_ranks_figure,
        "storage": storage_figure,
    }
    with style():
        drawn = {name: make(recorded) for name, make in makers.items()}
    return {name: replace(one, name=f"{prefix}{name}") for name, one in drawn.items() if one is not None}


def _plan(recorded: Recorded) -> Drawn | None:
    if recorded.plan is None:
        return None
    origins, units = (find_in(recorded.record, key) for key in ("source_blocks", "mlp_units"))
    return plan_figure(recorded.plan, source_blocks=origins, units=units, beside=blocks_title(recorded))


def distances_figure(recorded: Recorded) -> Drawn | None:
    """How much further than its nearest candidate each kept block is from each pruned one."""
    rows, bases = recorded.distances, recorded.bases
    if not rows:
        return None
    candidates = sorted({j for row in rows.values() for j in row})
    more = {(i, j): distance / (min(row.values()) or 1.0) - 1 for i, row in rows.items() for j, distance in row.items()}
    furthest = max(more.values(), default=0) or 1.0
    figure = new_figure(0.95 + _ROW * max(_LEAST_ROWS, len(rows)), _distances_title(rows, bases))
    axes = figure.add_subplot()
    cells = {
        (number, candidates.index(j)): Cell(
            share=1 - more[i, j] / furthest, text=f"+{more[i, j]:.0%}", marked=bases.get(i) == j
        )
        for number, i in enumerate(rows)
        for j in rows[i]
    }
    heat_map(axes, [str(i) for i in rows], [str(j) for j in candidates], cells)
    axes.set(xlabel="kept block", ylabel="pruned block")
    ends = [("nearest", swatch(heat(1))), (f"{furthest / 2:.0%} further", swatch(heat(0.5)))]
    key(figure, [("its base", _dot()), *ends, (f"{furthest:.0%}", swatch(heat(0)))], 4)
    told = "; ".join(f"{i} is nearest to {min(row, key=row.__getitem__)}" for i, row in rows.items())
    name = find_in(recorded.record, "base_distance")
    alt = f"Heat map: {name} distance of each pruned block ({number_ranges(rows)}) to each kept block. {told}."
    return Drawn(name="distances", alt=alt, figure=figure)


def _distances_title(rows: dict[int, dict[int, float]], bases: dict[int, int]) -> str:
    found = {i: bases[i] for i in rows if i in bases}
    if not found:
        return "Distances to the candidates"
    if len(found) > 1 and len(set(found.values())) == 1:
        return f"Block {next(iter(found.values()))} is the base of all {len(found)} pruned blocks"
    beside = sum(abs(i - j) == min(abs(i - other) for other in rows[i]) for i, j in found.items())
    return f"{beside} of {len(found)} pruned blocks borrow from the kept block next to them"


def adapters_figure(recorded: Recorded) -> Drawn | None:
    """What share of |W_i - W_j|_F^2 each adapter mends."""
    spectra = _spectra(recorded)
    if not spectra:
        return None
    linears = list(dict.fromkeys(linear for block in spectra.values() for linear in block))
    finals = [one["mended"][-1] for block in spectra.values() for one in block.values()]
    ranks = {one["ranks"][-1] for block in spectra.values() for one in block.values()}
    kind = f"Rank-{max(ranks)} adapters" if len(ranks) == 1 else f"Adapters of rank {min(ranks)} to {max(ranks)}"
    title = f"{kind} mend {_percents(finals)} of the squared difference to the base"
    cells = {
        (number, linears.index(linear)): _share(one["mended"][-1])
        for number, own in enumerate(spectra.values())
        for linear, one in own.items()
    }
    alt = f"Heat map: {title}, for each replica ({number_ranges(spectra)}) and each of {', '.join(linears)}."
    return _shares_map("adapters", title, alt, [str(block) for block in spectra], _short(linears), cells, "replica")


def adapter_ranks_figure(recorded: Recorded) -> Drawn | None:
    """What share the first directions of the adapters mend, over the replicas."""
    spectra = _spectra(recorded)
    found: dict[str, dict[int, list[float]]] = {}
    for block in spectra.values():
        for linear, one in block.items():
            for rank, share in zip(one["ranks"], one["mended"], strict=True):
                found.setdefault(linear, {}).setdefault(int(rank), []).append(share)
    ranks = sorted({rank for own in found.values() for rank in own})
    if len(ranks) < 2:
        return None
    cells = {
        (number, ranks.index(rank)): _share(sum(shares) / len(shares))
        for number, own in enumerate(found.values())
        for rank, shares in own.items()
    }
    title = "What a smaller rank would mend, on average over the replicas"
    alt = f"Heat map: {title}: ranks {', '.join(map(str, ranks))}, for each of {', '.join(found)}."
    rows = _short(list(found))
    return _shares_map("adapter-ranks", title, alt, rows, [str(rank) for rank in ranks], cells, "", "rank")


def _shares_map(
    name: str,
    title: str,
    alt: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: dict[tuple[int, int], Cell],
    ylabel: str,
    xlabel: str = "",
) -> Drawn:
    figure = new_figure(0.75 + _ROW * max(_LEAST_ROWS, len(rows)) + 0.06 * max(map(len, columns)), title)
    axes = figure.add_subplot()
    heat_map(axes, rows, columns, cells)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if max(map(len, columns)) > 3:
        axes.tick_params(axis="x", rotation=40)
    ends = [("all of it", swatch(heat(1))), ("half", swatch(heat(0.5))), ("nothing", swatch(heat(0)))]
    key(figure, ends, 3)
    return Drawn(name=name, alt=alt, figure=figure)


def _spectra(recorded: Recorded) -> dict[int, dict[str, dict[str, list[float]]]]:
    """Older records have them of adapters that ignore the weights too: these are left out."""
    spectra: dict[int, dict[str, dict[str, list[float]]]] = find_in(recorded.record, "adapter_spectra") or {}
    return {} if find_in(recorded.record, "fitted") else spectra


def _share(share: float) -> Cell:
    return Cell(share=share, text=f"{100 * share:.0f}")


def _short(linears: Sequence[str]) -> list[str]:
    """Names of linears without the module that they stand in, where that tells them apart."""
    short = [linear.rpartition(".")[2] for linear in linears]
    return short if len(set(short)) == len(short) else list(linears)


def storage_figure(recorded: Recorded) -> Drawn | None:
    """Stored bytes by part, a bar for each state of the model."""
    sizes = [size for size in recorded.sizes if size.parts]
    if not sizes:
        return None
    stored = [_large_parts(size, sizes) for size in sizes]
    parts = list(dict.fromkeys(part for its in stored for part in its))
    first, last = sizes[0], sizes[-1]
    scale, unit = (1e9, "GB") if max(size.bytes for size in sizes) >= 1e9 else (1e6, "MB")
    title = f"Stored: {first.bytes / scale:.2f} {unit} became {last.bytes / scale:.2f} {unit}"
    figure = new_figure(0.95 + 0.42 * len(sizes) + 0.2 * (-(-(len(parts) + 1) // 2)), title)
    axes = figure.add_subplot()
    for row, (size, its) in enumerate(zip(sizes, stored, strict=True)):
        left = 0.0
        for number, part in enumerate(parts):
            width = its.get(part, 0) * size.itemsize / scale
            (bar,) = axes.barh(row, width, left=left, height=0.62, color=_part_shade(part, number))
            bar.set_gid(f"stored-{row}-{part.replace(' ', '-').replace(',', '')}")
            left += width
        share = "" if row == 0 else f"\n{size.bytes / first.bytes:.1%}"
        place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 8}
        axes.annotate(f"{size.bytes / scale:.2f}{share}", (left, row), (3, 0), **place)
    removal = find_in(recorded.record, "plain_removal")
    if removal:
        x = removal["parameters"] * first.itemsize / scale
        axes.axvline(x, color=colour("ink"), linewidth=1, linestyle=DASHES)
    axes.set(ylim=(len(sizes) - 0.5, -0.5), xlabel=unit)
    axes.set_yticks(range(len(sizes)), [f"\u2009{size.label}" for size in sizes], size=9)
    axes.set_xlim(0, 1.3 * max(size.bytes for size in sizes) / scale)
    axes.grid(False)
    entries = [(part, swatch(_part_shade(part, number))) for number, part in enumerate(parts)]
    if removal:
        dashed = line_key(colour("ink"), DASHES)
        entries.append(("plain removal", dashed))
    key(figure, entries, 2)
    told = ", ".join(f"{size.label} {size.bytes / scale:.2f} {unit}" for size in sizes)
    return Drawn(name="storage", alt=f"Stacked bars: stored bytes by part. {told}.", figure=figure)


def _large_parts(size: Size, sizes: Sequence[Size]) -> dict[str, int]:
    """Parameters by part; parts that are small in all of the sizes together."""
    large = [part for part in size.parts if any(one.parts.get(part, 0) > _SMALL * one.parameters for one in sizes)]
    rest = sum(number for part, number in size.parts.items() if part not in large)
    return {part: size.parts[part] for part in large} | ({_REST: rest} if rest else {})


def _part_shade(part: str, number: int) -> str:
    """What dominates is quiet, what is new stands out."""
    replicas = dict.fromkeys(REPLICA_PARTS.values())
    known = dict(zip(replicas, ("orange", "red", "blue"), strict=True)) | {
        "embeddings": "slate",
        "output head": "green",
        "kept blocks, linears": "kept",
        "kept blocks, norms and biases": "purple",
        "replicas, norms and biases": "amber",
        "outside the blocks, other": "muted",
        _REST: "ink",
    }
    return colour(known[part]) if part in known else series(number)


def _dot() -> Line2D:
    return Line2D([], [], color=colour("ink"), marker="o", markersize=4, linestyle="none")


def _percents(shares: Sequence[float]) -> str:
    low, high = (f"{share:.0%}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low[:-1]}\u2013{high}"
