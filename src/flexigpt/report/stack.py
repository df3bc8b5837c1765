"""The stack of blocks: what became of each, and beside it what was measured of it."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from PIL import Image
from transformers import PreTrainedConfig

from flexigpt.model import FlexiGPTConfig, Plan, plan_in_words, plan_of, plan_summary, source_units
from flexigpt.record import PLAN_PICTURE, Recorded, find_in
from flexigpt.report.drawing import (
    DASHES,
    WIDTH,
    Drawn,
    colour,
    key,
    number_ranges,
    plain_axes,
    style,
    swatch,
    to_png,
    wrapped,
)

_STACK = 2.4  # width of a block; blocks are 1 apart

# Inches above and below the stack besides the title's lines, and beside what stands there.
_ABOVE, _BELOW, _MARGIN = 0.5, 0.5, 0.08

_LANES = 8 * 0.28  # width of the lanes for the arrows beside it

_ATTENTION, _BETWEEN = 0.75, 0.08  # of a block that is drawn as attention and MLP: the width of one, and a gap

_CARD_COLOURS = 48


def plan_figure(
    plan: Plan, source_blocks: Sequence[int] | None = None, units: int | None = None, beside: str = ""
) -> Drawn:
    """The plan of a compact model, first block at the top.

    Args:
        plan: to draw.
        source_blocks: of an extended model, the source's block behind each block.
        units: hidden units of the source's MLPs; None: as many as the widest that is named.
        beside: title of the figure that stands beside it, with rows at the same places.
    """
    borrowers: dict[int, list[int]] = {}
    for replica in plan.replicas:
        borrowers.setdefault(replica.base, []).append(replica.block)
    lanes = _lanes(borrowers)
    with style():
        figure, axes_at = _stacked(plan_title(plan, units), beside, plan.num_blocks)
        axes = axes_at(_MARGIN, WIDTH - 2 * _MARGIN)
        plain_axes(axes)
        size = min(8.5, 72 * _block_inches(plan.num_blocks) * 0.58)
        bases = {replica.block: replica.base for replica in plan.replicas}
        for block in range(plan.num_blocks):
            base = bases.get(block)
            if plan.sublayers and base is None:
                _draw_sublayers(axes, plan, block, block in borrowers, units, size)
                continue
            origin = "" if source_blocks is None else f" (the source's {source_blocks[block]})"
            _draw_block(axes, block, base, block in borrowers, origin, size)
        step = _LANES / max(8, 1 + max(lanes.values(), default=0))
        for base, blocks in borrowers.items():
            _draw_lane(axes, base, blocks, lanes[base] * step)
        axes.set_xlim(-0.15, _STACK + (1.0 + _LANES if borrowers or not plan.sublayers else 0.15))
        outline = Line2D([], [], color=colour("orange"), marker="s", markersize=7, linestyle="none", fillstyle="none")
        replicas = ("replica, an arrow to its base", outline)
        if plan.sublayers:
            heads = {0.0: "attention", _ATTENTION + _BETWEEN: "MLP"}
            for x, head in heads.items():
                axes.text(x, -0.7, head, ha="left", va="bottom", size=8, color=colour("muted"))
            shares = [("left", swatch(colour("kept"))), ("gone", swatch(colour("rest")))]
            key(figure, [*shares, *([replicas] if borrowers else [])], 3)
        else:
            key(figure, [("kept", swatch(colour("kept"))), replicas], 2)
    return Drawn(name="plan", alt=plan_in_words(plan, units), figure=figure)


def plan_title(plan: Plan, units: int | None) -> str:
    """What stands above its figure."""
    return "\n".join(plan_summary(plan, units).split("; "))


def _stacked(title: str, beside: str, num_blocks: int) -> tuple[Figure, Callable[[float, float], Axes]]:
    """A figure with its rows where the one beside it has them, and what adds axes from so many inches on, so wide."""
    rows = num_blocks * _block_inches(num_blocks)
    height = 0.17 * max(len(wrapped(title)), len(wrapped(beside))) + _ABOVE + rows + _BELOW
    figure = Figure(figsize=(WIDTH, height), facecolor="none")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "\n".join(wrapped(title)), x=0.012, y=1 - 0.06 / height, ha="left", va="top", size=10, weight="bold"
    )

    def axes_at(left: float, width: float) -> Axes:
        axes = figure.add_axes((left / WIDTH, _BELOW / height, width / WIDTH, rows / height))
        axes.set_ylim(num_blocks - 0.5, -0.5)
        return axes

    return figure, axes_at


def plan_picture(config: PreTrainedConfig) -> dict[str, bytes]:
    """The picture of a compact model's plan, by the name that the model card shows it by; of other models none."""
    if not isinstance(config, FlexiGPTConfig):
        return {}
    return {PLAN_PICTURE: plan_png(plan_of(config), source_units(config))}


def plan_png(plan: Plan, units: int | None = None) -> bytes:
    """A small picture of the plan, for a model card: some 20 kB for 16 blocks, below 60 kB for 80."""
    drawn = Image.open(io.BytesIO(to_png(plan_figure(plan, units=units), dpi=110))).convert("RGB")
    small = io.BytesIO()
    drawn.quantize(_CARD_COLOURS, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def _block_inches(num_blocks: int) -> float:
    return 0.23 if num_blocks <= 20 else 0.18 if num_blocks <= 48 else 0.15


def _lanes(borrowers: dict[int, list[int]]) -> dict[int, int]:
    """A lane beside the stack for each base, the shortest nearest to it, so that no two lines lie on one another."""
    spans = {base: (min(base, *blocks), max(base, *blocks)) for base, blocks in borrowers.items()}
    lanes: dict[int, int] = {}
    for base in sorted(spans, key=lambda base: (spans[base][1] - spans[base][0], base)):
        low, high = spans[base]
        taken = {lane for other, lane in lanes.items() if spans[other][0] <= high and low <= spans[other][1]}
        lanes[base] = next(lane for lane in range(len(spans)) if lane not in taken)
    return lanes


def _draw_block(axes: Axes, block: int, base: int | None, is_base: bool, origin: str, size: float) -> None:
    """A kept block is filled, a replica a dashed outline."""
    inset = 0.0 if base is None else 0.35
    box = FancyBboxPatch(
        (inset, block - 0.38),
        _STACK - inset,
        0.76,
        boxstyle="round,pad=0,rounding_size=0.14",
        facecolor=colour("kept") if base is None else colour("paper"),
        edgecolor=colour("kept" if base is None and not is_base else "orange"),
        linewidth=1.3 if is_base or base is not None else 0.8,
        linestyle="-" if base is None else DASHES,
    )
    box.set_gid(f"block-{block}-{'kept' if base is None else 'replica'}")
    axes.add_patch(box)
    label = f"{block}{origin}" if base is None else f"{block}: uses {base}"
    axes.text((inset + _STACK) / 2, block, label, ha="center", va="center_baseline", size=size, color=colour("ink"))


def _draw_sublayers(axes: Axes, plan: Plan, block: int, is_base: bool, units: int | None, size: float) -> None:
    """Attention and MLP of a block beside each other, filled as far as they are left."""
    rows = {one.sublayer: one for one in plan.sublayers if one.block == block}
    most = units or max((one.units for one in plan.sublayers if one.units), default=1)
    start = _ATTENTION + _BETWEEN
    for sublayer, x, width in (("attention", 0.0, _ATTENTION), ("mlp", start, _STACK - start)):
        row = rows.get(sublayer)  # type: ignore[call-overload]
        left = 1.0 if row is None else (row.units or 0) / most
        for part, share, fill in (("whole", 1.0, "rest"), ("left", left, "kept")):
            edge: dict[str, Any] = (
                {"edgecolor": colour("kept")} if left else {"edgecolor": colour("muted"), "ls": DASHES}
            )
            bar = Rectangle(
                (x, block - 0.38), width * share, 0.76, facecolor=colour(fill), lw=0.8 * bool(share), **edge
            )
            bar.set_gid(f"{sublayer}-{block}-{part}")
            axes.add_patch(bar)
        if is_base:
            edge = {"fill": False, "edgecolor": colour("orange"), "linewidth": 1.3}
            axes.add_patch(Rectangle((x, block - 0.38), width, 0.76, **edge))
        units_left = units if row is None else row.units or 0
        label = str(block) if sublayer == "attention" else "" if units_left is None else f"{units_left:,}"
        axes.text(x + 0.06, block, label, ha="left", va="center_baseline", size=size, color=colour("ink"))


def _draw_lane(axes: Axes, base: int, blocks: list[int], lane: float) -> None:
    """From each replica along the base's lane to the base, with the arrow's head there."""
    x, bend = _STACK + 0.75 + lane, 0.3
    for block in blocks:
        down = bend if block < base else -bend
        vertices = [
            (_STACK + 0.03, block),
            (x - bend, block),
            (x, block),
            (x, block + down),
            (x, base - down),
            (x, base),
            (x - bend, base),
            (_STACK + 0.03, base),
        ]
        codes = [Path.MOVETO, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO]
        arrow = FancyArrowPatch(
            path=Path(vertices, codes),
            arrowstyle="-|>,head_length=4,head_width=2",
            color=colour("orange"),
            linewidth=1.3,
            mutation_scale=1,
            shrinkA=0,
            shrinkB=0,
        )
        arrow.set_gid(f"arrow-{block}-{base}")
        axes.add_patch(arrow)


@dataclass(frozen=True, kw_only=True)
class _Column:
    """What was measured of each block, for bars: a name for ids, a heading, a value a block, and which were changed.

    `whole` is what the source's block has, `top` a value at which longer bars end, `is_log` whether lengths are logs.
    """

    name: str
    heading: str
    values: Sequence[float]
    changed: set[int]
    whole: Sequence[float] = ()
    top: float = math.inf
    is_log: bool = False


def blocks_figure(recorded: Recorded) -> Drawn | None:
    """Bars beside the stack: score, or what leaving out would cost; rank; stored bytes. Rows are the stack's."""
    columns = _columns(recorded)
    if not columns:
        return None
    count = len(columns[0].values)
    beside = "" if recorded.plan is None else plan_title(recorded.plan, find_in(recorded.record, "mlp_units"))
    figure, axes_at = _stacked(blocks_title(recorded), beside, count)
    left, size = 0.34, min(8, 72 * _block_inches(count) * 0.62)
    for number, column in enumerate(columns):
        width = (WIDTH - left - _MARGIN) / len(columns)
        axes = axes_at(left + number * width, width - 0.06)
        _draw_column(axes, column, size)
        for block in range(count if number == 0 else 0):
            place: dict[str, Any] = {"ha": "right", "va": "center_baseline", "size": size, "color": colour("muted")}
            axes.annotate(str(block), (0, block), (-5, 0), textcoords="offset points", **place)
    narrow = recorded.plan is not None and recorded.plan.sublayers
    what = "removed" if recorded.removed else "narrowed or gone" if narrow else "pruned"
    entries = [(what, swatch(colour("orange"))), ("kept", swatch(colour("kept")))]
    entries += [("the source's", swatch(colour("rest")))] if any(column.whole for column in columns) else []
    key(figure, entries if recorded.pruned or narrow else entries[1:], 3)
    changed = number_ranges(set().union(*(column.changed for column in columns)))
    headings = ", ".join(column.heading.replace("\n", " ") for column in columns)
    alt = f"Bars beside each of {count} blocks: {headings}. {what.capitalize()}: {changed or 'none'}."
    return Drawn(name="blocks", alt=alt, figure=figure)


def blocks_title(recorded: Recorded) -> str:
    """What stands above the bars."""
    scores, name = find_in(recorded.record, "scores"), find_in(recorded.record, "block_score")
    if recorded.plan is not None and recorded.plan.sublayers and find_in(recorded.record, "sublayer_costs"):
        return "What leaving out the attention or the MLP would cost"
    if not scores:
        return "What each block stores"
    pruned = {block for block in recorded.pruned if block < len(scores)}
    kept_scores = [score for block, score in enumerate(scores) if block not in pruned]
    lowest = pruned and kept_scores and max(scores[block] for block in pruned) <= min(kept_scores)
    what = "removed" if recorded.removed else "pruned"
    return f"The {len(pruned)} blocks of least {name} are {what}" if lowest else f"{name.capitalize()} of each block"


def _columns(recorded: Recorded) -> list[_Column]:
    plan, record = recorded.plan, recorded.record
    scores, costs = find_in(record, "scores") or [], find_in(record, "sublayer_costs") or {}
    count = plan.num_blocks if plan else recorded.removed["num_blocks"] if recorded.removed else len(scores)
    pruned, columns = set(recorded.pruned), []
    if scores and len(scores) == count:
        middle = sorted(scores)[count // 2]
        top = 3 * middle if middle > 0 else math.inf
        columns.append(
            _Column(name="score", heading=find_in(record, "block_score"), values=scores, changed=pruned, top=top)
        )
    sublayers = plan.sublayers if plan else ()
    for name, shown in (("attention", "attention"), ("mlp", "MLP")) if costs and sublayers else ():
        changed = {one.block for one in sublayers if one.sublayer == name}
        positive = [cost for values in costs.values() for cost in values if cost > 0]
        is_log = bool(positive) and max(positive) > 30 * min(positive)
        heading = f"cost of its\n{shown}{', log' if is_log else ''}"
        columns.append(
            _Column(name=f"cost-{name}", heading=heading, values=costs[name], changed=changed, is_log=is_log)
        )
    if plan and plan.replicas:
        ranks = dict.fromkeys(range(count), 0.0)
        ranks |= {one.block: max([one.rank, *(one.ranks or {}).values()]) for one in plan.replicas}
        columns.append(_Column(name="rank", heading="adapter\nrank", values=list(ranks.values()), changed=pruned))
    return columns + _stored_column(recorded, count, pruned | {one.block for one in sublayers})


def _stored_column(recorded: Recorded, count: int, changed: set[int]) -> list[_Column]:
    sizes = recorded.sizes
    if not sizes or not sizes[-1].blocks:
        return []
    stored = [number * sizes[-1].itemsize / 1e6 for number in sizes[-1].blocks]
    if recorded.removed:  # what is left stands in the source's places
        rest = iter(stored)
        stored = [0.0 if block in changed else next(rest, 0.0) for block in range(count)]
    whole = [number * sizes[0].itemsize / 1e6 for number in sizes[0].blocks]
    if len(stored) != count:
        return []
    whole = whole if len(whole) == count and whole != stored else []
    return [_Column(name="stored", heading="stored MB", values=stored, changed=changed, whole=whole)]


def _draw_column(axes: Axes, column: _Column, size: float) -> None:
    """Bars from the left, each with its number behind it."""
    plain_axes(axes)
    longest = min(column.top, max([*column.values, *column.whole], default=0)) or 1.0
    least = min((value for value in column.values if value > 0), default=1.0) / 2

    def length(value: float) -> float:
        if not column.is_log:
            return min(max(value, 0), longest) / longest
        return math.log(value / least) / math.log(longest / least) if value > least else 0.0

    for block, whole in enumerate(column.whole):
        axes.barh(block, length(whole), height=0.76, color=colour("rest"))
    for block, value in enumerate(column.values):
        is_changed = block in column.changed
        (bar,) = axes.barh(block, length(value), height=0.76, color=colour("orange" if is_changed else "kept"))
        bar.set_gid(f"{column.name}-{block}-{'pruned' if is_changed else 'kept'}")
        end = max(length(value), length(column.whole[block]) if column.whole else 0)
        text = "" if value == 0 else f"{value:.3g}{' (cut off)' if value > column.top else ''}"
        place: dict[str, Any] = {"va": "center_baseline", "size": size, "color": colour("ink")}
        axes.annotate(text, (end, block), (3, 0), textcoords="offset points", **place)
    axes.set_xlim(0, 1.75)
    heading: dict[str, Any] = {"ha": "left", "va": "bottom", "size": 8, "color": colour("muted")}
    axes.annotate(column.heading, (0, -0.5), (0, 3), textcoords="offset points", linespacing=1.1, **heading)
