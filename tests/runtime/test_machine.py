"""What a CPU is good at, told from what it says of itself."""

import ctypes
import subprocess
import sys

import pytest
import torch

from flexigpt.runtime import widened_rows

INTEL, AMD = {"cpu_name": "Intel Xeon"}, {"cpu_name": "AMD EPYC"}


@pytest.mark.parametrize(
    ("capability", "found", "bf16", "fp16"),
    [
        ("AVX2", INTEL | {"avx512_bf16": True}, 4, 4),
        ("AVX512", INTEL, 4, 4),
        ("AVX512", INTEL | {"avx512_bf16": True, "avx512_fp16": True}, 256, None),
        ("AVX512", INTEL | {"avx512_bf16": True, "amx_bf16": True, "amx_fp16": True}, None, None),
        ("AVX512", AMD | {"avx512_bf16": True}, None, 4),
    ],
)
def test_products_are_widened_where_float32_is_faster(
    capability: str, found: dict[str, object], bf16: int | None, fp16: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intel without AMX, 2,048 rows of 576 numbers: 89 GFLOP/s in bfloat16, 147 in float32, 163 in float16."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert widened_rows(torch.bfloat16) == bf16
    assert widened_rows(torch.float16) == fp16
    assert widened_rows(torch.float32) is None
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert widened_rows(torch.bfloat16) is None


FREED = """
import psutil, torch
from flexigpt.runtime import return_memory
torch.ones(2**22)  # as large a piece, freed, makes glibc hold smaller ones itself
pieces = [(torch.ones(2**17), torch.ones(64)) for _ in range(400)]
small = [one for _, one in pieces]
del pieces
before = psutil.Process().memory_info().rss
return_memory()
print(before - psutil.Process().memory_info().rss)
assert all(one.sum() == 64 for one in small)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc keeps what others give back")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Though something small lies behind each piece of it; in a process whose heap has no holes of other work."""
    ran = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 100 * 2**20
