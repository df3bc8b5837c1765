"""Commands -> functions; no logic."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

from flexigpt.cli.commands import (
    benchmark_command,
    eval_command,
    inspect_command,
    recover_command,
    report_command,
)
from flexigpt.cli.console import OVERWRITE, Bars, stdout, tell_estimate, write_and_show
from flexigpt.cli.options import block_numbers, field_help
from flexigpt.decoding import GenerateOptions, generate
from flexigpt.pruning import (
    PRESETS,
    ExtendOptions,
    PruneOptions,
    assemble_extended,
    assemble_pruned,
    assemble_removed,
    plan_only,
)
from flexigpt.record import notes, plan_table, write_plan
from flexigpt.runtime import InputError, check_output, tells

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# typer brings its own copy of click or depends on it, by version; either way this is its base of usage errors.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_INTERRUPTED = 130  # what typer returns after KeyboardInterrupt

_PRUNE, _EXTEND = field_help(PruneOptions), field_help(ExtendOptions)

_GENERATE = field_help(GenerateOptions)


def preset_values(context: typer.Context, preset: str) -> dict[str, Any]:
    """What a preset sets of what was not given.

    Raises:
        InputError: an unknown preset.
    """
    if preset not in PRESETS:
        raise InputError(f"--preset {preset} is unknown: give {', '.join(PRESETS)}")
    given = {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
    return {field: value for field, value in PRESETS[preset].items() if field not in given}


def _print_version(asked: bool) -> None:
    if asked:
        print(f"flexigpt {version('flexigpt')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Smaller large language models by sharing blocks."""


@app.command("prune")
def prune_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder or hub name of the source model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the compact checkpoint to.")],
    ratio: Annotated[float | None, typer.Option(help=_PRUNE["ratio"])] = None,
    blocks: Annotated[str | None, typer.Option(help=_PRUNE["blocks"], metavar="12,13,...")] = None,
    target_size: Annotated[str | None, typer.Option(help=_PRUNE["target_size"], metavar="4.8B|3.2GB")] = None,
    preset: Annotated[str, typer.Option(help="Settings that go together.", metavar="|".join(PRESETS))] = "fitted",
    plan: Annotated[Path | None, typer.Option(help=_PRUNE["plan"])] = None,
    plan_only_: Annotated[
        bool, typer.Option("--plan-only", help="Write only the plan, OUT/plan.json, to look at, edit and apply.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help=_PRUNE["remove"])] = False,
    rank: Annotated[str | None, typer.Option(help=_PRUNE["rank"], metavar="12|3.7%")] = None,
    calibration: Annotated[str, typer.Option(help=_PRUNE["calibration"])] = PruneOptions.calibration,
    windows: Annotated[int, typer.Option(help=_PRUNE["windows"])] = PruneOptions.windows,
    window_length: Annotated[int | None, typer.Option(help=_PRUNE["window_length"])] = None,
    block_score: Annotated[str, typer.Option(help=_PRUNE["block_score"])] = PruneOptions.block_score,
    refit_kept: Annotated[bool, typer.Option(help=_PRUNE["refit_kept"])] = PruneOptions.refit_kept,
    base_distance: Annotated[str, typer.Option(help=_PRUNE["base_distance"])] = PruneOptions.base_distance,
    adapter_init: Annotated[str, typer.Option(help=_PRUNE["adapter_init"])] = PruneOptions.adapter_init,
    output_norm: Annotated[str, typer.Option(help=_PRUNE["output_norm"])] = str(PruneOptions.output_norm),
    perplexity: Annotated[str | None, typer.Option(help=_PRUNE["perplexity"])] = None,
    dtype: Annotated[str, typer.Option(help=_PRUNE["dtype"])] = PruneOptions.dtype,
    device: Annotated[str, typer.Option(help=_PRUNE["device"])] = PruneOptions.device,
    memory: Annotated[str | None, typer.Option(help=_PRUNE["memory"], metavar="4GiB")] = None,
    seed: Annotated[int, typer.Option(help=_PRUNE["seed"])] = PruneOptions.seed,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Prune a source model into a compact model and write its checkpoint."""
    fields = {name: value for name, value in context.params.items() if name in PruneOptions.__dataclass_fields__}
    fields |= preset_values(context, preset) | {"blocks": None if blocks is None else block_numbers(blocks)}
    options = PruneOptions(**fields)
    check_output(out, (source, plan, calibration, perplexity), overwrite)
    command = {"command": context.obj}
    announce = partial(tell_estimate, out=out)
    with Bars() as track:
        if plan_only_:
            decided, record = plan_only(source, options, track, announce)
            write_plan(out, decided, record | command)
        elif remove:
            assembly, _, record = assemble_removed(source, options, track, announce)
            write_and_show(out, source, assembly, record | command, track)
        else:
            with assemble_pruned(source, options, track, announce) as (assembly, _, record):
                write_and_show(out, source, assembly, record | command, track)
    if plan_only_:
        stdout.print(plan_table(decided, record))
        for note in notes(record):
            print(note)
        print(f"plan written to {out / 'plan.json'}; apply it with --plan")


@app.command("extend")
def extend_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder or hub name of the source model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the compact checkpoint to.")],
    blocks: Annotated[str, typer.Option(help=_EXTEND["blocks"], metavar="4:18|2:6,10:14")],
    times: Annotated[int, typer.Option(help=_EXTEND["times"])] = ExtendOptions.times,
    pattern: Annotated[str, typer.Option(help=_EXTEND["pattern"])] = ExtendOptions.pattern,
    rank: Annotated[int | None, typer.Option(help=_EXTEND["rank"])] = None,
    output_norm: Annotated[float, typer.Option(help=_EXTEND["output_norm"])] = ExtendOptions.output_norm,
    perplexity: Annotated[str | None, typer.Option(help=_EXTEND["perplexity"])] = None,
    window_length: Annotated[int | None, typer.Option(help=_EXTEND["window_length"])] = None,
    dtype: Annotated[str, typer.Option(help=_EXTEND["dtype"])] = ExtendOptions.dtype,
    device: Annotated[str, typer.Option(help=_EXTEND["device"])] = ExtendOptions.device,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Repeat blocks of a source model: a deeper model for almost no storage."""
    fields = {name: value for name, value in context.params.items() if name in ExtendOptions.__dataclass_fields__}
    options = ExtendOptions(**fields)
    check_output(out, (source, perplexity), overwrite)
    with Bars() as track:
        assembly, _, record = assemble_extended(source, options, track, partial(tell_estimate, out=out))
        write_and_show(out, source, assembly, record | {"command": context.obj}, track)


app.command("recover")(recover_command)

app.command("inspect")(inspect_command)

app.command("eval")(eval_command)

app.command("benchmark")(benchmark_command)

app.command("report")(report_command)


@app.command("generate")
def generate_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a source or compact model.")],
    prompt: Annotated[str, typer.Option(help=_GENERATE["prompt"])],
    max_new_tokens: Annotated[int, typer.Option(help=_GENERATE["max_new_tokens"])] = GenerateOptions.max_new_tokens,
    temperature: Annotated[float | None, typer.Option(help=_GENERATE["temperature"])] = None,
    top_p: Annotated[float | None, typer.Option(help=_GENERATE["top_p"])] = None,
    seed: Annotated[int | None, typer.Option(help=_GENERATE["seed"])] = None,
    speculative: Annotated[bool, typer.Option("--speculative", help=_GENERATE["speculative"])] = False,
    draft_length: Annotated[int | None, typer.Option(help=_GENERATE["draft_length"])] = None,
    draft_blocks: Annotated[str | None, typer.Option(help=_GENERATE["draft_blocks"], metavar="3,4,...")] = None,
    prompt_lookup: Annotated[int | None, typer.Option(help=_GENERATE["prompt_lookup"])] = None,
    materialize: Annotated[bool, typer.Option("--materialize", help=_GENERATE["materialize"])] = False,
    dtype: Annotated[str, typer.Option(help=_GENERATE["dtype"])] = GenerateOptions.dtype,
    device: Annotated[str, typer.Option(help=_GENERATE["device"])] = GenerateOptions.device,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    options = GenerateOptions(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        speculative=speculative,
        draft_length=draft_length,
        draft_blocks=None if draft_blocks is None else block_numbers(draft_blocks, "--draft-blocks"),
        prompt_lookup=prompt_lookup,
        materialize=materialize,
        dtype=dtype,
        device=device,
    )
    statistics = generate(model, options, lambda piece: print(piece, end="", flush=True))
    print()
    if statistics is not None:
        print(statistics.line(), file=sys.stderr)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Bad input and interruption: one line on stderr and exit code 2."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("datasets", "huggingface_hub", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, standalone_mode=False, obj=shlex.join(["flexigpt", *arguments]))
        sys.stdout.flush()
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except InputError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(error.format_message())
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written")
    except OSError as error:  # of stdout, a closed pipe or a full disk: files have messages of their own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush into it once more
        _fail(f"the output cannot be printed: {error.strerror}")
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> None:
    if message and tells():  # a bare `flexigpt` has printed its help, and that is all
        print(f"flexigpt: {message}", file=sys.stderr)
    sys.exit(2)
