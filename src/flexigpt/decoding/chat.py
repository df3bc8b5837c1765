"""A conversation with a model whose tokenizer has a chat template."""

from collections.abc import Callable
from typing import Any

from transformers import set_seed

from flexigpt.decoding.generate import Message, asked, continued, ends_text, opened_tokenizer, why_empty
from flexigpt.decoding.options import ChatOptions
from flexigpt.runtime import InputError
from flexigpt.weights import load_model


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        model: folder or hub name of a source or compact model.
        options: how it answers.

    Raises:
        InputError: a model that cannot be opened, or a tokenizer without a chat template.
    """

    def __init__(self, model: str, options: ChatOptions) -> None:
        self._tokenizer, self._context = opened_tokenizer(model)
        if self._tokenizer.chat_template is None:
            raise InputError(
                f"the tokenizer of {model} has no chat template, so nobody can talk to it: use flexigpt generate"
            )
        self._options = options
        self._model: Any = load_model(model, options.dtype, options.device)
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self._said: list[Message] = []
        if self._options.temperature > 0:
            set_seed(self._options.seed)

    def answer(self, text: str, emit: Callable[[str], None]) -> str | None:
        """Answers the text, piece by piece through `emit`.

        An interruption (Ctrl-C) ends the answer; what was said of it stays said.

        Returns:
            What a reader should know of the answer: that it is empty, cut off or interrupted.

        Raises:
            InputError: a conversation that has filled the model's context; the text is not part of it then.
        """
        said = [*self._said, {"role": "user", "content": text}]
        inputs, pieces = asked(self._tokenizer, said), list[str]()
        length, most = inputs["input_ids"].shape[1], self._options.max_new_tokens
        room = most if self._context is None else min(most, self._context - length)
        if room < 1:
            raise InputError(f"{length} tokens fill the model's context of {self._context}: /reset begins anew")

        def hear(piece: str) -> None:
            pieces.append(piece)
            emit(piece)

        try:
            ids = continued(self._model, self._tokenizer, inputs, self._options, hear, max_new_tokens=room)
            remark = why_empty(self._model, self._tokenizer, ids)
            if len(ids) == room and remark is None and not ends_text(self._model, ids):
                remark = f"cut off after {room} tokens"
        except KeyboardInterrupt:
            remark = "interrupted"
        self._said = [*said, {"role": "assistant", "content": "".join(pieces)}]
        return remark
