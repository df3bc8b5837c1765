"""Training speed and memory: plain removal + LoRA, the paper's recipe, ours, and what sharing the teacher saves.

python benchmarks/training_speed.py > benchmarks/results/training_speed.md
python benchmarks/training_speed.py --device cuda --source meta-llama/Llama-2-7b-hf --data NAME ...

Each round runs a few steps of every variant, one after the other, each in a process of its own, so that peak memory is
its own too; ratios are medians over rounds, to the first row of the same round. `unshared` is the same distillation
with a teacher that shares nothing with its student.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from recovery import matching_lora_rank

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain removal + LoRA": ("removed", ("--lora-rank", "RANK")),
    "the paper's recipe: replicas only": ("compact", ("--train", "replicas")),
    "+ LoRA on kept blocks": ("compact", ()),
    "replicas only + distillation": ("compact", ("--train", "replicas", "--teacher", "SOURCE")),
    "replicas only + distillation, unshared": ("compact", ("--train", "replicas", "--teacher", "SOURCE")),
    "+ LoRA on kept blocks + distillation": ("compact", ("--teacher", "SOURCE")),
    "+ LoRA on kept blocks + distillation, unshared": ("compact", ("--teacher", "SOURCE")),
    "everything": ("compact", ("--train", "all")),
}
UNSHARE = (
    "from flexigpt.recovery import teacher; teacher._same_tensors = lambda *_: {}; "
    "import sys; from flexigpt.cli import main; main(sys.argv[1:])"
)


def flexigpt(arguments: argparse.Namespace, *command: str, unshared: bool = False) -> None:
    start = ("-c", UNSHARE) if unshared else ("-m", "flexigpt")
    environment = os.environ | ({"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {})
    ran = subprocess.run([sys.executable, *start, *command], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"flexigpt {' '.join(command)}\n{ran.stderr[-2000:]}")


def measure(arguments: argparse.Namespace, work: Path, name: str) -> dict[str, Any]:
    start, extra = VARIANTS[name]
    rank = matching_lora_rank(str(work / "removed"), str(work / "compact"))
    places = {"RANK": str(rank), "SOURCE": arguments.source}
    flexigpt(
        arguments,
        *("recover", str(work / start), str(work / "out"), "--overwrite", "--data", arguments.data),
        *("--tokens", str(arguments.steps * arguments.batch_tokens), "--batch-tokens", str(arguments.batch_tokens)),
        *("--window-length", str(arguments.window_length), "--device", arguments.device),
        *(places.get(word, word) for word in extra),
        unshared=name.endswith("unshared"),
    )
    recovery = json.loads((work / "out" / "record.json").read_text())["recovery"]
    # The first step pays for allocations that the others reuse.
    later = [values["tokens_per_second"] for values in recovery["history"][1:]]
    return recovery | {"rate": statistics.median(later)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(EXAMPLE))
    parser.add_argument("--data", default=str(EXAMPLE / "recovery.parquet"))
    parser.add_argument("--calibration", default=str(EXAMPLE / "calibration.jsonl"))
    parser.add_argument("--ratio", default="0.3")
    parser.add_argument("--blocks", help="the blocks to prune, instead of a ratio")
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads; 0: as many as there are cores")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scored: tuple[str, ...] = ("--blocks", arguments.blocks, "--device", arguments.device)
        if arguments.blocks is None:
            scored = ("--ratio", arguments.ratio, "--calibration", arguments.calibration)
            scored += ("--window-length", str(arguments.window_length), "--device", arguments.device)
        flexigpt(arguments, "prune", arguments.source, str(work / "compact"), "--preset", "paper", *scored)
        removed = ("--remove", "--preset", "paper", *scored)
        flexigpt(arguments, "prune", arguments.source, str(work / "removed"), *removed)
        rounds = [{name: measure(arguments, work, name) for name in VARIANTS} for _ in range(arguments.rounds)]
    print_table(arguments, rounds)


def print_table(arguments: argparse.Namespace, rounds: list[dict[str, dict[str, Any]]]) -> None:
    reference = next(iter(VARIANTS))
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"# Training speed and memory, {Path(arguments.source).name}\n")
    which = f"--ratio {arguments.ratio}" if arguments.blocks is None else f"--blocks {arguments.blocks}"
    print(f"`python benchmarks/training_speed.py {which} --rounds {arguments.rounds}`: {arguments.steps} steps of")
    print(
        f"{arguments.batch_tokens:,} tokens, windows of {arguments.window_length}, torch {torch.__version__}, {device}."
    )
    print(
        "Rates are medians; ratios are medians (and ranges) of ratios within a round. Peak memory is the process's.\n"
    )
    print(
        "| variant | trained parameters | tokens/s | to plain removal + LoRA | peak MB | teacher: own MB | shared MB | "
        "blocks run once |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in VARIANTS:
        runs = [measured[name] for measured in rounds]
        ratios = [measured[name]["rate"] / measured[reference]["rate"] for measured in rounds]
        teacher = runs[0].get("teacher")
        memory = "| |"
        if teacher is not None:
            own, shared = teacher["own_bytes"] / 1e6, teacher["shared_bytes"] / 1e6
            memory = f"{own:.1f} | {shared:.1f} | {teacher['blocks_run_once']}"
        print(
            f"| {name} | {runs[0]['trained_parameters']:,} | {statistics.median(run['rate'] for run in runs):,.0f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{statistics.median(run['peak_bytes'] for run in runs) / 1e6:,.0f} | {memory} |"
        )


if __name__ == "__main__":
    main()
