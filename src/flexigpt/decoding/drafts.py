"""Documents and conversations in the making: which tokens a model is given, and what became of those it wrote."""

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedTokenizerBase

from flexigpt.decoding.options import SampleOptions
from flexigpt.runtime import InputError
from flexigpt.text import Documents, render

# Where a user's message stands in a template is seen by a word that no template has.
_MARK = "flexigptmark"

# What a window's end leaves of a document that has just begun is no text to learn from.
_LEAST_TOKENS = 16


class Draft:
    """A document or conversation in the making, one token at a time.

    Args:
        writer: whose it is.
        prompt: that it begins with, or the user's message; none: the model writes that, too.

    Attributes:
        token: that the model reads next.
    """

    def __init__(self, writer: "Writer", prompt: str | None) -> None:
        self._writer, self._prompt = writer, prompt
        self._asked: list[int] = []
        self._written: list[int] = []
        self._steps = self._conversation() if writer.template is not None else self._document()
        self.token = next(self._steps)

    def goes_on(self, drawn: int) -> bool:
        """Takes the token that was drawn after `token`, where that was not given anyway; whether there is a next."""
        try:
            self.token = self._steps.send(drawn)
        except StopIteration:
            return False
        return True

    def document(self, cut: bool = False) -> dict[str, Any] | None:
        """The row of the file; None where there is too little of it."""
        if cut and len(self._written) < _LEAST_TOKENS:
            return None
        writer = self._writer
        if writer.template is None:
            text = writer.text(writer.ids(self._prompt or "") + self._written)
            return {"text": text} if text.strip() else None
        text, user = writer.text(self._written), self._user()
        if not user or not text.strip():
            return None
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": text.strip()}]}

    def _user(self) -> str:
        return self._prompt or self._writer.text(self._asked).strip()

    def _document(self) -> Generator[int, int, None]:
        writer = self._writer
        given = [writer.first, *writer.ids(self._prompt or "")]
        yield from self._turn(given, self._written)

    def _conversation(self) -> Generator[int, int, None]:
        writer = self._writer
        assert writer.template is not None
        before, between = writer.template
        if self._prompt is not None:
            rendered = render([{"role": "user", "content": self._prompt}], writer.tokenizer, answer=True)
            yield from self._turn(writer.ids(rendered), self._written)
            return
        yield from self._turn(writer.ids(before) or [writer.first], self._asked)
        if self._user():
            yield from self._turn(writer.ids(between), self._written)

    def _turn(self, given: list[int], written: list[int]) -> Generator[int, int, None]:
        """Yields what is to be read: what is given, then what is drawn, which it keeps, until the model ends."""
        drawn = 0
        for token in given:
            drawn = yield token
        while drawn not in self._writer.stops:
            written.append(drawn)
            drawn = yield drawn


@dataclass(kw_only=True)
class Writer:
    """How drafts begin and end.

    Attributes:
        tokenizer: of the model.
        template: what the chat template puts before a user's message, and between that and the answer; None:
            documents are written.
        first: the token that documents begin with.
        prompts: what drafts begin with, in turn; none: the model begins.
        stops: tokens at which a document, or a message, ends.
    """

    tokenizer: PreTrainedTokenizerBase
    template: tuple[str, str] | None
    first: int
    prompts: list[str]
    stops: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, model: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, length: int) -> Self:
        """What the options and the tokenizer come to.

        Raises:
            InputError: prompts that cannot be read; no chat template, or no token to begin with, where one is needed.
        """
        has_template = bool(getattr(tokenizer, "chat_template", None))
        template = None
        if options.kind == "conversations" or (options.kind is None and has_template):
            written = render([{"role": "user", "content": _MARK}], tokenizer, answer=True).split(_MARK)
            if len(written) != 2:
                raise InputError(f"the chat template of {model} changes messages: give --kind documents")
            template = (written[0], written[1])
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Where documents are parted by one token, as <|endoftext|>, that is the beginning of the next one.
        first = eos if bos is None else bos
        if first is None:
            raise InputError(f"the tokenizer of {model} has no token for a beginning: nothing to start from")
        writer = cls(tokenizer=tokenizer, template=template, first=first, prompts=[], stops={bos, eos} - {None})
        writer.prompts = [] if options.prompts is None else writer.read(options.prompts, length // 2)
        return writer

    def stops_at(self, config: GenerationConfig | None) -> None:
        """Adds the tokens at which the model says that it stops: of a chat model often others than the tokenizer's."""
        found = getattr(config, "eos_token_id", None)
        self.stops |= {token for token in (found if isinstance(found, list) else [found]) if token is not None}

    def read(self, prompts: str, most: int) -> list[str]:
        """The documents of a text, each cut to so many tokens."""
        found = []
        for document in Documents(prompts):
            if not isinstance(document, str):
                raise InputError(f"{prompts} holds conversations: give the column of the prompts, as {prompts}#COLUMN")
            ids = self.ids(document)
            found.append(document if len(ids) <= most else self.text(ids[:most]))
        if not found:
            raise InputError(f"{prompts} holds no text: give a file with prompts in it")
        return found

    def drafts(self, begun: int) -> Iterator[Draft]:
        """Drafts without end, after so many."""
        for number in itertools.count(begun):
            yield Draft(self, self.prompts[number % len(self.prompts)] if self.prompts else None)

    def ids(self, text: str) -> list[int]:
        """Of a text as it stands, special tokens in it by their names."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def text(self, ids: list[int]) -> str:
        """Without special tokens, and without the half of a letter at its end."""
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded).rstrip("\ufffd")
