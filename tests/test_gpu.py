"""What a GPU computes, against the CPU; skipped where there is none. CI has none: run it where there is one."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexigpt.cli.main import main
from flexigpt.replicas.least_squares import Moments, ridge_fit

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHORT = ("--windows", 8, "--window-length", 128)


@pytest.fixture(scope="module")
def pruned(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model, pruned on both devices by both presets; once more with little memory."""
    folder = tmp_path_factory.mktemp("pruned")
    made: dict[str, Path] = {}
    for preset in ("default", "paper"):
        for name, device in (("cpu", "cpu"), ("gpu", GPU)):
            made[f"{preset} {name}"] = folder / f"{preset}-{name}"
            prune(example, made[f"{preset} {name}"], "--preset", preset, "--device", device)
    made["default spilled"] = folder / "spilled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXIGPT_CACHE", str(folder / "cache"))  # nothing is found that was measured with more
        prune(example, made["default spilled"], "--device", GPU, "--memory", "64MiB")
    return made


def flexigpt(*words: object, start: tuple[str, ...] = ()) -> str:
    """What a command prints; in a process of its own where something starts it."""
    if start:
        command = [sys.executable, *start, "-m", "flexigpt", *map(str, words)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert not stopped.value.code
    return printed.getvalue()


def prune(example: Path, out: Path, *words: object) -> None:
    text = ("--calibration", example / "calibration.jsonl", "--dtype", "float32")
    flexigpt("prune", example, out, "--ratio", 0.3, *text, *SHORT, *words)


def perplexities(text: Path, *words: object) -> list[float]:
    given = ("--perplexity", text, *SHORT[2:], "--json")
    return [model["perplexity"]["perplexity"] for model in json.loads(flexigpt("eval", *words, *given))["models"]]


def test_least_squares() -> None:
    torch.manual_seed(0)
    given = torch.randn(2000, 300, dtype=torch.float64)
    weight, wished = torch.randn(200, 300), torch.randn(2000, 200, dtype=torch.float64)
    moments = Moments(given.T @ given, wished.T @ given)
    on_gpu = Moments(*(values.cuda() for values in moments))
    found = ridge_fit(weight.cuda(), on_gpu).cpu()  # before the other, which uses its moments' memory
    torch.testing.assert_close(found, ridge_fit(weight, moments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_prune_makes_what_a_cpu_makes(pruned: dict[str, Path], preset: str, text: Path) -> None:
    cpu, gpu = pruned[f"{preset} cpu"], pruned[f"{preset} gpu"]
    sizes = [sum(t.numel() for t in load_file(folder / "model.safetensors").values()) for folder in (cpu, gpu)]
    assert sizes[0] == sizes[1]
    found = perplexities(text, cpu, gpu, "--device", GPU)
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_prune_with_little_memory_makes_the_same(pruned: dict[str, Path], text: Path) -> None:
    found = perplexities(text, pruned["default gpu"], pruned["default spilled"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_perplexity_is_that_of_a_cpu(pruned: dict[str, Path], text: Path) -> None:
    model = pruned["default cpu"]
    cpu, gpu = (perplexities(text, model, "--device", device)[0] for device in ("cpu", GPU))
    assert gpu == pytest.approx(cpu, rel=1e-4)


def test_tasks(pruned: dict[str, Path], example: Path) -> None:
    words = ("--tasks", "piqa_sample", "--include-path", example.parent / "benchmarks", "--limit", 8, "--json")
    cpu, gpu = (json.loads(flexigpt("eval", pruned["paper cpu"], *words, "--device", d)) for d in ("cpu", GPU))
    assert gpu["models"][0]["tasks"] == cpu["models"][0]["tasks"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_attention(pruned: dict[str, Path], preset: str, implementation: str) -> None:
    folder = pruned[f"{preset} cpu"]
    ids = torch.arange(2, 258).view(2, 128)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).cuda()
        found = model(ids.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_generates_the_same_text(pruned: dict[str, Path], preset: str) -> None:
    words = ("generate", pruned[f"{preset} cpu"], "--prompt", "It was a dark", "--max-new-tokens", 24)
    assert flexigpt(*words, "--device", GPU) == flexigpt(*words, "--device", "cpu")


def test_compiled_with_a_static_cache(pruned: dict[str, Path]) -> None:
    folder = pruned["paper cpu"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).cuda()
    given = tokenizer("It was a dark", return_tensors="pt").to(GPU)
    plain = model.generate(**given, max_new_tokens=16, do_sample=False)
    static = model.generate(**given, max_new_tokens=16, do_sample=False, cache_implementation="static")
    assert static.tolist() == plain.tolist()


def losses(folder: Path) -> list[float]:
    found = [row["loss"] for row in json.loads((folder / "record.json").read_text())["recovery"]["history"]]
    assert len(found) == 4
    return found


def recover(example: Path, model: Path, out: Path, *words: object, start: tuple[str, ...] = ()) -> None:
    step = ("--tokens", 4096, "--batch-tokens", 1024, "--window-length", 128, "--lr", 1e-3)
    flexigpt("recover", model, out, "--data", example / "recovery.parquet", *step, *words, start=start)


def test_recovery_has_the_losses_of_a_cpu(pruned: dict[str, Path], example: Path, tmp_path: Path) -> None:
    for name, device in (("cpu", "cpu"), ("gpu", GPU)):
        words = ("--device", device, "--precision", "fp32", "--teacher", example)
        recover(example, pruned["default cpu"], tmp_path / name, *words)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=2e-3)


@pytest.mark.parametrize("more", [(), ("--activation-checkpointing",), ("--draft-weight", 0.5)])
def test_recovery_in_bfloat16(
    pruned: dict[str, Path], example: Path, tmp_path: Path, more: tuple[str, ...], text: Path
) -> None:
    recover(example, pruned["paper cpu"], tmp_path / "out", *more)
    before, after = perplexities(text, pruned["paper cpu"], tmp_path / "out")
    assert after < before


@pytest.mark.parametrize("more", [(), ("--fsdp",)])
def test_torchrun_with_nccl(pruned: dict[str, Path], example: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    start = ("-m", "torch.distributed.run", "--nproc-per-node", "1")
    words = ("--precision", "fp32")
    recover(example, pruned["paper cpu"], tmp_path / "alone", *words)
    recover(example, pruned["paper cpu"], tmp_path / "joined", *words, *more, start=start)
    assert losses(tmp_path / "joined") == pytest.approx(losses(tmp_path / "alone"), rel=2e-3)


def test_benchmark(pruned: dict[str, Path], example: Path) -> None:
    found = json.loads(flexigpt("benchmark", pruned["paper cpu"], "--batch-sizes", 1, "--device", GPU, "--json"))
    assert found["device"] == torch.cuda.get_device_name()


def test_frontier(example: Path, tmp_path: Path, text: Path) -> None:
    given = ("--calibration", example / "calibration.jsonl", "--perplexity", text)
    flexigpt("frontier", example, tmp_path / "sizes", *given, *SHORT, "--sizes", 2, "--device", GPU)
    record = json.loads((tmp_path / "sizes" / "record.json").read_text())
    assert all(point["perplexity"] < point["removed"]["perplexity"] for point in record["points"])


def test_sample(example: Path, tmp_path: Path) -> None:
    words = ("--tokens", "2K", "--window-length", 128, "--device", GPU)
    flexigpt("sample", example, tmp_path / "own.jsonl", *words)
    assert (tmp_path / "own.jsonl").read_text().count('"text"') > 4


def test_quantized(pruned: dict[str, Path], tmp_path: Path, text: Path) -> None:
    pytest.importorskip("torchao")
    flexigpt("quantize", pruned["default cpu"], tmp_path / "8", "--bits", 8)
    whole, small = perplexities(text, pruned["default cpu"], tmp_path / "8", "--device", GPU)
    assert small == pytest.approx(whole, rel=2e-2)
