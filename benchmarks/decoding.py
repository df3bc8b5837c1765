"""`flexigpt benchmark` on two models, in one run: what the paper's table 6 reports of LLaMA-2 7B on an A100.

python benchmarks/decoding.py > benchmarks/results/decoding.md

The shipped model pruned at 30 %, unrecovered, where a pass costs mostly Python; and a random one of TinyLlama-1.1B's
widths (--layers of its 22 blocks), where it costs arithmetic and reading weights. The latter's replicas start at a
gamma so small that draft and target agree: its speculative row is the most that speculation can give.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexigpt import BenchmarkOptions, Plan, PruneOptions, Replica, benchmark, prune, write_checkpoint
from flexigpt.benchmark_tables import benchmark_markdown
from flexigpt.checkpoint import compact_of
from flexigpt.initialization import initialize_replicas

EXAMPLE = Path(os.path.relpath(Path(__file__).parents[1] / "examples" / "novel16"))


def pruned_example(folder: Path) -> Path:
    """The shipped model pruned at 30 %, unrecovered, in float32."""
    options = PruneOptions(
        ratio=0.3, calibration=str(EXAMPLE / "calibration.jsonl"), window_length=256, dtype="float32", windows=32
    )
    model, _, record = prune(str(EXAMPLE), options)
    write_checkpoint(folder, model, record, source=str(EXAMPLE))
    return folder


def large(folder: Path, layers: int, rank: int) -> tuple[Path, Path]:
    """A random source and its compact model with 30 % of the blocks pruned, the last ones but one."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    source = LlamaForCausalLM(config).eval()
    first = layers - 1 - int(0.3 * layers)
    plan = Plan(
        num_blocks=layers, replicas=tuple(Replica(block=b, base=0, rank=rank) for b in range(first, layers - 1))
    )
    compact = compact_of(source, plan)
    initialize_replicas(compact, source, plan, adapter_init="zero", norm_init=1e-3, seed=0)
    source.save_pretrained(folder / "source")
    compact.save_pretrained(folder / "compact")
    return folder / "source", folder / "compact"


def say(heading: str, result: dict[str, Any]) -> None:
    print(f"## {heading}\n\n{benchmark_markdown(result)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=10, help="of the random model; 0 leaves it out")
    parser.add_argument("--rank", type=int, default=128, help="of its adapters; the paper's 256 at half the width")
    parser.add_argument("--large-prompt", type=int, default=16)
    parser.add_argument("--large-tokens", type=int, default=8)
    parser.add_argument("--large-repeats", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread beside other work on the machine")
    arguments = parser.parse_args()
    shared: dict[str, Any] = {"speculative": True, "cpu_time": arguments.cpu_time, "dtype": "float32"}
    print("# Decoding\n\n`python benchmarks/decoding.py`, all in one run.\n")
    with tempfile.TemporaryDirectory() as folder:
        options = BenchmarkOptions(
            against=str(EXAMPLE),
            prompt=str(EXAMPLE / "validation.jsonl"),
            prompt_tokens=64,
            repeats=arguments.repeats,
            **shared,
        )
        small = benchmark(str(pruned_example(Path(folder) / "example")), options)
        say("examples/novel16, pruned at 30 %, unrecovered", small)
        if arguments.layers:
            source, compact = large(Path(folder), arguments.layers, arguments.rank)
            options = BenchmarkOptions(
                against=str(source),
                batch_sizes=(1, 4),
                prompt_tokens=arguments.large_prompt,
                new_tokens=arguments.large_tokens,
                repeats=arguments.large_repeats,
                **shared,
            )
            say(
                f"{arguments.layers} blocks of TinyLlama-1.1B's widths, random, 30 % pruned at rank {arguments.rank}",
                benchmark(str(compact), options),
            )


if __name__ == "__main__":
    main()
