"""Commands -> functions; no logic."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

from flexigpt.cli.commands import (
    baseline_command,
    benchmark_command,
    eval_command,
    inspect_command,
    recover_command,
    report_command,
)
from flexigpt.cli.console import MAX_SHARD_SIZE, OVERWRITE, Bars, stdout, tell_estimate, write_and_show
from flexigpt.cli.options import block_numbers, field_help, parse_shard_size
from flexigpt.decoding import GenerateOptions, generate
from flexigpt.pruning import (
    BASE_DISTANCES,
    BLOCK_SCORES,
    DEFAULT_PRESET,
    GREEDY_SCORES,
    PATTERNS,
    PRESETS,
    REPLACEMENT_SCORE,
    ExtendOptions,
    PruneOptions,
    assemble_extended,
    assemble_pruned,
    can_refit,
    extended_bytes,
    plan_only,
)
from flexigpt.pruning import expected as prune_expected
from flexigpt.record import notes, plan_rows, write_plan
from flexigpt.replicas import ADAPTER_INITS
from flexigpt.runtime import InputError, check_output, check_space, tells
from flexigpt.weights import load_tokenizer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# typer brings its own copy of click or depends on it, by version; either way this is its base of usage errors.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_INTERRUPTED = 130  # what typer returns after KeyboardInterrupt

_SCORES = "|".join((*BLOCK_SCORES, *GREEDY_SCORES))

_PRUNE, _EXTEND = field_help(PruneOptions), field_help(ExtendOptions)

_GENERATE = field_help(GenerateOptions)


def is_given(context: typer.Context, field: str) -> bool:
    """Whether the user gave that setting."""
    return getattr(context.get_parameter_source(field), "name", "") != "DEFAULT"


def preset_has(field: str, preset: str | None) -> Any:
    """What a preset, or the default one, sets a field to; None: it does not."""
    return PRESETS.get(preset or DEFAULT_PRESET, {}).get(field)


def preset_values(context: typer.Context, preset: str | None, idle: dict[str, bool]) -> dict[str, Any]:
    """What a preset sets of what was not given.

    Args:
        context: knows what was given.
        preset: a key of PRESETS; None: the default.
        idle: settings that have no effect beside those given, or on this source.

    Raises:
        InputError: an unknown preset; one that is asked for and sets nothing here.
    """
    name = preset or DEFAULT_PRESET
    if name not in PRESETS:
        raise InputError(f"--preset {name} is unknown: give {', '.join(PRESETS)}")
    values = {
        field: value for field, value in PRESETS[name].items() if not idle.get(field) and not is_given(context, field)
    }
    if preset and PRESETS[name] and not values:
        raise InputError(f"--preset {name} has no effect, since all that it sets is given: leave it out")
    return values


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
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings that go together, where they are not given and have an effect: fitted, to the calibration "
            "text (--adapter-init block-output, --spread-rank, --no-output-norm, --base-scale, --refit-kept); "
            "thorough, the same and --block-score replacement-perplexity; paper, the paper's recipe, all as given "
            "below; default: fitted.",
            metavar="|".join(PRESETS),
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help=_PRUNE["plan"])] = None,
    plan_only_: Annotated[
        bool, typer.Option("--plan-only", help="Write only the plan, OUT/plan.json, to look at, edit and apply.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help=_PRUNE["rank"])] = None,
    adapter_budget: Annotated[str | None, typer.Option(help=_PRUNE["adapter_budget"], metavar="3.7%")] = None,
    spread_rank: Annotated[bool, typer.Option(help=_PRUNE["spread_rank"])] = PruneOptions.spread_rank,
    calibration: Annotated[str | None, typer.Option(help=_PRUNE["calibration"])] = None,
    text_column: Annotated[str | None, typer.Option(help=_PRUNE["text_column"])] = None,
    windows: Annotated[int | None, typer.Option(help=_PRUNE["windows"])] = None,
    window_length: Annotated[int | None, typer.Option(help=_PRUNE["window_length"])] = None,
    block_score: Annotated[str | None, typer.Option(help=_PRUNE["block_score"], metavar=_SCORES)] = None,
    refit_kept: Annotated[bool, typer.Option(help=_PRUNE["refit_kept"])] = False,
    base_distance: Annotated[
        str | None, typer.Option(help=_PRUNE["base_distance"], metavar="|".join(BASE_DISTANCES))
    ] = None,
    compare_distances: Annotated[
        str | None, typer.Option(help=_PRUNE["compare_distances"], metavar="full-rank,frobenius")
    ] = None,
    align: Annotated[bool, typer.Option("--align", help=_PRUNE["align"])] = PruneOptions.align,
    adapter_init: Annotated[
        str, typer.Option(help=_PRUNE["adapter_init"], metavar="|".join(ADAPTER_INITS))
    ] = PruneOptions.adapter_init,
    norm_init: Annotated[str | None, typer.Option(help=_PRUNE["norm_init"], metavar="0.05|fitted")] = None,
    output_norm: Annotated[bool, typer.Option(help=_PRUNE["output_norm"])] = PruneOptions.output_norm,
    base_scale: Annotated[bool, typer.Option(help=_PRUNE["base_scale"])] = PruneOptions.base_scale,
    perplexity: Annotated[str | None, typer.Option(help=_PRUNE["perplexity"])] = None,
    dtype: Annotated[str, typer.Option(help=_PRUNE["dtype"])] = PruneOptions.dtype,
    device: Annotated[str, typer.Option(help=_PRUNE["device"])] = PruneOptions.device,
    memory: Annotated[str | None, typer.Option(help=_PRUNE["memory"], metavar="4GiB")] = None,
    cache: Annotated[Path | None, typer.Option(help=_PRUNE["cache"])] = None,
    seed: Annotated[int | None, typer.Option(help=_PRUNE["seed"])] = None,
    max_shard_size: Annotated[str | None, typer.Option(help=MAX_SHARD_SIZE)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Prune a source model into a compact model and write its checkpoint."""
    idle = {"block_score": blocks is not None or plan is not None, "output_norm": norm_init is not None}
    idle["spread_rank"] = plan is not None
    score = block_score or preset_has("block_score", preset)
    idle["refit_kept"] = plan_only_ or not can_refit(source)
    if plan_only_ and (idle["block_score"] or score != REPLACEMENT_SCORE):  # no replica is made
        idle |= dict.fromkeys(("adapter_init", "output_norm"), True)
        asked = spread_rank if is_given(context, "spread_rank") else preset_has("spread_rank", preset)
        idle["base_scale"] = not asked  # by which it is spread
    by_preset = preset_values(context, preset, idle)
    given: dict[str, Any] = {
        "block_score": block_score,
        "refit_kept": refit_kept,
        "adapter_init": adapter_init,
        "spread_rank": spread_rank,
        "output_norm": output_norm,
        "base_scale": base_scale,
    }
    options = PruneOptions(
        **given | by_preset,
        ratio=ratio,
        blocks=None if blocks is None else block_numbers(blocks),
        target_size=target_size,
        plan=plan,
        rank=rank,
        adapter_budget=adapter_budget,
        calibration=calibration,
        text_column=text_column,
        windows=windows,
        window_length=window_length,
        base_distance=base_distance,
        compare_distances=None if compare_distances is None else compare_distances.split(","),
        align=align,
        norm_init=norm_init,
        perplexity=perplexity,
        dtype=dtype,
        device=device,
        memory=memory,
        cache=cache,
        seed=seed,
    )
    check_output(out, (source, plan, calibration, perplexity), overwrite)
    if plan_only_ and max_shard_size is not None:
        raise InputError("--max-shard-size has no effect with --plan-only, which writes no weights: leave it out")
    shard_bytes = parse_shard_size(max_shard_size)
    command = {"command": context.obj}
    if plan_only_:
        tell_estimate(prune_expected(source, options, plan_only=True), out, cache)
        with Bars() as track:
            decided, record = plan_only(source, options, track)
        write_plan(out, decided, record | command)
        stdout.print(plan_rows(decided, record).terminal())
        for note in notes(record):
            print(note)
        print(f"plan written to {out / 'plan.json'}; apply it with --plan")
        return
    told = prune_expected(source, options)
    load_tokenizer(source)  # a source without one is told now, not after the work
    tell_estimate(told, out, cache)
    with Bars() as track, assemble_pruned(source, options, track) as (assembly, _, record):
        write_and_show(out, source, assembly, record | command, shard_bytes, track)


@app.command("extend")
def extend_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder or hub name of the source model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the compact checkpoint to.")],
    blocks: Annotated[str, typer.Option(help=_EXTEND["blocks"], metavar="4:18|2:6,10:14")],
    times: Annotated[int, typer.Option(help=_EXTEND["times"])] = ExtendOptions.times,
    pattern: Annotated[str, typer.Option(help=_EXTEND["pattern"], metavar="|".join(PATTERNS))] = ExtendOptions.pattern,
    rank: Annotated[int | None, typer.Option(help=_EXTEND["rank"])] = None,
    norm_init: Annotated[float | None, typer.Option(help=_EXTEND["norm_init"])] = None,
    perplexity: Annotated[str | None, typer.Option(help=_EXTEND["perplexity"])] = None,
    text_column: Annotated[str | None, typer.Option(help=_EXTEND["text_column"])] = None,
    window_length: Annotated[int | None, typer.Option(help=_EXTEND["window_length"])] = None,
    dtype: Annotated[str, typer.Option(help=_EXTEND["dtype"])] = ExtendOptions.dtype,
    device: Annotated[str, typer.Option(help=_EXTEND["device"])] = ExtendOptions.device,
    seed: Annotated[int, typer.Option(help=_EXTEND["seed"])] = ExtendOptions.seed,
    max_shard_size: Annotated[str | None, typer.Option(help=MAX_SHARD_SIZE)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Repeat blocks of a source model: a deeper model for almost no storage."""
    options = ExtendOptions(
        blocks=blocks,
        times=times,
        pattern=pattern,
        rank=rank,
        norm_init=norm_init,
        perplexity=perplexity,
        text_column=text_column,
        window_length=window_length,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    check_output(out, (source, perplexity), overwrite)
    shard_bytes = parse_shard_size(max_shard_size)
    check_space(out, extended_bytes(source, options))
    load_tokenizer(source)
    with Bars() as track:
        assembly, _, record = assemble_extended(source, options, track)
        write_and_show(out, source, assembly, record | {"command": context.obj}, shard_bytes, track)


app.command("baseline")(baseline_command)

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
