"""What a benchmark measures of tiny models; how long they take is not asserted."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import Hooked, Run
from families import remove_blocks, tiny_config
from flexigpt import BenchmarkOptions, InputError, benchmark
from flexigpt.cli.main import main
from flexigpt.decoding import benchmark_rows
from flexigpt.decoding.benchmark import NEW_TOKENS, time_generation, variants_of
from flexigpt.weights import load_model


@pytest.fixture(scope="module")
def result(tiny_compact: Path, tiny_source: Path) -> dict[str, Any]:
    """What the command prints of the tiny model, while this process holds more memory than any variant takes."""
    held = np.ones(600 * 2**20, dtype=np.uint8)
    asked = ["benchmark", tiny_compact, "--against", tiny_source, "--batch-sizes", "3,1", "--device", "cpu", "--json"]
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stopped:
        main([str(word) for word in asked])
    assert not stopped.value.code
    return json.loads(printed.getvalue()) | {"held": held.nbytes + psutil.Process().memory_info().rss}


def test_all_variants_are_measured(result: dict[str, Any]) -> None:
    assert (result["format"], result["new_tokens"]) == (2, NEW_TOKENS)
    assert result["command"].startswith("flexigpt benchmark ")
    assert result["prompt_tokens"] == 128 - NEW_TOKENS  # what the tiny model's context leaves
    variants = {variant["variant"]: variant for variant in result["variants"]}
    assert list(variants) == ["source", "compact", "materialised", "speculative"]
    for name, variant in variants.items():
        sizes = [1] if name == "speculative" else [1, 3]
        assert [batch["batch_size"] for batch in variant["batches"]] == sizes
        for batch in variant["batches"]:
            assert min(batch[key] for key in ("prefill_seconds", "tokens_per_second", "throughput")) > 0
            share = batch["throughput_percent"]
            assert (share == 100) == (name == "source")
            assert batch["time_percent"] == pytest.approx(1e4 / share)
        peaks = [batch["peak_bytes"] for batch in variant["batches"]]
        assert variant["library_bytes"] < peaks[0]
        assert peaks == sorted(peaks)
    assert variants["materialised"]["same_tokens_as_compact"]
    assert variants["speculative"]["same_tokens_as_compact"]
    assert 0 <= variants["speculative"]["acceptance"] <= 1


def test_peaks_are_of_a_process_of_its_own(result: dict[str, Any]) -> None:
    assert all(batch["peak_bytes"] < result["held"] for one in result["variants"] for batch in one["batches"])


def test_stored_bytes_are_those_of_the_files(result: dict[str, Any], tiny_compact: Path, tiny_source: Path) -> None:
    for variant in result["variants"]:
        folder = tiny_source if variant["variant"] == "source" else tiny_compact
        assert variant["model"] == str(folder)
        assert variant["stored_bytes"] == (folder / "model.safetensors").stat().st_size


def test_tables_say_what_was_measured(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    import rich  # noqa: PLC0415 - printed on what capsys captures

    rows = benchmark_rows(result)
    rich.print(rows.terminal())
    shown = capsys.readouterr().out
    assert {variant["variant"] for variant in result["variants"]} <= set(shown.split())
    assert shown.count(" 100.0 ") == 2  # the source's throughput at each batch size
    assert "…" not in shown  # what a terminal of 80 columns would cut off
    assert any(note.startswith("speculative: the tokens that compact gives; ") for note in rows.notes)


def test_generation_is_timed_by_the_clock_that_is_given(tiny_compact: Path) -> None:
    """A clock that ticks once a look: at the start, at the first token, at the end."""
    model, ids = load_model(str(tiny_compact), device="cpu"), torch.arange(3, 15).view(2, 6)
    for speculative in (False, True):
        ticks = iter((1.0, 5.0, 21.0))
        prompts = ids[:1] if speculative else ids
        made, prefill, total, seen = time_generation(model, prompts, 7, speculative, lambda ticks=ticks: next(ticks))
        assert (prefill, total) == (4.0, 20.0)
        expected = model.generate(prompts, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(made, expected)
        assert seen.tokens == (7 if speculative else 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sizes", "0"], "--batch-sizes 0 cannot be used"),
        (["--batch-sizes", "1,1"], "--batch-sizes 1,1 cannot be used"),
        (["--batch-sizes", "a"], "--batch-sizes a cannot be read"),
        (["--device", "tpu"], "device tpu cannot be used here"),
        (["--dtype", "int8"], "dtype int8 is unknown"),
        (["--against", "nowhere"], "nowhere"),
        (["--against", "{compact}"], "was not made from --against"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Run, tiny_compact: Path, flags: list[str], message: str) -> None:
    code, _, err = run("benchmark", tiny_compact, *(flag.format(compact=tiny_compact) for flag in flags))
    assert code == 2
    assert message in err.splitlines()[-1]


def test_models_that_do_not_belong_together_are_refused(tiny_compact: Path, tiny_source: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("llama-gqa")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="was not made from"):
        benchmark(str(tiny_compact), BenchmarkOptions(against=str(tmp_path)))
    remove_blocks(load_model(str(tiny_source)), [1]).save_pretrained(tmp_path / "shorter")
    options = BenchmarkOptions(against=str(tiny_source), batch_sizes=(8,))
    assert list(variants_of(str(tmp_path / "shorter"), options)) == ["source", "model"]
    assert list(variants_of(str(tiny_compact), options)) == ["source", "compact", "materialised"]


def test_a_failure_in_the_process_that_measures_is_reported(
    hooked: Hooked, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = hooked("open", str(tiny_source / "config.json"), "raise MemoryError('none left')")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    with pytest.raises(InputError, match=r"^model cannot be measured, .*none left"):
        benchmark(str(tiny_source), BenchmarkOptions(batch_sizes=(1,)))


def test_the_pages_costs_are_counted() -> None:
    """LLaMA-2 7B at 30 %, rank 256: weights read for a token."""
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")
    width, mlp, vocabulary, depth, pruned, rank = 4096, 11008, 32000, 32, 9, 256
    linears, head = 4 * width**2 + 3 * width * mlp, vocabulary * width
    source, draft = depth * linears + head, (depth - pruned) * linears + head
    compact = source + pruned * rank * (4 * 2 * width + 3 * (width + mlp))

    def speculative(drafted: int, acceptance: float) -> float:
        return (drafted * draft + compact) / sum(acceptance**token for token in range(drafted + 1))

    for name, weights in (
        ("source", source),
        ("plain removal", draft),
        ("compact", compact),
        ("materialised", source),
        ("speculative, 4 drafted, all accepted", speculative(4, 1.0)),
        ("speculative, 4 drafted, acceptance 0.8", speculative(4, 0.8)),
        ("speculative, 1 drafted, acceptance 0.8", speculative(1, 0.8)),
    ):
        assert f"| {name} | {weights / 1e9:.3f} B | {weights / source:.1%}".replace("%", " %") in page
