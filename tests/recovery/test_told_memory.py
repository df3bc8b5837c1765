"""What a recovery says before its first step, against what it then does and takes."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_training import options

from conftest import Run
from flexigpt import recover
from flexigpt.runtime import slow_half
from forks import Forks

QUICK = ("--tokens", "64", "--window-length", "16", "--batch-tokens", "64")
TAKES = r"parameters, takes at most about ([\d.]+) (MB|GB) of memory"


@pytest.mark.parametrize(
    ("model", "train", "words"),
    [
        ("tiny_source", "replicas+kept", "LoRA of rank 2"),
        ("tiny_source", "all", "every parameter"),
        ("tiny_compact", "replicas+kept", "the replicas' own, and LoRA of rank 4 on the kept blocks"),
        ("tiny_compact", "replicas", "the replicas' own"),
    ],
)
def test_what_is_trained_is_said_of_this_very_model(
    model: str, train: str, words: str, text: Path, tmp_path: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    code, printed, errors = run("recover", folder, tmp_path / "out", "--data", text, "--train", train, *QUICK)
    assert code == 0
    recovery = json.loads((tmp_path / "out" / "record.json").read_text())["recovery"]
    assert re.search(rf"^trains {re.escape(words)}: {recovery['trained_parameters']:,} {TAKES}$", errors, re.MULTILINE)
    assert f"trained {words} on 64 tokens" in " ".join(printed.split())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak where Linux tells it")
@pytest.mark.parametrize("more", [[], ["--train", "all"], ["--teacher", "EXAMPLE", "--activation-checkpointing"]])
def test_memory_stays_below_what_was_told(example: Path, tmp_path: Path, early_forks: Forks, more: list[str]) -> None:
    """Of a process of its own; the peak is what the record says."""
    flags = [str(example) if word == "EXAMPLE" else word for word in more]
    given = ["--data", str(example / "recovery.parquet"), "--tokens", "4096", "--batch-tokens", "2048", *flags]
    out = tmp_path / "out"
    ran = early_forks.run("-m", "flexigpt", "recover", example, out, "--device", "cpu", *given)
    assert ran.returncode == 0, ran.stderr
    peak = json.loads((out / "record.json").read_text())["recovery"]["peak_bytes"]
    told, unit = re.search(TAKES, ran.stderr).groups()  # type: ignore[union-attr]
    assert 0.4 < peak / (float(told) * {"MB": 1e6, "GB": 1e9}[unit]) < 1


@pytest.mark.parametrize(
    ("capability", "units", "slow"),
    [
        ("AVX2", {"avx512_bf16": True}, True),
        ("AVX512", {"avx512_fp16": True}, True),
        ("AVX512", {"avx512_bf16": True}, False),
        ("AVX512", {"amx_bf16": True}, False),
    ],
)
def test_a_cpu_that_is_slow_in_bf16_says_so(
    capability: str,
    units: dict[str, bool],
    slow: bool,
    tiny_source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured on one core, forward and backward: 24 x float32's time on AVX2, 3 x on AVX-512, 1.2 x with units."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    cpu, said = torch.device("cpu"), list[str]()
    assert slow_half(cpu, torch.bfloat16) is slow
    assert not slow_half(cpu, torch.float32)
    given = options(text, tokens="64", precision="bf16", lora_rank=2)
    recover(str(tiny_source), tmp_path / "out", given, note=said.append)
    warning = "warning: this CPU cannot multiply bf16, so --precision bf16 is several times slower than fp32"
    assert said[1:] == ([warning] if slow else [])
