"""How figures look, in the light and in the dark, and how they become SVG and PNG."""

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import escape
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from PIL import Image
from transformers import PreTrainedConfig

from flexigpt.model import FlexiGPTConfig, Plan, plan_in_words, plan_of, plan_summary, source_units
from flexigpt.record import GENERATOR, PLAN_PICTURE

WIDTH = 7.4  # inches: what a page shows in full

DASHES = (0, (3, 1.5))

_FONT = "DejaVu Sans"  # comes with matplotlib: the same everywhere

# name -> (in the light, in the dark). Figures are drawn in the light colours; in an SVG they become CSS variables.
# Hues of Okabe and Ito (2008), which colour-blind readers tell apart, darker or lighter for contrast with the page.
_RAMP = colormaps["plasma"]

_STEPS = 9

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1c2128", "#e4e8ee"),
    "muted": ("#5a6472", "#a3adba"),
    "grid": ("#dde2e8", "#363e49"),
    "paper": ("#fffffe", "#14181d"),
    "kept": ("#b9c4d0", "#4b5868"),
    "rest": ("#eef1f4", "#222932"),
    "blue": ("#0069a8", "#58b4ec"),
    "orange": ("#c14d00", "#ff9454"),
    "green": ("#007f5c", "#3ecfa3"),
    "purple": ("#9c4785", "#e6a1cd"),
    "amber": ("#946900", "#eec04a"),
    "sky": ("#2d86b8", "#a5d8f7"),
    "red": ("#a3263b", "#ff8f9f"),
    "slate": ("#4d5a94", "#b3bdf5"),
} | {
    f"ramp{n}": (to_hex(_RAMP(0.63 * n / (_STEPS - 1))), to_hex(_RAMP(0.4 + 0.56 * n / (_STEPS - 1))))
    for n in range(_STEPS)
}

SERIES = ("blue", "orange", "green", "purple", "amber", "sky", "red", "slate")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure.

    Attributes:
        name: of its file, and of what its SVG's ids begin with.
        alt: what it shows, for those who do not see it.
        figure: drawn in the light colours.
    """

    name: str
    alt: str
    figure: Figure


def colour(name: str) -> str:
    """The colour as it is drawn."""
    return PALETTE[name][0]


def series(number: int) -> str:
    """The colour of a series; they come round again."""
    return colour(SERIES[number % len(SERIES)])


def ramp(position: float) -> str:
    """A colour for a place in an order, 0 to 1: dark to bright."""
    return colour(f"ramp{round(position * (_STEPS - 1))}")


@contextmanager
def style() -> Iterator[None]:
    """Within it figures are drawn our way, whatever the user's matplotlibrc says; nothing of it stays behind."""
    ink, muted, grid = colour("ink"), colour("muted"), colour("grid")
    with rc_context(), warnings.catch_warnings():
        # Names of models may be in a script that the font lacks; a browser has it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        rcdefaults()
        rcParams.update(
            {
                "font.family": [_FONT],
                "font.size": 9,
                "text.color": ink,
                "text.parse_math": False,  # a $ in a name is a $
                "axes.edgecolor": muted,
                "axes.labelcolor": muted,
                "axes.labelsize": 9,
                "axes.titlesize": 9,
                "axes.titlelocation": "left",
                "axes.facecolor": "none",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "axes.axisbelow": True,
                "grid.color": grid,
                "grid.linewidth": 0.8,
                "xtick.color": muted,
                "ytick.color": muted,
                "xtick.labelsize": 8,
                "ytick.labelsize": 8,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
                "legend.handlelength": 1.2,
                "svg.fonttype": "none",
                "svg.hashsalt": GENERATOR,
            }
        )
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches under a title that says what is seen."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, x=0.012, ha="left", size=10.5, weight="bold")
    return figure


def key(figure: Figure, entries: list[tuple[str, Line2D]], columns: int) -> None:
    """A legend below the axes; a name with an underscore in front, which matplotlib would drop, stands too."""
    figure.legend(
        [handle for _, handle in entries],
        [f"\u2009{label}" for label, _ in entries],
        loc="outside lower left",
        ncols=columns,
        columnspacing=1.2,
        handletextpad=0.4,
        borderpad=0.1,
    )


def swatch(shade: str) -> Line2D:
    """What a legend shows of an area."""
    return Line2D([], [], color=shade, marker="s", markersize=7, linestyle="none")


def line_key(shade: str, dashes: Any = "-") -> Line2D:
    """What a legend shows of a line."""
    return Line2D([], [], color=shade, linewidth=2.2 if dashes == "-" else 1.4, linestyle=dashes)


def plain_axes(axes: Axes) -> None:
    """No frame, no ticks, no grid."""
    axes.set_axis_off()
    axes.grid(False)


def to_svg(drawn: Drawn) -> str:
    """The figure for a page: scales, follows the page's colours and font; its ids begin with its name."""
    buffer = io.StringIO()
    with style():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.figure.savefig(buffer, format="svg", metadata=nothing)
        drawn.figure.set_layout_engine("none")  # everything is in its place: not again for the PNG
    text = buffer.getvalue()
    found = re.search(r'<svg[^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>(.*)</svg>', text, re.DOTALL)
    assert found
    width, height, body = float(found[1]), float(found[2]), found[3]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href").replace(f"'{_FONT}'", "var(--figure-font)")
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{drawn.name}-", body)
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(drawn.alt)}" style="max-width:{width / 72:.3g}in">{body}</svg>'
    )


def to_png(drawn: Drawn, dpi: int = 200) -> bytes:
    """The figure as a picture, in the light colours on white."""
    buffer = io.BytesIO()
    with style():
        about: dict[str, Any] = {"Software": GENERATOR, "Description": drawn.alt.encode("ascii", "replace").decode()}
        drawn.figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata=about)
    return buffer.getvalue()


def palette_css() -> str:
    """The colours as CSS variables, for both themes."""
    light, dark = ("".join(f"--{name}:{pair[theme]};" for name, pair in PALETTE.items()) for theme in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"


_STACK = 2.4  # width of a block; blocks are 1 apart

_LANES = 8 * 0.28  # width of the lanes for the arrows beside it

_ATTENTION, _BETWEEN = 0.75, 0.08  # of a block that is drawn as attention and MLP: the width of one, and a gap

_CARD_COLOURS = 48


def plan_figure(
    plan: Plan, name: str = "plan", source_blocks: Sequence[int] | None = None, units: int | None = None
) -> Drawn:
    """The plan of a compact model, first block at the top.

    Args:
        plan: to draw.
        name: of the figure.
        source_blocks: of an extended model, the source's block behind each block.
        units: hidden units of the source's MLPs; None: as many as the widest that is named.
    """
    borrowers: dict[int, list[int]] = {}
    for replica in plan.replicas:
        borrowers.setdefault(replica.base, []).append(replica.block)
    lanes = _lanes(borrowers)
    shades = {base: series(number) for number, base in enumerate(sorted(borrowers))}
    height = plan.num_blocks * _block_inches(plan.num_blocks)
    title = [line for part in plan_summary(plan, units).split("; ") for line in textwrap.wrap(part, 44)]
    with style():
        figure = new_figure(4.2, height + 0.6 + 0.15 * len(title), "\n".join(title))
        axes = figure.add_subplot()
        plain_axes(axes)
        size = min(8.5, 72 * _block_inches(plan.num_blocks) * 0.58)
        bases = {replica.block: replica.base for replica in plan.replicas}
        for block in range(plan.num_blocks):
            base = bases.get(block)
            if plan.sublayers and base is None:
                _draw_sublayers(axes, plan, block, shades.get(block), units, size)
                continue
            origin = "" if source_blocks is None else f" (block {source_blocks[block]} of the source)"
            _draw_block(axes, block, base, shades.get(block if base is None else base), origin, size)
        step = _LANES / max(8, 1 + max(lanes.values(), default=0))
        for base, blocks in borrowers.items():
            _draw_lane(axes, base, blocks, lanes[base] * step, shades[base])
        axes.set_xlim(-0.15, _STACK + (1.0 + _LANES if borrowers or not plan.sublayers else 0.15))
        axes.set_ylim(plan.num_blocks - 0.4, -1.5 if plan.sublayers else -0.6)
        outline = Line2D([], [], color=colour("muted"), marker="s", markersize=7, linestyle="none", fillstyle="none")
        replicas = ("replica, its base at the arrow", outline)
        if plan.sublayers:
            heads = {0.0: "attention", _ATTENTION + _BETWEEN: "MLP"}
            for x, head in heads.items():
                axes.text(x, -0.95, head, ha="left", va="center_baseline", size=min(size, 8), color=colour("muted"))
            shares = [("left", swatch(colour("kept"))), ("gone", swatch(colour("rest")))]
            key(figure, [*shares, *([replicas] if borrowers else [])], 3)
        else:
            key(figure, [("keeps its own linears", swatch(colour("kept"))), replicas], 2)
    return Drawn(name=name, alt=plan_in_words(plan, units), figure=figure)


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


def _draw_sublayers(axes: Axes, plan: Plan, block: int, shade: str | None, units: int | None, size: float) -> None:
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
        if shade is not None:
            axes.add_patch(Rectangle((x, block - 0.38), width, 0.76, fill=False, edgecolor=shade, linewidth=1.3))
        units_left = units if row is None else row.units or 0
        label = str(block) if sublayer == "attention" else "" if units_left is None else f"{units_left:,}"
        axes.text(x + 0.06, block, label, ha="left", va="center_baseline", size=size, color=colour("ink"))


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
