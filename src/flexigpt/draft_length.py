"""How many tokens to draft: a cost model, and a draft length that follows the acceptance seen. No torch."""

from collections.abc import Callable

# Longer drafts pay only where nearly every token is accepted, and then hardly more.
MAX_DRAFT_LENGTH = 16
# What is assumed before anything was seen, and how fast it is forgotten.
_FIRST_ACCEPTANCE = 0.9
_LEARNING_RATE = 0.1
# Where drafting does not pay, one token is drafted every so many rounds, or no change would ever be seen.
_PROBE_EVERY = 32


def expected_speedup(
    acceptance: float,
    draft_length: int,
    num_blocks: int,
    num_skipped: int,
    first_skipped: int,
    row_cost: float = 0.0,
    head_cost: float = 0.0,
) -> float:
    """Tokens per cost of speculative decoding over those of plain decoding.

    A round drafts k tokens and verifies them. Each is accepted with probability a if all before it were, and the target
    adds one token of its own: 1 + a + ... + a^k tokens come out. Their cost, in evaluations of a block on one token:

    - k draft steps of L - n blocks. The f blocks before the first skipped one compute in them what the target needs;
    - f blocks for the last drafted token, so that the target can add a token after it;
    - one pass over the other L - f blocks for k + 1 tokens: (L - f) (1 + c k);
    - the output head h for each of those steps, and for that pass h (1 + c k).

    Plain decoding takes L + h for one token. Where weights are what decoding waits for (c = 0) the costs add up to
    k (L - n + h) + L + h, whatever f is: sharing the first blocks then saves cache and prompt, but no pass over a
    block. Where tokens cost (c > 0), it saves f c k.

    Args:
        acceptance: a, in [0, 1].
        draft_length: k; 0 is plain decoding.
        num_blocks: L.
        num_skipped: n, blocks that the draft skips (the replicas, and others asked for).
        first_skipped: f, the first of them.
        row_cost: c, what each token after the first adds to a pass over a block, in such passes.
        head_cost: h, the output head's cost in blocks' costs. Large vocabularies make it as much as several blocks.
    """
    tokens = sum(acceptance**accepted for accepted in range(draft_length + 1))
    drafting = draft_length * (num_blocks - num_skipped + head_cost) + first_skipped
    verifying = (num_blocks - first_skipped + head_cost) * (1 + row_cost * draft_length)
    return tokens * (num_blocks + head_cost) / (drafting + verifying)


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
