"""Commands that show what a model is and does: plain functions that `cli.py` registers."""

from pathlib import Path
from typing import Annotated

import typer

from flexigpt.console import Bars, field_help, print_json, stdout
from flexigpt.errors import InputError
from flexigpt.evaluate import EvalOptions, Evaluation, evaluate
from flexigpt.evaluation_tables import evaluation_markdown, evaluation_notes, evaluation_table
from flexigpt.inspection import inspect_model, inspection_tables
from flexigpt.report import FIGURES, report
from flexigpt.writing import check_evaluation_file, check_recordable, record_evaluation, write_evaluation

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
