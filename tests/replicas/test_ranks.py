"""A rank for each adapter: spent where it mends most, stored, read, shown and trained like any other."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import Run
from families import NUM_BLOCKS, tiny_model, token_ids
from flexigpt import InputError, Plan, PruneOptions, Replica, assemble_pruned, materialize, plan_only, prune
from flexigpt.model import SharedLinear, model_shape, stored_bytes
from flexigpt.replicas import spread_ranks
from flexigpt.replicas.ranks import spend
from flexigpt.runtime import Cache
from flexigpt.weights import StreamedModel, load_model
from workspaces import announced

WINDOWS = token_ids(batch=12, tokens=32, seed=3)


@pytest.fixture
def settings(text: Path) -> dict[str, Any]:
    return {"ratio": 0.4, "rank": 4, "calibration": str(text), "window_length": 64, "windows": 8}


def ranks(model: torch.nn.Module) -> list[int]:
    return [len(module.adapter_A) for module in model.modules() if isinstance(module, SharedLinear)]


@pytest.mark.parametrize("seed", range(5))
def test_no_other_ranks_mend_more(seed: int) -> None:
    """All of them tried; where costs differ, up to what the parameters that are left over could mend."""
    generator = torch.Generator().manual_seed(seed)
    places = [(0, "a"), (0, "b"), (3, "a")]
    spectra = {place: torch.rand(6, generator=generator).sort(descending=True).values for place in places}
    for costs, budget in ((dict.fromkeys(places, 2), 18), ({(0, "a"): 2, (0, "b"): 3, (3, "a"): 2}, 20)):
        found = spend(spectra, costs, budget)
        mended = {
            tried: sum(spectra[place][:rank].sum().item() for place, rank in zip(places, tried, strict=True))
            for tried in itertools.product(range(1, 7), repeat=3)
            if sum(costs[place] * rank for place, rank in zip(places, tried, strict=True)) <= budget
        }
        left = budget - sum(costs[place] * rank for place, rank in found.items())
        assert left >= 0
        dearest = max(spectra[place][rank].item() / costs[place] for place, rank in found.items() if rank < 6)
        ours = mended[tuple(found[place] for place in places)]
        assert ours >= max(mended.values()) - left * dearest - 1e-6


def test_what_an_adapter_mends_wholly_gets_no_more(tmp_path: Path) -> None:
    """One block differs from its base by rank 2, the other has nothing of it."""
    source = tiny_model("llama")
    shape = model_shape(source, output_norm=False)
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=(Replica(block=1, base=0, rank=6), Replica(block=3, base=0, rank=6)))
    with torch.no_grad():
        for path in shape.linears:
            near, base = (source.model.layers[i].get_submodule(path).weight for i in (1, 0))
            near.copy_(base + torch.randn(len(base), 2) @ torch.randn(2, base.shape[1]) * 0.05)
    with Cache(tmp_path).stage("ranks") as stage:
        spread = spread_ranks(StreamedModel(source), plan, WINDOWS, shape, stage)
    near, far = ([replica.rank_of(path) for path in shape.linears] for replica in spread.replicas)
    assert max(near) <= 2
    assert sum(far) > 6 * len(far)
    spent, given = (sum(map(shape.adapter_parameters, p.replicas)) for p in (spread, plan))
    assert 0 <= given - spent < max(map(sum, shape.linears.values()))


def test_less_is_left_of_the_output_at_the_same_size(tiny_source: Path, settings: dict[str, Any]) -> None:
    ids = token_ids(batch=8, tokens=48, seed=7)
    source, errors = load_model(str(tiny_source)), []
    for spread in (False, True):
        model, _, _ = prune(str(tiny_source), PruneOptions(**settings | {"spread_rank": spread}))
        with torch.no_grad():
            ours, theirs = (m.get_decoder()(input_ids=ids).last_hidden_state for m in (model, source))
        errors.append((ours - theirs).norm().item())
        assert stored_bytes(model) <= announced(assemble_pruned, tiny_source, PruneOptions(**settings)).written
    assert errors[1] < errors[0]


def test_every_form_computes_the_same(tiny_source: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint, the same plan applied, the source made of it."""
    options = PruneOptions(**settings)
    model, plan, record = prune(str(tiny_source), options)
    assert len(set(ranks(model))) > 1
    assert record["options"]["spread_rank"] is True
    expected = model(token_ids()).logits
    model.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert read.config.format_version == 3
    assert ranks(read) == ranks(model)
    assert torch.equal(read(token_ids()).logits, expected)
    decided, _ = plan_only(
        str(tiny_source),
        PruneOptions(**settings | {"adapter_init": "svd", "output_norm": True, "refit_kept": False}),
    )
    assert decided == plan
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    assert Plan.read(tmp_path / "plan.json") == plan
    given = PruneOptions(**settings | {"ratio": None, "rank": None, "plan": tmp_path / "plan.json"})
    applied, _, _ = prune(str(tiny_source), given)
    assert torch.equal(applied(token_ids()).logits, expected)
    assert announced(assemble_pruned, tiny_source, given).written == stored_bytes(model)
    torch.testing.assert_close(materialize(read)(token_ids()).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_command_spreads_by_default_and_shows_it(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--ratio", "0.4", "--rank", "4", "--calibration", text, "--window-length", "64", "--windows", "8"]
    code, out, errors = run("prune", tiny_source, tmp_path / "spread", *flags)
    assert code == 0, errors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "spread")
    least, most = min(ranks(model)), max(ranks(model))
    assert least < 4 < most
    assert "adapters of rank" in out
    _, shown, _ = run("inspect", tmp_path / "spread")
    assert " to " in shown
    assert run("report", tmp_path / "spread", "--out", tmp_path / "report.html")[0] == 0
    code, _, errors = run("prune", tiny_source, tmp_path / "plan", "--plan-only", *flags)
    assert code == 0, errors
    assert Plan.read(tmp_path / "plan" / "plan.json") == Plan.from_dict(
        {"format_version": 1, "num_blocks": NUM_BLOCKS, "replicas": model.config.replicas}
    )
    calibrated = {"calibration": str(text), "window_length": 64, "windows": 8}
    alike, _, _ = prune(str(tiny_source), PruneOptions(ratio=0.4, rank=4, spread_rank=False, **calibrated))
    assert set(ranks(alike)) == {4}
    assert stored_bytes(model) <= stored_bytes(alike)
    trained = ["--data", text, "--tokens", "256", "--batch-tokens", "128", "--window-length", "32"]
    code, _, errors = run("recover", tmp_path / "spread", tmp_path / "recovered", *trained)
    assert code == 0, errors
    assert ranks(AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")) == ranks(model)


@pytest.mark.parametrize("spread", [False, True])
def test_a_share_of_the_source_is_kept(tiny_source: Path, settings: dict[str, Any], spread: bool) -> None:
    """And another rank would not be within it."""
    source = load_model(str(tiny_source)).num_parameters()
    shape = model_shape(load_model(str(tiny_source)))
    options = PruneOptions(**settings | {"rank": "3.5%", "spread_rank": spread})
    model, plan, record = prune(str(tiny_source), options)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "adapter_" in name)
    of_a_rank = 2 * shape.adapter_parameters(1)
    dearest = max(map(sum, shape.linears.values()))
    assert 0.035 * source - of_a_rank - (dearest if spread else 0) < adapters <= 0.035 * source
    assert record["options"]["rank"] == plan.replicas[0].rank == int(0.035 * source / of_a_rank)


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        ("100%", "--rank 100% cannot be used"),
        ("0.01%", r"--rank 0.01% is out of range for 1 replicas: give 0\.\d+% \(rank 1\) to \d\.\d+% \(rank 32\)"),
        ("90%", "out of range"),
    ],
)
def test_shares_that_cannot_be_are_refused(tiny_source: Path, rank: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prune(str(tiny_source), PruneOptions.paper(blocks=[2], rank=rank))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([4], "row 0 .* has ranks = .* expected a whole number for each"),
        ({"self_attn.q_proj": "4"}, "expected a whole number for each"),
        ({"self_attn.q_proj": 0}, "gives block 2 rank 0: a rank is at least 1"),
        ({"q_proj": 4}, "a rank for q_proj, which is not there: name linears of self_attn.q_proj"),
        ({"mlp.up_proj": 33}, r"rank 33 of block 2 is above the size of mlp.up_proj \(48 x 32\): .* up to 32"),
    ],
)
def test_ranks_that_cannot_be_are_refused(tiny_source: Path, tmp_path: Path, given: Any, reason: str) -> None:
    row = {"block": 2, "base": 1, "rank": 4, "ranks": given}
    (tmp_path / "plan.json").write_text(json.dumps({"format_version": 1, "num_blocks": 6, "replicas": [row]}))
    with pytest.raises(InputError, match=reason):
        prune(str(tiny_source), PruneOptions.paper(plan=tmp_path / "plan.json"))
