"""The cache: what a run left is found as it was written, or made again; nothing is left of processes that died."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexigpt.calibration.hidden_states import HiddenStates
from flexigpt.runtime import Cache, CachedStage, InputError
from flexigpt.runtime.cache import CACHE_VARIABLE

KILLED = """
import os, sys, torch
from flexigpt.runtime import Cache
with Cache(sys.argv[1], of="model").stage("stage") as stage:
    stage.tensors("values", lambda: {"a": torch.ones(3)})
    print(flush=True)
    if sys.argv[2] == "waits":
        sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def named(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] + path.suffix for path in folder.iterdir())


def measured(cache: Cache) -> tuple[int, dict[str, float]]:
    """How often the stage had to measure, and its result."""
    calls: list[int] = []
    measures: dict[str, Callable[[], float]] = {str(n): lambda n=n: calls.append(n) or n / 3 for n in range(3)}
    with cache.stage("stage") as stage:
        for _ in stage.numbers(measures):
            pass
        return len(calls), stage.result


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"0": "x"}', b'{"digest": [], "data": {}}', b"[" * 100_000, b"\xff", None]
)
def test_a_result_that_is_not_as_it_was_written_is_measured_again(tmp_path: Path, content: bytes | None) -> None:
    cache = Cache(tmp_path, of="model")
    expected = measured(cache)
    assert measured(cache) == (0, expected[1])
    (file,) = tmp_path.iterdir()
    if content is None:
        changed = json.loads(file.read_text())
        changed["data"]["1"] = 7.0
        content = json.dumps(changed).encode()
    file.write_bytes(content)
    assert measured(cache) == expected
    assert named(tmp_path) == ["stage.json"]


@pytest.mark.parametrize("left", ["values.safetensors", "values.safetensors.json", "values.safetensors.part"])
@pytest.mark.parametrize("how", ["cut", "changed", "other"])
def test_tensors_of_a_killed_run_that_were_changed_are_made_again(tmp_path: Path, left: str, how: str) -> None:
    def tensors(stage: CachedStage) -> torch.Tensor:
        return stage.tensors("values", lambda: {"a": torch.arange(5.0)})["a"]

    with Cache(tmp_path).stage("stage") as stage:
        tensors(stage)  # not finished
    (file,) = tmp_path.glob(f"stage-*/{left.removesuffix('.part')}")
    content = file.read_bytes()
    file = file.with_name(left)
    file.write_bytes({"cut": content[:9], "changed": content[:-1] + b"9", "other": b"[]"}[how])
    with Cache(tmp_path).stage("stage") as stage:
        assert torch.equal(tensors(stage), torch.arange(5.0))
        stage.finish(1)
    assert named(tmp_path) == ["stage.json"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ECONNRESET])
def test_an_error_of_the_work_in_a_stage_stays_what_it_is(tmp_path: Path, number: int) -> None:
    for error in (OSError(number, "given up"), OSError(number, "given up", str(tmp_path / "elsewhere"))):
        with pytest.raises(OSError, match="given up") as raised, Cache(tmp_path / "cache").stage("stage"):
            raise error
        assert raised.value is error


def test_an_error_of_the_caches_files_says_where_it_lies(tmp_path: Path) -> None:
    of_a_file = OSError(errno.EACCES, "not allowed", str(tmp_path / "stage-1" / "values"))
    for error in (of_a_file, OSError(errno.ENOSPC, "full")):
        with pytest.raises(InputError, match=CACHE_VARIABLE), Cache(tmp_path).stage("stage"):
            raise error


def test_nothing_is_left_of_processes_that_died(tmp_path: Path) -> None:
    """One held the stage; another worked beside it, in a folder of its own."""
    first = [sys.executable, "-c", KILLED, tmp_path, "waits"]
    with subprocess.Popen(first, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert subprocess.run([*first[:-1], "dies"], check=False, stdout=subprocess.DEVNULL).returncode == -9
        assert measured(Cache(tmp_path, of="model"))[0] == 3
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
        holder.kill()
    assert named(tmp_path) == ["stage", "stage.json", "stage.lock"]
    assert measured(Cache(tmp_path, of="model"))[0] == 0
    assert named(tmp_path) == ["stage.json"]


def test_hidden_states_in_files_have_no_name_that_a_killed_process_would_leave(tmp_path: Path) -> None:
    batches = [torch.arange(6, dtype=torch.bfloat16).view(1, 2, 3), torch.ones(1, 3, 1)]
    held = HiddenStates(iter(batches), tmp_path)
    assert not list(tmp_path.iterdir())
    held[0] = batches[0] + 1
    assert torch.equal(held[0], batches[0] + 1)
    assert torch.equal(held[1], batches[1])
