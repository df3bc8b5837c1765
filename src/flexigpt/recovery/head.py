"""The largest tensor of a training step, the logits, made and used up some tokens at a time.

A model is run up to its last hidden states; its head makes logits of a few tokens, the loss their gradient, and only
the hidden states' gradient is kept.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from flexigpt.model import layout_of, replaced_forwards

# Logits that exist at a time: 16 MiB in float32 on a CPU. A GPU wants larger products, and no device very small ones.
_CHUNK_BUDGET, _LEAST_TOKENS = {"cuda": 2**24, "cpu": 2**22}, 64

T = TypeVar("T")

# (hidden states of some tokens, which tokens) -> (loss, sums to be told)
LossOf = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


class Head:
    """A model as a body, which makes hidden states, and a head, which makes logits of them: whatever its family does.

    Args:
        model: compact or ordinary; it may lie behind DDP or be sharded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._body: Any = model.get_submodule(layout_of(model).prefix.rpartition(".")[0])
        self.vocabulary: int = model.config.get_text_config().vocab_size

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) ids -> (batch, tokens, hidden); where the model is sharded, only within `instead`."""
        hidden: torch.Tensor = self._body(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def instead(self, called: nn.Module, ids: torch.Tensor, run: Callable[[Callable[..., Any]], T]) -> T:
        """Calls the model, as `called`, so that all hooks run; what it does and returns is `run(its own forward)`."""
        with replaced_forwards((self._model,), lambda _, forward: lambda **_given: run(forward)):
            found: T = called(input_ids=ids, use_cache=False)
        return found

    def logits(self, hidden: torch.Tensor, forward: Callable[..., Any] | None = None) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, vocabulary); `forward` is given within `instead`, where hooks ran already."""
        body = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])  # type: ignore[arg-type,unused-ignore]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with replaced_forwards((self._body,), lambda *_: lambda *_args, **_given: body):
            logits: torch.Tensor = (forward or self._model)(input_ids=ids, use_cache=False).logits
        return logits[0]

    def chunk(self, device: torch.device) -> int:
        """Tokens whose logits exist at a time."""
        return max(_LEAST_TOKENS, _CHUNK_BUDGET.get(device.type, 2**22) // self.vocabulary)

    def loss_in_chunks(self, hidden: torch.Tensor, loss_of: LossOf) -> tuple[torch.Tensor, torch.Tensor]:
        """What `loss_of` gives for all tokens together; one has to call `backward` on the first.

        Args:
            hidden: (..., tokens, hidden).
            loss_of: is given (..., some tokens, hidden).
        """
        size = self.chunk(hidden.device)
        trained = [p for p in self._model.get_output_embeddings().parameters() if p.requires_grad]
        loss, sums = _Chunks.apply(loss_of, size, hidden, *trained)
        return loss, sums


class _Chunks(torch.autograd.Function):
    """Takes the gradient of each chunk at once, so that nothing of a chunk outlives it, or is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, loss_of: LossOf, size: int, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slopes, gradients = torch.empty_like(hidden), [torch.zeros_like(p) for p in parameters]
        losses, told = list[torch.Tensor](), list[torch.Tensor]()
        for start in range(0, hidden.shape[-2], size):
            rows = slice(start, start + size)
            with torch.enable_grad():
                chunk = hidden[..., rows, :].detach().requires_grad_()
                loss, sums = loss_of(chunk, rows)
            with torch.autocast(hidden.device.type, enabled=False):  # each product in the precision it was made in
                slopes[..., rows, :], *found = torch.autograd.grad(loss, (chunk, *parameters))
            for gradient, more in zip(gradients, found, strict=True):
                gradient += more
            losses.append(loss.detach())
            told.append(sums)
        ctx.gradients = (slopes, *gradients)
        total = torch.stack(told).sum(0)
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(), total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(gradient.mul_(grad_outputs[0]) for gradient in ctx.gradients)
