"""What recovery trains, on what, and how."""

from dataclasses import dataclass

import torch

from flexigpt.record import Record, find_in
from flexigpt.recovery.tracking import check_trackers
from flexigpt.recovery.trainable import TRAIN, USES_LORA
from flexigpt.recovery.training import PRECISIONS, Settings
from flexigpt.runtime import InputError, World, check_seed, flag, launched, parse_tokens

# Sequences in a step (appendix A).
_PAPER_BATCH = 480

# Tokens in one forward pass of one process, where the user does not say: what fills a GPU, what fits a CPU's caches.
_MICRO_BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}

_DISTILL_WEIGHT = 0.5

# What was fitted wants less than LoRA: on novel16 a thirtieth and a tenth are as good, a third is worse.
_FITTED_SHARE = 0.1

DEFAULT_DATA = "cerebras/SlimPajama-627B@train"


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """What to train, on what, and how.

    None stands for the default that a field's description names. A field that is given but has no effect is refused.

    Attributes:
        data: text to train on: a .txt, .jsonl, .jsonl.gz or .parquet file, a folder or pattern of such files, or
            NAME[:CONFIG][@SPLIT] of a data set on the hub, which is streamed; with #COLUMN behind it where the text is
            not in the column `text`.
        tokens: tokens to train on: 1B, 600M, 100K or a number; rounded down to whole steps.
        epochs: times that the text may be read, each time in another order.
        window_length: tokens in a window; default: the model's context, at most 2048.
        batch_tokens: tokens in a step, over all processes; default: 480 windows, as in the paper.
        micro_batch: windows in one forward pass of one process; default: as many as make 8192 tokens on a GPU, 1024 on
            a CPU.
        lr: learning rate after warm-up; a cosine to zero follows.
        replica_lr: the same for the replicas' own adapters, output norms and base scales, beside LoRA or all else;
            default: a tenth of lr where they were fitted to calibration text and LoRA, which starts at nothing, is
            trained beside them; otherwise lr.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: AdamW's.
        clip: norm that gradients are clipped to.
        train: replicas+kept (adapters and output norms of the replicas, and LoRA on the kept blocks that is merged into
            them at the end), replicas, or all.
        lora_rank: rank of the LoRA on kept blocks; default: the replicas' own, or hidden size / 16 without replicas.
        match: compact model whose recovery trains as many parameters: gives a model without replicas LoRA of that
            size.
        precision: to compute in: fp32, bf16 or fp16; what is trained is held in float32; default: bf16 on a GPU, fp32
            on a CPU.
        activation_checkpointing: whether activations are computed again in the backward pass, to save memory.
        teacher: folder or hub name of the source model, to distill from; default: none.
        distill_weight: of the divergence from the teacher, beside 1 minus it of the cross-entropy; default: 0.5.
        draft_weight: of the divergence of the draft (the model without its replicas) from the whole model, beside the
            loss of the latter: speculative decoding then accepts more; default: the draft is not trained.
        perplexity: held-out text to measure perplexity on before, during and after; default: none.
        eval_every: steps between two such measurements; default: a tenth of the run.
        save_every: steps between two checkpoints to resume from.
        report_to: tensorboard, wandb, trackio or others that accelerate knows, with commas between; default: none.
        fsdp: whether parameters are sharded over the processes (FSDP2); needs torchrun.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        seed: shuffles the text and draws the LoRA's random factors.
    """

    data: str = DEFAULT_DATA
    tokens: str = "1B"
    epochs: int = 1
    window_length: int | None = None
    batch_tokens: int | None = None
    micro_batch: int | None = None
    lr: float = 4e-3
    replica_lr: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    train: str = "replicas+kept"
    lora_rank: int | None = None
    match: str | None = None
    precision: str | None = None
    activation_checkpointing: bool = False
    teacher: str | None = None
    distill_weight: float | None = None
    draft_weight: float | None = None
    perplexity: str | None = None
    eval_every: int | None = None
    save_every: int = 20
    report_to: str | None = None
    fsdp: bool = False
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("train", self.train, TRAIN), ("precision", self.precision, PRECISIONS)):
            if value is not None and value not in known:
                raise InputError(f"--{name} {value} is unknown: give {', '.join(known)}")
        for name in ("epochs", "batch_tokens", "micro_batch", "lora_rank", "eval_every", "save_every"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InputError(f"{flag(name)} {number} is too small: give at least 1")
        ranges = {"lr": (0, 1e3), "warmup": (-1e-9, 1), "weight_decay": (-1e-9, 1e3), "clip": (0, 1e9)}
        if self.replica_lr is not None:
            ranges["replica_lr"] = ranges["lr"]
        for name, (low, high) in ranges.items():
            if not low < getattr(self, name) < high:
                raise InputError(f"{flag(name)} {getattr(self, name)} is out of range: see --help")
        for name in ("distill_weight", "draft_weight"):
            weight = getattr(self, name)
            if weight is not None and not 0 < weight <= 1:
                raise InputError(f"{flag(name)} {weight} is outside (0, 1]")
        parse_tokens(self.tokens)
        check_seed(self.seed)
        check_trackers(self.report_to)
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        idle = {
            "distill_weight": self.teacher is None and "without --teacher",
            # What replicas are is not in the draft, and nothing else would be trained.
            "draft_weight": self.train == "replicas" and f"with --train {self.train}",
            "replica_lr": self.train == "replicas" and f"with --train {self.train}, since --lr is theirs",
            "eval_every": self.perplexity is None and "without --perplexity",
            "lora_rank": self.train not in USES_LORA and f"with --train {self.train}",
            "match": (self.train not in USES_LORA and f"with --train {self.train}")
            or (self.lora_rank is not None and "beside --lora-rank"),
        }
        for name, reason in idle.items():
            if getattr(self, name) is not None and reason:
                raise InputError(f"{flag(name)} has no effect {reason}: leave it out")
        if self.fsdp and not launched():
            raise InputError(
                "--fsdp shards over processes, and there is one: start it with torchrun --nproc-per-node N -m flexigpt"
            )


def replica_lr_for(options: RecoverOptions, record: Record) -> float:
    """The learning rate of the replicas' own parameters.

    Args:
        options: of the run.
        record: of the model that it begins with; empty where there is none.
    """
    if options.replica_lr is not None:
        return options.replica_lr
    fitted = find_in(record, "fitted")
    return options.lr * _FITTED_SHARE if fitted and options.train in USES_LORA else options.lr


def resolve_settings(
    options: RecoverOptions, window_length: int, world: World, device: torch.device, record: Record
) -> Settings:
    """What the options make of one step of training; `record` is that of the model that it begins with, or empty.

    Raises:
        InputError: tokens that are fewer than a step, or a step that windows and processes do not divide.
    """
    batch_tokens = options.batch_tokens or _PAPER_BATCH * window_length
    batch_windows, rest = divmod(batch_tokens, window_length)
    if rest or batch_windows % world.size:
        unit = window_length * world.size
        near = max(unit, batch_tokens // unit * unit)
        raise InputError(
            f"{flag('batch_tokens')} {batch_tokens} is no multiple of {window_length} tokens x {world.size} processes: "
            f"give {near} or {near + unit}"
        )
    steps = parse_tokens(options.tokens) // batch_tokens
    if steps == 0:
        raise InputError(
            f"--tokens {options.tokens} is less than one step of {batch_tokens:,} tokens: "
            "give more, or fewer --batch-tokens"
        )
    dtype = PRECISIONS[options.precision or ("bf16" if device.type == "cuda" else "fp32")]
    share = batch_windows // world.size
    most = max(1, _MICRO_BATCH_TOKENS.get(device.type, 1024) // window_length)
    micro_batch = options.micro_batch or max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    if micro_batch > share:
        raise InputError(f"--micro-batch {micro_batch} is more than the {share} windows a process has in a step")
    distill_weight = _DISTILL_WEIGHT if options.distill_weight is None else options.distill_weight
    return Settings(
        steps=steps,
        batch_windows=batch_windows,
        micro_batch=micro_batch,
        window_length=window_length,
        lr=options.lr,
        replica_share=replica_lr_for(options, record) / options.lr,
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        clip=options.clip,
        dtype=dtype,
        fsdp=options.fsdp,
        activation_checkpointing=options.activation_checkpointing,
        distill_weight=0.0 if options.teacher is None else distill_weight,
        draft_weight=options.draft_weight or 0.0,
        seed=options.seed,
    )
