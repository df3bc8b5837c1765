"""What recovery trains, on what, and how. No torch."""

import math
from dataclasses import dataclass
from typing import Literal

from flexigpt.runtime import InputError, check_options, flag, option, parse_tokens
from flexigpt.text import TextNames, shares_of

AUTO, DEFAULT_RATE, _RATES = "auto", 4e-3, "above 0 and below 1000"

_TEXT, _TRAINED, _HOW = "What to train on", "What is trained", "How it is trained"


def parse_rate(lr: float | str) -> float | str:
    """A learning rate, or `auto`.

    Raises:
        InputError: anything else.
    """
    if lr == AUTO:
        return lr
    try:
        value = float(lr)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e3:
        raise InputError(f"--lr {lr} is out of range: give a number {_RATES}, or {AUTO}")
    return value


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """What to train, on what, and how.

    Attributes:
        data: text to train on: a .txt, .jsonl, .jsonl.gz or .parquet file, a folder or pattern of such files, or
            NAME[:CONFIG][@SPLIT] of a data set on the hub, which is streamed; with #COLUMN at its end where the text is
            not in the column `text`; given several times, a mixture in equal parts, or with =SHARE of the tokens.
        tokens: tokens to train on: 1B, 600M, 100K or a number; rounded down to whole steps.
        perplexity: held-out text to measure perplexity on before, ten times during, and after; default: none.
        epochs: times that the text may be read, each time in another order.
        window_length: tokens in a window; default: the model's context, at most 2048.
        train: what is trained: what is the replicas' own, with replicas+kept also LoRA on the kept blocks, which is
            merged into them at the end.
        lora_rank: rank of the LoRA on kept blocks, less on linears too narrow for it; default: the replicas' own, or
            hidden size / 16 without replicas.
        teacher: folder or hub name of the source model, to distill from; default: none.
        distill_weight: of the divergence from the teacher, beside 1 minus it of the cross-entropy.
        draft_weight: of the divergence of the draft (the model without its replicas) from the whole model, beside the
            loss of the latter: speculative decoding then accepts more. At 0 the draft is not trained.
        lr: learning rate after warm-up; a cosine to zero follows. auto finds it: a few rates are tried for 5 % of the
            tokens each, beside the run.
        replica_lr: the same for what is the replicas' own, beside LoRA or all else; default: a tenth of lr where they
            were fitted to calibration text and LoRA, which starts at nothing, is trained beside them; otherwise lr.
        warmup: share of the steps over which the learning rate rises.
        batch_tokens: tokens in a step, over all processes; default: 480 windows, as in the paper.
        precision: to compute in; what is trained is held in float32; default: bf16 on a GPU, fp32 on a CPU.
        activation_checkpointing: whether activations are computed again in the backward pass, to save memory.
        fsdp: whether parameters are sharded over the processes (FSDP2); needs torchrun.
        report_to: tensorboard, wandb, trackio or others that accelerate knows, with commas between; default: none.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        seed: shuffles the text and draws the LoRA's random factors.
    """

    data: TextNames = option("cerebras/SlimPajama-627B@train", group=_TEXT, everyday=True, metavar="FILE|FOLDER|NAME")
    tokens: str = option("1B", group=_TEXT, everyday=True, metavar="600M|100K")
    perplexity: str | None = option(None, group=_TEXT, metavar="FILE|NAME")
    epochs: int = option(1, group=_TEXT, least=1)
    window_length: int | None = option(None, group=_TEXT)
    train: Literal["replicas+kept", "replicas", "all"] = option("replicas+kept", group=_TRAINED)
    lora_rank: int | None = option(None, group=_TRAINED, least=1)
    teacher: str | None = option(None, group=_HOW, everyday=True, metavar="SOURCE")
    distill_weight: float = option(0.5, group=_HOW)
    draft_weight: float = option(0.0, group=_HOW)
    lr: float | str = option(DEFAULT_RATE, group=_HOW, everyday=True, metavar="X|auto", parse=parse_rate)
    replica_lr: float | None = option(None, group=_HOW)
    warmup: float = option(0.03, group=_HOW, command=False)
    batch_tokens: int | None = option(None, group=_HOW, least=1)
    precision: Literal["fp32", "bf16", "fp16"] | None = option(None)
    activation_checkpointing: bool = option(False)
    fsdp: bool = option(False)
    report_to: str | None = option(None, metavar="NAME,...")
    device: str = option("auto")
    seed: int = option(0)

    def __post_init__(self) -> None:
        check_options(self)
        parse_tokens(self.tokens)
        shares_of(self.data)
        object.__setattr__(self, "lr", parse_rate(self.lr))
        share = "above 0, at most 1"
        for name, fits, wanted in (
            ("replica_lr", self.replica_lr is None or 0 < self.replica_lr < 1e3, _RATES),
            ("warmup", 0 <= self.warmup < 1, "of 0 or more, below 1"),
            ("distill_weight", 0 < self.distill_weight <= 1, share),
            ("draft_weight", 0 <= self.draft_weight <= 1, "of 0 to 1"),
        ):
            if not fits:
                raise InputError(f"{flag(name)} {getattr(self, name)} is out of range: give a number {wanted}")
