"""Commands about decoding: plain functions that `cli.py` registers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexigpt.benchmark import BenchmarkOptions, benchmark
from flexigpt.benchmark_tables import benchmark_markdown, benchmark_notes, benchmark_tables
from flexigpt.console import Bars, field_help, print_json, stdout
from flexigpt.errors import InputError
from flexigpt.writing import check_evaluation_file, replace_file

_BENCHMARK = field_help(BenchmarkOptions)
_SIZES = ",".join(map(str, BenchmarkOptions.batch_sizes))


def benchmark_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of a compact model.")],
    against: Annotated[str, typer.Option(help=_BENCHMARK["against"], metavar="SOURCE")],
    removal: Annotated[str | None, typer.Option(help=_BENCHMARK["removal"], metavar="DIR")] = None,
    speculative: Annotated[bool, typer.Option("--speculative", help=_BENCHMARK["speculative"])] = False,
    batch_sizes: Annotated[str, typer.Option(help=_BENCHMARK["batch_sizes"], metavar="1,8,...")] = _SIZES,
    prompt_tokens: Annotated[int, typer.Option(help=_BENCHMARK["prompt_tokens"])] = BenchmarkOptions.prompt_tokens,
    new_tokens: Annotated[int, typer.Option(help=_BENCHMARK["new_tokens"])] = BenchmarkOptions.new_tokens,
    repeats: Annotated[int, typer.Option(help=_BENCHMARK["repeats"])] = BenchmarkOptions.repeats,
    prompt: Annotated[str | None, typer.Option(help=_BENCHMARK["prompt"], metavar="FILE")] = None,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help=_BENCHMARK["cpu_time"])] = False,
    dtype: Annotated[str, typer.Option(help=_BENCHMARK["dtype"])] = BenchmarkOptions.dtype,
    device: Annotated[str, typer.Option(help=_BENCHMARK["device"])] = BenchmarkOptions.device,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write the result to as well, by its suffix.", metavar="FILE.json|FILE.md"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a compact model and its variants against its source: prefill, decoding, throughput, memory, storage."""
    options = BenchmarkOptions(
        against=against,
        removal=removal,
        speculative=speculative,
        batch_sizes=_numbers(batch_sizes),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        prompt=prompt,
        cpu_time=cpu_time,
        dtype=dtype,
        device=device,
    )
    if output is None and overwrite:
        raise InputError("--overwrite has no effect without --output: leave it out")
    if output is not None:
        check_evaluation_file(output, overwrite)
    with Bars() as track:
        result = benchmark(model, options, track) | {"command": context.obj}
    if output is not None:
        replace_file(
            output, benchmark_markdown(result) if output.suffix == ".md" else json.dumps(result, indent=2) + "\n"
        )
    if as_json:
        print_json(result)
        return
    for table in benchmark_tables(result):
        stdout.print(table)
    for note in benchmark_notes(result):
        print(note)


def _numbers(sizes: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise InputError(f"--batch-sizes {sizes} cannot be read: give numbers with commas between, as 1,8") from None
