"""Text from a source or compact model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessor, TextStreamer, set_seed

from flexigpt.decoding.draft import SpeculateStatistics
from flexigpt.decoding.options import GenerateOptions
from flexigpt.decoding.speculate import speculative_generate
from flexigpt.model import fast_half, materialize
from flexigpt.runtime import InputError
from flexigpt.text import check_tokenizer
from flexigpt.weights import has_replicas, load_model, load_tokenizer, read_config


@torch.no_grad()
def generate(model: str, options: GenerateOptions, emit: Callable[[str], None]) -> SpeculateStatistics | None:
    """Continues a prompt with stock `generate`; hands the new text to `emit` piece by piece.

    Returns what speculative decoding did, where it was asked for.

    Raises:
        InputError: a model that cannot be opened, or has no replicas to draft without; a prompt that leaves no room in
            its context.
    """
    config, tokenizer = read_config(model), load_tokenizer(model)
    check_tokenizer(model, tokenizer, config)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("--prompt has no token for this model's tokenizer: give some text to continue")
    if context and length + options.max_new_tokens > context:
        raise InputError(
            f"{length} prompt tokens and --max-new-tokens {options.max_new_tokens} exceed the context of {context}: "
            "shorten one of them"
        )
    loaded: Any = load_model(model, options.dtype, options.device)
    if options.materialize and has_replicas(model):
        materialize(loaded)
    settings: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        set_seed(options.seed)
        settings |= {"temperature": options.temperature, "top_p": options.top_p}
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: emit(text)  # instead of printing it
    statistics = SpeculateStatistics() if options.speculative else None
    if options.speculative:
        decode = partial(speculative_generate, streamer=streamer)
        settings |= {"custom_generate": decode, "speculate": options, "statistics": statistics}
    with fast_half(loaded):
        loaded.generate(
            **inputs.to(loaded.device),
            max_new_tokens=options.max_new_tokens,
            streamer=streamer,
            logits_processor=[_Checked()],
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **settings,
        )
    return statistics


class _Checked(LogitsProcessor):
    """Refuses logits that no token can be chosen by."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits as they are."""
        if not (scores < torch.inf).all():
            raise InputError("logits are not finite after this prompt: give --dtype float32, or check the weights")
        return scores
