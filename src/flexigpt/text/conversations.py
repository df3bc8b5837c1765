"""Conversations: lists of {role, content}, written as the tokenizer's chat template does."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from flexigpt.runtime import InputError, one_line

Conversation = list[dict[str, Any]]


def told_apart(found: Any, where: str) -> str | Conversation:
    """A value of a column as a text ("" where there is none) or a conversation.

    Raises:
        InputError: neither of them.
    """
    if not found:
        return ""
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in found
    ):
        # Where some messages have more (tool_calls), the others have it too, as None, which templates mistake for it.
        return [{key: value for key, value in message.items() if value is not None} for message in found]
    raise InputError(f"{where} holds {type(found).__name__}: expected text, or lists of {{role, content}}")


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, answer: bool = False) -> str:
    """What the model reads of a conversation: its chat template's text, special tokens by name.

    Args:
        conversation: at least one message.
        tokenizer: whose template writes it.
        answer: whether the beginning of the model's next message follows.

    Raises:
        InputError: no template, or one that refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("conversations take a chat template, which this tokenizer has not: give plain text")
    from jinja2 import TemplateError  # noqa: PLC0415 - only where there are conversations

    try:
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in conversation)
        raise InputError(f"the chat template refuses a conversation of {roles}: {one_line(error)}") from error
    assert isinstance(rendered, str)
    return rendered
