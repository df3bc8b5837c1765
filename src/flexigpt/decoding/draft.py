"""How speculative decoding drafts, what it skips, and what it did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from flexigpt.model import layout_of
from flexigpt.runtime import InputError, flag


@dataclass(frozen=True, kw_only=True)
class SpeculateOptions:
    """How to draft.

    Attributes:
        draft_length: with --speculative: tokens to draft each time; default: as many as pay at the acceptance seen.
        draft_blocks: with --speculative: blocks that the draft skips besides the replicas: faster drafts, of which less
            is accepted.
        prompt_lookup: with --speculative: proposes up to so many tokens from the text so far, where its last three
            stand in it already, before the draft is asked.
    """

    draft_length: int | None = None
    draft_blocks: Sequence[int] | None = None
    prompt_lookup: int | None = None

    def __post_init__(self) -> None:
        for name in ("draft_length", "prompt_lookup"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)} {value} is too small: give at least 1")


@dataclass(kw_only=True)
class SpeculateStatistics:
    """What speculative decoding did, the pass over the prompt and the token that comes of it left out of the passes.

    Attributes:
        tokens: new tokens.
        target_passes: times that the target verified tokens or decoded one.
        draft_passes: times that the draft decoded a token.
        drafted: tokens that the draft proposed.
        accepted: of those, the ones that the target accepted.
        looked_up: tokens proposed from the text so far.
        looked_up_accepted: of those, the ones that the target accepted.
        block_evaluations: times that a block ran, over however many tokens: how often a block's weights were read.
        block_rows: tokens that blocks ran over, summed over those times.
        num_blocks: blocks of the model: what plain decoding takes for each token, of either.
    """

    tokens: int = 0
    target_passes: int = 0
    draft_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    looked_up_accepted: int = 0
    block_evaluations: int = 0
    block_rows: int = 0
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
        text = (
            f"{self.tokens} tokens, {self.target_passes} target passes, {self.draft_passes} draft passes, "
            f"{self.accepted} of {self.drafted} drafted tokens accepted, "
        )
        if self.looked_up:
            text += f"{self.looked_up_accepted} of {self.looked_up} looked up, "
        return text + f"{self.block_evaluations_per_token:.1f} block evaluations a token instead of {self.num_blocks}"


def skipped_blocks(model: PreTrainedModel, options: SpeculateOptions) -> frozenset[int]:
    """The blocks that the draft skips: the replicas, and others asked for.

    Raises:
        InputError: none to skip, or none left; blocks that do not exist, are replicas anyway or are named twice.
    """
    layout, draft_blocks = layout_of(model), tuple(options.draft_blocks or ())
    depth = len(layout.blocks)
    if not layout.bases and not draft_blocks:
        raise InputError("the model has no replicas to skip, so it has no draft: decode it without --speculative")
    for block in draft_blocks:
        if not 0 <= block < depth:
            raise InputError(f"--draft-blocks names block {block}, but the model has blocks 0 to {depth - 1}")
        if block in layout.bases:
            raise InputError(
                f"--draft-blocks names block {block}, a replica, which the draft skips anyway: leave it out"
            )
        if draft_blocks.count(block) > 1:
            raise InputError(f"--draft-blocks names block {block} more than once")
    skipped = frozenset(layout.bases) | frozenset(draft_blocks)
    if len(skipped) == depth:
        raise InputError("--draft-blocks leaves the draft no block: name fewer")
    return skipped


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
