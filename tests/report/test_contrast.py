"""What is read stands out from what is behind it, in the light and in the dark: computed from the page's own CSS."""

import re
from importlib.resources import files

import pytest
from matplotlib.colors import to_rgb

from flexigpt.report.drawing import PALETTE, palette_css

CSS = (files("flexigpt.report") / "report.css").read_text(encoding="utf-8")


def luminance(shade: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    """The variables of the style sheet, of each theme."""
    blocks = re.findall(r":root\{(.*?)\}", palette_css())
    assert len(blocks) == 2
    return [dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", block)) for block in blocks]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_from_whatever_is_behind_it(theme: int) -> None:
    """WCAG 2.2 AA: 4.5 to 1. All text colours that the CSS names, on all grounds that it names."""
    shades = themes()[theme]
    texts = set(re.findall(r"[{; ]color: var\(--([\w-]+)\)", CSS))
    grounds = set(re.findall(r"background: var\(--([\w-]+)\)", CSS))
    assert {"ink", "muted", "blue"} <= texts
    assert {"paper", "rest"} <= grounds
    found = {(text, ground): contrast(shades[text], shades[ground]) for text in texts for ground in grounds}
    assert not {pair: ratio for pair, ratio in found.items() if ratio < 4.5}


@pytest.mark.parametrize("theme", [0, 1])
def test_figures_stand_out_and_numbers_in_them_can_be_read(theme: int) -> None:
    """4.5 to 1 for text in bars and cells, 3 to 1 for what carries meaning."""
    shades = {name: pair[theme] for name, pair in PALETTE.items()}
    heats = [name for name in shades if name.startswith("heat")]
    for ground in ("paper", "kept", "rest", *heats):
        assert contrast(shades["ink"], shades[ground]) >= 4.5, ground
    assert contrast(shades["muted"], shades["paper"]) >= 4.5
    for name in set(shades) - {"paper", "grid", "rest", "kept", *heats}:
        assert contrast(shades[name], shades["paper"]) >= 3, name
    assert len({pair[0] for pair in PALETTE.values()}) == len(PALETTE), "an SVG tells them apart by their light shade"
    steps = [luminance(shades[name]) for name in heats]
    assert steps == sorted(steps, reverse=theme == 0), "little to much can be seen in grey"
