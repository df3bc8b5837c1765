"""What a run takes, told before it starts, against what it then takes."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Run
from flexigpt import InputError, PruneOptions, assemble_pruned, assemble_removed, plan_only
from flexigpt.calibration import hidden_states as calibration_module
from flexigpt.cli.commands import announced_to
from flexigpt.pruning import Estimate
from flexigpt.runtime.cache import CACHE_VARIABLE
from forks import Forks
from workspaces import announced

# Bytes of a safetensors file besides its tensors, at least.
HEADER = 200


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_bytes_written_are_those_of_the_checkpoint(tiny_source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    """But for the files' headers."""
    options = PruneOptions(ratio=0.4, calibration=str(text), window_length=64, windows=8)
    told = announced(assemble_pruned, tiny_source, options)
    flags = ["--ratio", 0.4, "--calibration", text, "--window-length", 64, "--windows", 8]
    code, _, errors = run("prune", tiny_source, tmp_path / "out", *flags)
    assert code == 0
    assert told.line().partition(", takes")[0] in errors
    assert -2_000 < bytes_of(tmp_path / "out") - told.written < 20_000
    removal = announced(assemble_removed, tiny_source, options)
    assert run("prune", tiny_source, tmp_path / "shorter", "--remove", *flags)[0] == 0
    assert 0 < bytes_of(tmp_path / "shorter") - removal.written < 20_000
    assert announced(plan_only, tiny_source, options).written == 0


def test_more_work_is_told_as_more(tiny_source: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = psutil.Process().memory_info()  # what tests before this one held may be given back meanwhile
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: held)

    def told(refit: bool, **more: object) -> Estimate:
        calibrated = {"ratio": 0.4, "calibration": str(text), "window_length": 64, "windows": 8}
        return announced(assemble_pruned, tiny_source, PruneOptions(refit_kept=refit, **calibrated | more))

    assert told(False).memory < told(True).memory < told(True, windows=4096).memory
    assert told(False, memory="64KIB").scratch >= 8 * 64 * 32 * 4  # hidden states in a file
    assert told(True, memory="64KIB").scratch >= 6 * 8 * 64 * 32 * 4
    assert "GB of memory" in told(True).line() or "MB of memory" in told(True).line()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak where Linux tells it")
def test_memory_stays_below_what_was_told(example: Path, tmp_path: Path, early_forks: Forks) -> None:
    """Of a process that prunes the shipped model, and measures perplexity, which takes most of it."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_bytes((example / "calibration.jsonl").read_bytes()[:15_000])
    options = ["--ratio", "0.3", "--calibration", str(example / "calibration.jsonl"), "--windows", "4"]
    options += ["--window-length", "256", "--perplexity", str(held_out)]
    code = (
        "import sys; from pathlib import Path; from flexigpt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        # Not ru_maxrss: what the process that forked this one held counts there.
        "finally: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    environment = os.environ | {"FLEXIGPT_CACHE": str(tmp_path / "cache")}
    ran = early_forks.run("-c", code, "prune", example, tmp_path / "out", *options, env=environment)
    assert ran.returncode == 0, ran.stderr
    peak = 1024 * int(ran.stderr.splitlines()[-1])
    told, unit = re.search(r"at most about ([\d.]+) (MB|GB) of memory", ran.stderr).groups()  # type: ignore[union-attr]
    assert 0.4 < peak / (float(told) * {"MB": 1e6, "GB": 1e9}[unit]) < 1


@pytest.mark.parametrize(
    ("assemble", "options"),
    [
        (assemble_pruned, PruneOptions),
        (assemble_pruned, partial(PruneOptions.paper, refit_kept=True)),
        (assemble_removed, PruneOptions),
    ],
)
def test_the_cache_holds_no_more_than_was_told(
    tiny_source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assemble: Callable[..., Any],
    options: Callable[..., PruneOptions],
) -> None:
    """Hidden states are in memory; what is to go on from, and what is fitted until all is written, is in files."""
    monkeypatch.setattr(calibration_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(calibration_module, "_SAVE_SHARE", 0)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    asked = options(ratio=0.4, calibration=str(text), window_length=64, windows=8)
    told = announced(assemble, tiny_source, asked).scratch
    held = []

    def looking(items: Iterable[object], *_: object) -> Iterator[object]:
        for item in items:
            yield item
            files = [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("progress")]
            held.append(sum(file.stat().st_size - HEADER for file in files))

    with assemble(str(tiny_source), asked, looking) as made:
        assert made
    assert 0.3 * told < max(held) <= told


@pytest.mark.parametrize(
    ("needs", "reason"),
    [({"written": 10**18}, "the checkpoint needs"), ({"scratch": 10**18}, "scratch files in the cache need")],
)
def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path: Path, needs: dict[str, int], reason: str) -> None:
    estimate = Estimate(**{"written": 1, "scratch": 1, "memory": 1} | needs)
    with pytest.raises(InputError, match=reason):
        announced_to(tmp_path / "out", print)(estimate)
