"""Speculative decoding against plain `generate`, its parts against separate models, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MaxTimeCriteria,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

from conftest import Run
from families import CACHE, FAMILIES, NUM_BLOCKS, compact_of, initialize_replicas, remove_blocks, tiny_model, token_ids
from flexigpt import InputError, Plan, Replica, SpeculateOptions, SpeculateStatistics, speculative_generate
from flexigpt.decoding.split import SplitDecoder
from flexigpt.model import SublayerReplica, sublayer_paths
from flexigpt.replicas import readers_of_units
from flexigpt.weights import StreamedModel, load_model, load_tokenizer

# replica -> base: in the middle, at the first block, at the last, apart and adjacent, all after the first or all before
# the last.
PLANS = [
    {2: 1, 3: 1},
    {0: 1},
    {5: 0},
    {1: 0, 2: 0, 4: 5},
    {1: 0, 2: 0, 3: 0, 4: 0, 5: 0},
    {0: 5, 1: 5, 2: 5, 3: 5, 4: 5},
]
# A torch made for GPUs, where there is none, cannot make the stream that transformers asks for.
OFFLOADS = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="no stream to offload a cache by"
)
PROMPT, NEW = 12, 14  # past the tiny families' sliding windows of 16


def compact(family: str, bases: dict[int, int], norm: float = 0.1, blocks: int = NUM_BLOCKS) -> Any:
    """A tiny compact model; at 0.1 its draft is right about half of the time."""
    source = remove_blocks(tiny_model(family), range(blocks, NUM_BLOCKS)) if blocks < NUM_BLOCKS else tiny_model(family)
    replicas = tuple(Replica(block=block, base=base, rank=3) for block, base in bases.items())
    plan = Plan(num_blocks=blocks, replicas=replicas)
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=norm, seed=0)
    return model.eval()


def plain(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    return model.generate(ids, **given)


def speculative(model: Any, ids: torch.Tensor, draft_length: int | None = 3, **settings: Any) -> torch.Tensor:
    options = {"speculate": SpeculateOptions(draft_length=draft_length), "custom_generate": speculative_generate}
    return plain(model, ids, **options | settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_plain_decodings(family: str) -> None:
    accepted = rejected = 0
    for number, bases in enumerate(PLANS):
        model, ids = compact(family, bases), token_ids(1, PROMPT, seed=number)
        expected = plain(model, ids)
        seen = SpeculateStatistics()
        assert torch.equal(speculative(model, ids, number + 1, statistics=seen), expected), bases
        accepted, rejected = accepted + seen.accepted, rejected + seen.drafted - seen.accepted
    assert accepted > 0
    assert rejected > 0


@pytest.mark.parametrize("family", ["llama-gqa", "opt-norm-before", "gpt_neox", "gpt2"])
def test_a_static_cache_gives_the_same_and_is_left_as_plain_decoding_leaves_it(family: str) -> None:
    for number, bases in enumerate(PLANS):
        model, ids = compact(family, bases), token_ids(1, PROMPT, seed=number)
        caches = [StaticCache(config=model.config.get_text_config(), max_cache_len=PROMPT + NEW) for _ in range(2)]
        expected = plain(model, ids, **{CACHE: caches[0]})
        assert torch.equal(speculative(model, ids, number + 1, **{CACHE: caches[1]}), expected), bases
        used = PROMPT + NEW - 1
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            assert int(one.get_seq_length()) == int(other.get_seq_length()) == used
            torch.testing.assert_close(one.keys[:, :, :used], other.keys[:, :, :used])
    given = {"cache_implementation": "static"}
    assert torch.equal(speculative(model, ids, None, **given), plain(model, ids, **given))


def test_compiled_blocks_draft_and_verify_in_one_graph_each() -> None:
    """fullgraph=True raises where a graph would break."""
    model, ids = compact("llama-gqa", {1: 0}, blocks=3), token_ids(1, PROMPT)
    expected = plain(model, ids, max_new_tokens=8)
    for block in model.block_list:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend="eager")
    seen = SpeculateStatistics()
    with torch._dynamo.config.patch(recompile_limit=64):  # blocks share their code, and each has some forms
        assert torch.equal(
            speculative(model, ids, 2, max_new_tokens=8, cache_implementation="static", statistics=seen), expected
        )
    assert seen.accepted > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_and_target_compute_what_two_separate_models_do(family: str) -> None:
    """Without a cache, whatever was taken back before. (A wrong draft would go unnoticed by what comes out.)"""
    replicas = (1, 2, 4)
    target, draft = compact(family, PLANS[3]), remove_blocks(tiny_model(family), replicas)
    model, ids, end = compact(family, PLANS[3]), token_ids(1, 40), 10
    cache, positions = DynamicCache(config=model.config), torch.arange(end)[None]
    decoder = SplitDecoder(model, cache, None, positions)

    def same(logits: torch.Tensor, reference: Any, stop: int) -> None:
        count = 1 if logits.ndim == 2 else logits.shape[1]
        expected = reference(input_ids=ids[:, :stop]).logits[:, -count:]
        torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-4, atol=1e-4)

    with torch.no_grad(), decoder.running():
        same(decoder.prompt(ids[:, :end]), target, end)
        for accepted in (0, 3, 2, 3, 3, 1):
            for stop in range(end + 1, end + 4):
                same(decoder.draft(ids[:, stop - 1 : stop]), draft, stop)
            decoder.first(ids[:, end + 3 : end + 4])
            same(decoder.verify(), target, end + 4)
            end += accepted + 1
            decoder.keep(end)
            if accepted == 2:
                same(decoder.target(ids[:, end : end + 3]), target, end + 3)
                end += 2
                decoder.keep(end)


@pytest.mark.parametrize("draft_length", [*range(1, 9), None])
def test_every_draft_length_stops_where_plain_decoding_does(draft_length: int | None) -> None:
    model, ids = compact("llama-gqa", {2: 1, 3: 1}), token_ids(1, PROMPT)
    for length in (1, 2, 5):
        expected = plain(model, ids, max_new_tokens=length)
        assert torch.equal(speculative(model, ids, draft_length, max_new_tokens=length), expected)
    for end in plain(model, ids)[0, PROMPT::3].unique().tolist():
        expected = plain(model, ids, eos_token_id=end)
        assert expected.shape[1] <= PROMPT + NEW
        assert torch.equal(speculative(model, ids, draft_length, eos_token_id=end), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma3_text", "opt-norm-before", "gpt2", "gpt_neo"])
def test_left_padding_and_processors_change_nothing(family: str) -> None:
    model, ids = compact(family, PLANS[3]), token_ids(1, PROMPT)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    for settings in ({"attention_mask": mask}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}):
        expected = plain(model, ids, **settings)
        assert torch.equal(speculative(model, ids, **settings), expected)
    assert not torch.equal(plain(model, ids, attention_mask=mask), plain(model, ids))


def test_block_evaluations_are_counted_exactly() -> None:
    """A round of k drafted tokens: k (L - n) + f + (L - f) calls of a block; hooks of our own count the same."""
    model, ids, calls = compact("llama", {2: 1, 3: 1}, norm=1e-6), token_ids(1, PROMPT), [0, 0]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        calls[0] += 1
        calls[1] += (args[0] if args else kwargs["x"]).shape[1]

    for block in model.block_list:
        block.mlp.register_forward_pre_hook(count, with_kwargs=True)
    seen = SpeculateStatistics()
    speculative(model, ids, 3, max_new_tokens=9, statistics=seen)
    rounds = 2  # a fresh gamma is nearly nothing, so all is accepted: 1 + 2 (3 + 1) tokens
    assert (seen.tokens, seen.target_passes, seen.drafted, seen.accepted) == (9, rounds, 6, 6)
    assert seen.block_evaluations == rounds * (3 * 4 + 6)
    prompt = (6 + 2, (6 + 2) * PROMPT)  # the target's pass, and the draft's blocks after the first replica
    assert calls[0] == seen.block_evaluations + prompt[0]
    # Tokens: 3 drafted x 4 blocks, 2 for the last, 4 x 4 blocks; once the draft's last two blocks catch up on one.
    assert calls[1] == rounds * (3 * 4 + 2 + 4 * 4) + 2 + prompt[1]
    assert seen.block_evaluations_per_token == pytest.approx(36 / 8)


def test_the_cache_and_the_model_are_left_as_by_plain_decoding() -> None:
    for family in ("llama-gqa", "mistral"):
        model, ids = compact(family, {2: 1}), token_ids(1, PROMPT)
        caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
        expected = plain(model, ids, **{CACHE: caches[0]})
        assert torch.equal(speculative(model, ids, 5, **{CACHE: caches[1]}), expected)
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(one.keys, other.keys)
            torch.testing.assert_close(one.values, other.values)
            assert one.get_seq_length() == other.get_seq_length()
            assert getattr(one, "record_past", False) is getattr(other, "record_past", False)
        assert not any("forward" in block.__dict__ for block in model.block_list)


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model, ids = compact("llama", {2: 1}), token_ids(1, PROMPT)
    expected = plain(model, ids)

    def fail(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        if ids.shape[1] > PROMPT + 3:
            raise RuntimeError("stop")
        return torch.tensor([False])

    with pytest.raises(RuntimeError, match="stop"):
        speculative(model, ids, stopping_criteria=StoppingCriteriaList([fail]))
    assert not any("forward" in block.__dict__ for block in model.block_list)
    assert torch.equal(plain(model, ids), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "does not go with num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "does not go with num_return_sequences=2"),
        ({"return_dict_in_generate": True}, "does not go with return_dict_in_generate=True"),
        ({"prompt_lookup_num_tokens": 3}, "does not go with prompt_lookup_num_tokens=3"),
        ({"guidance_scale": 1.5}, "does not go with guidance_scale=1.5"),
        pytest.param({"cache_implementation": "offloaded_static"}, "with StaticCache as set up here", marks=OFFLOADS),
        pytest.param({"cache_implementation": "offloaded"}, "with DynamicCache as set up here", marks=OFFLOADS),
        ({"use_cache": False}, "cannot with no cache"),
        ({"inputs_embeds": torch.zeros(1, PROMPT, 32)}, "leave inputs_embeds out"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    model = compact("llama", {2: 1})
    with pytest.raises(InputError, match=message):
        speculative(model, token_ids(1, PROMPT), **settings)


def test_several_sequences_a_used_cache_and_a_model_without_draft_are_refused() -> None:
    model, ids = compact("llama", {2: 1}), token_ids(2, PROMPT)
    with pytest.raises(InputError, match="takes one sequence at a time, not 2"):
        speculative(model, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:1, :4], **{CACHE: cache})
    with pytest.raises(InputError, match="holds tokens that the draft has not seen"):
        speculative(model, ids[:1], **{CACHE: cache})
    with pytest.raises(InputError, match="cannot take back tokens of a StaticSlidingWindowLayer"):
        speculative(compact("gemma2", {2: 1}), ids[:1], cache_implementation="static")
    with pytest.raises(InputError, match="no replicas to skip"):
        speculative(tiny_model("llama"), ids[:1])
    with pytest.raises(InputError, match="--draft-length 0 is too small"):
        SpeculateOptions(draft_length=0)


def test_stop_strings_time_and_streamers(tiny_compact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(str(tiny_compact)), load_tokenizer(str(tiny_compact))
    ids = tokenizer("It was a dark", return_tensors="pt").input_ids
    text = tokenizer.decode(plain(model, ids)[0, ids.shape[1] :])
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, text[8:11])])
    expected = plain(model, ids, stopping_criteria=stop)
    assert expected.shape[1] < ids.shape[1] + NEW
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    generate = partial(speculative_generate, streamer=streamer)
    found = speculative(model, ids, stopping_criteria=stop, custom_generate=generate, streamer=streamer)
    assert torch.equal(found, expected)
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0, ids.shape[1] :]).strip()
    out_of_time = StoppingCriteriaList([MaxTimeCriteria(0.0)])
    assert speculative(model, ids, stopping_criteria=out_of_time).shape[1] == ids.shape[1] + 1


def test_the_command_prints_the_same_text_and_says_what_it_did(run: Run, tiny_compact: Path) -> None:
    asked = ["generate", tiny_compact, "--prompt", "It was a dark", "--max-new-tokens", 20]
    expected = run(*asked)
    assert expected[0] == 0
    code, out, err = run(*asked, "--speculative")
    assert (code, out) == (0, expected[1])
    assert "20 tokens, " in err
    assert " block evaluations a token instead of 6" in err
    code, out, err = run(*asked, "--speculative", "--temperature", 0.7, "--seed", 3)
    assert (code, out) == run(*asked, "--speculative", "--temperature", 0.7, "--seed", 3)[:2]
    assert code == 0


def test_the_command_says_that_a_model_has_no_replicas(run: Run, tiny_source: Path) -> None:
    code, _, err = run("generate", tiny_source, "--prompt", "It", "--max-new-tokens", 4, "--speculative")
    assert code == 2
    assert "the model has no replicas to skip, so it has no draft" in err


def narrow(family: str, *blocks: int, replicas: tuple[Replica, ...] = ()) -> Any:
    """A tiny compact model whose blocks have half of their hidden units; the last two of them no attention."""
    source = tiny_model(family)
    rows = [SublayerReplica(block=block, sublayer="mlp", form="units", units=24) for block in blocks]
    rows += [SublayerReplica(block=block, sublayer="attention", form="none") for block in blocks[-2:]]
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=replicas, sublayers=tuple(rows))
    model = compact_of(source, plan)
    for block in blocks:
        readers = readers_of_units(StreamedModel(source), block, sublayer_paths(source)["mlp"], torch.arange(24))
        StreamedModel(model).own(block, readers)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.0, seed=0)
    return model.eval()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2", "opt-norm-before"])
def test_a_model_with_replicas_and_narrow_blocks_drafts_as_any_other(family: str) -> None:
    model = narrow(family, 1, 3, replicas=(Replica(block=2, base=0, rank=3),))
    ids, seen = token_ids(1, PROMPT), SpeculateStatistics()
    assert torch.equal(speculative(model, ids, statistics=seen), plain(model, ids))
    assert seen.acceptance == 1, "the replica writes nothing, so the draft is the model"


def test_a_model_without_replicas_is_said_to_be_fast_as_it_is() -> None:
    with pytest.raises(InputError, match="no draft: it is faster than its source as it is, decode it without"):
        speculative(narrow("llama", 2, 3), token_ids(1, PROMPT))
