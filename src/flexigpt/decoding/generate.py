"""Text from a source or compact model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from flexigpt.decoding.draft import SpeculateOptions, SpeculateStatistics, skipped_blocks
from flexigpt.decoding.speculate import speculative_generate
from flexigpt.model import fast_half, materialize
from flexigpt.runtime import InputError, check_seed, flag
from flexigpt.weights import has_replicas, load_model, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SpeculateOptions):
    """What to generate, and how.

    Attributes:
        prompt: text to continue.
        max_new_tokens: tokens to generate at most.
        temperature: above 0: samples at that temperature; default: the likeliest token each time.
        top_p: samples from the likeliest tokens that hold this share of the probability; needs a temperature.
        seed: makes samples repeatable; needs a temperature; default: 0.
        speculative: drafts with the model's replicas skipped and verifies with all of it: the same text (or, with a
            temperature, samples of the same distribution) in fewer passes.
        materialize: folds the replicas' adapters into weights of their own first: the memory and, but for the output
            norms, the speed of the source.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """

    prompt: str
    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    speculative: bool = False
    materialize: bool = False
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompt or _is_broken(self.prompt):
            raise InputError("--prompt is empty or not valid UTF-8: give some text to continue")
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens} is too small: give at least 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature} is not above 0: leave it out for the likeliest tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p} is outside (0, 1]")
        check_seed(self.seed)
        for name in ("top_p", "seed"):
            if self.temperature is None and getattr(self, name) is not None:
                raise InputError(
                    f"{flag(name)} has no effect without --temperature: give one, or leave {flag(name)} out"
                )
        for name in ("draft_length", "draft_blocks", "prompt_lookup"):
            if not self.speculative and getattr(self, name) is not None:
                raise InputError(f"{flag(name)} has no effect without --speculative: give both or neither")
        super().__post_init__()


def _is_broken(text: str) -> bool:
    # How Python hands on bytes of the command line that are not UTF-8.
    return any("\ud800" <= character <= "\udfff" for character in text)


class _Emitter(TextStreamer):
    """Hands finished pieces of text on instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._emit(text)


@torch.no_grad()
def generate(model: str, options: GenerateOptions, emit: Callable[[str], None]) -> SpeculateStatistics | None:
    """Continues a prompt with stock `generate`; hands the new text to `emit` piece by piece.

    Returns what speculative decoding did, where it was asked for.

    Raises:
        InputError: a model that cannot be opened or has no replicas where these are to be skipped or materialised; a
            prompt that leaves no room in its context.
    """
    if options.materialize and not has_replicas(model):
        raise InputError(f"--materialize has no effect, since {model} has no replicas: leave it out")
    loaded: Any = load_model(model, options.dtype, options.device)
    if options.speculative:
        skipped_blocks(loaded, options)
    if options.materialize:
        materialize(loaded)
    tokenizer = load_tokenizer(model)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    context = getattr(loaded.config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if context and length + options.max_new_tokens > context:
        raise InputError(
            f"{length} prompt tokens and --max-new-tokens {options.max_new_tokens} exceed the context of {context}: "
            "shorten one of them"
        )
    settings: dict[str, Any] = {} if options.top_p is None else {"top_p": options.top_p}
    if options.temperature is not None:
        set_seed(options.seed or 0)
        settings |= {"temperature": options.temperature}
    streamer = _Emitter(tokenizer, emit)
    statistics = SpeculateStatistics() if options.speculative else None
    if options.speculative:
        settings |= {
            "custom_generate": partial(speculative_generate, streamer=streamer),
            "speculate": options,
            "statistics": statistics,
        }
    with fast_half(loaded):
        loaded.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature is not None,
            streamer=streamer,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **settings,
        )
    return statistics
