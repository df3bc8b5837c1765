"""How near a model stays to its source on a text: beyond perplexity, which averages damage away."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexigpt.evaluation.metrics import add_up
from flexigpt.evaluation.perplexity import logits_over
from flexigpt.model import block_output, layout_of
from flexigpt.runtime import InputError, Track, silent
from flexigpt.text import TokenizedText


def measure_fidelity(
    model: PreTrainedModel,
    source: PreTrainedModel,
    text: TokenizedText,
    *,
    window_length: int,
    against: str,
    track: Track = silent,
) -> dict[str, Any]:
    """Divergence from the source, agreement with it, loss by position, and the error of each replica's output.

    Args:
        model: compact or ordinary, in eval mode.
        source: of the same vocabulary, on the same device, in eval mode.
        text: at least 2 tokens.
        window_length: tokens in a window; windows do not overlap.
        against: name of the source.
        track: reports the progress, batch by batch.

    Returns:
        JSON-ready: `against`; `tokens` predicted; `divergence`, the mean over tokens of KL(source || model) in nats;
        `agreement`, the share of tokens for which both rank the same token first; `positions`: the mean loss in nats of
        `source` and `model` by `position` in the window, in at most 64 buckets of equal width, named by their first
        position; and for a compact model of the source's depth `blocks`: by replica its `base` and the error of its
        `output`, |replica(X) - block(X)|_F / |block(X)|_F, where X are the source's own inputs to that block and the
        outputs are what each adds to the residual stream.

    Raises:
        InputError: models of different vocabularies, or logits that are not finite.
    """
    size, other = (m.config.get_text_config().vocab_size for m in (model, source))
    if size != other:
        raise InputError(f"{against} has {other:,} tokens in its vocabulary, the model {size:,}: give its own source")

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(m(input_ids=ids, use_cache=False).logits for m in (model, source))

    with _replicas_beside(model, source) as beside:
        walk = logits_over(model, text, window_length, both=both, stage="measuring fidelity", track=track)
        measured = {"against": against} | add_up(walk, text.num_bytes, model.device, against=True)
    if beside:
        measured["blocks"] = {
            block: {"base": errors.base, "output": errors.error()} for block, errors in beside.items()
        }
    return measured


class _Beside:
    """Runs a replica on what its pruned block was given, and adds up both outputs and their difference."""

    def __init__(self, replica: nn.Module, base: int) -> None:
        self.replica, self.base = replica, base
        self.difference, self.energy = 0.0, 0.0

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        theirs, ours = (block_output(out).float() for out in (output, self.replica(*args, **kwargs)))
        self.energy += (theirs - entering.float()).square().sum(dtype=torch.float64).item()
        self.difference += (ours - theirs).square().sum(dtype=torch.float64).item()

    def error(self) -> float:
        return math.sqrt(self.difference / self.energy) if self.energy else math.inf


@contextmanager
def _replicas_beside(model: PreTrainedModel, source: PreTrainedModel) -> Iterator[dict[int, _Beside]]:
    """Within it the source's pruned blocks run their replicas too: by block, where model and source have as many."""
    ours, theirs = layout_of(model), layout_of(source)
    alike = len(ours.blocks) == len(theirs.blocks) and not theirs.is_compact
    beside = {block: _Beside(ours.blocks[block], base) for block, base in ours.bases.items() if alike}
    with ExitStack() as hooks:
        for block, errors in beside.items():
            hooks.callback(theirs.blocks[block].register_forward_hook(errors, with_kwargs=True).remove)
        yield beside
