"""Our models for vLLM and SGLang against transformers' compact model, with their layers stubbed: `servers_stub`."""

import sys
import threading
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import servers_stub
import torch
from safetensors.torch import load_file

from families import NUM_BLOCKS, compact_of, tiny_model, token_ids
from flexigpt import Plan, Replica
from flexigpt.model import FlexiGPTForCausalLM
from flexigpt.model.plan import SublayerReplica

RANKS = {"self_attn.k_proj": 3, "mlp.down_proj": 5}


def compact(family: str, output_norm: bool, scaled: bool = False) -> FlexiGPTForCausalLM:
    """Of six blocks one is a replica, one MLP is narrow, one is gone, and so is one attention."""
    source = tiny_model(family)
    plan = Plan(
        num_blocks=NUM_BLOCKS,
        replicas=(Replica(block=4, base=1, rank=4, ranks=RANKS),),
        sublayers=(
            SublayerReplica(block=2, sublayer="mlp", form="units", units=20),
            SublayerReplica(block=3, sublayer="mlp", form="none"),
            SublayerReplica(block=5, sublayer="attention", form="none"),
        ),
    )
    config = compact_of(source, plan, output_norm).config
    config.base_scale = scaled
    torch.manual_seed(3)
    model = FlexiGPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1))
    return model


_ONE_AT_A_TIME = threading.Lock()


def served(model: FlexiGPTForCausalLM, folder: Path, server: str = "vLLM") -> Any:
    """The server's model of a checkpoint, loaded as the server does."""
    with _ONE_AT_A_TIME:  # real devices have a process each, and classes of their own to build with
        made = in_vllm(model) if server == "vLLM" else in_sglang(model)
    loaded = made.load_weights(iter(load_file(folder / "model.safetensors").items()))
    of_server = "" if server == "vLLM" else "language_model."
    assert {of_server + name for name in loaded} == {name for name, _ in made.named_parameters()}
    return made


def in_sglang(model: FlexiGPTForCausalLM) -> Any:
    from flexigpt.serving.sglang.sglang_model import EntryClass  # noqa: PLC0415 - with the stub in place

    return EntryClass(config=model.config, quant_config=None)


def in_vllm(model: FlexiGPTForCausalLM) -> Any:
    from flexigpt.serving.vllm_model import FlexiGPTForCausalLM as Served  # noqa: PLC0415 - with the stub in place

    asked = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model.config),
        compilation_config=SimpleNamespace(static_forward_context={}),
        quant_config=None,
    )
    made = Served(vllm_config=asked)
    made.asked = asked
    return made


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.compute_logits(model(ids, torch.arange(len(ids))))


@pytest.mark.parametrize("server", ["vLLM", "SGLang"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "output_norm", "scaled"),
    [("llama-gqa", False, False), ("llama-gqa", True, False), ("llama-biases-tied", True, True)],
)
def test_with_stubbed_layers_it_computes_what_transformers_does(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    output_norm: bool,
    scaled: bool,
    size: int,
    server: str,
) -> None:
    """On one device and on several, of which some have the same heads of keys."""
    model = compact(family, output_norm, scaled)
    model.save_pretrained(tmp_path)
    ids = token_ids(batch=1, tokens=9)[0]
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    devices = servers_stub.install(monkeypatch, size, server)
    for found in devices.run(lambda: logits_of(served(model, tmp_path, server), ids)):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_with_stubbed_vllm_layers_nothing_is_kept_for_what_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither weights nor a place in the key/value cache; nor is more memory asked for while the model is built."""
    model = compact("llama-gqa", output_norm=False)
    model.save_pretrained(tmp_path)
    servers_stub.install(monkeypatch)
    built: list[int] = []
    plain = torch.full
    monkeypatch.setattr(torch, "full", lambda shape, value: built.append(shape[0] * shape[-1]) or plain(shape, value))
    made = served(model, tmp_path)
    cached = [f"language_model.model.layers.{block}.self_attn.attn" for block in range(5)]
    assert list(made.asked.compilation_config.static_forward_context) == cached
    stored = sum(parameter.numel() for parameter in model.parameters())
    # Ranks below a linear's highest are filled up with zeros.
    assert stored <= sum(parameter.numel() for parameter in made.parameters()) < 1.02 * stored
    assert sum(built) < stored


@pytest.mark.parametrize("server", ["vLLM", "SGLang"])
def test_with_stubbed_layers_units_that_cannot_be_split_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str
) -> None:
    model = compact("llama-gqa", output_norm=False)
    servers_stub.install(monkeypatch, 8, server)
    with pytest.raises(ValueError, match="the 20 units of block 2 cannot be split over 8 devices"):
        served(model, tmp_path, server)


def test_with_stubbed_vllm_the_plugin_names_a_class_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["flexigpt"].split(":")
    servers_stub.install(monkeypatch)
    registered: dict[str, str] = {}
    sys.modules["vllm"].ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)  # type: ignore[attr-defined]
    getattr(import_module(module), name)()
    (asked, place), *more = registered.items()
    assert (asked, more) == (FlexiGPTForCausalLM.__name__, [])
    module, _, name = place.partition(":")
    assert issubclass(getattr(import_module(module), name), torch.nn.Module)
