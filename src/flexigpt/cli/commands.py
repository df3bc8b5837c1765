"""Commands of baselines and training: functions that `cli.py` registers; no logic."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexigpt.cli.console import Bars, print_json, stdout
from flexigpt.cli.options import field_help
from flexigpt.decoding import BenchmarkOptions, benchmark, benchmark_markdown, benchmark_notes, benchmark_tables
from flexigpt.evaluation import EvalOptions, Evaluation, evaluate
from flexigpt.record import (
    check_evaluation_file,
    check_recordable,
    cost_table,
    evaluation_markdown,
    evaluation_notes,
    evaluation_table,
    inspect_model,
    inspection_tables,
    notes,
    record_evaluation,
    write_evaluation,
)
from flexigpt.recovery import PRECISIONS, TRAIN, RecoverOptions, recover
from flexigpt.report import FIGURES, report
from flexigpt.runtime import InputError, launched_rank, replace_file

_RECOVER = field_help(RecoverOptions)


def recover_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of a compact model, or of one without replicas.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the recovered model to.")],
    data: Annotated[str, typer.Option(help=_RECOVER["data"], metavar="FILE|FOLDER|NAME")] = RecoverOptions.data,
    tokens: Annotated[str, typer.Option(help=_RECOVER["tokens"], metavar="1B|600M|100K")] = RecoverOptions.tokens,
    epochs: Annotated[int, typer.Option(help=_RECOVER["epochs"])] = RecoverOptions.epochs,
    text_column: Annotated[str, typer.Option(help=_RECOVER["text_column"])] = RecoverOptions.text_column,
    window_length: Annotated[int | None, typer.Option(help=_RECOVER["window_length"])] = None,
    batch_tokens: Annotated[int | None, typer.Option(help=_RECOVER["batch_tokens"])] = None,
    micro_batch: Annotated[int | None, typer.Option(help=_RECOVER["micro_batch"])] = None,
    lr: Annotated[float, typer.Option(help=_RECOVER["lr"])] = RecoverOptions.lr,
    replica_lr: Annotated[float | None, typer.Option(help=_RECOVER["replica_lr"])] = None,
    warmup: Annotated[float, typer.Option(help=_RECOVER["warmup"])] = RecoverOptions.warmup,
    weight_decay: Annotated[float, typer.Option(help=_RECOVER["weight_decay"])] = RecoverOptions.weight_decay,
    clip: Annotated[float, typer.Option(help=_RECOVER["clip"])] = RecoverOptions.clip,
    train: Annotated[str, typer.Option(help=_RECOVER["train"], metavar="|".join(TRAIN))] = RecoverOptions.train,
    lora_rank: Annotated[int | None, typer.Option(help=_RECOVER["lora_rank"])] = None,
    match: Annotated[str | None, typer.Option(help=_RECOVER["match"], metavar="COMPACT")] = None,
    precision: Annotated[str | None, typer.Option(help=_RECOVER["precision"], metavar="|".join(PRECISIONS))] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help=_RECOVER["activation_checkpointing"])
    ] = RecoverOptions.activation_checkpointing,
    teacher: Annotated[str | None, typer.Option(help=_RECOVER["teacher"], metavar="SOURCE")] = None,
    distill_weight: Annotated[float | None, typer.Option(help=_RECOVER["distill_weight"])] = None,
    draft_weight: Annotated[float | None, typer.Option(help=_RECOVER["draft_weight"])] = None,
    perplexity: Annotated[str | None, typer.Option(help=_RECOVER["perplexity"])] = None,
    eval_every: Annotated[int | None, typer.Option(help=_RECOVER["eval_every"])] = None,
    save_every: Annotated[int, typer.Option(help=_RECOVER["save_every"])] = RecoverOptions.save_every,
    report_to: Annotated[str | None, typer.Option(help=_RECOVER["report_to"])] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help=_RECOVER["fsdp"])] = RecoverOptions.fsdp,
    device: Annotated[str, typer.Option(help=_RECOVER["device"])] = RecoverOptions.device,
    seed: Annotated[int, typer.Option(help=_RECOVER["seed"])] = RecoverOptions.seed,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the same, unfinished run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in OUT, or an unfinished run.")
    ] = False,
) -> None:
    """Train a compact model back; under torchrun, on many devices."""
    options = RecoverOptions(
        data=data,
        tokens=tokens,
        epochs=epochs,
        text_column=text_column,
        window_length=window_length,
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        lr=lr,
        warmup=warmup,
        replica_lr=replica_lr,
        weight_decay=weight_decay,
        clip=clip,
        train=train,
        lora_rank=lora_rank,
        match=match,
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        teacher=teacher,
        distill_weight=distill_weight,
        draft_weight=draft_weight,
        perplexity=perplexity,
        eval_every=eval_every,
        save_every=save_every,
        report_to=report_to,
        fsdp=fsdp,
        device=device,
        seed=seed,
    )
    with Bars(shown=launched_rank() == 0) as bars:
        record = recover(
            model, out, options, resume=resume, overwrite=overwrite, command=context.obj, track=bars, log=bars.tell
        )
    if record is None:
        return
    stdout.print(cost_table(record))
    for line in notes(record):
        print(line)
    recovery = record["recovery"]
    print(f"{recovery['trained_parameters']:,} parameters trained at {recovery['tokens_per_second']:,.0f} tokens/s")
    if "stopped" in recovery:
        raise InputError(recovery["stopped"])
    print(f"checkpoint written to {out}")


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


_EVAL = field_help(EvalOptions)

_RECORD_HELP = "Write the result into the first model's folder too: evaluation.json, and a table in its model card."


def inspect_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a source or compact model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the plan, stored and effective parameters, and the bytes of each part."""
    inspection = inspect_model(model)
    if as_json:
        print_json(inspection)
        return
    for table in inspection_tables(inspection):
        stdout.print(table)


def eval_command(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Source or compact models, side by side.")],
    perplexity: Annotated[str | None, typer.Option(help=_EVAL["perplexity"])] = None,
    text_column: Annotated[str | None, typer.Option(help=_EVAL["text_column"])] = None,
    window_length: Annotated[int | None, typer.Option(help=_EVAL["window_length"])] = None,
    stride: Annotated[int | None, typer.Option(help=_EVAL["stride"])] = None,
    against: Annotated[str | None, typer.Option(help=_EVAL["against"], metavar="SOURCE")] = None,
    tasks: Annotated[str | None, typer.Option(help=_EVAL["tasks"], metavar="arc_easy,piqa,...")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help=_EVAL["num_fewshot"])] = None,
    limit: Annotated[int | None, typer.Option(help=_EVAL["limit"])] = None,
    batch_size: Annotated[str | None, typer.Option(help=_EVAL["batch_size"], metavar="auto|N")] = None,
    include_path: Annotated[Path | None, typer.Option(help=_EVAL["include_path"], metavar="DIR")] = None,
    materialize: Annotated[bool, typer.Option("--materialize", help=_EVAL["materialize"])] = False,
    dtype: Annotated[str, typer.Option(help=_EVAL["dtype"])] = EvalOptions.dtype,
    device: Annotated[str, typer.Option(help=_EVAL["device"])] = EvalOptions.device,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write the result to as well, by its suffix.", metavar="FILE.json|FILE.md"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    record: Annotated[bool, typer.Option("--record", help=_RECORD_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Measure perplexity, benchmark tasks and fidelity to the source, of several models side by side."""
    options = EvalOptions(
        perplexity=perplexity,
        text_column=text_column,
        window_length=window_length,
        stride=stride,
        against=against,
        tasks=None if tasks is None else [name.strip() for name in tasks.split(",")],
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        include_path=include_path,
        materialize=materialize,
        dtype=dtype,
        device=device,
    )
    if as_json and as_markdown:
        raise InputError("--json and --markdown exclude each other: give one, and --output FILE for the other")
    if output is None and overwrite:
        raise InputError("--overwrite has no effect without --output: leave it out")
    if output is not None:
        check_evaluation_file(output, overwrite)
    if record:
        check_recordable(models[0])
    with Bars() as track:
        evaluation = evaluate(models, options, track) | {"command": context.obj}
    if output is not None:
        write_evaluation(output, evaluation)
    if record:
        record_evaluation(models[0], evaluation)
    _show(evaluation, as_json, as_markdown)


def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Checkpoint or plan folders that flexigpt wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write, or folder for report.html; default: DIR.", metavar="PAGE.html|FOLDER"),
    ] = None,
) -> None:
    """Draw what was recorded: one HTML page that needs nothing else, and its figures as PNG files beside it."""
    written = report(folders, out)
    print(f"report written to {written}, its figures to {written.parent / FIGURES}")


def _show(evaluation: Evaluation, as_json: bool, as_markdown: bool) -> None:
    if as_json:
        print_json(evaluation)
    elif as_markdown:
        print(evaluation_markdown(evaluation), end="")
    else:
        stdout.print(evaluation_table(evaluation))
        for note in evaluation_notes(evaluation):
            print(note)
