"""The plan as a picture: the stack of blocks, with an arrow from each replica to the base whose linears it borrows."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from PIL import Image

from flexigpt.figure_style import Drawn, colour, key, new_figure, plain_axes, series, style, swatch, to_png
from flexigpt.plan import Plan
from flexigpt.tables import plan_in_words

_STACK = 2.4  # width of a block; blocks are 1 apart
_LANES = 8 * 0.28  # width of the lanes for the arrows beside it
_CARD_COLOURS = 48


def plan_figure(plan: Plan, name: str = "plan", source_blocks: Sequence[int] | None = None) -> Drawn:
    """The plan of a compact model, first block at the top.

    Args:
        plan: to draw.
        name: of the figure.
        source_blocks: of an extended model, the source's block behind each block.
    """
    borrowers: dict[int, list[int]] = {}
    for replica in plan.replicas:
        borrowers.setdefault(replica.base, []).append(replica.block)
    lanes = _lanes(borrowers)
    shades = {base: series(number) for number, base in enumerate(sorted(borrowers))}
    height = plan.num_blocks * _block_inches(plan.num_blocks)
    title = f"{len(plan.replicas)} of {plan.num_blocks} blocks borrow another's linears"
    with style():
        figure = new_figure(4.2, height + 0.75, title)
        axes = figure.add_subplot()
        plain_axes(axes)
        size = min(8.5, 72 * _block_inches(plan.num_blocks) * 0.58)
        bases = {replica.block: replica.base for replica in plan.replicas}
        for block in range(plan.num_blocks):
            base = bases.get(block)
            origin = "" if source_blocks is None else f" (block {source_blocks[block]} of the source)"
            _draw_block(axes, block, base, shades.get(block if base is None else base), origin, size)
        step = _LANES / max(8, 1 + max(lanes.values(), default=0))
        for base, blocks in borrowers.items():
            _draw_lane(axes, base, blocks, lanes[base] * step, shades[base])
        axes.set_xlim(-0.15, _STACK + 1.0 + _LANES)
        axes.set_ylim(plan.num_blocks - 0.4, -0.6)
        outline = Line2D([], [], color=colour("muted"), marker="s", markersize=7, linestyle="none", fillstyle="none")
        key(figure, [("keeps its own linears", swatch(colour("kept"))), ("replica, its base at the arrow", outline)], 2)
    return Drawn(name=name, alt=plan_in_words(plan), figure=figure)


def plan_png(plan: Plan) -> bytes:
    """A small picture of the plan, for a model card: some 20 kB for 16 blocks, below 60 kB for 80."""
    drawn = Image.open(io.BytesIO(to_png(plan_figure(plan), dpi=110))).convert("RGB")
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


def _draw_block(axes: Axes, block: int, base: int | None, shade: str | None, origin: str, size: float) -> None:
    """A kept block is filled, a replica an outline in its base's colour."""
    inset = 0.0 if base is None else 0.35
    box = FancyBboxPatch(
        (inset, block - 0.38),
        _STACK - inset,
        0.76,
        boxstyle="round,pad=0,rounding_size=0.14",
        facecolor=colour("kept") if base is None else colour("paper"),
        edgecolor=shade or colour("kept"),
        linewidth=1.3 if shade else 0.8,
        linestyle="-" if base is None else (0, (3, 1.5)),
    )
    box.set_gid(f"block-{block}-{'kept' if base is None else 'replica'}")
    axes.add_patch(box)
    label = f"{block}{origin}" if base is None else f"{block}: uses {base}"
    axes.text((inset + _STACK) / 2, block, label, ha="center", va="center_baseline", size=size, color=colour("ink"))


def _draw_lane(axes: Axes, base: int, blocks: list[int], lane: float, shade: str) -> None:
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
            color=shade,
            linewidth=1.3,
            mutation_scale=1,
            shrinkA=0,
            shrinkB=0,
        )
        arrow.set_gid(f"arrow-{block}-{base}")
        axes.add_patch(arrow)
