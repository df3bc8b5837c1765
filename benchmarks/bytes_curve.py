"""Perplexity against stored bytes: compact models, and plain removal of fewer or more blocks; does sharing pay?

python benchmarks/bytes_curve.py --workers 2

Every model is made by benchmarks/prune.py, without training: kept blocks refitted to calibration text in both, and
replicas fitted in the compact ones. What benchmarks/recovery.py found after training stands beside it. Results are kept
in benchmarks/results/bytes_curve.json and not measured again; the table and the figure lie beside it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "novel16"
RESULTS = Path(__file__).parent / "results"
DEPTH = 16
# Kind of a row -> its settings.
KINDS = {
    "baseline": ("remove=true", "block_score=removal-perplexity"),
    "prune": ("preset=thorough",),
    "prune-by-linear": ("preset=thorough", "adapter_init=activation", "spread_rank=false"),
}
# Name of a line -> rows: kind, blocks pruned, rank of the replicas.
LINES: dict[str, list[tuple[str, int, int]]] = {
    "plain removal": [("baseline", blocks, 0) for blocks in range(1, 8)],
    "4 replicas": [("prune", 4, rank) for rank in (1, 4, 12, 24, 48)],
    "6 replicas": [("prune", 6, rank) for rank in (4, 12, 24)],
    "4 replicas, each linear by itself": [("prune-by-linear", 4, rank) for rank in (1, 4, 12, 24, 48)],
    "6 replicas, each linear by itself": [("prune-by-linear", 6, rank) for rank in (4, 12, 24)],
}
# Line -> tokens, and rows of recovery.json that belong to it.
TRAINED: dict[str, tuple[int, tuple[str, ...]]] = {
    "plain removal by influence": (1_000_000, ("removal-distilled", "fewer-distilled")),
    "the paper's start": (1_000_000, ("distilled",)),
    "plain removal by perplexity, refitted": (600_000, ("removal-refitted-distilled", "fewer-refitted-distilled")),
    "fitted": (600_000, ("fitted-distilled", "fitted-rank-24-distilled")),
    "each linear fitted by itself": (600_000, ("by-linear-distilled",)),
}


def measure(kind: str, blocks: int, rank: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Stored bytes and perplexity of one model, and the source's."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        words = [
            *("benchmarks/prune.py", str(EXAMPLE), str(out), f"ratio={blocks / DEPTH}"),
            *(f"calibration={EXAMPLE / 'calibration.jsonl'}", f"windows={arguments.windows}"),
            *("window_length=256", f"perplexity={EXAMPLE / 'validation.jsonl'}"),
            *(*KINDS[kind], *((f"rank={rank}",) if rank else ())),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        ran = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(words)}\n{ran.stderr[-2000:]}")
        record = json.loads((out / "record.json").read_text())
    made = "compact" if rank else "shorter"
    return {
        "bytes": record[made]["bytes"],
        "perplexity": record["perplexity"][made]["perplexity"],
        "source": record["perplexity"]["source"]["perplexity"],
    }


def interpolated(points: list[tuple[float, float]], size: float) -> float | None:
    """The perplexity at so many bytes on the line through points ordered by bytes; None outside of it."""
    for (low, one), (high, other) in itertools.pairwise(points):
        if low <= size <= high:
            return one + (other - one) * (size - low) / (high - low)
    return None


def trained_points(name: str) -> list[tuple[float, float]]:
    """(bytes, perplexity) of what recovery.json holds of the rows behind that name, by bytes; the best rate of each."""
    length, rows = TRAINED[name]
    known: dict[str, dict[str, Any]] = json.loads((RESULTS / "recovery.json").read_text())
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for key, found in known.items():
        row, ratio, tokens, _, *seed = key.split(" ")
        if row in rows and int(tokens) == length and not seed:
            point = (found["bytes"], found["after"])
            best[row, ratio] = min(point, best.get((row, ratio), point), key=lambda p: p[1])
    return sorted(best.values())


def write(known: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """The table and the figure."""
    points = {
        line: sorted(
            (found["bytes"], found["perplexity"]) for row in rows if (found := known.get(key(row, arguments.windows)))
        )
        for line, rows in LINES.items()
    }
    removal = points["plain removal"]
    source = next(iter(known.values()))["source"]
    lines = [
        "# Perplexity against stored bytes, novel16",
        "",
        f"`python benchmarks/bytes_curve.py`: no training, kept blocks refitted on {arguments.windows} windows of 256 "
        "tokens, replicas",
        f"fitted; perplexity on all of validation.jsonl (the source: {source:.2f}). At the same bytes: plain",
        "removal, refitted alike, interpolated between two numbers of blocks. ![curve](bytes_curve.svg)",
        "",
        "| model | rank | stored MB | perplexity | plain removal at the same bytes | excess over the source |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line, rows in LINES.items():
        for kind, blocks, rank in rows:
            found = known.get(key((kind, blocks, rank), arguments.windows))
            if found is None:
                continue
            rival = interpolated(removal, found["bytes"]) if rank else None
            excess = f"{(found['perplexity'] - source) / (rival - source):.2f} of its" if rival else ""
            label = line if rank else f"plain removal of {blocks}"
            lines.append(
                f"| {label} | {rank or ''} | {found['bytes'] / 1e6:.2f} | {found['perplexity']:.2f} | "
                f"{f'{rival:.2f}' if rival else ''} | {excess} |"
            )
    lines += ["", "Trained with distillation ([recovery.md](recovery.md)), stored MB: perplexity:", ""]
    for name in TRAINED:
        shown = ", ".join(f"{size / 1e6:.2f}: {value:.2f}" for size, value in trained_points(name))
        if shown:
            lines.append(f"- {name}, {TRAINED[name][0]:,} tokens: {shown}")
    (RESULTS / "bytes_curve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(points, source).savefig(RESULTS / "bytes_curve.svg", metadata={"Date": None})


def draw(points: dict[str, list[tuple[float, float]]], source: float) -> Figure:
    figure = Figure(figsize=(7.4, 4), layout="constrained")
    axes = figure.subplots()
    for line, found in points.items():
        axes.plot([size / 1e6 for size, _ in found], [value for _, value in found], "o-", label=f"{line}, untrained")
    for name in TRAINED:
        found = trained_points(name)
        axes.plot([s / 1e6 for s, _ in found], [v for _, v in found], "x--", label=f"{name}, trained, distilled")
    axes.axhline(source, color="grey", linewidth=0.8)
    axes.set(xlabel="stored MB", ylabel="perplexity of validation.jsonl (grey: the source)")
    axes.legend(fontsize=8)
    return figure


def key(row: tuple[str, int, int], windows: int) -> str:
    return f"{' '.join(map(str, row))} {windows}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    arguments = parser.parse_args()
    file = RESULTS / "bytes_curve.json"
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}

    def run(row: tuple[str, int, int]) -> None:
        name = key(row, arguments.windows)
        if name not in known:
            known[name] = measure(*row, arguments)
            print(name, known[name]["perplexity"], flush=True)
            file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(run, (row for rows in LINES.values() for row in rows)))
    write(known, arguments)
    print((RESULTS / "bytes_curve.md").read_text())


if __name__ == "__main__":
    main()
