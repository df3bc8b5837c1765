"""What a benchmark says, as rows, tables and Markdown."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flexigpt.benchmark import Benchmark
from flexigpt.tables import Rows, markdown, megabytes

_COST = ("variant", "parameters in memory", "weights, MB", "stored, MB", "load, s", "peak, MB", "of source, %")
_TIME = ("batch", "variant", "prefill, ms", "a token, ms", "tokens/s", "time, %", "least-most", "throughput, %")


def cost_rows(result: Benchmark) -> Rows:
    """What each variant takes of disk and memory."""
    source = result["variants"][0]
    rows = [
        [
            variant["variant"],
            f"{variant['parameters']:,}",
            megabytes(variant["weight_bytes"]),
            megabytes(variant["stored_bytes"]),
            "" if variant["load_seconds"] is None else f"{variant['load_seconds']:.2f}",
            megabytes(variant["peak_bytes"]),
            f"{100 * variant['peak_bytes'] / source['peak_bytes']:.1f}",
        ]
        for variant in result["variants"]
    ]
    return list(_COST), rows


def time_rows(result: Benchmark) -> Rows:
    """How long each takes, and in percent of the source, as in the paper's tables 6 and 7."""
    rows = []
    for size in result["options"]["batch_sizes"]:
        for variant in result["variants"]:
            rows += [[str(size), variant["variant"], *_times(b)] for b in variant["batches"] if b["batch_size"] == size]
    return list(_TIME), rows


def _times(batch: dict[str, Any]) -> list[str]:
    share = batch["time_percent"]
    return [
        f"{1000 * batch['prefill_seconds']['median']:.1f}",
        f"{1000 * batch['token_seconds']['median']:.2f}",
        f"{batch['tokens_per_second']['median']:.1f}",
        f"{share['median']:.1f}",
        f"{share['min']:.1f}-{share['max']:.1f}",
        f"{batch['throughput_percent']['median']:.1f}",
    ]


def benchmark_tables(result: Benchmark) -> list[Table]:
    """Costs and times, for a terminal of 80 columns."""
    tables = []
    for headings, rows in (cost_rows(result), time_rows(result)):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True):
            width = max(len(text) for text in (*heading.split(), *cells))  # or rich would cut off words
            table.add_column(heading, justify="left" if heading in ("batch", "variant") else "right", min_width=width)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def benchmark_notes(result: Benchmark) -> list[str]:
    """What a reader of the tables has to know."""
    options, versions = result["options"], result["versions"]
    kind = "of CPU time" if result["clock"] == "cpu" else "passed"
    text = options.get("prompt", "random tokens")
    lines = [
        f"greedy, prompts of {options['prompt_tokens']} tokens ({text}), {options['new_tokens']} new ones; seconds "
        f"{kind}; medians (least-most) of {options['repeats']} repeats, all variants in turn; % of the source's within "
        "a repeat",
    ]
    if result["peak_bytes_of_libraries"] is None:
        lines.append("peak memory: weights, and what the GPU's allocator gave besides while the variant ran")
    else:
        libraries = megabytes(result["peak_bytes_of_libraries"])
        lines.append(f"peak memory: RSS of a process of its own, {libraries} MB of it libraries")
    lines += [line for variant in result["variants"] for line in _of_compact(variant)]
    names = ", ".join(f"{name} {versions[name]}" for name in ("flexigpt", "torch", "transformers"))
    machine = f"{result['device']}, {result['dtype']}, {result['threads']} threads, load {result['load']}"
    return [*lines, f"{machine}; {names}"]


def _of_compact(variant: dict[str, Any]) -> list[str]:
    if "same_ids_as_compact" not in variant:
        return []
    shares = [
        f"{batch['throughput_percent_of_compact']['median']:.1f} % at batch {batch['batch_size']}"
        for batch in variant["batches"]
    ]
    same = "the same tokens" if variant["same_ids_as_compact"] else "other tokens (the last bit decided otherwise)"
    line = f"{variant['variant']}: {same} as compact, its throughput {', '.join(shares)}"
    if "acceptance" in variant:
        line += (
            f"; {100 * variant['acceptance']:.0f} % of the draft's tokens accepted, "
            f"{variant['block_evaluations_per_token']:.1f} block evaluations a token"
        )
    return [line]


def benchmark_markdown(result: Benchmark) -> str:
    """Tables and notes in Markdown."""
    notes = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in benchmark_notes(result))
    return f"{markdown(*cost_rows(result))}\n{markdown(*time_rows(result))}{notes}"
