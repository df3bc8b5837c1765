"""What a recovery measures on held-out text: perplexity, and what a draft that is trained too is worth."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt.evaluation import perplexity
from flexigpt.recovery.draft import measure_draft
from flexigpt.recovery.training import Training, hold_in
from flexigpt.runtime import ALONE, Track, World, silent
from flexigpt.text import TokenizedText
from flexigpt.weights import move


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A text to measure on.

    Attributes:
        text: tokenized.
        window_length: tokens in a window; windows do not overlap.
        draft: whether the draft is measured too.
    """

    text: TokenizedText
    window_length: int
    draft: bool

    def of_model(self, model: PreTrainedModel, world: World = ALONE, track: Track = silent) -> dict[str, Any]:
        """Perplexity, as a dictionary, and as its `draft` what `measure_draft` returns; the model is in eval mode."""
        given: dict[str, Any] = {"window_length": self.window_length, "world": world, "track": track}
        measured = perplexity(model, self.text, **given)
        return measured | ({"draft": measure_draft(model, self.text, **given)} if self.draft else {})

    def of_training(self, training: Training) -> dict[str, Any]:
        """The same of a model under training; every process must call it."""
        with _evaluating(training):
            return self.of_model(training.model, training.world)

    def perplexity_of_training(self, training: Training) -> float:
        """Its perplexity alone; every process must call it."""
        with _evaluating(training):
            measured = perplexity(training.model, self.text, window_length=self.window_length, world=training.world)
        value: float = measured["perplexity"]
        return value

    def computed_in(
        self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, track: Track
    ) -> dict[str, Any]:
        """The same in a dtype other than the stored one; the model is as before afterwards."""
        stored = {name: parameter.data for name, parameter in model.named_parameters()}
        hold_in(model, dtype)
        measured = self.of_model(move(model.eval(), device), track=track)
        move(model, torch.device("cpu"))
        for name, parameter in model.named_parameters():
            parameter.data = stored[name]
        return measured


@contextlib.contextmanager
def _evaluating(training: Training) -> Iterator[None]:
    training.model.eval()
    with training.computing():
        yield
    training.model.train()
