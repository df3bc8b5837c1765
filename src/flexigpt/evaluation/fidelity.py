"""How near a model stays to its source on a text: beyond perplexity, which averages damage away."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

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
        errors = {block: math.sqrt(lost / own) if own else math.inf for block, (lost, own) in beside.items()}
        bases = layout_of(model).bases
        measured["blocks"] = {block: {"base": bases[block], "output": error} for block, error in errors.items()}
    return measured


def _source_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config()


@contextmanager
def _replicas_beside(model: PreTrainedModel, source: PreTrainedModel) -> Iterator[dict[int, list[float]]]:
    """Within it the source's pruned blocks run their replicas too, on what they are given.

    By block, where the source is of the model's family and shape: squares of the difference of both outputs, and of the
    block's own.
    """
    ours, theirs = layout_of(model), layout_of(source)
    shapes = [(c.model_type, c.num_hidden_layers, c.hidden_size) for c in map(_source_config, (model, source))]
    alike = shapes[0] == shapes[1] and not theirs.is_compact
    sums = {block: [0.0, 0.0] for block in ours.bases if alike}

    def run_beside(block: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        its, replicas = (block_output(out).float() for out in (output, ours.blocks[block](*args, **kwargs)))
        for number, part in enumerate((replicas - its, its - entering.float())):
            sums[block][number] += part.square().sum(dtype=torch.float64).item()

    with ExitStack() as hooks:
        for block in sums:
            hook = theirs.blocks[block].register_forward_hook(partial(run_beside, block), with_kwargs=True)
            hooks.callback(hook.remove)
        yield sums
