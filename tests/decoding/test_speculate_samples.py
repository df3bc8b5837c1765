"""Samples of speculative decoding against the model's exact distribution; draft lengths against simulated rounds."""

import copy
import itertools
import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from test_speculate import compact
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from families import NUM_BLOCKS, VOCABULARY
from flexigpt import SpeculateOptions, SpeculateStatistics
from flexigpt.decoding.draft import DraftLength, expected_speedup
from flexigpt.decoding.speculate import Chooser, Speculation
from flexigpt.decoding.split import SplitDecoder

# A vocabulary of 12, of which top-k leaves 6; the draft is far from the target.
TINY = 12
PROCESSORS = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(6)]
CONTEXT = torch.tensor([[1, 3, 4]])


def sampled_model() -> Any:
    model = compact("llama", {1: 0, 2: 0, 4: 5}, norm=1.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    return model


class Cut:
    """A processor that leaves only the first tokens of the vocabulary."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(TINY, VOCABULARY), -math.inf)


def processors() -> Any:
    return LogitsProcessorList([Cut(), *PROCESSORS])


class Tables:
    """A decoder that reads processed logits, computed before by the model and its draft, by what was decoded so far.

    20,000 samples of a real model's would take minutes; what is tested here is what is done with the logits.
    """

    num_blocks, num_replicas, head_cost, block_evaluations = NUM_BLOCKS, 3, 0.5, 0

    def __init__(self, model: Any, depth: int) -> None:
        self.seen = tuple(CONTEXT[0, :-1].tolist())
        self.unverified = 0
        self._tables = [tables(model, depth), tables(draft_of(model), depth)]

    def draft(self, ids: torch.Tensor) -> torch.Tensor:
        self.first(ids)
        return self._tables[1][self.seen]

    def first(self, ids: torch.Tensor) -> None:
        self.seen += tuple(ids[0].tolist())
        self.unverified += ids.shape[1]

    def verify(self) -> torch.Tensor:
        ends = range(len(self.seen) - self.unverified + 1, len(self.seen) + 1)
        self.unverified = 0
        return torch.stack([self._tables[0][self.seen[:end]] for end in ends], 1)

    def target(self, ids: torch.Tensor) -> torch.Tensor:
        self.first(ids)
        return self.verify()

    def keep(self, length: int) -> None:
        self.seen = self.seen[:length]


def draft_of(model: Any) -> Any:
    """The model whose replicas change nothing: an independent draft."""
    draft = copy.deepcopy(model)
    for block in (1, 2, 4):
        draft.block_list[block].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return draft


@torch.no_grad()
def tables(model: Any, depth: int) -> dict[tuple[int, ...], torch.Tensor]:
    """(1, vocabulary) logits after the context and up to `depth` more tokens."""
    found = {}
    for length in range(depth + 1):
        more = list(itertools.product(range(TINY), repeat=length))
        ids = torch.cat((CONTEXT.expand(len(more), -1), torch.tensor(more, dtype=torch.long).view(len(more), -1)), 1)
        for row, logits in zip(ids.tolist(), model(ids).logits[:, -1], strict=True):
            found[tuple(row)] = processors()(ids, logits[None])[:, :TINY]
    return found


@torch.no_grad()
def exact(model: Any, length: int = 2) -> dict[tuple[int, ...], float]:
    """Probabilities of the next tokens, by a plain forward pass over every continuation."""
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in probabilities.items():
            ids = torch.cat((CONTEXT, torch.tensor([tokens], dtype=torch.long)), 1)
            after = processors()(ids, model(ids).logits[:, -1].float()).softmax(-1)[0].tolist()
            longer |= {(*tokens, token): probability * p for token, p in enumerate(after) if p > 0}
        probabilities = longer
    return probabilities


def chi_square_p(counts: dict[tuple[int, ...], int], probabilities: dict[tuple[int, ...], float]) -> float:
    """How likely counts this far from the probabilities are (Wilson and Hilferty's approximation); rare ones pooled."""
    draws = sum(counts.values())
    if set(counts) - set(probabilities):
        return 0.0
    cells = [(counts.get(cell, 0), draws * p) for cell, p in probabilities.items()]
    rare = [cell for cell in cells if cell[1] < 10]
    cells = [cell for cell in cells if cell[1] >= 10]
    if rare:
        cells.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


class AcceptsAlways(Chooser):
    def judge(self, target: Any, draft: Any, drafted: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return drafted, True


class DrawsFromTheTarget(Chooser):
    """After a rejection from p instead of what is left of it."""

    def judge(self, target: Any, draft: Any, drafted: torch.Tensor) -> tuple[torch.Tensor, bool]:
        token, accepted = super().judge(target, draft, drafted)
        return (token, True) if accepted else (self.choose(target), False)


@torch.no_grad()
def draw(decoder: Any, chooser: Chooser, draws: int, options: SpeculateOptions) -> dict[tuple[int, ...], int]:
    """Counts of the two tokens after the context."""
    counts: dict[tuple[int, ...], int] = {}
    speculation = Speculation(decoder, chooser, options, SpeculateStatistics())
    for _ in range(draws):
        ids, tokens = CONTEXT, ()
        while len(tokens) < 2:
            new = speculation.round(ids, 3)
            ids = torch.cat((ids, torch.stack(new, 1)), 1)
            tokens += tuple(int(token) for token in new)
        decoder.keep(CONTEXT.shape[1] - 1)
        counts[tokens[:2]] = counts.get(tokens[:2], 0) + 1
    return counts


TWO = SpeculateOptions(draft_length=2)


def test_samples_have_the_targets_distribution() -> None:
    torch.manual_seed(0)
    model = sampled_model()
    counts = draw(Tables(model, 3), Chooser(LogitsProcessorList(), True), 5000, TWO)
    assert chi_square_p(counts, exact(model)) > 0.01


@pytest.mark.parametrize("wrong", [AcceptsAlways, DrawsFromTheTarget])
def test_wrong_rules_are_found_out(wrong: type[Chooser]) -> None:
    torch.manual_seed(0)
    model = sampled_model()
    counts = draw(Tables(model, 3), wrong(LogitsProcessorList(), True), 2000, TWO)
    assert chi_square_p(counts, exact(model)) < 1e-6


def test_samples_of_the_model_itself_have_its_distribution() -> None:
    """Through real passes, caches and rollbacks."""
    torch.manual_seed(0)
    model = sampled_model()
    decoder = SplitDecoder(model, DynamicCache(config=model.config), None, torch.arange(2)[None])
    with torch.no_grad(), decoder.running():
        decoder.prompt(CONTEXT[:, :-1])
        counts = draw(decoder, Chooser(processors(), True), 200, TWO)
    assert chi_square_p(counts, exact(model)) > 0.01


def test_expected_speedup_is_that_of_simulated_rounds() -> None:
    """Rounds played token by token, and block by block."""
    chance, depth, replicas, head = random.Random(0), 12, frozenset((5, 7, 8, 9)), 1.5
    first = min(replicas)
    for acceptance, length in ((0.9, 4), (0.6, 1), (0.6, 3), (0.3, 0), (1.0, 5)):
        cost = tokens = 0.0
        for _ in range(20_000):
            for _ in range(length):
                cost += sum(1 for block in range(depth) if block not in replicas) + head
            cost += first + (depth - first) + head  # the last token through the first blocks, all through the rest
            accepted = 0
            while accepted < length and chance.random() < acceptance:
                accepted += 1
            tokens += accepted + 1
        expected = expected_speedup(acceptance, length, depth, len(replicas), head)
        assert tokens / (cost / (depth + head)) == pytest.approx(expected, rel=0.01)


def test_the_draft_length_follows_the_acceptance() -> None:
    speedup = partial(expected_speedup, num_blocks=16, num_replicas=6)
    lengths = DraftLength(None, speedup)
    for _ in range(60):
        lengths.saw(3, 3)
    eager = lengths.next()
    assert eager == max(range(17), key=lambda length: speedup(lengths.acceptance, length)) > 4
    for _ in range(60):
        lengths.saw(0, 3)
    drafted = [lengths.next() for _ in range(64)]
    assert drafted.count(0) == 62  # and a probe now and then
    assert drafted.count(1) == 2
    assert DraftLength(7, speedup).next() == 7
