"""`flexigpt benchmark` on two models and their plain removals: what the paper's table 6 reports of LLaMA-2 7B.

python benchmarks/decoding.py > benchmarks/results/decoding.md

The shipped model pruned at 30 %, unrecovered, where a pass costs mostly Python; and random ones of a known model's
widths (--shape, --layers, --ratios), where it costs arithmetic and reading weights. The latter's replicas start at a
gamma so small that draft and target agree: their speculative row is the most that speculation can give.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from speculation import EXAMPLE, OPTIONS, add_large, heading, large
from transformers import PreTrainedModel

from flexigpt import BenchmarkOptions, benchmark, prune, write_checkpoint
from flexigpt.model import layout_of
from flexigpt.runtime import megabytes
from flexigpt.weights import StreamedModel, load_model, load_tokenizer, without_blocks

COLUMNS = ("batch", "variant", "prefill, ms", "tokens/s each", "time, %", "least-most", "throughput, %", "peak, MB")


def shortened(source: PreTrainedModel, compact: PreTrainedModel) -> PreTrainedModel:
    """The source without the blocks that are replicas in the compact model."""
    return without_blocks(StreamedModel(source), list(layout_of(compact).bases)).in_memory()


def small(folder: Path) -> None:
    """The shipped model pruned at 30 %, unrecovered, in float32, and with the same blocks removed."""
    model, _, record = prune(str(EXAMPLE), OPTIONS)
    write_checkpoint(folder / "compact", model, record, source=str(EXAMPLE))
    source = load_model(str(EXAMPLE), "float32")
    save({"source": source, "removal": shortened(source, model)}, folder)


def save(models: dict[str, Any], folder: Path) -> None:
    for name, model in models.items():
        model.save_pretrained(folder / name)
        load_tokenizer(str(EXAMPLE)).save_pretrained(folder / name)


def measure(folder: Path, dtype: str, rounds: int) -> None:
    """Prints what each variant costs: medians over rounds of all variants; ratios are within a round."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    notes = set()
    for _ in range(rounds):
        against = BenchmarkOptions(against=str(folder / "source"), dtype=dtype)
        result, alone = (
            benchmark(str(folder / "compact"), against),
            benchmark(str(folder / "removal"), BenchmarkOptions(dtype=dtype)),
        )
        variants = [*result["variants"], alone["variants"][0] | {"variant": "removal"}]
        source = {batch["batch_size"]: batch["throughput"] for batch in variants[0]["batches"]}
        for variant in variants:
            for batch in variant["batches"]:
                time = 100 * source[batch["batch_size"]] / batch["throughput"]
                found.setdefault((batch["batch_size"], variant["variant"]), []).append(batch | {"time": time})
            if "acceptance" in variant:
                notes.add(f"{variant['acceptance']:.0%} of drafted tokens accepted")
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    for (size, variant), batches in sorted(found.items(), key=lambda item: item[0][0]):
        prefill, each, time, peak = (
            median(batch[key] for batch in batches)
            for key in ("prefill_seconds", "tokens_per_second", "time", "peak_bytes")
        )
        least, most = (pick(batch["time"] for batch in batches) for pick in (min, max))
        cells = (f"{1000 * prefill:.1f}", f"{each:.1f}", f"{time:.1f}", f"{least:.1f}-{most:.1f}", f"{1e4 / time:.1f}")
        print(f"| {size} | {variant} | {' | '.join(cells)} | {megabytes(int(peak))} |")
    words = f"prompts of {result['prompt_tokens']} tokens, {result['new_tokens']} new ones"
    print(f"\nMedians of {rounds} rounds; {words}; {', '.join(sorted(notes))}.")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"{result['device']}, {dtype}, torch threads: {result['threads']}; {versions}.\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_large(parser)
    parser.add_argument("--gamma", type=float, default=1e-3, help="of the random models' replicas")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("# Decoding\n\n`python benchmarks/decoding.py`, all in one run.\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("## examples/novel16, pruned at 30 %, unrecovered\n")
        small(folder)
        measure(folder, "float32", arguments.rounds)
        for ratio in arguments.ratios if arguments.layers else ():
            print(f"## {heading(arguments, ratio, arguments.gamma)}\n")
            source, compact = large(arguments, ratio, arguments.gamma)
            removal = shortened(source, compact)
            save({"source": source, "compact": compact, "removal": removal}, folder)
            del source, compact, removal
            measure(folder, arguments.dtype, arguments.rounds)


if __name__ == "__main__":
    main()
