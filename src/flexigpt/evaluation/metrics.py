"""What is measured of predictions on a text. A new metric is a class here and a line in METRICS."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from flexigpt.runtime import ALONE, InputError, World

_MAX_BUCKETS = 64


@dataclass(frozen=True)
class Predictions:
    """What is predicted in a batch of windows.

    Attributes:
        targets: (windows, tokens) ids of the tokens that come.
        logits: (windows, tokens, vocabulary) of the model and, where there is one, of the model beside it: its source,
            or its draft.
    """

    targets: torch.Tensor
    logits: tuple[torch.Tensor, ...]

    @cached_property
    def loss(self) -> float:
        """The model's negative log-likelihood of the targets, summed, in nats."""
        return F.cross_entropy(self.logits[0].flatten(0, 1).float(), self.targets.flatten(), reduction="sum").item()

    @cached_property
    def log_probabilities(self) -> list[torch.Tensor]:
        """(windows, tokens, vocabulary) float32 of each model."""
        return [F.log_softmax(logits.float(), -1) for logits in self.logits]


class Metric:
    """What is added up over the tokens of a text, and what comes of it: by default the mean.

    Attributes:
        heading: of its row in tables; empty: it has none, and its result need not be a number.
        digits: after the point, in tables.
        percent: whether tables show it in percent.
        better: lower or higher.
        against: whether it compares the model with its source, the second of the predictions.
        total: what `add` adds to, a number or a tensor; summed over processes.
    """

    heading, digits, percent, better, against = "", 4, False, "lower", False

    def __init__(self) -> None:
        self.total: Any = 0.0

    def add(self, seen: Predictions) -> None:
        """Adds a batch to `total`."""
        raise NotImplementedError

    def result(self, tokens: int, num_bytes: int) -> Any:
        """JSON-ready, of so many predicted tokens and UTF-8 bytes of text."""
        return self.total / tokens

    @classmethod
    def shown(cls, value: float) -> str:
        """A result as tables show it."""
        return f"{(100 if cls.percent else 1) * value:.{cls.digits}f}"


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of a token."""

    heading = "perplexity"

    def add(self, seen: Predictions) -> None:
        self.total += seen.loss

    def result(self, tokens: int, num_bytes: int) -> float:
        return math.exp(min(self.total / tokens, 700.0))


class BitsPerByte(Perplexity):
    """Negative log-likelihood of the text in bits, by its bytes: comparable between tokenizers."""

    heading = "bits per byte"

    def result(self, tokens: int, num_bytes: int) -> float:
        return self.total / math.log(2) / num_bytes


class Divergence(Metric):
    """KL(source || model) of a token in nats."""

    heading, against = "divergence", True

    def add(self, seen: Predictions) -> None:
        own, theirs = seen.log_probabilities
        self.total += F.kl_div(own, theirs, reduction="sum", log_target=True).item()


class Agreement(Metric):
    """Share of tokens for which model and source rank the same token first."""

    heading, percent, digits, better, against = "agreement", True, 2, "higher", True

    def add(self, seen: Predictions) -> None:
        ours, theirs = seen.logits
        self.total += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()


class Positions(Metric):
    """Mean loss of source and model by position in the window, in buckets named by their first position."""

    against = True

    def add(self, seen: Predictions) -> None:
        losses = [-part.gather(-1, seen.targets[..., None])[..., 0] for part in seen.log_probabilities]
        sums = torch.stack([*losses, torch.ones_like(losses[0])]).sum(1, dtype=torch.float64)
        if not isinstance(self.total, torch.Tensor):  # no later window is longer than the first
            self.total = torch.zeros_like(sums)
        self.total[:, : sums.shape[1]] += sums

    def result(self, tokens: int, num_bytes: int) -> dict[str, list[float]]:
        width = math.ceil(self.total.shape[1] / _MAX_BUCKETS)
        model, source, count = torch.stack([bucket.sum(1) for bucket in self.total.split(width, 1)], 1)
        positions = list(range(0, self.total.shape[1], width))
        return {"position": positions, "source": (source / count).tolist(), "model": (model / count).tolist()}


# By name in an evaluation: in its `fidelity` those that compare with the source, in its `perplexity` the others.
METRICS: Mapping[str, type[Metric]] = {
    "perplexity": Perplexity,
    "bits_per_byte": BitsPerByte,
    "divergence": Divergence,
    "agreement": Agreement,
    "positions": Positions,
}


def add_up(
    predictions: Iterable[Predictions], num_bytes: int, device: torch.device, against: bool, world: World = ALONE
) -> dict[str, Any]:
    """What METRICS make of the predictions on a text: those that compare with the source, or the others.

    Returns:
        JSON-ready, by the metric's name; and `tokens`, how many were predicted.

    Raises:
        InputError: logits that are not finite.
    """
    metrics = {name: metric() for name, metric in METRICS.items() if metric.against == against}
    tokens = 0
    for seen in predictions:
        tokens += seen.targets.numel()
        for metric in metrics.values():
            metric.add(seen)
    for metric in metrics.values():
        total = world.sum(torch.as_tensor(metric.total, dtype=torch.float64, device=device))
        if not total.isfinite().all():
            raise InputError("logits are not finite on this text: give --dtype float32, or check the weights")
        metric.total = total if total.ndim else total.item()
    tokens = int(world.sum(torch.tensor(tokens, device=device)))
    return {name: metric.result(tokens, num_bytes) for name, metric in metrics.items()} | {"tokens": tokens}
