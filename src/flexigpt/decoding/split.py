"""A model's blocks run in parts: those before the first replica, the rest of the draft, the rest of the target.

Up to the first replica draft and target compute the same, so hidden states and cache entries of these blocks are made
once and serve both. After it the draft has a cache of its own. The model's own forward prepares embeddings, masks and
positions for every part; blocks that do not belong to it hand their input on.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from flexigpt.model import cache_name, layout_of, plan_of, replaced_forwards
from flexigpt.runtime import InputError


class SplitDecoder:
    """Decodes one sequence with a model and its draft.

    Tokens enter by `draft` (through the draft), `target` (through the target) or `first` (through the first blocks
    only); `verify` takes the target to where the first blocks are. `keep` takes everything back to a length.

    Args:
        model: a compact model with replicas, which the draft skips.
        cache: empty; afterwards the target's.
        mask: (1, prompt) 1 for tokens, 0 for padding; None: no padding.
        positions: (1, prompt) positions of the prompt's tokens.

    Attributes:
        entry: the first replica.
        head_cost: the output head's weights over those of a kept block, in the mean.
        block_evaluations: calls of a block since the prompt, each over one or more tokens.

    Raises:
        InputError: a model without replicas; a cache that holds tokens already, or that cannot be taken back to a
            length.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
        layout = layout_of(model)
        if not layout.bases:
            faster = "it is faster than its source as it is, " if layout.is_compact else ""
            raise InputError(
                f"the model has no replicas to skip, so it has no draft: {faster}decode it without --speculative"
            )
        _check_cache(cache)
        self._model: Any = model
        self._blocks, self._draft_blocks = layout.blocks, frozenset(layout.kept)
        self.num_blocks, self.num_replicas, self.entry = len(layout.blocks), len(layout.bases), min(layout.bases)
        head: Any = model.get_output_embeddings()
        own = sum(p.numel() for block in layout.kept for p in layout.blocks[block].parameters())
        self.head_cost = head.weight.numel() * len(layout.kept) / own
        self._cache, self._cache_name = cache, cache_name(model.get_decoder())
        self._mask, self._positions = mask, positions
        self.block_evaluations = 0
        self.length = self.target_length = self.draft_length = 0  # of the first blocks, and of the rest of each
        # Tokens, and what they gave the first replica, from the shorter of the two rests on.
        self._ids = positions.new_empty(1, 0)
        self._stream: torch.Tensor | None = None
        self._running: frozenset[int] = frozenset()
        self._injected: torch.Tensor | None = None
        self._entering: torch.Tensor | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it the model belongs to this decoder: its blocks run when their part does."""
        as_tuple = layout_of(self._model).returns_tuple

        def switched(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == self.entry:
                    if self._injected is not None:
                        hidden_states = self._injected
                    self._entering = hidden_states
                if index in self._running:
                    self.block_evaluations += 1
                    return forward(hidden_states, *args, **kwargs)
                return (hidden_states, None) if as_tuple else hidden_states

            return run

        with replaced_forwards(self._blocks, switched):
            yield

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, prompt) ids through target and draft -> (1, vocabulary) logits of the target after the last."""
        logits = self._pass(ids, range(self.num_blocks), self._cache, 0, num_logits=1)
        self._took(ids)
        self.target_length = self.length
        self._make_views()
        self._draft_rest(num_logits=0)
        self.keep(self.length)
        self.block_evaluations = 0
        return logits[:, -1]

    def _make_views(self) -> None:
        """Caches for the parts: the same layers of each, and in place of those that do not run one that does.

        Masks and positions are made from the lengths of any of a cache's layers, so all of them must be a running one,
        of a block that has attention.
        """
        own: list[Any] = list(self._cache.layers)
        entry = self.entry
        rest = [_fresh(layer) if index in self._draft_blocks else None for index, layer in enumerate(own)]
        self._own_layers = [layer for layer in rest[entry:] if layer is not None]
        self._rollback = [layer for layer in own + self._own_layers if isinstance(layer, DynamicSlidingWindowLayer)]
        for layer in self._rollback:
            layer.activate_past_recording()
            layer.update = partial(_in_window, layer, layer.update)  # type: ignore[method-assign]
        silent = {one.block for one in plan_of(self._model.config).sublayers if one.sublayer == "attention"}
        target, first, rest = (
            [None if index in silent else layer for index, layer in enumerate(layers)]
            for layers in (own, own[:entry], rest)
        )
        some: Any = next((layer for layer in rest[entry:] if layer is not None), None) or _fresh(own[entry])
        live = own[0] if entry else some
        self._target_rest_view = Cache(layers=[own[entry]] * entry + [layer or own[entry] for layer in target[entry:]])
        self._draft_view = Cache(layers=[layer or live for layer in first + rest[entry:]])
        self._draft_rest_view = Cache(layers=[some] * entry + [layer or some for layer in rest[entry:]])

    def first(self, ids: torch.Tensor) -> None:
        """(1, tokens) ids through the first blocks only."""
        if self.entry:
            self._pass(ids, range(self.entry), self._cache, self.length, num_logits=0)
        self._took(ids)

    def draft(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, 1) id through the draft -> (1, vocabulary) logits; first whatever the draft has not seen yet."""
        if self.draft_length < self.length:
            self.first(ids)
            return self._draft_rest(num_logits=1)
        logits = self._pass(ids, self._draft_blocks, self._draft_view, self.length, num_logits=1)
        self._took(ids)
        self.draft_length = self.length
        return logits[:, -1]

    def target(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, tokens) ids through the target, which has seen all before -> (1, tokens, vocabulary) logits."""
        assert self.target_length == self.length
        logits = self._pass(ids, range(self.num_blocks), self._cache, self.length, num_logits=ids.shape[1])
        self._took(ids)
        self.target_length = self.length
        return logits

    def verify(self) -> torch.Tensor:
        """The target's logits after each token that it has not seen: (1, tokens, vocabulary)."""
        unseen = self.length - self.target_length
        blocks = range(self.entry, self.num_blocks)
        logits = self._rest(blocks, self._target_rest_view, self.target_length, num_logits=unseen)
        self.target_length = self.length
        return logits

    def _draft_rest(self, num_logits: int) -> torch.Tensor:
        blocks = [block for block in self._draft_blocks if block > self.entry]
        logits = self._rest(blocks, self._draft_rest_view, self.draft_length, num_logits)
        self.draft_length = self.length
        return logits[:, -1]

    def _rest(self, blocks: Any, view: Cache, start: int, num_logits: int) -> torch.Tensor:
        """What the first blocks made of the tokens from `start` on, through these blocks."""
        count = self.length - start
        entering = None if self._stream is None else self._stream[:, -count:]
        return self._pass(self._ids[:, -count:], blocks, view, start, num_logits, entering)

    def _pass(
        self, ids: torch.Tensor, blocks: Any, view: Cache, start: int, num_logits: int, entering: Any = None
    ) -> torch.Tensor:
        """Runs some of the blocks on tokens whose first is number `start` of the sequence.

        The first replica is given `entering`, where there is one, in the place of what came to it. Returns the logits
        after the last `num_logits` tokens; with none, the final norm's output instead.
        """
        self._running, self._injected = frozenset(blocks), entering
        end, prompt = start + ids.shape[1], self._positions.shape[1]
        positions = self._positions[:, start:end]
        if end > prompt:
            positions = self._positions[:, -1:] + torch.arange(start, end, device=ids.device) - prompt + 1
        mask = self._mask
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(1, max(end - prompt, 0))), 1)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, self._cache_name: view}
        if num_logits:
            logits: torch.Tensor = self._model(**given, use_cache=True, logits_to_keep=num_logits).logits
            return logits
        hidden: torch.Tensor = self._model.get_decoder()(**given, use_cache=True)[0]
        return hidden

    def _took(self, ids: torch.Tensor) -> None:
        """Notes that the first blocks have run on these tokens."""
        self._ids = torch.cat((self._ids, ids), 1)
        if self.entry:
            assert self._entering is not None
            parts = (self._entering,) if self._stream is None else (self._stream, self._entering)
            self._stream = torch.cat(parts, 1)
        self.length += ids.shape[1]

    def keep(self, length: int) -> None:
        """Takes caches and hidden states back to the first `length` tokens of the sequence."""
        own, entry = self._cache.layers, self.entry
        for layers, its in (
            (own[:entry], self.length),
            (own[entry:], self.target_length),
            (self._own_layers, self.draft_length),
        ):
            for layer in layers:
                _drop(layer, max(its - length, 0))
        dropped = self.length - length
        self.length, self.target_length, self.draft_length = (
            min(its, length) for its in (self.length, self.target_length, self.draft_length)
        )
        unseen = self.length - min(self.target_length, self.draft_length)
        stop = self._ids.shape[1] - dropped
        self._ids = self._ids[:, stop - unseen : stop]
        self._stream = None if self._stream is None else self._stream[:, stop - unseen : stop]

    def finish(self, length: int) -> None:
        """Leaves the cache as plain decoding would: the first `length` tokens, nothing kept for a way back."""
        self.keep(length)
        for layer in self._rollback:
            layer.record_past = False
            del layer.update


def _check_cache(cache: Any) -> None:
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        kind = type(cache).__name__ if cache is not None else "no cache"
        raise InputError(
            f"speculative decoding takes back rejected tokens, which it cannot with {kind} as set up here: leave out "
            "the cache, cache_implementation and use_cache"
        )
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
            raise InputError(
                f"speculative decoding cannot take back tokens of a {type(layer).__name__}: decode without it"
            )
    if cache.get_seq_length():
        raise InputError("the cache holds tokens that the draft has not seen: give the whole text and no cache")


def _fresh(layer: Any) -> Any:
    """An empty layer of the same kind."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    if isinstance(layer, StaticLayer):
        return StaticLayer(max_cache_len=layer.max_cache_len)
    return type(layer)()


def _in_window(layer: Any, update: Callable[..., Any], keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the masks are made for: transformers 5.17 gives out all that it keeps for a way back."""
    visible = layer.sliding_window - 1 + keys.shape[-2]
    return tuple(kept[:, :, -visible:] for kept in update(keys, *args, **kwargs))


def _drop(layer: Any, tokens: int) -> None:
    """Takes the last tokens back. With 0, too: a layer then lets go of what lies before its sliding window."""
    if isinstance(layer, StaticLayer):
        # What is left beyond the length is masked, until it is written over.
        layer.cumulative_length.sub_(tokens)
    else:
        layer.crop(-tokens)
