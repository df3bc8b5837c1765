"""`flexigpt benchmark` on two models, in one run: what the paper's table 6 reports of LLaMA-2 7B on an A100.

python benchmarks/decoding.py > benchmarks/results/decoding.md

The shipped model pruned at 30 %, unrecovered, where a pass costs mostly Python; and random ones of a known model's
widths (--shape, --layers, --ratios), where it costs arithmetic and reading weights. The latter's replicas start at a
gamma so small that draft and target agree: their speculative row is the most that speculation can give.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from speculation import EXAMPLE, OPTIONS, add_large, heading, large

from flexigpt import BenchmarkOptions, benchmark, prune, write_checkpoint
from flexigpt.decoding import benchmark_rows


def pruned(folder: Path) -> Path:
    """The shipped model pruned at 30 %, unrecovered, in float32."""
    model, _, record = prune(str(EXAMPLE), OPTIONS)
    write_checkpoint(folder, model, record, source=str(EXAMPLE))
    return folder


def say(what: str, result: dict[str, Any]) -> None:
    print(f"## {what}\n\n{benchmark_rows(result).markdown()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_large(parser)
    parser.add_argument("--gamma", type=float, default=1e-3, help="of the random models' replicas")
    parser.add_argument("--large-prompt", type=int, default=16)
    parser.add_argument("--large-tokens", type=int, default=33)
    parser.add_argument("--large-repeats", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread beside other work on the machine")
    arguments = parser.parse_args()
    shared: dict[str, Any] = {"speculative": True, "cpu_time": arguments.cpu_time}
    print("# Decoding\n\n`python benchmarks/decoding.py`, all in one run.\n")
    with tempfile.TemporaryDirectory() as folder:
        options = BenchmarkOptions(
            against=str(EXAMPLE),
            prompt=str(EXAMPLE / "validation.jsonl"),
            prompt_tokens=64,
            repeats=arguments.repeats,
            dtype="float32",
            **shared,
        )
        small = benchmark(str(pruned(Path(folder) / "example")), options)
        say("examples/novel16, pruned at 30 %, unrecovered", small)
        for ratio in arguments.ratios if arguments.layers else ():
            for name, model in zip(("source", "compact"), large(arguments, ratio, arguments.gamma), strict=True):
                model.save_pretrained(Path(folder) / name)
            del model
            options = BenchmarkOptions(
                against=str(Path(folder) / "source"),
                batch_sizes=(1, 8),
                prompt_tokens=arguments.large_prompt,
                new_tokens=arguments.large_tokens,
                repeats=arguments.large_repeats,
                dtype=arguments.dtype,
                **shared,
            )
            say(heading(arguments, ratio, arguments.gamma), benchmark(str(Path(folder) / "compact"), options))


if __name__ == "__main__":
    main()
