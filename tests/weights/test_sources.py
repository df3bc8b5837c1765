"""Models in memory block by block, against the same models in memory as a whole."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, compact_of, initialize_replicas, remove_blocks, tiny_model, token_ids
from flexigpt import (
    ExtendOptions,
    InputError,
    PruneOptions,
    assemble_extended,
    assemble_pruned,
    assemble_removed,
    extend,
    plan_only,
    prune,
    remove,
    write_checkpoint,
)
from flexigpt.calibration import HiddenStates, block_means
from flexigpt.calibration import hidden_states as calibration_module
from flexigpt.model import Plan
from flexigpt.pruning.scores import STATISTICS
from flexigpt.runtime import Cache
from flexigpt.runtime.cache import CACHE_VARIABLE
from flexigpt.weights import Source, StreamedModel, load_model
from killing import Killed, KillingTrack


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def calibrated(text: Path) -> dict[str, object]:
    return {"calibration": str(text), "window_length": 64, "windows": 8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_bit_equal_to_the_whole_models(family: str, dtype: str, tmp_path: Path) -> None:
    tiny_model(family, getattr(torch, dtype)).save_pretrained(tmp_path)
    whole, source = StreamedModel(load_model(str(tmp_path))), Source(str(tmp_path))
    assert {p.device.type for p in source.blocks.parameters()} == {"meta"}
    windows = token_ids(batch=6, tokens=40)
    assert block_means(source, windows, STATISTICS) == block_means(whole, windows, STATISTICS)
    assert {p.device.type for p in source.blocks.parameters()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_checkpoint_is_bit_equal_to_the_whole_models(family: str, tmp_path: Path) -> None:
    """Assembled from files, returned in memory, and made in memory from the beginning."""
    source = tmp_path / "source"
    tiny_model(family).save_pretrained(source)
    plan = Plan.from_dict(
        {
            "format_version": 1,
            "num_blocks": 6,
            "replicas": [{"block": 1, "base": 0, "rank": 3}, {"block": 4, "base": 2, "rank": 5}],
        }
    )
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    options = PruneOptions.paper(plan=tmp_path / "plan.json")
    model, _, _ = prune(str(source), options)
    with assemble_pruned(str(source), options) as (assembly, _, record):
        write_checkpoint(tmp_path / "assembled", assembly, record)
    opened = load_model(str(source))
    reference = compact_of(opened, plan)
    initialize_replicas(reference, opened, plan, adapter_init="svd", norm_init=0.05, seed=0)
    written = load_model(str(tmp_path / "assembled"))
    expected = dict(reference.named_parameters())
    for made in (model, written):
        assert dict(made.named_parameters()).keys() == expected.keys()
        assert all(torch.equal(values, expected[name]) for name, values in made.named_parameters())
        assert torch.equal(made(token_ids()).logits, reference(token_ids()).logits)
    write_checkpoint(tmp_path / "saved", model, record)
    for name in ("config.json", "generation_config.json", "modeling_flexigpt.py"):
        first, second = (tmp_path / folder / name for folder in ("assembled", "saved"))
        assert first.is_file() == second.is_file()
        assert not first.is_file() or first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_shorter_and_extended_models_are_assembled_bit_equal(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model(family).save_pretrained(source)
    with assemble_removed(str(source), PruneOptions.paper(blocks=[1, 4])) as (assembly, _, record):
        write_checkpoint(tmp_path / "shorter", assembly, record)
    expected = remove_blocks(load_model(str(source)), [1, 4]).state_dict()
    found = load_model(str(tmp_path / "shorter")).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    options = ExtendOptions(blocks="1:3", rank=2)
    assembly, _, record = assemble_extended(str(source), options)
    write_checkpoint(tmp_path / "extended", assembly, record)
    extended, _, _ = extend(str(source), options)
    expected, found = extended.state_dict(), load_model(str(tmp_path / "extended")).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ends = [extended.block_list[i].state_dict(keep_vars=True) for i in (1, 2)]
    shared = {id(values) for values in ends[0].values()} & {id(values) for values in ends[1].values()}
    assert not shared


def test_a_converted_dtype_is_that_of_the_whole_model(tiny_source: Path, tmp_path: Path) -> None:
    with assemble_pruned(str(tiny_source), PruneOptions.paper(blocks=[2], rank=2, dtype="bfloat16")) as (
        model,
        _,
        record,
    ):
        write_checkpoint(tmp_path / "half", model, record, max_shard_size=200_000)
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    kept = load_model(str(tmp_path / "half")).block_list[0].mlp.up_proj.weight
    whole = load_model(str(tiny_source)).get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(kept, whole.to(torch.bfloat16))


def test_hidden_states_in_a_file_give_the_same_scores(
    tiny_source: Path, calibrated: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of 40 KB beside 8 windows of 64 tokens, which take 65 KB."""
    records = []
    for name, memory in (("file", "64KIB"), ("memory", "1GiB")):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        perplexity = calibrated["calibration"]
        options = PruneOptions.paper(ratio=0.4, memory=memory, perplexity=perplexity, **calibrated)
        records.append(prune(str(tiny_source), options)[2])
    assert records[0]["scores"] == records[1]["scores"]
    assert records[0]["perplexity"] == records[1]["perplexity"]


@pytest.mark.parametrize("removed", [True, False])
def test_fits_with_hidden_states_in_files_give_the_same_weights(
    tiny_source: Path, calibrated: dict[str, object], tmp_path: Path, removed: bool
) -> None:
    """Six copies of 65 KB, which 300 KiB do not hold beside a block, and one would be held."""
    weights, files = [], []
    for memory in ("300KiB", "1GiB"):
        opened: list[Any] = []
        options = PruneOptions(ratio=0.4, rank=3, memory=memory, **calibrated)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE_VARIABLE, str(tmp_path / memory))
            patch.setattr(tempfile, "TemporaryFile", counted(tempfile.TemporaryFile, opened))
            model = (remove if removed else prune)(str(tiny_source), options)[0]
        weights.append(model.state_dict())
        files.append(len(opened))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert files[0] > 6
    assert files[1] == 0


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The function, each call noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return function(*args, **kwargs)

    return call


def test_hidden_states_are_exchanged_in_memory_and_in_files(tmp_path: Path) -> None:
    batches = [torch.randn(2, 3, 4).to(torch.bfloat16), torch.randn(1, 3, 4).to(torch.bfloat16)]
    for states in (HiddenStates(batches), HiddenStates(batches, tmp_path)):
        before = states[1]
        states[1] = batches[1] + 1
        assert torch.equal(states[0], batches[0])
        assert torch.equal(states[1], batches[1] + 1)
        assert torch.equal(before, batches[1])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """And not the end of the process, as it is where a file is mapped before its bytes are there."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            HiddenStates([torch.zeros(1, 1000)], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


STAGES = ["checking weights", "calibrating", "measuring distances", "initialising replicas", "fitting blocks"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    stage: str,
    tiny_source: Path,
    calibrated: dict[str, object],
    tmp_path: Path,
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(calibration_module, "_SAVE_SHARE", 0)
    settings = {"ratio": 0.4, "rank": 3, "refit_kept": True} | calibrated

    def written(name: str, track: KillingTrack, cache: Path) -> bytes:
        monkeypatch.setenv(CACHE_VARIABLE, str(cache))
        with assemble_pruned(str(tiny_source), PruneOptions.paper(**settings), track) as (model, _, record):
            write_checkpoint(tmp_path / name, model, record)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = KillingTrack()
    expected = written("expected", whole, tmp_path / "other")
    assert set(STAGES) <= set(whole.seen)
    at = whole.seen[stage] - 1
    first, second = KillingTrack(stage, at), KillingTrack()
    with pytest.raises(Killed):
        written("out", first, fresh_cache)
    assert not (tmp_path / "out").exists()
    calls = []
    original = StreamedModel.block

    def counted(self: StreamedModel, index: int) -> object:
        calls.append(index)
        return original(self, index)

    monkeypatch.setattr(StreamedModel, "block", counted)
    assert written("out", second, fresh_cache) == expected
    done = STAGES[: STAGES.index(stage)]
    assert not {"checking weights", "calibrating"} & set(done) & set(second.seen)
    if stage == "calibrating":
        assert calls[0] == 5  # the last block only, then the fits
    assert not [path for path in fresh_cache.iterdir() if path.is_dir()]


def test_another_ratio_reads_no_text_through_the_blocks(
    tiny_source: Path, calibrated: dict[str, object], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = KillingTrack(), KillingTrack(), KillingTrack()
    prune(str(tiny_source), PruneOptions.paper(ratio=0.2, rank=3, **calibrated), first)
    plan, record = plan_only(str(tiny_source), PruneOptions.paper(ratio=0.4, rank=3, **calibrated), again)
    assert {"checking weights", "calibrating"} <= set(first.seen)
    assert not {"checking weights", "calibrating"} & set(again.seen)
    monkeypatch.setenv(CACHE_VARIABLE, str(fresh_cache / "new"))
    fresh, _ = plan_only(str(tiny_source), PruneOptions.paper(ratio=0.4, rank=3, **calibrated), other)
    assert plan == fresh
    assert len(record["scores"]) == 6


def test_another_text_rank_or_state_of_the_files_is_measured_anew(
    tiny_source: Path, text: Path, single: Path, fresh_cache: Path, tmp_path: Path
) -> None:
    settings = {"ratio": 0.4, "window_length": 64, "windows": 4}
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_source.iterdir():
        (source / file.name).write_bytes(file.read_bytes())

    def seen(**options: object) -> set[str]:
        track = KillingTrack()
        plan_only(str(source), PruneOptions.paper(**settings | {"rank": 2, "calibration": str(text)} | options), track)
        return set(track.seen) - {"measuring distances"}

    assert seen() == {"checking weights", "calibrating"}
    assert seen() == seen(rank=3) == seen(block_score="angular") == set()
    assert seen(calibration=str(single)) == seen(seed=1) == {"calibrating"}
    os.utime(source / "model.safetensors", (1, 1))
    assert seen() == {"checking weights", "calibrating"}


def test_two_processes_on_one_stage_do_not_share_its_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.stage("it", key=1) as first, cache.stage("it", key=1) as second:
        assert first.folder != second.folder
        second.finish({"value": 2})
    with cache.stage("it", key=1) as third:
        assert third.result == {"value": 2}
    with cache.stage("it", key=2) as other:
        assert other.result is None


def test_a_block_that_memory_cannot_hold_is_refused(tiny_source: Path, calibrated: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"--memory 1KIB is too small: one block alone takes 1 MiB"):
        plan_only(str(tiny_source), PruneOptions.paper(ratio=0.4, memory="1KIB", **calibrated))


def test_a_cache_that_cannot_be_written_says_what_to_do(
    tiny_source: Path, calibrated: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(InputError, match=CACHE_VARIABLE):
        plan_only(str(tiny_source), PruneOptions.paper(ratio=0.4, **calibrated))


def test_kept_tensors_are_the_files_bytes(tiny_source: Path, tmp_path: Path) -> None:
    with assemble_pruned(str(tiny_source), PruneOptions.paper(blocks=[2], rank=2)) as (assembly, _, record):
        write_checkpoint(tmp_path / "out", assembly, record)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_source, tmp_path / "out"))
    kept = [name for name in before if f"language_model.{name}" in after]
    assert len(kept) == len(before) - 7  # all but the pruned block's linears
    assert all(torch.equal(before[name], after[f"language_model.{name}"]) for name in kept)


def test_a_source_that_changes_during_the_run_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_source.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    with assemble_pruned(str(source), PruneOptions.paper(blocks=[2], rank=2)) as (assembly, _, record):
        os.utime(source / "model.safetensors", (1, 1))
        with pytest.raises(InputError, match="changed while they were read"):
            write_checkpoint(tmp_path / "out", assembly, record)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_killed_in_every_stage_end_with_the_same_bytes(example: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as a stage has left something, again and again, until a run may get through."""
    options = ["--ratio", "0.3", "--calibration", str(example / "calibration.jsonl"), "--window-length", "256"]
    options += ["--windows", "16", "--dtype", "float32"]

    def start(out: str, cache: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {CACHE_VARIABLE: str(tmp_path / cache)}
        command = [sys.executable, "-m", "flexigpt", "prune", str(example), str(tmp_path / out), *options]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("expected", "whole").wait() == 0
    left = ["finite-*.json", "scores-*.json", "distances-*/*.safetensors", "distances-*.json"]
    left += ["replicas-*/replica-*.safetensors", "replicas-*/fitted-7.safetensors"]
    for pattern in left:
        process = start("out", "killed")
        while not list((tmp_path / "killed").glob(pattern)):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists()
    assert start("out", "killed").wait() == 0
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "expected" / n).read_bytes() for n in names)
