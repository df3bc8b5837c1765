"""How speculative decoding drafts, what it skips, and what it did."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from flexigpt.errors import InputError, flag
from flexigpt.trainable import layout_of


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
