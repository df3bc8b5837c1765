"""What models write: the same few words of a text, continued greedily."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexigpt.model import fast_half
from flexigpt.text import TokenizedText

# Prompts from as many places of the text; tokens of each prompt and of what continues it.
_PROMPTS, _GIVEN, _NEW = 2, 24, 40


def prompts_from(text: TokenizedText, tokenizer: PreTrainedTokenizerBase, window_length: int) -> list[str]:
    """Some words from the beginning of a text and from its middle, which other models' tokenizers take too."""
    given = min(_GIVEN, window_length // 2)
    starts = [place * len(text.ids) // _PROMPTS for place in range(_PROMPTS)]
    found = (str(tokenizer.decode(text.ids[at : at + given], skip_special_tokens=True)) for at in starts)
    # From the middle it may begin within a word.
    words = (" ".join((prompt.partition(" ")[2] if number else prompt).split()) for number, prompt in enumerate(found))
    return [prompt for prompt in words if prompt]


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], window_length: int
) -> list[dict[str, str]]:
    """`prompt` and the `text` that follows it, of each prompt: the likeliest token each time."""
    found: list[dict[str, str]] = []
    generator: Any = model
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        length = inputs["input_ids"].shape[1]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        room = min(_NEW, window_length - length)
        if room < 1:  # another model's tokenizer may need more tokens for it
            continue
        with fast_half(model):
            ids = generator.generate(**inputs, max_new_tokens=room, pad_token_id=pad, **settings)
        found.append({"prompt": prompt, "text": str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))})
    return found
