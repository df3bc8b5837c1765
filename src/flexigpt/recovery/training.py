"""The training loop of recovery: the same on one CPU, one GPU, or many processes with DDP or FSDP2."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.model import layout_of
from flexigpt.recovery.draft import Draft
from flexigpt.recovery.head import Head
from flexigpt.recovery.options import DEFAULT_RATE, RecoverOptions
from flexigpt.recovery.teacher import Teacher
from flexigpt.recovery.trainable import REPLICA_PARAMETERS, USES_LORA, trained_parameters
from flexigpt.runtime import InputError, World, parse_tokens, processes

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Sequences in a step (appendix A), and the norm that gradients are scaled down to.
_PAPER_BATCH, _CLIP = 480, 1.0

# Tokens in one forward pass of one process: what fills a GPU, as far as its free memory holds them; a CPU's caches.
_PASS_TOKENS, _USABLE = {"cuda": 8192, "cpu": 1024}, 0.9

# What was fitted wants less than LoRA: on novel16 a thirtieth and a tenth are as good, a third is worse.
_FITTED_SHARE = 0.1

# fp16 loses small gradients: the loss is scaled up, by less after an overflow, by more after as many steps without.
_FIRST_LOSS_SCALE, _STEPS_TO_RAISE, _MOST_SKIPPED = 2.0**16, 200, 16

_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one step of training is.

    Attributes:
        steps: of the whole run.
        batch_windows: windows in a step, over all processes.
        micro_batch: windows in one forward pass of one process.
        window_length: tokens that a window predicts.
        lr: the learning rate after warm-up.
        replica_share: of that rate, what the replicas' own parameters get.
        warmup_steps: over which it rises from near zero; a cosine to zero follows.
        dtype: to compute in; what is trained is held in float32.
        fsdp: whether parameters are sharded.
        activation_checkpointing: whether a block's activations are computed again in the backward pass.
        distill_weight: of the divergence from the teacher.
        draft_weight: of the divergence of the draft from the whole model; at 0 the draft is not trained.
        seed: of dropout, where the model has any.
    """

    steps: int
    batch_windows: int
    micro_batch: int
    window_length: int
    lr: float
    replica_share: float
    warmup_steps: int
    dtype: torch.dtype
    fsdp: bool
    activation_checkpointing: bool
    distill_weight: float
    draft_weight: float
    seed: int

    @property
    def batch_tokens(self) -> int:
        """Tokens predicted in a step."""
        return self.batch_windows * self.window_length

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 0: a pure function, so that resuming needs no state."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        done = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * done))


def resolve_settings(
    options: RecoverOptions,
    window_length: int,
    world: World,
    device: torch.device,
    *,
    replicas: bool,
    fitted: bool,
    lr: float | None = None,
) -> Settings:
    """What the options make of one step of training, of a model with replicas or without, `fitted` to text or not.

    `lr` is the rate to try in the place of `auto`.

    Raises:
        InputError: tokens that are fewer than a step, or a step that windows and processes do not divide.
    """
    lr = lr or (DEFAULT_RATE if isinstance(options.lr, str) else options.lr)
    batch_tokens = options.batch_tokens or _PAPER_BATCH * window_length
    batch_windows, rest = divmod(batch_tokens, window_length)
    if rest or batch_windows % world.size:
        unit = window_length * world.size
        near = max(unit, batch_tokens // unit * unit)
        whole_steps = f"{window_length} tokens x {world.size} processes: give {near} or {near + unit}"
        raise InputError(f"--batch-tokens {batch_tokens} is no multiple of {whole_steps}")
    steps = parse_tokens(options.tokens) // batch_tokens
    if steps == 0:
        less = f"is less than one step of {batch_tokens:,} tokens: give more, or fewer --batch-tokens"
        raise InputError(f"--tokens {options.tokens} {less}")
    alone = options.train == "replicas"  # then --lr is theirs, and nothing of a draft is trained
    replica_lr = lr * _FITTED_SHARE if fitted and options.train in USES_LORA else lr
    replica_lr = lr if alone else options.replica_lr or replica_lr
    return Settings(
        steps=steps,
        batch_windows=batch_windows,
        micro_batch=_part_of(batch_windows // world.size, _PASS_TOKENS.get(device.type, 1024) // window_length),
        window_length=window_length,
        lr=lr,
        replica_share=replica_lr / lr,
        warmup_steps=round(options.warmup * steps),
        dtype=PRECISIONS[options.precision or ("bf16" if device.type == "cuda" else "fp32")],
        fsdp=options.fsdp,
        activation_checkpointing=options.activation_checkpointing,
        distill_weight=0.0 if options.teacher is None else options.distill_weight,
        draft_weight=options.draft_weight if replicas and not alone else 0.0,
        seed=options.seed,
    )


def _part_of(share: int, most: int) -> int:
    """Windows in one forward pass: the most that divide a process's share of a step, up to `most`, or 1."""
    return max(n for n in range(1, max(1, min(most, share)) + 1) if share % n == 0)


class NotFiniteError(Exception):
    """A loss, or gradients, that are not finite; the step was not taken."""


class TokenLoss(NamedTuple):
    """Sums over the tokens, as scalars: the loss to call `backward` on, and, without gradient, its parts in nats."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor


class Training:
    """A model under training, prepared by `prepare_training`, and its teacher, where there is one, not yet settled."""

    def __init__(
        self, model: PreTrainedModel, settings: Settings, world: World, device: torch.device, teacher: Teacher | None
    ) -> None:
        self.model, self.settings, self.world, self.device, self.teacher = model, settings, world, device, teacher
        hold_in(model, settings.dtype, frozen_only=True)
        self.head = Head(model)
        self.draft = Draft(model) if settings.draft_weight else None
        self.trained_parameters = sum(p.numel() for p in trained_parameters(model).values())
        if settings.activation_checkpointing:
            _checkpoint_activations(model)
        if not settings.fsdp:
            nn.Module.to(model, device)
        if teacher is not None:
            teacher.settle(model, device, share=not settings.fsdp)
        if settings.fsdp:
            for sharded in (model,) if teacher is None else (teacher.model, model):
                processes.shard(sharded, layout_of(sharded).groups, device, world, settings.dtype)
        self.wrapped: nn.Module = model if settings.fsdp else processes.replicate(model, world)
        model.train()
        self._begin()

    def _begin(self) -> None:
        """An optimizer that has seen nothing yet."""
        settings, trained, groups = self.settings, trained_parameters(self.model), []
        for own, share in ((True, settings.replica_share), (False, 1.0)):
            parameters = [p for name, p in trained.items() if name.endswith(REPLICA_PARAMETERS) is own]
            groups += [{"params": parameters, "share": share}] if parameters else []
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
        fp16 = settings.dtype is torch.float16
        self._scale = {"loss_scale": _FIRST_LOSS_SCALE if fp16 else 1.0, "since": 0, "skipped": 0}

    def copied(self) -> dict[str, torch.Tensor]:
        """What this process holds of what is trained, by name, for `begin_again`; a GPU's memory is left free."""
        named = trained_parameters(self.model).items()
        return {name: processes.part_of(p).to("cpu", copy=True) for name, p in named}

    def begin_again(self, beginning: Mapping[str, torch.Tensor], settings: Settings) -> None:
        """Goes back to the beginning, what `copied` gave then; as many windows as before go through at a time."""
        for name, parameter in trained_parameters(self.model).items():
            processes.part_of(parameter).copy_(beginning[name])
        self.settings = replace(settings, micro_batch=self.settings.micro_batch)
        self._begin()

    def fit_memory(self) -> None:
        """Lets fewer windows through at a time where a GPU's memory holds no more, by what one of them takes.

        Every process must call it, before the first step.

        Raises:
            InputError: not even one window fits.
        """
        if self.device.type != "cuda":
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            self._try_window()
        except torch.OutOfMemoryError as error:
            advice = "give --activation-checkpointing, a smaller --window-length, or --fsdp on more GPUs"
            raise InputError(f"this GPU's memory does not hold the training of one window: {advice}") from error
        taken = torch.cuda.max_memory_allocated(self.device) - before
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = _USABLE * (torch.cuda.mem_get_info(self.device)[0] + held)
        # Gradients and AdamW's two averages stay beside the windows.
        free -= 12 * self.trained_parameters / (self.world.size if self.settings.fsdp else 1)
        fits = torch.zeros(self.world.size, device=self.device)
        fits[self.world.rank] = free // taken
        most = min(self.settings.micro_batch, int(self.world.sum(fits).min()))
        share = self.settings.batch_windows // self.world.size
        self.settings = replace(self.settings, micro_batch=_part_of(share, most))

    def _try_window(self) -> None:
        """Trains on one window, but for the step: no trace is left."""
        window = torch.zeros(1, self.settings.window_length + 1, dtype=torch.int64, device=self.device)
        with processes.reduced(self.wrapped, last=True):
            self._backward(window, 0.0)
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Computes in the precision asked for; with FSDP its policy does that."""
        mixed = self.settings.dtype is not torch.float32 and not self.settings.fsdp
        with torch.autocast(self.device.type, self.settings.dtype, enabled=mixed):
            yield

    def step(self, number: int, windows: torch.Tensor) -> dict[str, float]:
        """One step of the optimizer.

        Args:
            number: of the step, from 0.
            windows: (batch_windows, window_length + 1) ids, the same on every process; each takes its share.

        Returns:
            loss, cross_entropy and divergence a token in nats, where the draft is trained too its draft_divergence from
            the whole model, the learning rate, and, where fp16 has not overflowed, the gradients' norm.

        Raises:
            NotFiniteError: the parameters are as they were before.
        """
        settings, world = self.settings, self.world
        # Dropout must not depend on what ran before, or a resumed run would differ.
        torch.manual_seed(hash((settings.seed, number, world.rank)) % 2**63)
        parts = self._parts(windows)
        scale = self._scale["loss_scale"] * world.size / settings.batch_tokens
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for index, part in enumerate(parts):
            with processes.reduced(self.wrapped, last=index == len(parts) - 1):
                sums += self._backward(part, scale)
        values = self._means(sums, f"step {number + 1}")
        lr = settings.lr_at(number)
        norm = self._update(number, lr)
        return values | {"lr": lr} | ({"gradient_norm": norm} if math.isfinite(norm) else {})

    @torch.no_grad()
    def loss_on(self, windows: torch.Tensor) -> float:
        """The loss of a step on these windows, which is not taken; every process must call it.

        Raises:
            NotFiniteError: it is not finite.
        """
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for part in self._parts(windows):
            sums += self._forward(part, 1.0)[1]
        self.model.train()
        return self._means(sums, "windows held out of it")["loss"]

    def _parts(self, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """This process's share of a step's windows, as many at a time as go through."""
        share = windows.tensor_split(self.world.size)[self.world.rank].to(self.device)
        return share.split(self.settings.micro_batch)

    def _means(self, sums: torch.Tensor, where: str) -> dict[str, float]:
        """A token's loss and its parts, of what this process has summed."""
        settings = self.settings
        entropy, divergence, draft = (self.world.sum(sums) / settings.batch_tokens).tolist()
        mean = (1 - settings.distill_weight) * entropy + settings.distill_weight * divergence
        mean += settings.draft_weight * draft
        if not math.isfinite(mean):
            raise NotFiniteError(f"the loss of {where} is not finite")
        values = {"loss": mean, "cross_entropy": entropy, "divergence": divergence}
        return values | ({} if self.draft is None else {"draft_divergence": draft})

    def _backward(self, part: torch.Tensor, scale: float) -> torch.Tensor:
        """Adds to the gradients; (3,) sums over the tokens: cross-entropy, divergence, the draft's divergence."""
        loss, sums = self._forward(part, scale)
        # One backward pass for model and draft: what they share is run through once, and DDP sees each gradient once.
        loss.backward()
        return sums

    def _forward(self, part: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to call `backward` on, and its sums."""
        ids = part[:, :-1]
        with contextlib.ExitStack() as around:
            around.enter_context(self.computing())
            taught: torch.Tensor | None = None
            if self.teacher is not None:
                taught, entering = self.teacher.hidden(ids)
                taught = taught.flatten(0, 1)
                around.enter_context(self.teacher.entered(entering))

            def run(forward: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
                return self._loss(forward, ids, part[:, 1:].flatten(), scale, taught)

            return self.head.instead(self.wrapped, ids, run)

    def _loss(
        self,
        forward: Callable[..., Any],
        ids: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        taught: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to call `backward` on and its sums; `taught` are the teacher's hidden states, (tokens, hidden)."""
        head, draft, teacher, settings = self.head, self.draft, self.teacher, self.settings
        if draft is None:
            hidden = head.hidden(ids)[None]
        else:
            with draft.watched() as branch:
                hidden = head.hidden(ids)
            with draft.skipping(branch[0]):
                hidden = torch.stack((hidden, head.hidden(ids)))

        def loss_of(chunk: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            logits = head.logits(chunk[0], forward)
            teacher_logits = None if teacher is None or taught is None else teacher.logits(taught[rows])
            of_draft: torch.Tensor | float = 0.0
            apart = torch.zeros((), dtype=torch.float64, device=logits.device)
            if draft is not None:  # first, since it reads the model's logits, and the other loss writes over them
                given = {"scale": scale * settings.draft_weight, "distill_weight": 1.0}
                drafted = head.logits(chunk[1], forward)
                of_draft, _, apart = token_loss(drafted, targets[rows], teacher_logits=logits.detach(), **given)
            given = {"scale": scale, "distill_weight": settings.distill_weight}
            of_model = token_loss(logits, targets[rows], teacher_logits=teacher_logits, **given)
            return of_model.loss + of_draft, torch.stack((of_model.cross_entropy, of_model.divergence, apart))

        return head.loss_in_chunks(hidden.flatten(1, 2), loss_of)

    def _update(self, number: int, lr: float) -> float:
        """Clips and steps; returns the gradients' norm. Steps whose fp16 gradients overflow are skipped."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = processes.whole(torch.nn.utils.get_total_norm(gradients)).item() / self._scale["loss_scale"]
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, min(1.0, _CLIP / (norm + 1e-6)) / self._scale["loss_scale"])
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["share"]
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._adjust_scale(number, math.isfinite(norm))
        return norm

    def _adjust_scale(self, number: int, finite: bool) -> None:
        scale = self._scale
        scale["since"] = scale["since"] + 1 if finite else 0
        scale["skipped"] = 0 if finite else scale["skipped"] + 1
        if not finite and (self.settings.dtype is not torch.float16 or scale["skipped"] == _MOST_SKIPPED):
            raise NotFiniteError(f"the gradients of step {number + 1} are not finite")
        if self.settings.dtype is torch.float16 and (not finite or scale["since"] == _STEPS_TO_RAISE):
            scale["loss_scale"] *= 2.0 if finite else 0.5
            scale["since"] = 0

    def tensors(self) -> dict[str, Any]:
        """What is trained and the optimizer's state, for a distributed checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_TRAINED_ONLY)
        return {"model": model, "optimizer": optimizer}

    def state(self) -> dict[str, Any]:
        """What else the next step depends on, JSON-ready."""
        return {"scale": self._scale}

    def restore(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Takes over what `tensors` and `state` gave."""
        given = {"model_state_dict": tensors["model"], "optim_state_dict": tensors["optimizer"]}
        set_state_dict(self.model, self.optimizer, **given, options=StateDictOptions(strict=False))
        self._scale = dict(state["scale"])

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, in full, on the CPU, by name; every process must call it."""
        return {name: processes.whole(p.detach()).cpu() for name, p in trained_parameters(self.model).items()}


def hold_in(model: nn.Module, dtype: torch.dtype, frozen_only: bool = False) -> None:
    """Casts parameters, or those that are not trained; buffers, such as rotary frequencies, stay as they are."""
    for parameter in model.parameters():
        if not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Lets the blocks' activations be computed again in the backward pass."""
    named: Any = getattr(model, "activation_checkpointing_enable", None)  # the older name warns where this one is there
    (named or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # transformers made the embeddings' output need a gradient: the backward pass would run through all blocks.
    model.disable_input_require_grads()


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    teacher_logits: torch.Tensor | None = None,
    distill_weight: float = 0.0,
) -> TokenLoss:
    """scale x sum over tokens of (1 - w) cross-entropy + w KL(teacher || student).

    The gradient takes the logits' own place, so the logits must not be read afterwards. (Where an operation of the
    model had kept them for its own backward pass, autograd would refuse that pass.)

    Args:
        logits: (tokens, vocabulary), any floating dtype; overwritten where they need a gradient.
        targets: (tokens,) int64.
        scale: of the loss, such as 1 / tokens for the mean.
        teacher_logits: (tokens, vocabulary); None: no distillation.
        distill_weight: w, in [0, 1].
    """
    return TokenLoss(*_TokenLoss.apply(logits, targets, scale, teacher_logits, distill_weight))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        teacher_logits: torch.Tensor | None,
        weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # detach() keeps the version counter: whoever saved the logits for backward will find them changed.
        gradient = logits.detach()
        log_p, target = F.log_softmax(logits.float(), -1), targets[:, None]
        entropy = -log_p.gather(-1, target).sum(dtype=torch.float64)
        divergence, wanted = torch.zeros_like(entropy), None
        if teacher_logits is not None:
            log_q = F.log_softmax(teacher_logits.float(), -1)
            wanted = log_q.exp()
            divergence += log_q.sub_(log_p).mul_(wanted).sum(dtype=torch.float64)
        if ctx.needs_input_grad[0]:
            slope = log_p.exp_()
            slope.scatter_add_(-1, target, torch.full_like(target, weight - 1, dtype=slope.dtype))
            if wanted is not None:
                slope.sub_(wanted, alpha=weight)
            gradient.copy_(slope)
        ctx.scale, ctx.gradient = scale, gradient
        ctx.mark_non_differentiable(entropy, divergence)
        return scale * ((1 - weight) * entropy + weight * divergence), entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        # Scaled only here: before fp16's loss scaling, slope / tokens would underflow.
        return ctx.gradient.mul_(grad_outputs[0] * ctx.scale), None, None, None, None
