"""Commands of baselines and training: functions that `cli.py` registers; no logic."""

from pathlib import Path
from typing import Annotated

import typer

from flexigpt.baselines import BaselineOptions, assemble_baseline
from flexigpt.baselines import expected as baseline_expected
from flexigpt.checkpoint import load_tokenizer
from flexigpt.console import (
    MAX_SHARD_SIZE,
    OVERWRITE,
    Bars,
    block_numbers,
    field_help,
    parse_shard_size,
    stdout,
    tell_estimate,
    write_and_show,
)
from flexigpt.distributed import launched_rank
from flexigpt.errors import InputError
from flexigpt.recover import recover
from flexigpt.recover_options import RecoverOptions
from flexigpt.selection import BLOCK_SCORES, REMOVAL_SCORE
from flexigpt.tables import cost_table, notes
from flexigpt.trainable import TRAIN
from flexigpt.training import PRECISIONS
from flexigpt.writing import check_output

_BASELINE, _RECOVER = field_help(BaselineOptions), field_help(RecoverOptions)


def baseline_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder or hub name of the source model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the shorter model's checkpoint to.")],
    ratio: Annotated[float | None, typer.Option(help=_BASELINE["ratio"])] = None,
    blocks: Annotated[str | None, typer.Option(help=_BASELINE["blocks"], metavar="12,13,...")] = None,
    target_size: Annotated[str | None, typer.Option(help=_BASELINE["target_size"], metavar="4.8B|3.2GB")] = None,
    calibration: Annotated[str | None, typer.Option(help=_BASELINE["calibration"])] = None,
    text_column: Annotated[str | None, typer.Option(help=_BASELINE["text_column"])] = None,
    windows: Annotated[int | None, typer.Option(help=_BASELINE["windows"])] = None,
    window_length: Annotated[int | None, typer.Option(help=_BASELINE["window_length"])] = None,
    block_score: Annotated[
        str | None, typer.Option(help=_BASELINE["block_score"], metavar="|".join((*BLOCK_SCORES, REMOVAL_SCORE)))
    ] = None,
    refit_kept: Annotated[bool, typer.Option("--refit-kept", help=_BASELINE["refit_kept"])] = False,
    perplexity: Annotated[str | None, typer.Option(help=_BASELINE["perplexity"])] = None,
    dtype: Annotated[str, typer.Option(help=_BASELINE["dtype"])] = BaselineOptions.dtype,
    device: Annotated[str, typer.Option(help=_BASELINE["device"])] = BaselineOptions.device,
    memory: Annotated[str | None, typer.Option(help=_BASELINE["memory"], metavar="4GiB")] = None,
    cache: Annotated[Path | None, typer.Option(help=_BASELINE["cache"])] = None,
    seed: Annotated[int | None, typer.Option(help=_BASELINE["seed"])] = None,
    max_shard_size: Annotated[str | None, typer.Option(help=MAX_SHARD_SIZE)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Remove blocks without a stand-in, to compare with: an ordinary, shorter model."""
    options = BaselineOptions(
        ratio=ratio,
        blocks=None if blocks is None else block_numbers(blocks),
        target_size=target_size,
        calibration=calibration,
        text_column=text_column,
        windows=windows,
        window_length=window_length,
        block_score=block_score,
        refit_kept=refit_kept,
        perplexity=perplexity,
        dtype=dtype,
        device=device,
        memory=memory,
        cache=cache,
        seed=seed,
    )
    check_output(out, (source, calibration, perplexity), overwrite)
    shard_bytes = parse_shard_size(max_shard_size)
    told = baseline_expected(source, options)
    load_tokenizer(source)
    tell_estimate(told, out, cache)
    with Bars() as track:
        assembly, _, record = assemble_baseline(source, options, track)
        write_and_show(out, source, assembly, record | {"command": context.obj}, shard_bytes, track)


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
