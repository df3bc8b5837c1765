"""The race on a real model: its table, its texts, and the other methods on a tiny LLaMA."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest

from families import NUM_BLOCKS, tiny_model, token_ids

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.usefixtures("benchmarks")
def test_other_methods_end_nearer_to_the_source_than_removing_two_blocks_does_in_the_mean() -> None:
    import peers  # noqa: PLC0415

    windows = token_ids(batch=64, tokens=16)
    for name, method in peers.PEERS.items():
        source = tiny_model("llama-gqa")
        hidden = peers.streams(source, windows)
        mended = copy.deepcopy(source)
        method(mended, windows, 2)
        assert len(mended.model.layers) == NUM_BLOCKS - 2
        mended_off = (peers.streams(mended, windows)[-1] - hidden[-1]).norm()
        offs = []
        for first in range(NUM_BLOCKS):
            for second in range(first):
                removed = copy.deepcopy(source)
                peers.without(removed, [second, first])
                offs.append((peers.streams(removed, windows)[-1] - hidden[-1]).norm())
        assert mended_off < sum(offs) / len(offs), name


@pytest.mark.usefixtures("benchmarks")
def test_the_table_gives_the_excess_as_a_share_of_the_rivals() -> None:
    import real  # noqa: PLC0415

    on = {"machine": "a CPU"}
    known: dict[str, dict[str, object]] = {
        "source": {"parameters": 100e6, "novels": 40.0, "technical": 10.0, **on},
        "rival 8 0": {"parameters": 80e6, "novels": 60.0, "technical": 20.0, **on},
        "ours 8 0": {"parameters": 80e6, "novels": 50.0, "technical": 12.0, **on},
    }
    assert "| **flexigpt** | 80.00 | 50.00 | 12.00 | 0.50 | 0.20 |" in real.table(known, 1)


def test_texts_share_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "examples" / "smollm2" / "texts.py"
    monkeypatch.setattr(sys, "argv", ["texts.py", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    found = {
        file.stem: {json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()}
        for file in tmp_path.iterdir()
    }
    assert set(found) == {"calibration", "recovery", "novels", "technical"}
    assert not found["calibration"] & found["recovery"]
    assert not (found["novels"] | found["technical"]) & (found["calibration"] | found["recovery"])
    assert all(len(text) <= 4000 for texts in found.values() for text in texts)
