"""The draft beside the model: what both compute alike is computed once. How often the two agree on a text."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.evaluation import logits_over
from flexigpt.model import layout_of, replaced_forwards
from flexigpt.runtime import ALONE, InputError, Track, World, silent
from flexigpt.text import TokenizedText


@contextlib.contextmanager
def entering(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it each forward pass leaves in the list what enters the block, (batch, tokens, hidden)."""
    seen: list[torch.Tensor] = []

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class Draft:
    """A compact model without its replicas, on the model's own tensors.

    Up to the first replica both compute the same. There the graph branches: what entered the first replica goes on
    through the kept blocks after it a second time, and a backward pass from both ends adds up at that place.

    Args:
        model: compact; it may lie behind DDP or be sharded.

    Attributes:
        entry: the first replica.

    Raises:
        InputError: a model without replicas.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layout = layout_of(model)
        if not layout.bases:
            raise InputError("the model has no replicas to skip, so it has no draft")
        self._model: Any = model
        self._blocks, self._returns_tuple = layout.blocks, layout.returns_tuple
        self._skipped = frozenset(layout.bases)
        self.entry = min(self._skipped)

    def watched(self) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        """Within it each forward pass of the model leaves in the list what enters the first replica."""
        return entering(self._blocks[self.entry])

    def logits(self, ids: torch.Tensor, entered: torch.Tensor) -> torch.Tensor:
        """The draft's logits, (batch, tokens, vocabulary).

        Args:
            ids: (batch, tokens), those of the model's forward pass.
            entered: (batch, tokens, hidden), what entered the first replica in it.
        """
        with self.skipping(entered):
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    def skipping(self, entered: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Within it the model is its draft, from what entered the first replica on."""

        def switched(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if index > self.entry and index not in self._skipped:
                    return forward(hidden_states, *args, **kwargs)
                if index < self.entry:  # what comes out of these stands in `entered` already
                    handed_on = hidden_states.detach()
                else:  # a copy: FSDP2's hooks would be lost on a block that puts out a view, as its input may be
                    handed_on = (entered if index == self.entry else hidden_states).clone()
                return (handed_on, None) if self._returns_tuple else handed_on

            return run

        return replaced_forwards(self._blocks, switched)


@torch.no_grad()
def measure_draft(
    model: PreTrainedModel, text: TokenizedText, *, window_length: int, world: World = ALONE, track: Track = silent
) -> dict[str, Any]:
    """What a compact model's draft is worth on a text, over windows without overlap.

    Args:
        model: compact, in eval mode.
        text: at least 2 tokens.
        window_length: tokens in.
        world: processes that share the work; each must call this, and gets the result for the whole text.
        track: reports each batch.

    Returns:
        JSON-ready: `tokens` predicted; the draft's own `perplexity`; `divergence`, the mean over tokens of
        KL(model || draft) in nats; `agreement`, the share of tokens for which both rank the same token first, which is
        how often the model accepts a drafted token without a temperature; `acceptance`, the mean of sum(min(p, q)),
        which is how often it does at temperature 1.

    Raises:
        InputError: a model without replicas, or logits that are not finite.
    """
    draft = Draft(model)

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with draft.watched() as entered:
            return model(input_ids=ids, use_cache=False).logits, draft.logits(ids, entered[0])

    sums = torch.zeros(5, dtype=torch.float64, device=model.device)
    walk = logits_over(model, text, window_length, both=both, world=world, stage="measuring the draft", track=track)
    for seen in walk:
        logits, drafted = (part.float() for part in seen.logits)
        sums += _compared(logits, drafted, seen.targets)
    tokens, loss, divergence, agreed, accepted = world.sum(sums).tolist()
    if not math.isfinite(loss + divergence):
        raise InputError("the draft's logits are not finite on this text: give --dtype float32, or check the weights")
    return {
        "tokens": int(tokens),
        "perplexity": math.exp(min(loss / tokens, 700.0)),
        "divergence": divergence / tokens,
        "agreement": agreed / tokens,
        "acceptance": accepted / tokens,
    }


def _compared(logits: torch.Tensor, drafted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over tokens: 1, the draft's loss, its divergence, same first token, sum(min(p, q)); (5,) float64."""
    agreed = logits.argmax(-1) == drafted.argmax(-1)
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(drafted, -1)
    sums = (
        torch.ones_like(targets),
        -log_q.gather(-1, targets[..., None]),
        F.kl_div(log_q, log_p, reduction="none", log_target=True),
        agreed,
        torch.minimum(log_p, log_q).exp(),
    )
    return torch.stack([part.sum(dtype=torch.float64) for part in sums])
