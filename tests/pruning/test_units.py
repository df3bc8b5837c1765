"""The default: each MLP keeps its own best units, as many as pay, and what is left is refitted."""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Hooked, Run
from families import FAMILIES, NUM_BLOCKS, compact_of, tiny_model, token_ids
from flexigpt import Plan, PruneOptions, Replica, assemble_pruned, assemble_removed, plan_only, prune, remove
from flexigpt.model import SublayerReplica, model_shape, sublayer_paths
from flexigpt.pruning.allocation import allocated, measure_sublayers, units_of
from flexigpt.replicas import readers_of_units, refit_kept
from flexigpt.runtime.cache import CACHE_VARIABLE
from flexigpt.weights import StreamedModel
from forks import Forks
from killing import Killed, KillingTrack
from workspaces import workspace_of

WINDOWS = token_ids(batch=12, tokens=32, seed=3)


@pytest.fixture(scope="module")
def calibrated(text: Path) -> dict[str, Any]:
    return {"calibration": str(text), "window_length": 64, "windows": 8}


def flags_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    states = (first.state_dict(), second.state_dict())
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_at_equal_bytes_it_wins_by_far_over_plain_removal(example: Path, tmp_path: Path) -> None:
    """On text that neither has seen, of the shipped model; the removal refits what is left, too."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text((example / "validation.jsonl").read_text().splitlines(keepends=True)[0])
    asked = {"calibration": str(example / "calibration.jsonl"), "window_length": 256, "windows": 8}
    asked |= {"perplexity": str(held_out)}
    shorter, _, removal = remove(str(example), PruneOptions(blocks=[5, 8, 11], **asked))
    target = shorter.num_parameters()
    model, plan, record = prune(str(example), PruneOptions(target_size=f"{target / 1e6}M", **asked))
    assert 0.995 * target <= model.num_parameters() <= target
    assert not plan.replicas
    theirs, ours = (one["perplexity"] for one in (removal, record))
    source = ours["source"]["perplexity"]
    assert ours["compact"]["perplexity"] - source < 0.5 * (theirs["shorter"]["perplexity"] - source)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_a_share_of_the_parameters_is_what_goes(tiny_source: Path, calibrated: dict[str, Any], ratio: float) -> None:
    """Within a step of units."""
    model, plan, record = prune(str(tiny_source), PruneOptions(ratio=ratio, **calibrated))
    source = AutoModelForCausalLM.from_pretrained(tiny_source)
    shape = model_shape(source)
    target = shape.parameters - ratio * NUM_BLOCKS * shape.block_parameters
    assert 0.99 * target <= model.num_parameters() <= target
    assert record["compact"]["parameters"] == model.num_parameters()
    assert model.config.sublayers == plan.to_dict()["sublayers"]
    assert plan.to_dict()["format_version"] == 2


def test_the_record_says_what_each_sublayer_costs(tiny_source: Path, calibrated: dict[str, Any]) -> None:
    _, record = plan_only(str(tiny_source), PruneOptions(ratio=0.3, **calibrated))
    for costs in record["sublayer_costs"].values():
        assert len(costs) == NUM_BLOCKS
        assert all(cost > 0 for cost in costs)
    assert record["calibration"] == {"text": calibrated["calibration"], "windows": [8, 64], "asked": 8}
    json.dumps(record)


def test_a_plan_can_be_made_edited_and_applied(
    run: Run, tiny_source: Path, calibrated: dict[str, Any], tmp_path: Path
) -> None:
    flags = flags_of(calibrated)
    code, printed, _ = run("prune", tiny_source, tmp_path / "plan", "--plan-only", "--ratio", "0.4", *flags)
    assert code == 0
    assert "apply it with --plan" in printed
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    as_it_is = ("--plan", tmp_path / "plan" / "plan.json")
    assert run("prune", tiny_source, tmp_path / "as-it-is", *as_it_is, *flags)[0] == 0
    assert run("prune", tiny_source, tmp_path / "direct", "--ratio", "0.4", *flags)[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("as-it-is", "direct")]
    assert weights[0] == weights[1]
    told, made = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("plan", "direct"))
    assert {key: told["planned"][key] for key in ("parameters", "bytes")} == {
        key: made["compact"][key] for key in ("parameters", "bytes")
    }
    assert f"the model will store {made['compact']['parameters']:,} parameters" in " ".join(printed.split())
    plan["sublayers"] = [
        {"block": 1, "sublayer": "attention", "form": "none"},
        {"block": 3, "sublayer": "mlp", "form": "units", "units": 5},
        {"block": 4, "sublayer": "mlp", "form": "none"},
    ]
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    assert run("prune", tiny_source, tmp_path / "out", "--plan", tmp_path / "edited.json", *flags)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.sublayers == plan["sublayers"]
    blocks = model.block_list
    assert [tuple(blocks[i].mlp.down_proj.weight.shape) for i in (2, 3)] == [(32, 48), (32, 5)]
    paths = {name for name, _ in model.named_parameters()}
    assert not [name for name in paths if ".1.self_attn." in name or ".4.mlp." in name]


def test_a_plan_may_hold_replicas_of_other_blocks_too(
    run: Run, tiny_source: Path, calibrated: dict[str, Any], tmp_path: Path
) -> None:
    plan = Plan(num_blocks=6, replicas=(Replica(block=4, base=5, rank=2),), sublayers=(SublayerReplica(**ROW),))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    asked = ("--plan", tmp_path / "plan.json", *flags_of(calibrated))
    code, _, errors = run("prune", tiny_source, tmp_path / "out", *asked)
    assert code == 0, errors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.replicas == plan.to_dict()["replicas"]
    assert model.config.sublayers == [ROW]
    assert torch.isfinite(model(token_ids()).logits).all()


def test_another_ratio_asks_the_cache_and_the_same_seed_gives_the_same_bytes(
    tiny_source: Path, calibrated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    seen = []
    for ratio in (0.3, 0.5):
        track = KillingTrack()
        seen.append((prune(str(tiny_source), PruneOptions(ratio=ratio, **calibrated), track)[0], track.seen))
    assert "measuring sensitivities" in seen[0][1]
    assert "measuring sensitivities" not in seen[1][1]
    assert "fitting blocks" in seen[1][1]
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another"))
    again = prune(str(tiny_source), PruneOptions(ratio=0.5, **calibrated))[0]
    assert same(again, seen[1][0])
    other = prune(str(tiny_source), PruneOptions(ratio=0.5, seed=1, **calibrated))[0]
    assert not same(other, again)


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("running the source", 2),
        *(("measuring sensitivities", at) for at in (1, 4)),
        *(("fitting blocks", at) for at in (2, 5)),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    tiny_source: Path,
    calibrated: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    at: int,
) -> None:
    """Forward, back, and in the refit."""
    options = PruneOptions(ratio=0.4, **calibrated)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "whole"))
    whole = prune(str(tiny_source), options)[0]
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "killed"))
    with pytest.raises(Killed):
        prune(str(tiny_source), options, KillingTrack(stage, at))
    assert same(prune(str(tiny_source), options)[0], whole)


@pytest.mark.parametrize(("name", "how"), [("block-1", []), ("fitted-3", []), ("fitted-2", ["--remove"])])
def test_a_killed_process_goes_on_to_the_same_bytes(
    run: Run,
    hooked: Hooked,
    forks: Forks,
    tiny_source: Path,
    calibrated: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: list[str],
) -> None:
    """SIGKILL where what was measured, and what was fitted, takes its place in the cache."""
    cache, flags = tmp_path / "cache", ["--ratio", "0.4", *how, *flags_of(calibrated)]
    assert run("prune", tiny_source, tmp_path / "whole", *flags)[0] == 0
    environment = hooked("os.rename", f"{cache}/*/{name}.safetensors", "os.kill(os.getpid(), signal.SIGKILL)")
    words = ("-m", "flexigpt", "prune", tiny_source, tmp_path / "out", *flags)
    ran = forks.run(*words, env=environment | {CACHE_VARIABLE: str(cache)})
    assert ran.returncode == -9, ran.stderr
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    assert run("prune", tiny_source, tmp_path / "out", *flags)[0] == 0
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert weights[0] == weights[1]
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_without_the_refit_the_units_are_the_sources_own(tiny_source: Path, calibrated: dict[str, Any]) -> None:
    """Each kept unit's weights are bits of the source's, and all else is as it was."""
    model, plan, _ = prune(str(tiny_source), PruneOptions(ratio=0.4, refit_kept=False, **calibrated))
    source = AutoModelForCausalLM.from_pretrained(tiny_source)
    state = source.state_dict()
    by_units = {one.block for one in plan.sublayers if one.form == "units"}
    assert by_units
    for name, values in model.state_dict().items():
        name = name.removeprefix("language_model.")
        if any(f"layers.{block}.mlp.up" in name for block in by_units):
            rows = {row.numpy().tobytes() for row in state[name]}
            assert {row.numpy().tobytes() for row in values} <= rows
        elif not any(f"layers.{block}.mlp." in name for block in by_units):
            assert torch.equal(values, state[name])
    refitted = prune(str(tiny_source), PruneOptions(ratio=0.4, **calibrated))[0]
    assert refitted.num_parameters() == model.num_parameters()
    assert not same(refitted, model)


@torch.no_grad()
def output_error(model: PreTrainedModel, source: PreTrainedModel) -> float:
    """Of the hidden states after the last block, relative."""
    ours, theirs = (m.get_decoder()(input_ids=WINDOWS, use_cache=False).last_hidden_state for m in (model, source))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_by_units_and_refitted_nearer_to_the_source(family: str, tmp_path: Path) -> None:
    """Families that normalise what sublayers write included: their norms are refitted."""
    source = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    workspace = workspace_of(source, tmp_path, WINDOWS, blocks=None, ratio=0.4, form="units")
    measured = measure_sublayers(workspace)
    stored = workspace.shape.parameters_at(0.4, NUM_BLOCKS)
    plan = allocated(workspace, measured, stored)
    units = units_of(workspace, plan)
    assert units
    models = []
    for refit in (False, True):
        model = compact_of(source, plan).eval()
        for block, kept in units.items():
            readers = readers_of_units(StreamedModel(source), block, sublayer_paths(source)["mlp"], kept)
            StreamedModel(model).own(block, readers)
        if refit:
            changed = [one.block for one in plan.sublayers]
            given = (StreamedModel(source), StreamedModel(model), range(NUM_BLOCKS), WINDOWS)
            refit_kept(*given, units=units, changed=changed)
        assert 0.97 * stored <= model.num_parameters() <= stored
        models.append(model)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in before.items())
    plain, refitted = (output_error(model, source) for model in models)
    assert refitted < plain


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak where Linux tells it")
@pytest.mark.parametrize("memory", [[], ["--memory", "2MiB"]])
def test_memory_stays_below_what_was_told(example: Path, tmp_path: Path, early_forks: Forks, memory: list[str]) -> None:
    """Of a process that prunes the shipped model, hidden states in memory and in files."""
    options = ["--ratio", "0.3", "--calibration", str(example / "calibration.jsonl"), "--windows", "8"]
    code = (
        "import sys; from pathlib import Path; from flexigpt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    words = ["prune", example, tmp_path / "out", *options, *memory, "--window-length", "256"]
    ran = early_forks.run("-c", code, *words, env=os.environ | {CACHE_VARIABLE: str(tmp_path / "cache")})
    assert ran.returncode == 0, ran.stderr
    peak = 1024 * int(ran.stderr.splitlines()[-1])
    told, unit = re.search(r"at most about ([\d.]+) (MB|GB) of memory", ran.stderr).groups()  # type: ignore[union-attr]
    assert 0.4 < peak / (float(told) * {"MB": 1e6, "GB": 1e9}[unit]) < 1


@pytest.mark.parametrize(
    ("assemble", "options"),
    [
        (assemble_pruned, PruneOptions),
        (assemble_pruned, partial(PruneOptions.paper, refit_kept=True)),
        (assemble_removed, PruneOptions),
    ],
)
def test_no_weight_of_a_block_is_held_while_another_is_in_use(
    tiny_source: Path,
    calibrated: dict[str, Any],
    assemble: Callable[..., Any],
    options: Callable[..., PruneOptions],
) -> None:
    """Each is copied from a file, or read when it is asked for: memory does not grow with the blocks."""
    with assemble(str(tiny_source), options(ratio=0.4, **calibrated)) as (assembly, _, record):
        assert record["options"]["refit_kept"]
        origins = [assembly.origin(name) for block in range(len(assembly)) for name in assembly.names(block).values()]
        assert any(map(callable, origins))  # what was fitted
        assert not any(isinstance(origin, torch.Tensor) for origin in origins)


ROW = {"block": 2, "sublayer": "mlp", "form": "units", "units": 5}
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "all units": (ROW | {"units": 48}, "the plan keeps 48 units of the MLP of block 2, which has 48: name fewer"),
    "no unit": (ROW | {"units": 0}, "has units = 0: the form units needs a whole number above 0"),
    "anchor": ({"block": 0, "sublayer": "attention", "form": "none"}, "leaves out the attention of block 0"),
    "beyond": (ROW | {"block": 6}, "names block 6, but the model has blocks 0 to 5"),
    "heads": ({"block": 2, "sublayer": "attention", "form": "units", "units": 2}, "units, which is for an mlp"),
    "unknown": (ROW | {"form": "linear"}, "has form 'linear': expected units or none"),
    "word": (ROW | {"units": "5"}, "has units = '5': the form units needs a whole number"),
}


def refused(run: Run, source: Path, out: Path, *asked: object) -> str:
    """The one line with which the command ends."""
    code, printed, errors = run("prune", source, out, *asked)
    lines = [line for line in errors.splitlines() if line.startswith("flexigpt: ") and "warning: " not in line]
    assert (code, printed, len(lines)) == (2, "", 1)
    assert not out.exists()
    return lines[0]


@pytest.mark.parametrize("which", BAD_ROWS)
def test_a_plan_that_cannot_be_is_one_clear_line(
    run: Run, tiny_source: Path, calibrated: dict[str, Any], tmp_path: Path, which: str
) -> None:
    row, reason = BAD_ROWS[which]
    plan = {"format_version": 2, "num_blocks": NUM_BLOCKS, "replicas": [], "sublayers": [row]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    asked = ("--plan", tmp_path / "plan.json", *flags_of(calibrated))
    assert reason in refused(run, tiny_source, tmp_path / "out", *asked)


def test_sublayers_are_not_for_the_paper(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    rows = (SublayerReplica(**ROW),)
    (tmp_path / "plan.json").write_text(json.dumps(Plan(num_blocks=NUM_BLOCKS, sublayers=rows).to_dict()))
    asked = ("--preset", "paper", "--plan", tmp_path / "plan.json")
    assert "leave out --preset paper" in refused(run, tiny_source, tmp_path / "out", *asked)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("--ratio", "0"), "--ratio 0.0 is out of range: give a share"),
        (("--ratio", "1"), "--ratio 1.0 is out of range"),
        (("--ratio", "0.999"), "so small a model is out of reach: the sublayers that have to stay store"),
        (("--target-size", "1K"), "so small a model is out of reach: the sublayers that have to stay store"),
        (("--target-size", "9B"), "meets the target of 9,000,000,000 already"),
        (("--blocks", "2"), "--blocks names whole blocks"),
    ],
)
def test_a_size_that_cannot_be_is_one_clear_line(
    run: Run, tiny_source: Path, calibrated: dict[str, Any], tmp_path: Path, asked: tuple[str, ...], reason: str
) -> None:
    assert reason in refused(run, tiny_source, tmp_path / "out", *asked, *flags_of(calibrated))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"format_version": 2, "num_blocks": 16, "replicas": [], "sublayers": []}, "the plan prunes nothing"),
        ({"format_version": 1, "num_blocks": 16, "replicas": [], "sublayers": []}, "give it format_version 2"),
        (
            {
                "format_version": 2,
                "num_blocks": 16,
                "replicas": [],
                "sublayers": [{"block": 3, "sublayer": "mlp", "form": "units", "units": 10**21}],
            },
            "which has 512",
        ),
    ],
)
def test_a_plan_that_means_nothing_is_refused(
    run: Run, example: Path, tmp_path: Path, plan: dict[str, Any], reason: str
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, _, errors = run("prune", example, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert code == 2
    assert reason in errors
    assert not (tmp_path / "out").exists()


def test_what_a_plan_without_replicas_has_no_use_for_is_an_error(run: Run, example: Path, tmp_path: Path) -> None:
    row = {"block": 3, "sublayer": "mlp", "form": "none"}
    plan = {"format_version": 2, "num_blocks": 16, "replicas": [], "sublayers": [row]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, _, errors = run("prune", example, tmp_path / "out", "--plan", tmp_path / "plan.json", "--output-norm", "none")
    assert code == 2
    assert "--output-norm without effect, since the plan has no replicas of blocks" in errors
