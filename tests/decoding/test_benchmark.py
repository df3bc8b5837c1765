"""What a benchmark measures of tiny models; how long they take is not asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import Run
from families import tiny_config
from flexigpt import BenchmarkOptions, InputError, benchmark, materialize
from flexigpt.decoding import benchmark_markdown
from flexigpt.decoding.benchmark import variants_of
from flexigpt.decoding.variants import Models, PeakRequest, open_alone, open_variants, peak_memory, time_generation
from flexigpt.pruning import ExtendOptions
from flexigpt.pruning.extend import extend
from flexigpt.record import write_checkpoint
from flexigpt.weights import load_model, remove_blocks

SMALL = {"batch_sizes": (1,), "prompt_tokens": 5, "new_tokens": 3, "repeats": 1, "device": "cpu"}
SMALL_FLAGS = ["--batch-sizes", "1,3", "--prompt-tokens", 6, "--new-tokens", 4, "--repeats", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def deeper(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny source with blocks 2 and 3 repeated."""
    folder = tmp_path_factory.mktemp("benchmark") / "deeper"
    model, _, record = extend(str(tiny_source), ExtendOptions(blocks="2:4", rank=4))
    write_checkpoint(folder, model, record, source=str(tiny_source))
    return folder


def test_the_command_measures_all_variants(
    run: Run, tiny_compact: Path, tiny_source: Path, single: Path, tmp_path: Path
) -> None:
    asked = ["benchmark", tiny_compact, "--against", tiny_source, "--speculative", "--prompt", single, *SMALL_FLAGS]
    code, out, _ = run(*asked, "--output", tmp_path / "result.json")
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["format"], result["clock"], result["dtype"]) == (1, "wall", "float32")
    assert result["command"].startswith("flexigpt benchmark ")
    assert all(result[name] for name in ("versions", "device", "threads", "peak_bytes_of_libraries"))
    variants = {variant["variant"]: variant for variant in result["variants"]}
    assert list(variants) == ["source", "removal", "compact", "materialised", "speculative"]
    for name, variant in variants.items():
        assert [batch["batch_size"] for batch in variant["batches"]] == ([1] if name == "speculative" else [1, 3])
        assert variant["peak_bytes"] > 0
        for batch in variant["batches"]:
            for values in (value for key, value in batch.items() if key != "batch_size"):
                assert 0 < values["min"] <= values["median"] <= values["max"]
            assert batch["time_percent"]["median"] == pytest.approx(1e4 / batch["throughput_percent"]["median"])
    for batch in variants["source"]["batches"]:
        for name in ("time_percent", "throughput_percent", "prefill_percent", "token_percent"):
            assert batch[name] == {"median": 100.0, "min": 100.0, "max": 100.0}
    assert variants["materialised"]["same_ids_as_compact"]
    assert variants["speculative"]["same_ids_as_compact"]
    check_sizes(variants, tiny_source, tiny_compact)
    for shown in (out, benchmark_markdown(result)):
        assert set(variants) <= set(shown.split())
        assert str(single) in shown
        assert "…" not in shown  # what a terminal of 80 columns would cut off


def check_sizes(variants: dict[str, Any], source: Path, compact: Path) -> None:
    opened = load_model(str(source))
    parameters = {name: variant["parameters"] for name, variant in variants.items()}
    assert parameters["source"] == opened.num_parameters()
    assert parameters["removal"] == remove_blocks(opened, [2, 4]).num_parameters()
    assert parameters["compact"] == parameters["speculative"] == load_model(str(compact)).num_parameters()
    assert parameters["materialised"] == parameters["source"] + 2 * 2 * 32  # two replicas' output norms
    stored = {name: variant["stored_bytes"] for name, variant in variants.items()}
    assert stored["source"] == (source / "model.safetensors").stat().st_size
    files = (compact / "model.safetensors").stat().st_size
    assert stored["compact"] == stored["materialised"] == stored["speculative"] == files
    assert stored["removal"] == 4 * parameters["removal"]
    assert all(variant["weight_bytes"] == 4 * variant["parameters"] for variant in variants.values())
    assert variants["removal"]["model"] is None
    assert variants["removal"]["load_seconds"] is None


def test_an_ordinary_model_is_held_against_its_source_beside_a_removal(tiny_source: Path, tmp_path: Path) -> None:
    remove_blocks(load_model(str(tiny_source)), [1]).save_pretrained(tmp_path / "shorter")
    both = BenchmarkOptions(
        **SMALL | {"batch_sizes": (2,)}, against=str(tiny_source), removal=str(tmp_path / "shorter"), cpu_time=True
    )
    result = benchmark(str(tiny_source), both)
    assert [variant["variant"] for variant in result["variants"]] == ["source", "removal", "model"]
    assert result["clock"] == "cpu"
    removal = result["variants"][1]
    assert removal["model"] == str(tmp_path / "shorter")
    assert removal["stored_bytes"] == (tmp_path / "shorter" / "model.safetensors").stat().st_size
    assert removal["load_seconds"] > 0


def test_an_extended_model_has_no_removal(deeper: Path, tiny_source: Path) -> None:
    options = BenchmarkOptions(against=str(tiny_source), speculative=True, new_tokens=2, prompt_tokens=2)
    assert variants_of(str(deeper), options) == ("source", "compact", "materialised", "speculative")


def test_variants_share_what_is_the_same(tiny_compact: Path, tiny_source: Path) -> None:
    models = Models(model=str(tiny_compact), source=str(tiny_source), device="cpu")
    names = ("source", "removal", "compact", "materialised", "speculative")
    opened = {name: its.model for name, its in open_variants(names, models).items()}
    source, folded = opened["source"], opened["materialised"]
    assert {p.data_ptr() for p in opened["removal"].parameters()} < {p.data_ptr() for p in source.parameters()}
    assert opened["speculative"] is opened["compact"]
    own = {id(p) for p in folded.parameters()} - {id(p) for p in opened["compact"].parameters()}
    assert len(own) == 2 * 7
    ids = torch.arange(3, 15)[None]
    for name in names:
        alone = open_alone(name, models)
        with torch.no_grad():
            assert torch.equal(alone(input_ids=ids).logits, opened[name](input_ids=ids).logits)
        assert not alone.training
    with torch.no_grad():
        expected = materialize(load_model(str(tiny_compact)))(input_ids=ids).logits
        assert torch.equal(folded(input_ids=ids).logits, expected)


def test_generation_is_timed_by_the_clock_that_is_given(tiny_compact: Path) -> None:
    """A clock that ticks once a look: at the start, at the first token, at the end."""
    model, ids = load_model(str(tiny_compact), device="cpu"), torch.arange(3, 15).view(2, 6)
    for speculative in (False, True):
        ticks = iter((1.0, 5.0, 21.0))
        prompts = ids[:1] if speculative else ids
        timing = time_generation(model, prompts, 7, speculative=speculative, clock=lambda ticks=ticks: next(ticks))
        assert (timing.prefill, timing.total, timing.new_tokens) == (4.0, 20.0, 7)
        expected = model.generate(prompts, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(timing.ids, expected)
        assert (timing.statistics is not None) == speculative


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sizes", "0"], "--batch-sizes 0 cannot be used"),
        (["--batch-sizes", "1,1"], "--batch-sizes 1,1 cannot be used"),
        (["--batch-sizes", "a"], "--batch-sizes a cannot be read"),
        (["--batch-sizes", "2", "--speculative"], "add 1 to --batch-sizes"),
        (["--new-tokens", "1"], "--new-tokens 1 is too small: give at least 2"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0 is too small"),
        (["--repeats", "0"], "--repeats 0 is too small"),
        (["--prompt-tokens", "100", "--new-tokens", "29"], "exceed the context of 128"),
        (["--prompt", "{text}", "--batch-sizes", "500", "--prompt-tokens", "60"], "give a longer text"),
        (["--device", "tpu"], "device tpu cannot be used here"),
        (["--dtype", "int8"], "dtype int8 is unknown"),
        (["--overwrite"], "--overwrite has no effect without --output"),
        (["--output", "result.txt"], "--output result.txt is of an unknown kind"),
        (["--removal", "{compact}", "--prompt-tokens", "60"], "is a compact model: give what flexigpt baseline wrote"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run: Run, tiny_compact: Path, tiny_source: Path, text: Path, flags: list[str], message: str
) -> None:
    given = [flag.format(text=text, compact=tiny_compact) for flag in flags]
    code, _, err = run("benchmark", tiny_compact, "--against", tiny_source, *given)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_models_that_do_not_belong_together_are_refused(tiny_compact: Path, tiny_source: Path, tmp_path: Path) -> None:
    def refused(model: Path, against: Path, match: str, **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            benchmark(str(model), BenchmarkOptions(**SMALL | {"against": str(against)} | more))

    other = AutoModelForCausalLM.from_config(tiny_config("llama-gqa"))
    other.save_pretrained(tmp_path / "other")
    load = load_model(str(tiny_source))
    remove_blocks(load, [0]).save_pretrained(tmp_path / "shorter")
    refused(tiny_compact, tmp_path / "other", "has vocab_size 96, .* has 4096")
    refused(tiny_compact, tiny_compact, "is a compact model: give the source")
    refused(tiny_source, tiny_source, "has no replicas to skip", speculative=True)
    refused(tmp_path / "nowhere", tiny_source, "nowhere")
    model, _, _ = extend(str(tmp_path / "shorter"), ExtendOptions(blocks="0:1", rank=4))  # 6 blocks of 5
    deep = AutoModelForCausalLM.from_config(type(load.config)(**load.config.to_dict() | {"num_hidden_layers": 7}))
    model.save_pretrained(tmp_path / "shallow")
    deep.save_pretrained(tmp_path / "deep")
    refused(tmp_path / "shallow", tmp_path / "deep", "has 1 more blocks than")


def test_a_failure_in_the_process_that_measures_memory_is_told(tiny_compact: Path, tiny_source: Path) -> None:
    """Weights that vanish between the check and the measurement."""
    models = Models(model=str(tiny_compact / "gone"), source=str(tiny_source))
    request = PeakRequest(variant="compact", models=models, ids=[[3, 4]], new_tokens=2, threads=1)
    with pytest.raises(InputError, match=r"peak memory could not be measured, .*gone"):
        peak_memory([request])
