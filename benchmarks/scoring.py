"""Scoring blocks by influence against a plain forward pass over the same windows: time, and memory by depth and length.

python benchmarks/scoring.py > benchmarks/results/scoring.md
"""

import argparse
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexigpt.calibration import block_means
from flexigpt.pruning.scores import influence
from flexigpt.text import calibration_windows
from flexigpt.weights import StreamedModel, load_model, load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"


def compare_time(source: str, device: str, batch: int, repeats: int) -> None:
    """Paired runs of both over the shipped model's calibration windows."""
    model = load_model(source, device=device)
    windows = calibration_windows(
        str(EXAMPLE / "calibration.jsonl"), load_tokenizer(source), windows=64, window_length=256, seed=0
    )

    @torch.no_grad()
    def forward() -> None:
        for ids in windows.to(model.device).split(batch):
            model(input_ids=ids, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    def score() -> None:
        block_means(StreamedModel(model), windows, {"influence": influence})

    ratios, plain, scored = [], [], []
    forward()
    score()
    for _ in range(repeats):
        seconds = []
        for function in (forward, score):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        plain.append(seconds[0])
        scored.append(seconds[1])
        ratios.append(seconds[1] / seconds[0])

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    print("| 64 windows of 256 tokens | median | min | max |\n| --- | ---: | ---: | ---: |")
    for name, values in (("forward pass, s", plain), ("scoring, s", scored), ("ratio, pair by pair", ratios)):
        print(f"| {name} | {median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


def measure_memory(blocks: int, tokens: int, total: int) -> None:
    """Peak resident memory of scoring above that of the loaded model; runs in a process of its own."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        max_position_embeddings=8192,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = torch.randint(0, 4096, (total // tokens, tokens))
    with torch.no_grad():
        model(windows[:1, :16])  # what the libraries allocate once
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    block_means(StreamedModel(model), windows, {"influence": influence})
    done.set()
    watcher.join()
    print((peak[0] - before) / 1e6)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(EXAMPLE))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="for the times; memory is measured on the CPU")
    parser.add_argument("--memory", type=int, nargs=3, metavar=("BLOCKS", "TOKENS", "TOTAL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(*arguments.memory)
        return
    print("# Scoring blocks by influence\n")
    print(f"`python benchmarks/scoring.py`: torch {torch.__version__}, {torch.get_num_threads()} threads,")
    print(f"{platform.machine()}.\n")
    compare_time(arguments.source, arguments.device, batch=8, repeats=arguments.repeats)
    total, depths, lengths = 16384, (4, 8, 16), (512, 1024, 2048, 4096)
    print(
        f"\nPeak memory above the loaded model's, MB: hidden size 512, float32, {total:,} tokens in all, of which the"
    )
    print(f"hidden states alone are {total * 512 * 4 / 1e6:.0f} MB.\n")
    print("| blocks | " + " | ".join(f"windows of {length}" for length in lengths) + " |")
    print("| ---: |" + " ---: |" * len(lengths))
    for blocks in depths:
        cells = []
        for tokens in lengths:
            command = [sys.executable, __file__, "--memory", str(blocks), str(tokens), str(total)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            cells.append(f"{float(run.stdout.splitlines()[-1]):.0f}")
        print(f"| {blocks} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
