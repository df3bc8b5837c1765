"""The machine: devices, dtypes, memory."""

import ctypes
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from flexigpt.runtime.errors import InputError
from flexigpt.runtime.options import RunOptions, choices_of

DTYPES = choices_of(RunOptions.__annotations__["dtype"])

# What torch calls an x86 CPU that has kernels in bfloat16 and float16; for others there are loops.
_WITH_KERNELS = "AVX512"

# Below so many rows a product is bound by reading the weight, and half of the bytes win.
_MIN_ROWS = 4

# The same where a CPU multiplies bfloat16, but no faster than float32: Intel's without AMX (1.6 times as long for many
# rows, the same from some hundred with the weight widened). AMD's are said to be twice as fast; not measured here.
_MIN_ROWS_BESIDE_UNITS = 256

# Compute capability of the first NVIDIA GPUs that multiply bfloat16.
_BFLOAT16_FROM = 8

# Units of x86 that multiply them.
_HALF_UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}

DEVICES = "auto, cpu, cuda or cuda:N"


def find_device(device: str) -> torch.device:
    """The device of that name; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        InputError: a device that does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found, dtype=torch.float64).item()  # no values on meta, no float64 on mps
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device} cannot be used here: give {DEVICES}") from error
    return found


def check_dtype(dtype: str) -> None:
    """Raises InputError for a dtype that is not one of DTYPES."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is unknown: give {', '.join(DTYPES)}")


def versions(*others: str) -> dict[str, str]:
    """Of flexigpt, of the libraries that results depend on, and of these others."""
    return {name: version(name) for name in ("flexigpt", "torch", "transformers", *others)}


def machine_lines() -> list[str]:
    """What the report of a fault has to say: versions, devices, and what each device computes in."""
    libraries = versions("accelerate", "peft", "safetensors", "tokenizers")
    libraries.pop("flexigpt")
    kernels = torch.backends.cpu.get_cpu_capability()
    beside = [name for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)) if widened_rows(dtype)]
    half = f"{' and '.join(beside)} in float32" if beside else "float32, bfloat16, float16"
    cpu = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    lines = [
        f"Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {number}" for name, number in libraries.items()),
        f"cpu: {cpu}, {psutil.virtual_memory().total / 1e9:.0f} GB, {kernels}: {half}",
    ]
    if not torch.cuda.is_available():
        return [*lines, "no GPU"]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        half = "float32, bfloat16, float16" if gpu.major >= _BFLOAT16_FROM else "float32, float16"
        lines.append(f"cuda:{number}: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB, {gpu.major}.{gpu.minor}: {half}")
    return lines


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slow_half(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU computes in this dtype by way of others, which takes several times as long as float32."""
    return device.type == "cpu" and widened_rows(dtype) == _MIN_ROWS


def widened_rows(dtype: torch.dtype) -> int | None:
    """From so many rows on a product in this dtype is faster in float32 on this CPU; None: never."""
    if dtype not in _HALF_UNITS or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    if torch.backends.cpu.get_cpu_capability() != _WITH_KERNELS:
        return _MIN_ROWS
    found = torch.cpu.get_capabilities()
    if not any(found.get(unit) for unit in _HALF_UNITS[dtype]):
        return _MIN_ROWS
    no_faster = dtype == torch.bfloat16 and not found.get("amx_bf16") and "Intel" in str(found.get("cpu_name"))
    return _MIN_ROWS_BESIDE_UNITS if no_faster else None


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on its GPU, or, without one, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) * 1024  # Linux, whose `resource` also counts the program that started this one
    process: Any = psutil.Process().memory_info()
    if hasattr(process, "peak_wset"):  # Windows, which has no `resource`
        return int(process.peak_wset)
    import resource  # noqa: PLC0415 - see above

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_memory() -> None:
    """Gives freed memory back to the system, where glibc would keep it for the small things that lie in between.

    Text on its way through blocks leaves such holes: gigabytes after some dozens of large ones.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
