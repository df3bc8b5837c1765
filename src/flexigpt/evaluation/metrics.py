"""What is measured of predictions on a text. A new metric is a class here and a line in METRICS."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from flexigpt.runtime import ALONE, InputError, World

_MAX_BUCKETS = 64


@dataclass(frozen=True)
class Predictions:
    """What is predicted in a batch of windows.

    Attributes:
        targets: (windows, tokens) ids of the tokens that come.
        logits: (windows, tokens, vocabulary) of the model.
        other: the same of the model beside it, its source or its draft; None: there is none.
    """

    targets: torch.Tensor
    logits: torch.Tensor
    other: Any = None

    @cached_property
    def loss(self) -> float:
        """Negative log-likelihood of the targets, summed, in nats."""
        return F.cross_entropy(self.logits.flatten(0, 1).float(), self.targets.flatten(), reduction="sum").item()

    @cached_property
    def log_probabilities(self) -> torch.Tensor:
        """(windows, tokens, vocabulary) float32."""
        return F.log_softmax(self.logits.float(), -1)

    @cached_property
    def other_log_probabilities(self) -> torch.Tensor:
        """(windows, tokens, vocabulary) float32, of the model beside it."""
        return F.log_softmax(self.other.float(), -1)


class Metric:
    """What is added up over the tokens of a text, and what comes of it: by default the mean.

    Attributes:
        heading: of its row in tables; empty: it has none, and the result need not be a number.
        digits: shown after the point.
        percent: whether a share is shown in percent.
        better: which way.
        against: whether it compares the model with its source, which is then the `other` one.
        total: what `add` adds to; summed over processes.
    """

    heading: ClassVar[str] = ""
    digits: ClassVar[int] = 4
    percent: ClassVar[bool] = False
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    against: ClassVar[bool] = False

    def __init__(self) -> None:
        self.total: Any = 0.0

    def add(self, seen: Predictions) -> None:
        """Adds a batch to `total`."""
        raise NotImplementedError

    def result(self, tokens: int, num_bytes: int) -> Any:
        """JSON-ready, of all tokens that were predicted and the UTF-8 bytes of the text."""
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
        theirs = seen.other_log_probabilities
        self.total += F.kl_div(seen.log_probabilities, theirs, reduction="sum", log_target=True).item()


class Agreement(Metric):
    """Share of tokens for which model and source rank the same token first."""

    heading, percent, digits, better, against = "agreement", True, 2, "higher", True

    def add(self, seen: Predictions) -> None:
        self.total += (seen.log_probabilities.argmax(-1) == seen.other_log_probabilities.argmax(-1)).sum().item()


class Positions(Metric):
    """Mean loss of source and model by position in the window, in buckets named by their first position."""

    against = True

    def add(self, seen: Predictions) -> None:
        parts = (seen.other_log_probabilities, seen.log_probabilities)
        losses = [-part.gather(-1, seen.targets[..., None])[..., 0] for part in parts]
        sums = torch.stack([*losses, torch.ones_like(losses[0])]).sum(1, dtype=torch.float64)
        if not isinstance(self.total, torch.Tensor):  # no later window is longer than the first
            self.total = torch.zeros_like(sums)
        self.total[:, : sums.shape[1]] += sums

    def result(self, tokens: int, num_bytes: int) -> dict[str, list[float]]:
        width = math.ceil(self.total.shape[1] / _MAX_BUCKETS)
        source, model, count = torch.stack([bucket.sum(1) for bucket in self.total.split(width, 1)], 1)
        return {
            "position": list(range(0, self.total.shape[1], width)),
            "source": (source / count).tolist(),
            "model": (model / count).tolist(),
        }


# By the name that each has in an evaluation: of those against the source in its `fidelity`, else in its `perplexity`.
METRICS: Mapping[str, type[Metric]] = {
    "perplexity": Perplexity,
    "bits_per_byte": BitsPerByte,
    "divergence": Divergence,
    "agreement": Agreement,
    "positions": Positions,
}


def add_up(
    predictions: Iterable[Predictions],
    num_bytes: int,
    device: torch.device,
    *,
    against: bool = False,
    world: World = ALONE,
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
