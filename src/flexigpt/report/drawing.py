"""How figures look, in the light and in the dark, and how they become SVG and PNG."""

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import escape
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from flexigpt.record import GENERATOR

WIDTH = 3.65  # inches: what a telephone shows in full; a wider page has several beside each other

_LARGEST = 1.2  # as many times its size is a figure at most on a wide page

_TITLE = 42  # characters of a line of a title

DASHES = (0, (3, 1.5))

# Columns of a heat map with room for words in its cells, those whose names can stand upright, and those that can be
# named at all.
_ROOMY, _UPRIGHT, _MOST_TICKS = 9, 16, 24

_FONT = "DejaVu Sans"  # comes with matplotlib: the same everywhere

_STEPS = 7


def _between(low: str, high: str, share: float) -> str:
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(low), to_rgb(high), strict=True))
    return to_hex((red, green, blue))


# name -> (in the light, in the dark). Figures are drawn in the light colours; in an SVG they become CSS variables.
# Hues of Okabe and Ito (2008), which colour-blind readers tell apart, darker or lighter for contrast with the page.
# Orange is what was pruned and what stands in for it, `kept` what was left as it was; no model has these colours.
# The steps of `heat` go from little to much, by lightness, and stay legible below `ink`.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1c2128", "#e4e8ee"),
    "muted": ("#5a6472", "#a3adba"),
    "grid": ("#dde2e8", "#363e49"),
    "paper": ("#fffffe", "#14181d"),
    "kept": ("#b9c4d0", "#4b5868"),
    "rest": ("#eef1f4", "#222932"),
    "blue": ("#0069a8", "#58b4ec"),
    "orange": ("#b84a00", "#ff9454"),
    "green": ("#007f5c", "#3ecfa3"),
    "purple": ("#9c4785", "#e6a1cd"),
    "amber": ("#8a6200", "#eec04a"),
    "red": ("#a3263b", "#ff8f9f"),
    "slate": ("#4d5a94", "#b3bdf5"),
} | {
    f"heat{n}": (_between("#edf6f4", "#4ea592", n / (_STEPS - 1)), _between("#1d2a2c", "#1f6c60", n / (_STEPS - 1)))
    for n in range(_STEPS)
}

SERIES = ("blue", "purple", "green", "amber", "red", "slate")


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


def heat(share: float) -> str:
    """A colour for little (0) to much (1)."""
    return colour(f"heat{round(min(max(share, 0), 1) * (_STEPS - 1))}")


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


def wrapped(title: str) -> list[str]:
    """The lines of a title."""
    return [line for part in title.split("\n") for line in textwrap.wrap(part, _TITLE)]


def number_ranges(blocks: Iterable[int]) -> str:
    """2-4, 7 of 2, 3, 4, 7."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}\u2013{b}" for a, b in runs)


def new_figure(height: float, title: str) -> Figure:
    """An empty figure, so many inches high without its title, which says what is seen."""
    lines = wrapped(title)
    figure = Figure(figsize=(WIDTH, height + 0.17 * len(lines)), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)  # type: ignore[union-attr, call-arg]
    figure.suptitle("\n".join(lines), x=0.012, ha="left", size=10, weight="bold")
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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a heat map.

    Attributes:
        share: 0 (little) to 1 (much).
        text: what stands in it, where there is room.
        marked: whether it stands out.
    """

    share: float
    text: str = ""
    marked: bool = False


def heat_map(axes: Axes, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[int, int], Cell]) -> None:
    """A grid of (row, column) cells, the first row at the top; a missing one stays empty, a marked one has a dot."""
    roomy = len(columns) <= _ROOMY
    for (row, column), cell in cells.items():
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=heat(cell.share), edgecolor=colour("paper"), lw=0.6)
        box.set_gid(f"cell-{rows[row]}-{columns[column]}")
        axes.add_patch(box)
        if cell.marked:
            (dot,) = axes.plot([column], [row], "o", color=colour("ink"), markersize=4)
            dot.set_gid(f"marked-{rows[row]}-{columns[column]}")
        elif roomy and cell.text:
            axes.text(column, row, cell.text, ha="center", va="center_baseline", size=8, color=colour("ink"))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    step = -(-len(columns) // _MOST_TICKS)
    named = columns[::step]
    turned = 90 if len(named) > _UPRIGHT else 0
    axes.set_xticks(range(0, len(columns), step), named, size=8 if roomy else 7, rotation=turned)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)


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
        f'aria-label="{escape(drawn.alt)}" style="max-width:{_LARGEST * width / 72:.3g}in">{body}</svg>'
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
