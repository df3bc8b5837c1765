"""Linears in 8 and 4 bits: what is stored, once; what opens it; what it computes; what refuses it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Run
from families import tiny_config
from flexigpt import Plan, PruneOptions, inspect_model, prune, write_checkpoint
from flexigpt.decoding import BenchmarkOptions
from flexigpt.decoding.benchmark import variants_of
from flexigpt.model import SublayerReplica
from flexigpt.quantization.options import LIBRARIES
from flexigpt.weights import load_model

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

# Of torchao's own modules and of its use of torch, on import and when a tensor is moved.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Quantised = Callable[[Path, int], Path]


@pytest.fixture(scope="module")
def narrow(tiny_source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with MLPs of 37 and 19 units, which no group of weights divides."""
    rows = tuple(SublayerReplica(block=b, sublayer="mlp", form="units", units=u) for b, u in ((1, 37), (3, 19)))
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "plan.json").write_text(json.dumps(Plan(num_blocks=6, sublayers=rows).to_dict()))
    asked = {"plan": folder / "plan.json", "calibration": str(text), "window_length": 32, "windows": 4}
    model, _, record = prune(str(tiny_source), PruneOptions(**asked))
    write_checkpoint(folder / "model", model, record, source=str(tiny_source))
    return folder / "model"


@pytest.fixture
def quantised(run: Run, tmp_path: Path) -> Quantised:
    """Runs the command on a model; returns what it wrote."""

    def made(model: Path, bits: int, *more: object) -> Path:
        out = tmp_path / f"{model.name}-{bits}"
        code, printed, errors = run("quantize", model, out, "--bits", bits, *more)
        assert code == 0, errors
        assert f"checkpoint written to {out}" in printed
        return out

    return made


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(40).view(2, 20)).logits


def read_8(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as it lies in the files, and by how much it may have moved: whole numbers times a scale for each row."""
    parts = name.removesuffix("weight") + "_weight_"
    step, numbers = tensors[f"{parts}scale"], tensors[f"{parts}qdata"]
    assert not tensors[f"{parts}zero_point"].any()
    return numbers * step, 0.51 * step


def read_4(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of 16 values times a scale for 64 weights, which is one of 256 values times a scale for 256 of them."""
    part = {end: tensors[f"{name}.{end}"] for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    packed = tensors[name].flatten()
    values = part["quant_map"][torch.stack([packed >> 4, packed & 15], 1).flatten().long()]
    outer = part["nested_absmax"].repeat_interleave(256)[: len(part["absmax"])]
    scales = part["nested_quant_map"][part["absmax"].long()] * outer + state["nested_offset"]
    scales = scales.repeat_interleave(64)[: len(values)].view(state["shape"])
    return values.view(state["shape"]) * scales, 0.2 * scales


READ = {8: read_8, 4: read_4}


@torch.no_grad()
def decoded(model: PreTrainedModel, out: Path, bits: int) -> PreTrainedModel:
    """The model with its linears as they lie in the files."""
    tensors = stored(out)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            weight, most = READ[bits](tensors, name)
            assert ((weight - parameter).abs() <= most).all(), "no weight goes past the value next to it"
            parameter.copy_(weight)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", ["tiny_source", "tiny_compact", "narrow"])
def test_it_computes_with_the_weights_in_its_file_and_leaves_the_rest_as_it_was(
    form: str, bits: int, quantised: Quantised, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(form)
    out = quantised(source, bits)
    # bitsandbytes itself decodes an ordinary model of such odd shapes wrongly on some CPUs, and fails on others.
    again = load_model(str(out)) if (form, bits) == ("tiny_source", 4) else opened(out)
    expected = logits(decoded(opened(source), out, bits))
    packing = [module for module in again.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for packed, most in ((False, 1e-4), (True, 1e-2)):  # packed, bitsandbytes multiplies bfloat16
        for module in packing:
            module.support_avx512bf16_for_cpu = packed
        torch.testing.assert_close(logits(again), expected, atol=most, rtol=1e-4)
    tensors, was = stored(out), stored(source)
    linears = {name for name in was if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS))}
    assert all(torch.equal(tensors[name], was[name]) for name in was.keys() - linears)
    if bits == 4:
        assert all(tensors[name].numel() == was[name].numel() // 2 for name in linears)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_base_is_stored_once_and_its_replicas_adapters_stay_as_they_were(
    bits: int, tiny_compact: Path, quantised: Quantised
) -> None:
    out = quantised(tiny_compact, bits)
    tensors, was = stored(out), stored(tiny_compact)
    small = [t for t in tensors.values() if t.dtype == (torch.int8 if bits == 8 else torch.uint8) and t.numel() > 256]
    assert len(small) == 4 * len(LINEARS), "4 kept blocks of 6"
    own = [name for name in was if "adapter" in name or "norm" in name]
    assert own
    assert all(torch.equal(tensors[name], was[name]) for name in own)


@pytest.mark.parametrize("bits", [8, 4])
def test_its_record_card_and_inspection_say_what_is_stored(
    bits: int, tiny_compact: Path, text: Path, quantised: Quantised, run: Run
) -> None:
    out = quantised(tiny_compact, bits, "--perplexity", text, "--window-length", 64)
    record = json.loads((out / "record.json").read_text())
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored(out).values())
    assert record["quantised"]["bytes"] == size == sum(record["quantised"]["part_bytes"].values())
    assert record["quantised"]["parameters"] == record["unquantised"]["parameters"]
    inspected = inspect_model(str(out))
    assert inspected["bytes"]["stored"] == size
    assert inspected["parameters"]["stored"] == record["unquantised"]["parameters"]
    assert {part: one["bytes"] for part, one in inspected["parts"].items()} == record["quantised"]["part_bytes"]
    assert record["origin"]["source_name"], "where the compact model came from"
    card = (out / "README.md").read_text()
    assert f"take {bits} bits a weight" in card
    assert "| same likeliest token |" in card
    asked = ("--perplexity", text, "--window-length", 64, "--against", tiny_compact)
    code, printed, errors = run("eval", out, *asked, "--json")
    assert code == 0, errors
    measured = json.loads(printed)["models"][0]
    assert measured["bytes"] == size
    assert measured["parameters"] == record["unquantised"]["parameters"]
    assert measured["perplexity"]["perplexity"] == pytest.approx(record["perplexity"]["quantised"]["perplexity"])
    assert measured["fidelity"]["agreement"] == pytest.approx(record["fidelity"]["agreement"])
    assert run("report", out)[0] == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_it_generates_and_drafts_and_all_else_refuses_it(
    bits: int,
    tiny_compact: Path,
    text: Path,
    quantised: Quantised,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = quantised(tiny_compact, bits)
    plain, drafted = (
        run("generate", out, "--prompt", "It was", "--max-new-tokens", 6, *more) for more in ([], ["--speculative"])
    )
    assert plain[0] == drafted[0] == 0
    assert plain[1] == drafted[1]
    assert set(variants_of(str(out), BenchmarkOptions())) == {"compact", "speculative"}, "it cannot be folded"
    for command in (
        ("prune", out, tmp_path / "x", "--ratio", 0.3, "--calibration", text),
        ("extend", out, tmp_path / "x", "--blocks", "1:2"),
        ("recover", out, tmp_path / "x", "--data", text, "--tokens", "1000"),
        ("quantize", out, tmp_path / "x", "--bits", bits),
        ("frontier", out, tmp_path / "x", "--calibration", text, "--perplexity", text),
        ("recover", tiny_compact, tmp_path / "x", "--data", text, "--tokens", "1000", "--teacher", out),
        ("export", out, tmp_path / "x", "--to", "stock"),
    ):
        code, printed, errors = run(*command)
        assert (code, printed, len(errors.splitlines())) == (2, "", 1), command
        assert "is quantised" in errors
        assert not (tmp_path / "x").exists()
    library = LIBRARIES[bits]
    monkeypatch.setitem(sys.modules, library, None)
    code, printed, errors = run("generate", out, "--prompt", "It was", "--max-new-tokens", 2)
    assert (code, printed, len(errors.splitlines())) == (2, "", 1)
    assert f"is quantised by {library}, which is not installed: pip install 'flexigpt[quantize]'" in errors


def test_linears_that_the_library_does_not_know_are_no_success(tmp_path: Path, tiny_source: Path, run: Run) -> None:
    config = tiny_config("gpt2")
    config.vocab_size = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_source / name, tmp_path / "gpt2")
    code, _, errors = run("quantize", tmp_path / "gpt2", tmp_path / "out", "--bits", 8)
    assert code == 2
    assert "no linear that torchao quantises" in errors
    assert run("quantize", tmp_path / "gpt2", tmp_path / "out", "--bits", 4)[0] == 0


def test_weights_that_are_not_all_there_are_refused(quantised: Quantised, tiny_source: Path, run: Run) -> None:
    out = quantised(tiny_source, 4)
    tensors = {name: t for name, t in stored(out).items() if "layers.2.mlp.up_proj.weight" not in name}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    code, _, errors = run("generate", out, "--prompt", "It was", "--max-new-tokens", 2)
    assert code == 2
    assert "lack model.layers.2.mlp.up_proj.weight" in errors


@pytest.mark.parametrize(("bits", "library"), [(8, "torchao"), (4, "bitsandbytes")])
def test_a_missing_library_is_a_line_that_says_how_to_get_it(
    bits: int, library: str, tiny_source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (library, f"{library}.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    code, printed, errors = run("quantize", tiny_source, tmp_path / "out", "--bits", bits)
    assert (code, printed, len(errors.splitlines())) == (2, "", 1)
    assert f"{library}, which is not installed: pip install 'flexigpt[quantize]'" in errors
    assert not (tmp_path / "out").exists()
