"""A report in a real browser: in the light and in the dark, on a phone, on paper."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from test_figures import plan_for, record, write

from flexigpt import report
from flexigpt.report.drawing import PALETTE

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
MEASURE = """<script>addEventListener("load", () => {
  for (const all of document.querySelectorAll("details")) all.open = true;
  const shown = [...document.querySelectorAll("body *")].filter(e => e.clientWidth && !e.parentElement.closest("svg"));
  parent.postMessage(JSON.stringify({
  scrolls: shown.filter(e => getComputedStyle(e).overflowX != "visible" && e.scrollWidth > e.clientWidth + 1).map(
    e => e.getAttribute("aria-label") || e.outerHTML.slice(0, 80)),
  beyond: shown.filter(e => !e.closest(".scroll table") && e.getBoundingClientRect().right > innerWidth + 1).map(
    e => e.outerHTML.slice(0, 80)),
  signs: [...document.querySelectorAll(".scroll")].every(e => getComputedStyle(e).backgroundImage != "none"),
  width: document.documentElement.scrollWidth, inner: innerWidth,
  loaded: performance.getEntriesByType("resource").length,
  small: Math.min(...[...document.querySelectorAll("svg text")].map(
    t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))),
}), "*") })</script>"""
FRAME = """<body><iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>
<script>addEventListener("message", event => document.title = event.data)</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed: apt-get install chromium"),
]


def browse(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=os.environ)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a plan with 32 blocks, all that is recorded of one at once."""
    folder = tmp_path_factory.mktemp("browser")
    pruned = (18, 21, 22, 23, 24, 25, 26, 28, 29)
    return report([write(folder / "model", record(32, pruned), plan_for(32, pruned))])


@pytest.mark.parametrize(("theme", "scheme"), [(0, 1), (1, 0)])
def test_the_page_is_light_or_dark_as_the_reader_wants_without_an_error(
    page: Path, tmp_path: Path, theme: int, scheme: int
) -> None:
    picture = tmp_path / "page.png"
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr", "--window-size=900,1500")
    told = browse(tmp_path, page, *flags, f"--screenshot={picture}").stderr
    assert "CONSOLE" not in told
    shot = Image.open(picture).convert("RGB")
    assert shot.getpixel((2, 2)) == tuple(bytes.fromhex(PALETTE["paper"][theme][1:]))
    colours = {found for _, found in shot.getcolors(2**24) or ()}
    for name in ("orange", "kept", "grid", "ink"):
        assert tuple(bytes.fromhex(PALETTE[name][theme][1:])) in colours, f"{name} is not in the page"


def test_nothing_is_requested_but_the_page_itself(page: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    browse(tmp_path, page, f"--log-net-log={log}", f"--screenshot={tmp_path / 'page.png'}")
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    initiated = {event["params"].get("initiator", "") for event in events if "url" in event.get("params", {})}
    assert not any(url.startswith("file:") and url != page.as_uri() for url in asked)
    assert not any(str(initiator).startswith("file:") or initiator == "null" for initiator in initiated)


def test_it_fits_a_phone_and_its_figures_stay_readable(page: Path, tmp_path: Path) -> None:
    """A copy without the policy that forbids scripts, in a frame as wide as a phone, opens everything, measures itself.

    Only what a reader opens to see all numbers, the matrix behind a heat map, scrolls sideways, and shows that it does.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME, encoding="utf-8")
    told = browse(tmp_path, tmp_path / "frame.html", "--virtual-time-budget=10000", "--dump-dom").stdout
    found = re.search(r"<title>(.*)</title>", told)
    assert found, told[:500]
    measured = json.loads(html.unescape(found[1]))
    assert measured["inner"] == 390
    assert measured["width"] <= 390, "the page scrolls sideways"
    assert measured["beyond"] == []
    assert set(measured["scrolls"]) <= {"low-rank distance, the base marked", "Share mended by rank"}
    assert measured["signs"]
    assert measured["loaded"] == 0
    assert measured["small"] >= 9, "text in a figure is too small to read"


def test_it_prints(page: Path, tmp_path: Path) -> None:
    browse(tmp_path, page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
