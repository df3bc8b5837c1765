"""How near a model stays to its source on a text: beyond perplexity, which averages damage away."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from flexigpt.model import FlexiGPTForCausalLM, block_output, fast_half, layout_of
from flexigpt.runtime import InputError, Track, silent
from flexigpt.text import TokenizedText, batch_size_for, window_batches

# Numbers in one batch's logits: 32 MiB in float32, of which there are some five copies.
_LOGITS_BUDGET = 2**23

_MAX_BUCKETS = 64


@torch.no_grad()
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
        track: told of each batch.

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
    starts = range(0, len(text.ids) - 1, window_length)
    batches = window_batches(text.ids, starts, window_length, batch_size_for(window_length, size, _LOGITS_BUDGET))
    sums = _Sums(window_length, source.device)
    with _replicas_beside(model, source) as beside:
        for batch, _ in track(batches, "measuring fidelity", len(batches)):
            inputs, targets = batch[:, :-1].to(source.device), batch[:, 1:].to(source.device)
            with fast_half(source):
                theirs, ours = (m(input_ids=inputs, use_cache=False).logits.float() for m in (source, model))
            sums.add(theirs, ours, targets)
    measured = {"against": against, **sums.result()}
    if beside:
        bases = layout_of(model).bases
        measured["blocks"] = {
            block: {"base": bases[block], "output": errors.error()} for block, errors in beside.items()
        }
    return measured


class _Sums:
    """What is added up over the tokens."""

    def __init__(self, window_length: int, device: torch.device) -> None:
        self.divergence, self.agreed = 0.0, 0
        # Of the source, of the model, and tokens, by position in the window.
        self.by_position = torch.zeros(3, window_length, dtype=torch.float64, device=device)

    def add(self, theirs: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> None:
        """(windows, tokens, vocabulary) float32 logits of source and model, (windows, tokens) ids of what comes."""
        self.agreed += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        theirs, ours = F.log_softmax(theirs, -1), F.log_softmax(ours, -1)
        self.divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        for row, log_probabilities in enumerate((theirs, ours)):
            losses = -log_probabilities.gather(-1, targets[..., None])[..., 0]
            self.by_position[row, : losses.shape[1]] += losses.sum(0, dtype=torch.float64)
        self.by_position[2, : targets.shape[1]] += len(targets)

    def result(self) -> dict[str, Any]:
        tokens = int(self.by_position[2].sum())
        if not math.isfinite(self.divergence):
            raise InputError("logits are not finite on this text: give --dtype float32, or check the weights")
        width = math.ceil(self.by_position.shape[1] / _MAX_BUCKETS)
        buckets = [bucket.sum(1) for bucket in self.by_position.split(width, 1)]
        filled = [(number * width, *bucket.tolist()) for number, bucket in enumerate(buckets) if bucket[2] > 0]
        return {
            "tokens": tokens,
            "divergence": self.divergence / tokens,
            "agreement": self.agreed / tokens,
            "positions": {
                "position": [position for position, *_ in filled],
                "source": [source / number for _, source, _, number in filled],
                "model": [model / number for _, _, model, number in filled],
            },
        }


class _Beside:
    """Runs a replica on what its pruned block was given, and adds up both outputs and their difference."""

    def __init__(self, replica: nn.Module) -> None:
        self.replica = replica
        self.difference, self.energy = 0.0, 0.0

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        theirs, ours = (block_output(out) for out in (output, self.replica(*args, **kwargs)))
        self.energy += (theirs.float() - entering.float()).square().sum(dtype=torch.float64).item()
        self.difference += (ours.float() - theirs.float()).square().sum(dtype=torch.float64).item()

    def error(self) -> float:
        return math.sqrt(self.difference / self.energy) if self.energy else math.inf


@contextmanager
def _replicas_beside(model: PreTrainedModel, source: PreTrainedModel) -> Iterator[dict[int, _Beside]]:
    """Within it the source's pruned blocks run their replicas too: by block, where model and source have as many."""
    beside: dict[int, _Beside] = {}
    with ExitStack() as hooks:
        if isinstance(model, FlexiGPTForCausalLM) and not isinstance(source, FlexiGPTForCausalLM):
            ours, theirs = layout_of(model), layout_of(source)
            for block in ours.bases if len(ours.blocks) == len(theirs.blocks) else ():
                beside[block] = _Beside(ours.blocks[block])
                handle = theirs.blocks[block].register_forward_hook(beside[block], with_kwargs=True)
                hooks.callback(handle.remove)
        yield beside
