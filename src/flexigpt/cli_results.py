"""Commands that show what a model is and does: plain functions that `cli.py` registers."""

from typing import Annotated

import typer

from flexigpt.console import Bars, field_help, print_json, stdout
from flexigpt.evaluate import EvalOptions, evaluate
from flexigpt.inspection import inspect_model, inspection_tables

_EVAL = field_help(EvalOptions)


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
    model: Annotated[str, typer.Argument(help="Folder or hub name of a source or compact model.")],
    perplexity: Annotated[str, typer.Option(help=_EVAL["perplexity"])],
    text_column: Annotated[str, typer.Option(help=_EVAL["text_column"])] = EvalOptions.text_column,
    window_length: Annotated[int | None, typer.Option(help=_EVAL["window_length"])] = None,
    stride: Annotated[int | None, typer.Option(help=_EVAL["stride"])] = None,
    dtype: Annotated[str, typer.Option(help=_EVAL["dtype"])] = EvalOptions.dtype,
    device: Annotated[str, typer.Option(help=_EVAL["device"])] = EvalOptions.device,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity per token and bits per byte."""
    options = EvalOptions(
        perplexity=perplexity,
        text_column=text_column,
        window_length=window_length,
        stride=stride,
        dtype=dtype,
        device=device,
    )
    with Bars() as track:
        measured = evaluate(model, options, track)
    if as_json:
        print_json({"model": model, "text": perplexity, **measured.to_dict()})
        return
    print(
        f"perplexity {measured.perplexity:.4f} per token, {measured.bits_per_byte:.4f} bits per byte "
        f"({measured.tokens:,} tokens scored, windows of {measured.window_length}, stride {measured.stride})"
    )
