"""How many tokens speculative decoding drafts, and what it did."""

from collections.abc import Callable
from dataclasses import dataclass

# Longer drafts pay only where nearly every token is accepted, and then hardly more.
MAX_DRAFT_LENGTH = 16

# What is assumed before anything was seen, and how fast it is forgotten.
_FIRST_ACCEPTANCE = 0.9

_LEARNING_RATE = 0.1

# Where drafting does not pay, one token is drafted every so many rounds, or no change would ever be seen.
_PROBE_EVERY = 32


@dataclass(kw_only=True)
class SpeculateStatistics:
    """What speculative decoding did; the pass over the prompt, and the token that comes of it, count as no pass.

    Attributes:
        tokens: new tokens.
        target_passes: times that the target verified tokens or decoded one.
        drafted: tokens that the draft proposed, one in each of its passes.
        accepted: of those, the ones that the target accepted.
        block_evaluations: times that a block ran, over however many tokens: how often a block's weights were read.
        num_blocks: blocks of the model: what plain decoding takes for each token.
    """

    tokens: int = 0
    target_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    block_evaluations: int = 0
    num_blocks: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the draft's tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def block_evaluations_per_token(self) -> float:
        """Times that a block ran for each token after the first, which the pass over the prompt gives."""
        return self.block_evaluations / (self.tokens - 1) if self.tokens > 1 else 0.0

    def line(self) -> str:
        """All of it in one line."""
        return (
            f"{self.tokens} tokens, {self.target_passes} target passes, {self.accepted} of {self.drafted} drafted "
            f"tokens accepted, {self.block_evaluations_per_token:.1f} block evaluations a token instead of "
            f"{self.num_blocks}"
        )


def expected_speedup(
    acceptance: float, draft_length: int, num_blocks: int, num_replicas: int, head_cost: float = 0.0
) -> float:
    """Tokens per cost of speculative decoding over those of plain decoding, where reading weights is what costs.

    A round drafts k tokens and verifies them. Each is accepted with probability a if all before it were, and the target
    adds one token of its own: 1 + a + ... + a^k tokens come out. They cost k passes over the draft's L - n blocks and
    one over all L, where draft and target share the first ones, each with the output head h: k (L - n + h) + L + h.
    Plain decoding takes L + h for one token. A pass over several tokens is taken to cost as much as one over one.

    Args:
        acceptance: a, in [0, 1].
        draft_length: k; 0 is plain decoding.
        num_blocks: L.
        num_replicas: n, which the draft skips.
        head_cost: h, the output head's cost in blocks' costs. Large vocabularies make it as much as several blocks.
    """
    tokens = sum(acceptance**accepted for accepted in range(draft_length + 1))
    plain = num_blocks + head_cost
    return tokens * plain / (draft_length * (plain - num_replicas) + plain)


class DraftLength:
    """The number of tokens to draft next.

    Args:
        fixed: that many each time; None: the number of the highest expected speedup at the acceptance seen, which may
            be 0.
        speedup: (acceptance, draft length) -> expected speedup.
    """

    def __init__(self, fixed: int | None, speedup: Callable[[float, int], float]) -> None:
        self._fixed = fixed
        self._speedup = speedup
        self._plain_rounds = 0
        self.acceptance = _FIRST_ACCEPTANCE

    def next(self) -> int:
        """Tokens to draft in the next round."""
        if self._fixed is not None:
            return self._fixed
        best = max(range(MAX_DRAFT_LENGTH + 1), key=lambda length: self._speedup(self.acceptance, length))
        self._plain_rounds = 0 if best else self._plain_rounds + 1
        return 1 if self._plain_rounds % _PROBE_EVERY == _PROBE_EVERY - 1 else best

    def saw(self, accepted: int, drafted: int) -> None:
        """Takes in a round: so many tokens accepted of those drafted; what came after a rejection tells nothing."""
        for outcome in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.acceptance += _LEARNING_RATE * (outcome - self.acceptance)
