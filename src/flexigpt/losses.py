"""The training loss of next-token prediction, with or without distillation, on one copy of the logits."""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

# Numbers of float32 temporaries that a chunk of tokens may take: 64 MiB each.
_CHUNK_BUDGET = 2**24


class TokenLoss(NamedTuple):
    """What `token_loss` returns: sums over the tokens.

    Attributes:
        loss: to call `backward` on; a scalar.
        cross_entropy: negative log-likelihood of the targets in nats; a scalar without gradient.
        divergence: KL(teacher || student) in nats; a scalar without gradient, 0 without a teacher.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    teacher_logits: torch.Tensor | None = None,
    distill_weight: float = 0.0,
) -> TokenLoss:
    """scale x sum over tokens of (1 - w) cross-entropy + w KL(teacher || student).

    A model's logits are the largest tensor of a training step. Here they exist once: float32 is made of some tokens at
    a time, and the gradient takes the logits' own place, so the logits must not be read afterwards. (Where an operation
    of the model had kept them for its own backward pass, autograd would refuse that pass.)

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
        entropy = torch.zeros((), dtype=torch.float64, device=logits.device)
        divergence = torch.zeros_like(entropy)
        for rows in torch.arange(len(logits)).split(max(1, _CHUNK_BUDGET // logits.shape[-1])):
            chunk = slice(int(rows[0]), int(rows[-1]) + 1)
            log_p = F.log_softmax(logits[chunk].float(), -1)
            target = targets[chunk, None]
            entropy -= log_p.gather(-1, target).sum(dtype=torch.float64)
            wanted = None
            if teacher_logits is not None:
                log_q = F.log_softmax(teacher_logits[chunk].float(), -1)
                wanted = log_q.exp()
                divergence += (wanted * (log_q - log_p)).sum(dtype=torch.float64)
            if ctx.needs_input_grad[0]:
                slope = log_p.exp_()
                slope.scatter_add_(-1, target, torch.full_like(target, weight - 1, dtype=slope.dtype))
                if wanted is not None:
                    slope.sub_(wanted, alpha=weight)
                gradient[chunk] = slope
        ctx.scale, ctx.gradient = scale, gradient
        ctx.mark_non_differentiable(entropy, divergence)
        return scale * ((1 - weight) * entropy + weight * divergence), entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        # Scaled only here: before fp16's loss scaling, slope / tokens would underflow.
        return ctx.gradient.mul_(grad_outputs[0] * ctx.scale), None, None, None, None
