"""The commands: each calls one flow and prints what came of it. A flow, and torch with it, loads where it is called."""

# ruff: noqa: PLC0415 - so that help and usage errors wait for neither torch nor transformers

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexigpt.cli.console import print_json, show, step_line, wants_line
from flexigpt.cli.effects import refuse_idle
from flexigpt.cli.options import Asked, add_command
from flexigpt.decoding import BenchmarkOptions, ChatOptions, GenerateOptions, SampleOptions
from flexigpt.evaluation import EvalOptions
from flexigpt.export import ExportOptions
from flexigpt.pruning import PRESETS, ExtendOptions, FrontierOptions, PruneOptions
from flexigpt.quantization import QuantizeOptions
from flexigpt.recovery import RecoverOptions
from flexigpt.runtime import InputError
from flexigpt.serving import ServeOptions

if TYPE_CHECKING:
    from flexigpt.pruning import Estimate
    from flexigpt.record import Record
    from flexigpt.weights import Assembly

Source = Annotated[str, typer.Argument(help="Folder or hub name of the source model.")]
Model = Annotated[str, typer.Argument(help="Folder or hub name of a source or compact model.")]
Out = Annotated[Path, typer.Argument(help="Folder to write to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what flexigpt wrote to OUT before.")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs.")]
_DEFAULT = next(iter(PRESETS))
_PRESET = (
    "settings that go together, each of which you can give yourself: default (each MLP keeps its best hidden units, "
    "and what is left is refitted to the calibration text), paper (whole blocks borrow the weights of others, and "
    f"nothing is refitted). [default: {_DEFAULT}]"
)
Preset = Annotated[
    str, typer.Option(help=_PRESET, metavar="NAME", autocompletion=lambda: list(PRESETS), show_default=False)
]


def prune(
    asked: Asked,
    source: Source,
    out: Out,
    preset: Preset = _DEFAULT,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only",
            help="write only the plan, OUT/plan.json, to look at, edit and apply.",
            rich_help_panel="What to prune",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune a source model: a smaller checkpoint, in which little stands in for what was pruned."""
    if preset not in PRESETS:
        raise InputError(f"--preset {preset} is unknown: give {', '.join(PRESETS)}")
    options = asked.options(**PRESETS[preset])
    if plan_only and options.remove:
        raise InputError("--remove makes no plan: leave it out, or leave out --plan-only")
    if plan_only:
        refuse_idle("plan", asked.typed, options)
    from flexigpt.pruning import assemble_pruned, assemble_removed
    from flexigpt.pruning import plan_only as decide
    from flexigpt.record import notes, plan_rows, reserved, write_plan
    from flexigpt.text import shares_of

    inputs = (source, options.plan, *shares_of(options.calibration), options.perplexity)
    with reserved(out, inputs, overwrite), asked.reporting() as track:
        if plan_only:
            plan, record = decide(source, options, track, announced_to(out, track.note))
            write_plan(out, plan, record | {"command": asked.call.command})
            show(plan_rows(plan, record), *notes(record), f"plan written to {out / 'plan.json'}; apply it with --plan")
            return
        reads = options.calibrates or options.perplexity is not None
        given = (source, options, track, announced_to(out, track.note, None if reads else source))
        assemble = assemble_removed if options.remove else assemble_pruned
        with assemble(*given) as (made, _, record):
            _write(asked, out, source, made, record, track)


def frontier(asked: Asked, source: Source, out: Out, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Measure how small a source model can go: perplexity at a ladder of sizes, beside plain removal.

    Each is measured in 8 bits too where torchao is installed: pip install 'flexigpt[quantize]'.
    """
    options = asked.options()
    from flexigpt.cli.chart import chart
    from flexigpt.pruning import frontier as measure
    from flexigpt.record import frontier_rows, frontier_series, reserved, write_frontier
    from flexigpt.text import shares_of

    with (
        reserved(out, (source, *shares_of(options.calibration), options.perplexity), overwrite),
        asked.reporting() as track,
    ):

        def note(measured: "Record") -> None:
            track.draw(chart(frontier_series(measured)))
            point = (measured["source"], *measured["points"])[-1]
            line = f"{point.get('share', 1):.1%}: perplexity {point['perplexity']:.2f}"
            line += f", plain removal {point['removed']['perplexity']:.2f}" if "removed" in point else ""
            track.note(f"{line}, in 8 bits {point['int8']['perplexity']:.2f}" if "int8" in point else line)

        record = measure(source, options, track, note) | {"command": asked.call.command}
        write_frontier(out, record)
    if as_json:
        print_json(record)
        return
    knee = record["points"][record["knee"]]
    show(frontier_rows(record), f"written to {out}; flexigpt report {out} draws it; the model at the knee:")
    show(_command_for(source, knee["parameters"], options))
    if "int8" in knee:
        size, loss = knee["int8"]["bytes"] / 1e6, knee["int8"]["perplexity"]
        show(f"flexigpt quantize OUT OUT-8 --bits 8  # {size:.1f} MB, perplexity {loss:.2f}")


def _command_for(source: str, parameters: int, options: FrontierOptions) -> str:
    texts = [options.calibration] if isinstance(options.calibration, str) else options.calibration
    words = ["flexigpt", "prune", source, "OUT", "--target-size", str(parameters)]
    words += [word for text in texts for word in ("--calibration", text)]
    words += ["--windows", str(options.windows)] if options.windows != FrontierOptions.windows else []
    words += ["--window-length", str(options.window_length)] if options.window_length is not None else []
    words += ["--dtype", options.dtype] if options.dtype != FrontierOptions.dtype else []
    return shlex.join([*words, "--perplexity", options.perplexity])


def extend(asked: Asked, source: Source, out: Out, overwrite: Overwrite = False) -> None:
    """Repeat blocks of a source model: a deeper model for almost no storage."""
    options = asked.options()
    from flexigpt.pruning import assemble_extended
    from flexigpt.record import reserved

    with reserved(out, (source, options.perplexity), overwrite), asked.reporting() as track:
        unread = source if options.perplexity is None else None
        made, _, record = assemble_extended(source, options, track, announced_to(out, track.note, unread))
        _write(asked, out, source, made, record, track)


def announced_to(out: Path, note: Callable[[str], None], unread: str | None = None) -> "Callable[[Estimate], None]":
    """What a flow calls before its work: says what it will take, and refuses a disk too small for it.

    Args:
        out: folder that is written to.
        note: prints a line.
        unread: a source whose tokenizer only writing would open: it is tried now.
    """

    def announce(estimate: "Estimate") -> None:
        from flexigpt.runtime import check_space, default_folder
        from flexigpt.text import check_tokenizer
        from flexigpt.weights import load_tokenizer, read_config

        if unread is not None:
            check_tokenizer(unread, load_tokenizer(unread), read_config(unread))

        check_space(out, estimate.written)
        check_space(default_folder() / "scratch", estimate.scratch, "scratch files in the cache need")
        note(estimate.line())

    return announce


def _write(asked: Asked, out: Path, source: str, assembly: "Assembly", record: "Record", track: Any) -> None:
    """Writes a checkpoint, and prints what became of its blocks, what it cost, and where it lies."""
    from flexigpt.record import result_rows, write_checkpoint
    from flexigpt.report import plan_picture

    config = assembly.model.config
    record = record | {"command": asked.call.command}
    write_checkpoint(out, assembly, record, source=source, extras=plan_picture(config), track=track)
    show(*result_rows(config, record), f"checkpoint written to {out}")


def recover(
    asked: Asked,
    model: Model,
    out: Out,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint of the same, unfinished run.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a compact model back; under torchrun, on many devices."""
    options = asked.options()
    from flexigpt import recovery
    from flexigpt.record import cost_rows

    with asked.reporting() as track:

        def log(values: dict[str, float], steps: int) -> None:
            if wants_line(values, steps):
                track.note(step_line(values, steps))

        command = asked.call.command
        record = recovery.recover(
            model,
            out,
            options,
            resume=resume,
            overwrite=overwrite,
            command=command,
            track=track,
            note=track.note,
            log=log,
        )
    if record is None:
        return
    done = record["recovery"]
    trained = f"{done['trained_parameters']:,} parameters trained at {done['tokens_per_second']:,.0f} tokens/s"
    show(cost_rows(record), trained)
    if "stopped" in done:
        raise InputError(done["stopped"])
    show(f"checkpoint written to {out}")


def export(asked: Asked, model: Model, out: Out, overwrite: Overwrite = False) -> None:
    """Write a compact model in a form that other programs read: transformers, llama.cpp, MLX, ONNX, ExecuTorch."""
    options = asked.options()
    from flexigpt.export import export as write
    from flexigpt.export import export_rows

    record = write(model, out, options, overwrite=overwrite, command=asked.call.command)
    show(export_rows(record), f"{options.to} written to {out}")


def quantize(asked: Asked, model: Model, out: Out, overwrite: Overwrite = False) -> None:
    """Store the linears of a model in 8 or 4 bits a weight; from_pretrained opens it."""
    options = asked.options()
    from flexigpt.quantization import quantize as convert
    from flexigpt.record import cost_rows, reserved, write_checkpoint

    with reserved(out, (model, options.perplexity), overwrite), asked.reporting() as track:
        made, record = convert(model, options, track)
        record |= {"command": asked.call.command}
        write_checkpoint(out, made, record, source=model)
        show(cost_rows(record), f"checkpoint written to {out}")


def inspect(model: Model, as_json: Json = False) -> None:
    """Show the plan, stored and effective parameters, and the bytes of each part."""
    from flexigpt.record import inspect_model, inspection_rows

    inspection = inspect_model(model)
    if as_json:
        print_json(inspection)
    else:
        show(*inspection_rows(inspection))


def evaluate(
    asked: Asked,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Source or compact models, side by side.")],
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="write the result into the first model's folder too: evaluation.json, and its model card."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, benchmark tasks and nearness to the source, of several models side by side."""
    options = asked.options()
    from flexigpt.evaluation import evaluate as measure
    from flexigpt.record import check_recordable, evaluation_rows, record_evaluation

    if record:
        check_recordable(models[0])
    with asked.reporting() as track:
        evaluation = measure(models, options, track, track.note) | {"command": asked.call.command}
    if record:
        record_evaluation(models[0], evaluation)
    if as_json:
        print_json(evaluation)
    else:
        show(evaluation_rows(evaluation))


def generate(asked: Asked, model: Model) -> None:
    """Continue or answer a prompt; the text appears as it is made."""
    options = asked.options()
    from flexigpt.decoding import generate as write

    notes: list[str] = []
    write(model, options, lambda piece: print(piece, end="", flush=True), notes.append)
    print()
    for line in notes:
        print(line, file=sys.stderr)


def chat(asked: Asked, model: Model) -> None:
    """Talk with a model in the terminal: /reset begins anew, Ctrl-C stops an answer, Ctrl-D ends."""
    options = asked.options()
    from flexigpt.cli.chat import converse
    from flexigpt.decoding import Conversation

    converse(Conversation(model, options))


def serve(asked: Asked, model: Model) -> None:
    """Serve a model to OpenAI's clients: chat and completions, streamed or whole."""
    options = asked.options()
    from flexigpt.serving import serve as listen

    listen(model, options, lambda line: print(line, file=sys.stderr, flush=True))


def sample(
    asked: Asked,
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write, OUT.jsonl.")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the same, unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT, or an unfinished run.")] = False,
) -> None:
    """Have a model write text of its own: to calibrate it on, or to train what became of it, without a data set."""
    options = asked.options()
    from flexigpt.decoding import sample as write

    with asked.reporting() as track:
        written = write(model, out, options, resume=resume, overwrite=overwrite, track=track)
    speed = f"{written['tokens_per_second']:,.0f} tokens/s"
    show(f"{written['documents']:,} documents of {written['tokens']:,} tokens at {speed} written to {out}")


def benchmark(asked: Asked, model: Model, as_json: Json = False) -> None:
    """Time a model and its variants, against its source where one is given: prefill, decoding, memory, storage."""
    options = asked.options()
    from flexigpt.decoding import benchmark as measure
    from flexigpt.decoding import benchmark_rows

    with asked.reporting() as track:
        result = measure(model, options, track) | {"command": asked.call.command}
    if as_json:
        print_json(result)
    else:
        show(benchmark_rows(result))


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Checkpoint or plan folders that flexigpt wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="page to write, or folder for report.html; default: DIR.", metavar="PAGE.html|FOLDER"),
    ] = None,
) -> None:
    """Draw what was recorded: one HTML page that needs nothing else, and its figures as PNG files beside it."""
    from flexigpt.record import FIGURES
    from flexigpt.report import report as draw

    written = draw(folders, out)
    show(f"report written to {written}, its figures to {written.parent / FIGURES}")


def card(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint that flexigpt wrote.")],
    repository: Annotated[
        str | None, typer.Argument(help="Its name on the hub, OWNER/NAME. [default: what the card says already]")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="licence, as the hub calls it. [default: the source's]", metavar="ID", show_default=False),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="the source's name on the hub. [default: as known]", metavar="OWNER/NAME", show_default=False
        ),
    ] = None,
) -> None:
    """Write a checkpoint's model card again, with its name on the hub, pictures and what was measured since."""
    from flexigpt.record import write_card
    from flexigpt.report import card_pictures

    write_card(model, repository, license=license, base_model=base_model, draw=card_pictures)
    show(f"model card written to {model / 'README.md'}")


def add_commands(app: typer.Typer) -> None:
    """Adds every command to the app."""
    data = "examples/novel16"
    text, measured = f"--calibration {data}/calibration.jsonl", f"--perplexity {data}/validation.jsonl"
    for name, function, options, example in (
        ("prune", prune, PruneOptions, f"flexigpt prune {data} out/small --ratio 0.3 {text} --window-length 256"),
        (
            "frontier",
            frontier,
            FrontierOptions,
            f"flexigpt frontier {data} out/sizes {text} --perplexity {data}/validation.jsonl",
        ),
        ("extend", extend, ExtendOptions, f"flexigpt extend {data} out/deep --blocks 4:12 --times 2"),
        ("recover", recover, RecoverOptions, "flexigpt recover out/small out/again --data my-text.jsonl --tokens 10M"),
        ("quantize", quantize, QuantizeOptions, "flexigpt quantize out/small out/small-8 --bits 8"),
        ("eval", evaluate, EvalOptions, f"flexigpt eval out/small {data} {measured}"),
        ("generate", generate, GenerateOptions, 'flexigpt generate out/small --prompt "It was a dark"'),
        ("chat", chat, ChatOptions, "flexigpt chat out/small"),
        ("serve", serve, ServeOptions, "flexigpt serve out/small"),
        ("sample", sample, SampleOptions, "flexigpt sample meta-llama/Llama-3.2-1B own.jsonl --tokens 1M"),
        ("benchmark", benchmark, BenchmarkOptions, f"flexigpt benchmark out/small --against {data}"),
        ("export", export, ExportOptions, "flexigpt export out/small out/stock --to stock"),
        ("inspect", inspect, None, "flexigpt inspect out/small"),
        ("report", report, None, "flexigpt report out/small out/again --out report.html"),
        ("card", card, None, "flexigpt card out/small me/small-llama"),
    ):
        add_command(app, name, function, options, example=example)
