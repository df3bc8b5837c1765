"""Pruning end to end, through the Python API."""

import collections
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import flexigpt
from families import token_ids
from flexigpt import ExtendOptions, InputError, Plan, PruneOptions, assemble_pruned, plan_only, prune
from flexigpt.model import build, find_architecture, stored_bytes
from flexigpt.pruning.distances import BASE_DISTANCES
from flexigpt.pruning.extend import PATTERNS
from flexigpt.pruning.scores import BLOCK_SCORES
from flexigpt.replicas.initialization import ADAPTER_INITS
from flexigpt.runtime import choices_of
from workspaces import announced


@pytest.fixture(scope="module")
def calibrated(text: Path) -> dict[str, object]:
    return {"calibration": str(text), "window_length": 64, "windows": 8}


def test_the_lowest_scores_become_replicas_of_the_nearest_bases(
    tiny_source: Path, calibrated: dict[str, object]
) -> None:
    model, plan, record = prune(str(tiny_source), PruneOptions.paper(ratio=0.4, rank=4, **calibrated))
    scores = record["scores"]
    assert plan.pruned == sorted(sorted(range(6), key=scores.__getitem__)[:2])
    for replica in plan.replicas:
        candidates = record["distances"][replica.block]
        assert set(candidates) == set(plan.kept)
        assert candidates[replica.base] == min(candidates.values())
        assert replica.rank == 4
    assert model.config.replicas == plan.to_dict()["replicas"]
    assert record["compact"]["parameters"] == model.num_parameters()
    assert record["compact"]["bytes"] == 4 * model.num_parameters()
    assert record["calibration"]["windows"] == [8, 64]
    json.dumps(record)


def test_the_default_rank_is_a_sixteenth_of_the_hidden_size(example: Path) -> None:
    _, plan, _ = prune(str(example), PruneOptions.paper(blocks=[5]))
    assert plan.replicas[0].rank == 192 // 16


def test_same_seed_same_bits(tiny_source: Path, calibrated: dict[str, object]) -> None:
    options = PruneOptions.paper(ratio=0.4, rank=4, adapter_init="zero", seed=5, **calibrated)
    (first, plan, _), (second, again, _) = (prune(str(tiny_source), options) for _ in range(2))
    assert plan == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_seed_chooses_windows_and_draws_adapters(tiny_source: Path, calibrated: dict[str, object]) -> None:
    records, adapters = [], []
    for seed in (1, 2):
        options = PruneOptions.paper(ratio=0.2, rank=4, adapter_init="zero", seed=seed, **calibrated)
        model, plan, record = prune(str(tiny_source), options)
        records.append(record["scores"])
        adapters.append(model.block_list[plan.pruned[0]].self_attn.q_proj.adapter_A)
    assert records[0] != records[1]
    assert not torch.equal(*adapters)


def test_the_record_says_what_the_defaults_were(tiny_source: Path, calibrated: dict[str, object]) -> None:
    _, _, record = prune(str(tiny_source), PruneOptions.paper(ratio=0.4, **calibrated))
    expected = {"rank": 2, "output_norm": 0.05, "seed": 0, "block_score": "influence", "base_distance": "low-rank"}
    assert expected.items() <= record["options"].items()


@pytest.mark.parametrize("settings", [{"ratio": 0.4}, {"blocks": [2, 3, 4]}, {"target_size": "1.2MB"}])
def test_the_size_is_known_before_the_work(
    tiny_source: Path, calibrated: dict[str, object], settings: dict[str, object]
) -> None:
    options = PruneOptions.paper(rank=4, **settings, **calibrated)
    model, _, _ = prune(str(tiny_source), options)
    assert announced(assemble_pruned, tiny_source, options).written == stored_bytes(model)


def test_applying_the_plan_gives_the_same_model(
    tiny_source: Path, calibrated: dict[str, object], tmp_path: Path
) -> None:
    options = PruneOptions.paper(ratio=0.4, rank=4, **calibrated)
    plan, record = plan_only(str(tiny_source), options)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    direct, decided, direct_record = prune(str(tiny_source), options)
    applied, read, _ = prune(str(tiny_source), PruneOptions.paper(plan=tmp_path / "plan.json"))
    assert decided == read == plan
    assert record["scores"] == direct_record["scores"]
    assert torch.equal(applied(token_ids()).logits, direct(token_ids()).logits)


@pytest.mark.parametrize("score", BLOCK_SCORES)
@pytest.mark.parametrize("distance", BASE_DISTANCES)
@pytest.mark.parametrize("init", ADAPTER_INITS)
def test_every_variant_makes_a_model(
    tiny_source: Path, calibrated: dict[str, object], score: str, distance: str, init: str
) -> None:
    options = PruneOptions.paper(
        ratio=0.4, rank=4, block_score=score, base_distance=distance, adapter_init=init, **calibrated
    )
    model, _, record = prune(str(tiny_source), options)
    assert torch.isfinite(model(token_ids()).logits).all()
    assert (record["block_score"], record["base_distance"]) == (score, distance)


def test_without_output_norm_nothing_is_normalised(tiny_source: Path) -> None:
    model, _, _ = prune(str(tiny_source), PruneOptions.paper(blocks=[2], rank=4, output_norm="none"))
    assert not [name for name, _ in model.named_parameters() if "output_norm" in name]


@pytest.mark.parametrize("size", ["0.31M", "1.24MB"])
def test_target_size_is_kept(tiny_source: Path, calibrated: dict[str, object], size: str) -> None:
    model, plan, _ = prune(str(tiny_source), PruneOptions.paper(target_size=size, rank=4, **calibrated))
    assert model.num_parameters() <= 310_000
    saved = 310_000 - model.num_parameters()
    linears = 32 * (64 + 32 + 32 + 64 + 3 * 48)
    adapters = 4 * (96 + 64 + 64 + 96 + 3 * 80)
    assert saved < linears - adapters - 2 * 32  # with one pruned block fewer it would not have been enough
    assert plan.replicas


def test_dtype_is_that_of_the_checkpoint(tiny_source: Path) -> None:
    model, _, record = prune(str(tiny_source), PruneOptions.paper(blocks=[2], rank=4, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert record["source"]["bytes"] == 2 * record["source"]["parameters"]


def test_perplexity_before_and_after_is_that_of_evaluate(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    options = PruneOptions.paper(blocks=[2], rank=4, perplexity=str(text), window_length=64)
    model, _, record = prune(str(tiny_source), options)
    flexigpt.write_checkpoint(tmp_path / "out", model, record, source=str(tiny_source))
    for name, where in (("source", tiny_source), ("compact", tmp_path / "out")):
        options_again = flexigpt.EvalOptions(perplexity=str(text), window_length=64)
        measured = flexigpt.evaluate(str(where), options_again)["models"][0]["perplexity"]
        assert record["perplexity"][name] == {key: value for key, value in measured.items() if key != "text"}


def test_the_method_on_the_shipped_model(example: Path, tmp_path: Path) -> None:
    """30 % of a real model on real text: influence spares the first blocks, and output norms help."""
    rows = (example / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (tmp_path / "two.jsonl").write_text("".join(rows), encoding="utf-8")
    settings = {
        "ratio": 0.3,
        "calibration": str(example / "calibration.jsonl"),
        "window_length": 256,
        "windows": 16,
        "perplexity": str(tmp_path / "two.jsonl"),
        "dtype": "float32",
    }
    _, plan, record = prune(str(example), PruneOptions.paper(**settings))
    _, _, without = prune(str(example), PruneOptions.paper(**settings, output_norm="none"))
    assert len(plan.replicas) == 4
    assert {0, 1} <= set(plan.kept)
    before, after = (record["perplexity"][name]["perplexity"] for name in ("source", "compact"))
    assert before < after < 2.2 * before
    assert without["perplexity"]["compact"]["perplexity"] > after
    assert 0.79 < record["compact"]["bytes"] / record["source"]["bytes"] < 0.81


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "exactly one of --ratio, --blocks, --target-size, --max-loss and --plan: got none"),
        ({"ratio": 0.3, "blocks": [1]}, "got --ratio and --blocks"),
        *(({"ratio": ratio}, "--ratio .* is out of range") for ratio in (0.0, 1.0, -0.1, 1.5, float("nan"))),
        ({"ratio": 0.3, "block_score": "best"}, "--block-score best is unknown: give influence, angular"),
        ({"ratio": 0.3, "base_distance": "best"}, "--base-distance best is unknown: give low-rank, full-rank, frob"),
        ({"ratio": 0.3, "adapter_init": "best"}, "--adapter-init best is unknown: give svd, zero"),
        ({"ratio": 0.3, "rank": 0}, "--rank 0 is too small"),
        ({"ratio": 0.3, "windows": 0}, "--windows 0 is too small"),
        ({"ratio": 0.3, "rank": "3.7"}, "--rank 3.7 cannot be used: give a number, as 12, or a share"),
        ({"target_size": "1M", "rank": "3.7%"}, "--target-size already says how much is stored"),
        ({"ratio": 0.3, "output_norm": "big"}, "--output-norm big cannot be used: give none, or a small constant"),
        ({"ratio": 0.3, "output_norm": float("inf")}, "--output-norm inf cannot be used"),
        ({"ratio": 0.3, "dtype": "int8"}, "--dtype int8 is unknown: give auto, float32"),
        ({"ratio": 0.3, "seed": -1}, "--seed -1 is out of range"),
        ({"plan": "p", "remove": True}, "a plan says which replicas stand in, and --remove leaves them out"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        PruneOptions(**options)


def test_ranks_and_norms_are_read_as_people_write_them() -> None:
    options = PruneOptions(ratio=0.3, rank="12", output_norm="0.1")
    assert (options.rank, options.output_norm) == (12, 0.1)
    assert PruneOptions(ratio=0.3, rank="3.7%").rank == "3.7%"


def test_every_choice_has_its_implementation() -> None:
    choices = {field.name: choices_of(field.type) for field in dataclasses.fields(PruneOptions)}
    for field, known in (
        ("block_score", BLOCK_SCORES),
        ("base_distance", BASE_DISTANCES),
        ("adapter_init", ADAPTER_INITS),
    ):
        assert choices[field] == tuple(known)
    assert choices_of(get_type_hints(ExtendOptions)["pattern"]) == tuple(PATTERNS)


def test_options_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from flexigpt import ExtendOptions, PruneOptions; PruneOptions.paper(ratio=0.3); "
        "ExtendOptions(blocks='1:2'); assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_removal_is_not_pruning(tiny_source: Path) -> None:
    with pytest.raises(InputError, match=r"have no replicas: call flexigpt\.remove"):
        prune(str(tiny_source), PruneOptions.paper(blocks=[2], remove=True))


def test_a_run_opens_its_source_once(
    tiny_source: Path, calibrated: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration, empty models, tokenizer: with text to calibrate on and to measure, and a checkpoint written."""
    calls: collections.Counter[str] = collections.Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (AutoConfig, "from_pretrained"),
        (AutoTokenizer, "from_pretrained"),
        (build, "init_empty_weights"),
    ):
        label = f"{getattr(owner, '__name__', '')}.{name}"
        monkeypatch.setattr(owner, name, counted(label, getattr(owner, name)))
    options = PruneOptions(ratio=0.4, rank=4, perplexity=calibrated["calibration"], **calibrated)
    with assemble_pruned(str(tiny_source), options) as (assembly, _, record):
        flexigpt.write_checkpoint(tmp_path / "out", assembly, record, source=str(tiny_source))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert calls["AutoConfig.from_pretrained"] <= 2
    assert calls["flexigpt.model.build.init_empty_weights"] == 2
    assert calls["AutoTokenizer.from_pretrained"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": [9]}, "name some of 0 to 5"),
        ({"blocks": list(range(6))}, "leaves none"),
        (
            {"blocks": [2], "rank": 33},
            r"rank 33 is above the size of self_attn.q_proj \(64 x 32\): .* up to 32",
        ),
        ({"target_size": "9B"}, "meets the target"),
        ({"target_size": "1K"}, "out of reach"),
        ({"ratio": 0.4, "window_length": 4000}, "give 2 to 128"),
        ({"blocks": [2], "perplexity": "nowhere.txt"}, "nowhere.txt is not there"),
    ],
)
def test_what_the_source_rules_out_is_refused(tiny_source: Path, options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prune(str(tiny_source), PruneOptions.paper(**{"rank": 4} | options))


def test_a_plan_must_fit_the_source(tiny_source: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for plan, reason in (
        (Plan(num_blocks=5, replicas=(flexigpt.Replica(block=1, base=0, rank=4),)), "the plan is for 5 blocks"),
        (Plan(num_blocks=6, replicas=(flexigpt.Replica(block=1, base=0, rank=40),)), "rank 40 is above the size"),
    ):
        path.write_text(json.dumps(plan.to_dict()))
        with pytest.raises(InputError, match=reason):
            prune(str(tiny_source), PruneOptions.paper(plan=path))


def test_what_the_adapters_mend_is_recorded(tiny_source: Path) -> None:
    """The share of |W_i - W_j|^2 within the first singular values, by a full SVD."""
    _, _, record = prune(str(tiny_source), PruneOptions.paper(blocks=[2], rank=3))
    source = AutoModelForCausalLM.from_pretrained(tiny_source)
    base = next(iter(min(record["distances"][2].items(), key=lambda item: item[1])))
    spectra = record["adapter_spectra"][2]
    assert set(spectra) == set(find_architecture(source.config).linears)
    for path, spectrum in spectra.items():
        weights = [source.model.layers[i].get_submodule(path).weight.detach().double() for i in (2, base)]
        energy = torch.linalg.svdvals(weights[0] - weights[1]).square()
        assert spectrum["ranks"] == [1, 2, 3]
        for rank, mended in zip(spectrum["ranks"], spectrum["mended"], strict=True):
            assert mended == pytest.approx((energy[:rank].sum() / energy.sum()).item(), abs=2e-5)


def test_the_parts_of_both_models_are_recorded(tiny_source: Path) -> None:
    _, _, record = prune(str(tiny_source), PruneOptions.paper(blocks=[2, 4], rank=3))
    for name in ("source", "compact"):
        assert sum(record[name]["parts"].values()) == record[name]["parameters"]
    assert record["compact"]["parts"]["replicas, adapters"] > 0
    assert "replicas, adapters" not in record["source"]["parts"]
