"""Compact models over several devices: offloaded to disk or CPU, on a second device, split by tensors."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_conformance import compact
from test_sublayers import ROWS, shrunk
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from forks import Forks

# The second replica's base lies in the first half of the blocks, the replica in the second.
PLAN = Plan(num_blocks=6, replicas=(Replica(block=2, base=1, rank=4), Replica(block=4, base=0, rank=3)))
BLOCK = "language_model.model.layers"
SPLITTING = str(Path(__file__).parents[1] / "splitting.py")


def scattered(family: str) -> FlexiGPTForCausalLM:
    """A compact model none of whose tensors are such that a mistake would not show."""
    model = compact(tiny_model(family), PLAN)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("adapter_B", "bias_difference", "output_norm.weight")):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("devices") / "llama"
    scattered("llama-biases-tied").save_pretrained(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("away", [0, 4], ids=["the base", "the replica"])
def test_offloaded_to_disk_it_computes_the_same(folder: Path, tmp_path: Path, away: int) -> None:
    devices = {f"{BLOCK}.{block}": "disk" if block == away else "cpu" for block in range(6)}
    devices |= {f"language_model.{name}": "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb")}
    devices |= {"language_model.lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
    assert model.block_list[away].input_layernorm.weight.device.type == "meta"
    expected = AutoModelForCausalLM.from_pretrained(folder)(token_ids()).logits
    assert torch.equal(model(token_ids()).logits, expected)


@torch.no_grad()
def test_transformers_finds_a_place_for_each_block_where_memory_is_short(folder: Path, tmp_path: Path) -> None:
    memory = {"cpu": 150_000}  # of 209 kB
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory=memory, offload_folder=tmp_path)
    places = {name: device for name, device in model.hf_device_map.items() if name.startswith(f"{BLOCK}.")}
    assert set(places) == {f"{BLOCK}.{block}" for block in range(6)}, "a block was split"
    assert {"cpu", "disk"} <= {str(place) for place in places.values()}
    expected = AutoModelForCausalLM.from_pretrained(folder)(token_ids()).logits
    assert torch.equal(model(token_ids()).logits, expected)


@torch.no_grad()
def test_offloaded_to_the_cpu_it_computes_the_same() -> None:
    model = scattered("llama-gqa")
    expected = model(token_ids()).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(model(token_ids()).logits, expected)


def lie_on(module: nn.Module, device: str) -> None:
    """As accelerate places a block: its tensors there, and a hook that brings its inputs there."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(parameter.detach().to(device))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    add_hook_to_module(module, AlignDevicesHook(device, place_submodules=False))


@torch.no_grad()
def test_a_replica_on_a_second_device_sends_its_input_to_its_base() -> None:
    """Tensors without values: the devices are checked as they would be, and the second one need not be there."""
    config = scattered("llama-gqa").config
    with FakeTensorMode():
        model = FlexiGPTForCausalLM(config)
        inner = model.language_model.model
        for module in (inner.embed_tokens, inner.rotary_emb, *inner.layers[:3]):
            lie_on(module, "cpu")
        for module in (*inner.layers[3:], inner.norm, model.language_model.lm_head):
            lie_on(module, "meta")
        assert model.block_list[4].self_attn.q_proj.base.weight.device.type == "cpu"
        logits = model(torch.ones(2, 5, dtype=torch.int64), use_cache=False).logits
    assert (tuple(logits.shape), logits.device.type) == ((2, 5, 96), "meta")


FAMILIES = ("llama-biases-tied", "phi3", "gemma2")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, early_forks: Forks) -> Path:
    """What two processes made of each."""
    path = tmp_path_factory.mktemp("split")
    for family in FAMILIES:
        scattered(family).save_pretrained(path / family)
    shrunk(tiny_model("llama-gqa"), *ROWS).save_pretrained(path / "units")
    folders = [str(path / name) for name in (*FAMILIES, "units")]
    for ran in early_forks.run_two(SPLITTING, *folders):
        assert ran.returncode == 0, ran.stderr[-4000:]
    return path


@pytest.mark.skipif(not hasattr(PreTrainedModel, "_expand_parallel_plan"), reason="this transformers splits otherwise")
@pytest.mark.parametrize("name", [*FAMILIES, "units"])
def test_two_processes_that_split_each_tensor_compute_the_same(split: Path, name: str) -> None:
    result = json.loads((split / name / "split.json").read_text())
    assert max(result["far"].values()) < 1e-4
    assert result["far"]["tokens"] == 0
    if name == "llama-biases-tied":
        lie, replica = result["lie"], f"{BLOCK}.4"
        assert lie[f"{BLOCK}.0.self_attn.q_proj.weight"] == [32, 32]
        assert lie[f"{replica}.self_attn.q_proj.adapter_B"] == [32, 3]
        assert lie[f"{replica}.self_attn.q_proj.bias_difference"] == [32]
        assert lie[f"{replica}.self_attn.o_proj.inner.adapter_A"] == [3, 32]
        assert f"{replica}.self_attn.q_proj.adapter_A" not in lie
    if name == "units":
        assert result["lie"][f"{BLOCK}.3.mlp.down_proj.weight"] == [32, 4]  # the other process has 3 of the 7 units
