"""Self-speculative decoding: the draft proposes tokens, the compact model verifies them; same output, fewer passes.

1. The draft, the model with its replicas skipped, decodes k tokens.
2. The target takes them all at once, from the first replica on: what comes before was computed for the draft.
3. They are accepted up to the first that the target would not have chosen; there the target puts its own, and after the
   last accepted one it adds one.

Sampling keeps the target's distribution exactly by the rule of Leviathan et al. (arXiv 2211.17192) and Chen et al.
(arXiv 2302.01318): a token drafted with probability q is accepted with probability min(1, p / q), else one is drawn
from the normalised positive part of p - q. Both p and q are taken after the same logits processors.
"""

from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from flexigpt.decoding.draft import DraftLength, SpeculateStatistics, expected_speedup
from flexigpt.decoding.options import SpeculateOptions
from flexigpt.decoding.split import SplitDecoder
from flexigpt.model import CACHE_NAMES
from flexigpt.runtime import InputError

# What `generate` hands on besides ids, and what of it is used here.
_KNOWN_INPUTS = frozenset(("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep"))

# Settings of `generate` that ask for another way of decoding, or for output that this one does not have.
_REFUSED = (
    *("num_beams", "num_return_sequences", "num_beam_groups", "penalty_alpha", "dola_layers", "constraints"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "force_words_ids", "prefill_chunk_size"),
    *("guidance_scale", "watermarking_config", "return_dict_in_generate"),
)


@torch.no_grad()
def speculative_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: Any = None,
    speculate: SpeculateOptions | None = None,
    statistics: SpeculateStatistics | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Decodes with the model's own draft: `model.generate(ids, custom_generate=speculative_generate)`.

    Greedy output is plain decoding's, as far as a pass over several tokens gives the same numbers as passes over one;
    samples have the same distribution.

    Args:
        model: a compact model with replicas.
        input_ids: (1, prompt) ids.
        logits_processor: as `generate` prepares them; what depends on more than ids and logits is refused.
        stopping_criteria: as `generate` prepares them, asked after every token.
        generation_config: `do_sample` and `max_length` are read here, the rest is in the two above.
        streamer: given each token. `generate` keeps the one that it is given to itself: pass it here as well, by
            `functools.partial`.
        speculate: how to draft; an argument of `generate`, too.
        statistics: filled in; an argument of `generate`, too.
        inputs: `attention_mask`, `position_ids` and the cache, as `generate` prepares them.

    Returns:
        (1, prompt + new) ids.

    Raises:
        InputError: several sequences, another decoding method, output other than ids, or a cache that cannot be taken
            back; a model that has no draft.
    """
    _check_request(input_ids, generation_config, inputs)
    _check_positions(model.config, input_ids.shape[1], generation_config.max_length)
    cache = next((inputs[name] for name in CACHE_NAMES if name in inputs), None)
    decoder = SplitDecoder(model, cache, inputs.get("attention_mask"), inputs["position_ids"])
    chooser = Chooser(logits_processor, bool(generation_config.do_sample))
    statistics = SpeculateStatistics() if statistics is None else statistics
    speculation = Speculation(decoder, chooser, speculate or SpeculateOptions(), statistics)
    ids, done = input_ids, False
    with decoder.running():
        new = [chooser.choose(chooser.scores(ids, decoder.prompt(ids)))]
        while not done:
            for token in new:
                ids = torch.cat((ids, token[None]), 1)
                statistics.tokens += 1
                if streamer is not None:
                    streamer.put(token.cpu())
                done = bool(stopping_criteria(ids, None).all())
                if done:
                    break
            else:
                new = speculation.round(ids, generation_config.max_length - ids.shape[1])
        decoder.finish(ids.shape[1] - 1)
    if streamer is not None:
        streamer.end()
    return ids


def _check_request(input_ids: torch.Tensor, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    for name in _REFUSED:
        value = getattr(config, name, None)
        if (value and value != 1) or value is True:
            raise InputError(f"speculative decoding does not go with {name}={value}: leave one of the two out")
    if input_ids.shape[0] != 1:
        raise InputError(
            f"speculative decoding takes one sequence at a time, not {input_ids.shape[0]}: call it for each"
        )
    unknown = sorted(name for name, value in inputs.items() if name not in _KNOWN_INPUTS and value is not None)
    if unknown or not input_ids.shape[1]:
        raise InputError(f"speculative decoding takes token ids alone: leave {', '.join(unknown) or 'others'} out")


def _check_positions(config: Any, prompt: int, end: int) -> None:
    """Refuses lengths across which the model turns its keys otherwise: what is cached would have to be computed again.

    `generate` does that for Phi-3's LongRoPE; with dynamic NTK each further position turns all of them a little.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for one in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        kind, limit = one.get("rope_type"), config.max_position_embeddings
        if kind == "longrope":
            limit = one["original_max_position_embeddings"]
        if end > limit and (kind == "dynamic" or (kind == "longrope" and prompt <= limit)):
            raise InputError(
                f"this model turns its keys otherwise beyond {limit} positions ({kind}), and speculative decoding "
                f"cannot go from {prompt} to {end}: stay below, or leave speculation out"
            )


class Chooser:
    """Chooses tokens as `generate` does, and judges those that were drafted."""

    def __init__(self, processor: LogitsProcessorList, sampling: bool) -> None:
        self._processor: Any = processor
        self._sampling = sampling

    def scores(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(1, vocabulary) logits after these ids -> what they are chosen by: probabilities, or scores when greedy."""
        scores: torch.Tensor = self._processor(ids, logits.to(dtype=torch.float32, copy=True))
        return scores.softmax(-1) if self._sampling else scores

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """(1, vocabulary) -> (1,) a token."""
        return torch.multinomial(scores, 1)[:, 0] if self._sampling else scores.argmax(-1)

    def judge(self, target: torch.Tensor, draft: torch.Tensor, drafted: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The token that stands where one was drafted, and whether it is that one.

        Args:
            target: (1, vocabulary) scores of the target.
            draft: (1, vocabulary) scores of the draft.
            drafted: (1,) what it proposed.
        """
        if not self._sampling:
            token = target.argmax(-1)
            return token, bool(token == drafted)
        if bool(torch.rand_like(target[0, :1]) * draft[0, drafted] < target[0, drafted]):
            return drafted, True
        left = (target - draft).clamp(min=0)
        # Rounding alone can leave nothing, where the two are the same.
        return self.choose(left if left.sum() > 0 else target), False


class Speculation:
    """Rounds of drafting and verifying."""

    def __init__(
        self, decoder: SplitDecoder, chooser: Chooser, options: SpeculateOptions, statistics: SpeculateStatistics
    ) -> None:
        self._decoder, self._chooser, self._statistics = decoder, chooser, statistics
        statistics.num_blocks = decoder.num_blocks
        speedup = partial(
            expected_speedup,
            num_blocks=decoder.num_blocks,
            num_replicas=decoder.num_replicas,
            head_cost=decoder.head_cost,
        )
        self._lengths = DraftLength(options.draft_length, speedup)

    def round(self, ids: torch.Tensor, room: int) -> list[torch.Tensor]:
        """The next tokens, one at least and `room` at most; `ids`, (1, tokens), ends in one that nothing has seen."""
        decoder, statistics = self._decoder, self._statistics
        drafted = self._draft(ids, min(self._lengths.next(), room - 1))
        logits = decoder.verify() if drafted else decoder.target(ids[:, -1:])
        new, accepted = self._judge(ids, logits, drafted)
        self._lengths.saw(accepted, len(drafted))
        decoder.keep(ids.shape[1] + accepted)
        statistics.target_passes += 1
        statistics.drafted += len(drafted)
        statistics.accepted += accepted
        statistics.block_evaluations = decoder.block_evaluations
        return new

    def _draft(self, ids: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`count` tokens of the draft's, which the first blocks have then seen, and the scores they were chosen by."""
        drafted = []
        for _ in range(count):
            scores = self._chooser.scores(ids, self._decoder.draft(ids[:, -1:]))
            drafted.append((self._chooser.choose(scores), scores))
            ids = torch.cat((ids, drafted[-1][0][None]), 1)
        if drafted:
            self._decoder.first(ids[:, -1:])
        return drafted

    def _judge(
        self, ids: torch.Tensor, logits: torch.Tensor, drafted: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], int]:
        """The tokens that come out of a round, and how many of them were drafted."""
        new: list[torch.Tensor] = []
        for number, (token, scores) in enumerate(drafted):
            chosen, is_it = self._chooser.judge(self._chooser.scores(ids, logits[:, number]), scores, token)
            new.append(chosen)
            if not is_it:
                return new, number
            ids = torch.cat((ids, chosen[None]), 1)
        new.append(self._chooser.choose(self._chooser.scores(ids, logits[:, -1])))
        return new, len(drafted)
