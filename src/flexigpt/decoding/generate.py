"""Text from a source or compact model: a prompt continued, or answered by the tokenizer's chat template."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import BatchEncoding, LogitsProcessor, PreTrainedTokenizerBase, TextStreamer, set_seed

from flexigpt.decoding.draft import SpeculateStatistics
from flexigpt.decoding.options import GenerateOptions, WritingOptions
from flexigpt.decoding.speculate import speculative_generate
from flexigpt.model import fast_half, materialize
from flexigpt.runtime import InputError, one_line
from flexigpt.text import check_tokenizer
from flexigpt.weights import has_replicas, load_model, load_tokenizer, read_config

Message = dict[str, str]


@torch.no_grad()
def generate(
    model: str, options: GenerateOptions, emit: Callable[[str], None], note: Callable[[str], None] = print
) -> None:
    """Continues a prompt with stock `generate`.

    Args:
        model: folder or hub name of a source or compact model.
        options: what to generate, and how.
        emit: gets the new text piece by piece.
        note: gets a line on why there is none, and one on what speculative decoding did.

    Raises:
        InputError: a model that cannot be opened, or has no replicas to draft without; a prompt that leaves no room in
            its context.
    """
    tokenizer, context = opened_tokenizer(model)
    if tokenizer.chat_template is None or options.raw:
        inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    else:
        inputs = asked(tokenizer, [{"role": "user", "content": options.prompt}])
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
    statistics = SpeculateStatistics() if options.speculative else None
    how = {"speculate": options, "statistics": statistics} if options.speculative else None
    if options.temperature > 0:
        set_seed(options.seed)
    ids = continued(loaded, tokenizer, inputs, options, emit, speculating=how)
    if statistics is not None:
        note(statistics.line())
    if (reason := why_empty(loaded, tokenizer, ids)) is not None:
        note(reason)


def opened_tokenizer(model: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """A model's tokenizer, and how many tokens the model can read; None: as many as it likes.

    Raises:
        InputError: a model or tokenizer that cannot be opened, or that do not fit each other.
    """
    config, tokenizer = read_config(model), load_tokenizer(model)
    check_tokenizer(model, tokenizer, config)
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def asked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> BatchEncoding:
    """The tokens of a conversation, up to where the model's answer begins.

    Raises:
        InputError: a chat template that refuses it, or cannot be read.
    """
    try:
        made: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # whatever a template raises
        raise InputError(
            f"the tokenizer's chat template fails: {one_line(error)}; `generate --raw` goes without it"
        ) from error
    return BatchEncoding({name: made[name] for name in ("input_ids", "attention_mask")})


@torch.no_grad()
def continued(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    options: WritingOptions,
    emit: Callable[[str], None],
    speculating: dict[str, Any] | None = None,
    **settings: Any,
) -> torch.Tensor:
    """The new ids after `inputs`; their text goes to `emit` piece by piece. With `speculating`, drafts are verified."""
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: emit(text)  # instead of printing it
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0} | settings
    if options.temperature > 0:
        settings |= {"temperature": options.temperature, "top_p": options.top_p}
    if speculating is not None:
        settings |= speculating | {"custom_generate": partial(speculative_generate, streamer=streamer)}
    with fast_half(model):
        ids = model.generate(
            **inputs.to(model.device),
            streamer=streamer,
            logits_processor=[_Checked()],
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **settings,
        )
    new: torch.Tensor = ids[0, inputs["input_ids"].shape[1] :]
    return new


def why_empty(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str | None:
    """Why a reader sees nothing of the new ids; None: there is something to see."""
    if str(tokenizer.decode(ids, skip_special_tokens=True)).strip():
        return None
    made = tokenizer.decode(ids)
    if len(ids) == 1 and ends_text(model, ids):
        return f"nothing was generated: the model's first token is {made}, which ends the text"
    return f"nothing to see was generated, only {made!r}"


def ends_text(model: Any, ids: torch.Tensor) -> bool:
    """Whether the last of the new ids says that the text ends there."""
    ends = model.generation_config.eos_token_id
    return int(ids[-1]) in (ends if isinstance(ends, list) else [ends])


class _Checked(LogitsProcessor):
    """Refuses logits that no token can be chosen by."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits as they are."""
        if not (scores < torch.inf).all():
            raise InputError("logits are not finite after this prompt: give --dtype float32, or check the weights")
        return scores
