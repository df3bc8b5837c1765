"""Pruning a checkpoint that is never in memory: peak memory, time by stage, and the floor of both.

python benchmarks/out_of_core.py --shape llama-2-7b
python benchmarks/out_of_core.py --shape tinyllama --memory 128MiB --kills 6
python benchmarks/out_of_core.py --growth
python benchmarks/out_of_core.py --pair llama-2-7b
python benchmarks/out_of_core.py --preset default --shape llama-2-7b
python benchmarks/out_of_core.py --preset default --source out/smollm2-135m --calibration out/texts/calibration.jsonl \
    --windows 64 --window-length 256
python benchmarks/out_of_core.py --device cuda --preset default --shape llama-2-7b

Checkpoints are random, their spectra like trained ones'; they are made in --work and deleted afterwards. Every run is
a `flexigpt prune` in a process of its own, whose memory is sampled. The floor is each byte read once, and what has to
be multiplied at least, at the rates of this machine: of the paper's preset one forward pass and the products of the
factorisations; of the default what docs/speed.md counts. A forward pass of the same text through the same blocks,
without logits, is timed beside it, in CPU seconds; on a GPU in those of the clock, and memory that is taken there is
sampled, its driver's included. Rows are added to benchmarks/results/out_of_core.json and the table
made anew. --pair measures the distance of one pair of blocks by a full SVD for each linear, and adds to the row of that
shape how long all pairs would take so.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig

from flexigpt.model import empty_model
from flexigpt.replicas import truncated_svd

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "novel16"
RESULTS = Path(__file__).parent / "results" / "out_of_core"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-7b-2": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    },
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "narrow-512": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8},
    "narrow-2048": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32},
    "narrow-12": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
    "narrow-24": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "narrow-48": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 48, "num_attention_heads": 16},
}
VOCABULARY = 32000
SPIKES = 128
SOURCE = "source"
SAMPLE_SECONDS = 0.05
READ_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a process took.

    Attributes:
        seconds: wall clock, start of Python included.
        cpu: seconds of all its threads.
        anonymous, mapped, total: peaks of its resident memory in bytes; each on its own.
        gpu: peak of what is taken of the GPU's memory, in bytes; 0 without one.
        record: what it measured, where it wrote a record.
    """

    seconds: float
    cpu: float
    anonymous: int
    mapped: int
    total: int
    gpu: int
    record: dict[str, Any]


def make_checkpoint(name: str, folder: Path, device: str = "cpu", shard_bytes: int = 2 * 10**9) -> LlamaConfig:
    """A sharded bfloat16 checkpoint of that shape, one tensor in memory at a time."""
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16", **SHAPES[name])
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / file, folder)
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shapes = {name: tuple(t.shape) for name, t in empty_model(config).state_dict().items()}
    for number, (key, shape) in enumerate(shapes.items()):
        shard[key] = random_weight(shape, generator).cpu()
        if sum(t.numel() * 2 for t in shard.values()) >= shard_bytes or number + 1 == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return config


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A Gaussian bulk and, above it, directions of a power law, as trained weights have."""
    where = generator.device
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.randn(shape, generator=generator, device=where)
    if VOCABULARY not in shape:
        rows, columns = shape
        heights = 2 * (rows**0.5 + columns**0.5) * torch.arange(1, SPIKES + 1, device=where) ** -0.7
        left, right = (torch.randn(n, SPIKES, generator=generator, device=where) / n**0.5 for n in shape)
        weight += (left * heights) @ right.T
    return (weight * 0.3 * shape[-1] ** -0.5).to(torch.bfloat16)


def measured(command: list[str], cache: Path, threads: int, kill_after: float | None = None) -> Run | None:
    """Runs flexigpt; None where it was killed after so many seconds."""
    environment = os.environ | {"FLEXIGPT_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "flexigpt", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    gpu, before = 0, gpu_taken()
    while process.poll() is None:
        gpu = max(gpu, gpu_taken() - before)
        for name, value in resident(process.pid).items():
            peaks[name] = max(peaks[name], value)
        if kill_after is not None and time.perf_counter() - began > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read()[-2000:])
    record = Path(command[2]) / "record.json"
    return Run(
        seconds=seconds,
        cpu=after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime,
        anonymous=peaks["RssAnon"],
        mapped=peaks["RssFile"],
        total=peaks["VmRSS"],
        gpu=gpu,
        record=json.loads(record.read_text()) if record.exists() else {},
    )


def gpu_taken() -> int:
    """Bytes of the first GPU's memory that are in use, by whomever; 0 before this process has used it."""
    if not torch.cuda.is_initialized():
        return 0
    free, all_of_it = torch.cuda.mem_get_info()
    return all_of_it - free


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process's resident memory by kind."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.startswith(("RssAnon", "RssFile", "VmRSS")))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in found}


def floor_seconds(
    folder: Path, config: LlamaConfig, tokens: int, rank: int, pruned: int, device: str
) -> dict[str, float]:
    """The least that reading, one forward pass and the products of the factorisations can take here."""
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rate = matmul_rate(device)
    blocks = [t for name, t in empty_model(config).named_parameters() if ".layers." in name and t.ndim == 2]
    one_block = blocks[: len(blocks) // config.num_hidden_layers]
    products: dict[tuple[int, ...], float] = {}
    for shape in {tuple(t.shape) for t in one_block}:
        with FlopCounterMode(display=False) as counter:
            truncated_svd(random_weight(shape, torch.Generator().manual_seed(1)), rank)
        products[shape] = counter.get_total_flops()
    per_block = sum(products[tuple(t.shape)] for t in one_block)
    attention = 4 * tokens * config.hidden_size * config.num_hidden_layers * 512 / 2
    return {
        "reading": num_bytes / read_rate(file),
        "forward": (2 * tokens * sum(t.numel() for t in blocks) + attention) / rate,
        "factors": per_block * config.num_hidden_layers / rate,
        "adapters": per_block * pruned / rate,
    }


def floor_of_units(folder: Path, config: LlamaConfig, tokens: int, ratio: float, device: str) -> dict[str, float]:
    """The same of the default preset, by docs/speed.md."""
    rate = matmul_rate(device)
    blocks = [t for name, t in empty_model(config).named_parameters() if ".layers." in name and t.ndim == 2]
    hidden, units, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention = 4 * tokens * hidden * depth * 512 / 2
    forward = (2 * tokens * sum(t.numel() for t in blocks) + attention) / rate
    # Of a symmetric product half is computed; on the way back, no product of an MLP's last linear.
    moments = tokens * depth * (units**2 + 3 * hidden**2) / rate
    kept = 1 - ratio * sum(t.numel() for t in blocks) / (3 * hidden * units * depth)
    left = kept * units
    fits = tokens * depth * (left**2 + hidden**2 + 4 * hidden * left + 2 * hidden**2) / rate
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "reading": num_bytes / read_rate(next(iter(sorted(folder.glob("*.safetensors"))))),
        "gradients": 3 * forward + (4 * config.vocab_size - 2 * units * depth) * tokens * hidden / rate,
        "moments": moments,
        "units": depth * 2 * units**3 / rate,
        "ours": forward,
        "fits": fits,
    }


# Arguments: source, text, windows, tokens in each, device.
FORWARD = """
import sys, time
from flexigpt.calibration import block_means
from flexigpt.text import calibration_windows
from flexigpt.weights import Source, load_tokenizer
name, text, windows, length, device = sys.argv[1:]
tokenizer = load_tokenizer(name)
ids = calibration_windows(text, tokenizer, windows=int(windows), window_length=int(length), seed=0)
clock = time.process_time if device == "cpu" else time.perf_counter
source, began = Source(name, device=device), clock()
block_means(source, ids, {})
print(clock() - began)
"""


def forward_seconds(source: Path, arguments: argparse.Namespace) -> float:
    """CPU seconds of the text's way through the blocks, once, in a process of its own; on a GPU those of the clock."""
    given = (source, arguments.calibration, arguments.windows, arguments.window_length, arguments.device)
    command = [sys.executable, "-c", FORWARD, *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(ran.stdout.split()[-1])


def matmul_rate(device: str) -> float:
    """FLOPs a second of a matrix product, the best of some: on a CPU in float32, on a GPU in bfloat16."""
    size, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    side = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        side @ side
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def pair_seconds(name: str) -> float:
    """One pair of blocks by a full SVD of the difference of each of their linears, in float32; each shape once."""
    config = LlamaConfig(vocab_size=VOCABULARY, **SHAPES[name])
    blocks = [t for path, t in empty_model(config).named_parameters() if ".layers.0." in path and t.ndim == 2]
    taken: dict[tuple[int, ...], float] = {}
    for shape in {tuple(t.shape) for t in blocks}:
        one, other = (random_weight(shape, torch.Generator().manual_seed(seed)).float() for seed in (1, 2))
        began = time.perf_counter()
        torch.linalg.svd(one - other, full_matrices=False)
        taken[shape] = time.perf_counter() - began
    return sum(taken[tuple(t.shape)] for t in blocks)


def read_rate(file: Path) -> float:
    """Bytes a second of reading a file that the system has not in memory, as far as it lets go of it."""
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, size = time.perf_counter(), 0
        while chunk := opened.read(READ_BYTES):
            size += len(chunk)
        return size / (time.perf_counter() - began)


def bench(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one shape."""
    work = Path(arguments.work) / name
    shutil.rmtree(work, ignore_errors=True)
    try:
        source = Path(arguments.source) if name == SOURCE else work / "source"
        config = (
            AutoConfig.from_pretrained(source) if name == SOURCE else make_checkpoint(name, source, arguments.device)
        )
        rank = config.hidden_size // 16
        options = [
            *("--ratio", str(arguments.ratio), "--calibration", arguments.calibration),
            *("--windows", str(arguments.windows), "--window-length", str(arguments.window_length)),
            *(("--memory", arguments.memory) if arguments.memory else ()),
            *("--device", arguments.device),
        ]

        def prune(out: str, cache: str, *more: str, kill_after: float | None = None) -> Run | None:
            command = ["prune", str(source), str(work / out), "--preset", arguments.preset, *options, *more]
            return measured(command, work / cache, arguments.threads, kill_after)

        on_gpu = "" if arguments.device == "cpu" else f", {torch.cuda.get_device_name()}"
        pruned = int(arguments.ratio * config.num_hidden_layers + 1e-9)
        tokens = arguments.windows * arguments.window_length
        if arguments.preset == "paper":
            floor = floor_seconds(source, config, tokens, rank, pruned, arguments.device)
        else:
            floor = floor_of_units(source, config, tokens, arguments.ratio, arguments.device)
        first = prune("compact", "cache")
        assert first is not None
        again = prune("plan", "cache", "--plan-only", "--ratio", str(arguments.other_ratio))
        assert again is not None
        row = {
            "shape": name + (", default preset" if arguments.preset == "default" else "") + on_gpu,
            "memory": arguments.memory or "",
            "windows": arguments.windows,
            "blocks": config.num_hidden_layers,
            "source_bytes": first.record["source"]["bytes"],
            "seconds": first.seconds,
            "cpu": first.cpu,
            "forward_cpu": forward_seconds(source, arguments),
            "stages": first.record["stages"],
            "floor": floor,
            "anonymous": first.anonymous,
            "mapped": first.mapped,
            "total": first.total,
            "gpu": first.gpu,
            "replanning": again.seconds,
            "kills": killed(prune, work, first.seconds, arguments.kills) if arguments.kills else None,
            "threads": arguments.threads,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores{on_gpu}, torch {torch.__version__}",
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return row


def killed(prune: Any, work: Path, seconds: float, kills: int) -> dict[str, Any]:
    """The same run, killed at so many random moments; whether its weights are those of the run that was not."""
    chance, done = random.Random(0), 0
    while done < kills:
        if prune("killed", "killed-cache", kill_after=chance.uniform(0.2, 1.0) * seconds / 2) is not None:
            shutil.rmtree(work / "killed")
            shutil.rmtree(work / "killed-cache")
            continue
        done += 1
    prune("killed", "killed-cache")
    files = sorted(path.name for path in (work / "compact").glob("*.safetensors"))
    same = all((work / "compact" / f).read_bytes() == (work / "killed" / f).read_bytes() for f in files)
    return {"times": done, "same bytes": same}


def write_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Pruning checkpoints that are never in memory",
        "",
        "`python benchmarks/out_of_core.py --shape NAME`, `--growth`: bfloat16 checkpoints of random weights,",
        "windows of 512 tokens, 30 %, rank hidden / 16. Memory: peaks of what is resident, anonymous and mapped from",
        "files each on its own, Python and torch included. Floor: each byte read once, one forward pass, the products",
        "of the factorisations.",
        "",
        "| shape | source GB | windows | --memory | time | of floor | anonymous, mapped, total GiB | re-planning |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        floor, again, seconds = sum(row["floor"].values()), row["replanning"], row["seconds"]
        memory = (f"{row[kind] / 2**30:.2f}" if row[kind] else "-" for kind in ("anonymous", "mapped", "total"))
        of_floor = f"{seconds / floor:.2f} x" if floor else "-"
        replanning = f"{again:.1f} s, {again / seconds:.1%}" if again else "-"
        lines.append(
            f"| {row['shape']}, {row['blocks']} blocks | {row['source_bytes'] / 1e9:.2f} | {row['windows']} "
            f"| {row['memory'] or 'default'} | {seconds:,.0f} s | {of_floor} | {', '.join(memory)} | {replanning} |"
        )
    lines += ["", "Seconds by stage, and the floor of each:", ""]
    for row in rows:
        stages = ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in row["stages"].items())
        floors = ", ".join(f"{part} {seconds:,.1f}" for part, seconds in row["floor"].items())
        floors = floors or "not measured"
        lines.append(
            f"- {row['shape']} {row['memory']} ({row['threads']} threads, {row['machine']}): {stages}; floor: {floors}"
        )
        if row.get("gpu") and "forward_cpu" in row:
            lines.append(
                f"  - {row['seconds']:,.0f} s, {row['seconds'] / row['forward_cpu']:.1f} times as long as a forward "
                f"pass of the same text without logits ({row['forward_cpu']:,.1f} s, reading included); "
                f"{row['gpu'] / 2**30:.2f} GiB of the GPU's memory at most, {row['cpu']:,.0f} CPU seconds"
            )
        elif "forward_cpu" in row:
            lines.append(
                f"  - {row['cpu']:,.0f} CPU seconds, {row['cpu'] / row['forward_cpu']:.1f} times those of a forward "
                f"pass of the same text without logits ({row['forward_cpu']:,.0f})"
            )
        if "remark" in row:
            lines.append(f"  - {row['remark']}")
        if "pair" in row:
            pairs = row["blocks"] * (row["blocks"] - 1) // 2
            stage = row["stages"]["measuring distances"]
            lines.append(
                f"  - distances of all {pairs} pairs: {stage:,.0f} s; one pair by a full SVD of each linear's "
                f"difference: {row['pair']:,.0f} s, all pairs so: {pairs * row['pair'] / 3600:,.1f} h, "
                f"{pairs * row['pair'] / stage:,.0f} times as long (three SVDs a linear, of both weights and of the "
                f"difference, as eq. 2 to 4 are written: {3 * pairs * row['pair'] / stage:,.0f} times)"
            )
        if row["kills"]:
            lines.append(f"  - killed {row['kills']['times']} times: the same bytes: {row['kills']['same bytes']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--growth", action="store_true", help="12, 24 and 48 blocks of one width, 12 of three widths")
    parser.add_argument("--pair", choices=SHAPES)
    parser.add_argument("--source", help="a real model in the place of a shape")
    parser.add_argument("--preset", choices=("paper", "default"), default="paper")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calibration", default=str(EXAMPLE / "calibration.jsonl"))
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--other-ratio", type=float, default=0.4, help="to plan again for")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--memory", help="passed on to flexigpt prune")
    parser.add_argument("--kills", type=int, default=0, help="times that a second run is killed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", default=str(ROOT / "out" / "benchmark-out-of-core"))
    arguments = parser.parse_args()
    names = [arguments.shape] if arguments.shape else []
    names += [SOURCE] if arguments.source else []
    names += [name for name in SHAPES if name.startswith("narrow")] if arguments.growth else []
    if not names and not arguments.pair:
        parser.error("give --shape, --source, --growth or --pair")
    file = RESULTS.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for name in names:
        row = bench(name, arguments)
        rows = [old for old in rows if (old["shape"], old["memory"]) != (row["shape"], row["memory"])] + [row]
        file.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(write_table(rows), encoding="utf-8")
    if arguments.pair:
        seconds = pair_seconds(arguments.pair)
        rows = [row | {"pair": seconds} if row["shape"] == arguments.pair else row for row in rows]
        file.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(write_table(rows), encoding="utf-8")
    print(write_table(rows))


if __name__ == "__main__":
    main()
