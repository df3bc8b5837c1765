"""Our model for SGLang against transformers' compact model, with SGLang's own layers, registry and loaders, on a CPU.

Attention alone is replaced: its kernels need a GPU. Skipped where SGLang is not installed; its CUDA wheel suffices.
"""

import importlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_plugins import compact

from families import token_ids

pytest.importorskip("sglang.srt.models.llama", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("default")

FAMILIES = {"llama-gqa": "llama", "mistral": "mistral", "qwen2-tied": "qwen2", "qwen3": "qwen3", "granite": "granite"}


@pytest.fixture(scope="module")
def registry() -> Iterator[Any]:
    """SGLang's models, ours among them, in one process on a CPU."""
    from sglang.srt import distributed, runtime_context, server_args  # noqa: PLC0415 - not installed everywhere

    asked = server_args.ServerArgs(model_path="dummy", device="cpu")
    runtime_context.publish(asked, role="test", ranks=runtime_context.SpawnRanks(world_rank=0))
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{tried.getsockname()[1]}"
    distributed.init_distributed_environment(1, 0, address, 0, "gloo")
    distributed.initialize_model_parallel(backend="gloo")
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "flexigpt.serving.sglang"
    from sglang.srt.models.registry import ModelRegistry  # noqa: PLC0415 - reads the variable

    yield ModelRegistry
    del os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"]
    distributed.destroy_model_parallel()
    distributed.destroy_distributed_environment()


class Batch(SimpleNamespace):
    """What SGLang says of a batch: of this one nothing else."""

    def __getattr__(self, name: str) -> None:
        return None


def plain_attention(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **more: Any) -> torch.Tensor:
    """One sequence at a time, whole and without windows."""
    q, k, v = (part.view(len(q), -1, self.head_dim).transpose(0, 1)[None] for part in (q, k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=self.scaling
    )
    return attended[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("output_norm", [False, True])
def test_with_sglangs_layers_it_computes_what_transformers_does(
    family: str, output_norm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Any
) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention  # noqa: PLC0415
    from sglang.srt.layers.rotary_embedding import base as rotary  # noqa: PLC0415
    from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: PLC0415

    model = compact(family, output_norm)
    model.save_pretrained(tmp_path)
    ids = token_ids(batch=1, tokens=12)[0]  # within every window
    with torch.no_grad():
        expected = model.base_model(ids[None]).last_hidden_state[0]
    monkeypatch.setattr(RadixAttention, "forward", plain_attention)
    monkeypatch.setattr(rotary, "_is_cpu", True)  # else it asks for kernels of vLLM's
    # Not all of SGLang's models are loaded to find one.
    theirs = importlib.import_module(f"sglang.srt.models.{FAMILIES[family]}").EntryClass
    theirs = theirs[0] if isinstance(theirs, list) else theirs
    monkeypatch.setitem(registry.models, theirs.__name__, theirs)
    served, name = registry.resolve_model_cls(model.config.architectures)
    assert name == "FlexiGPTForCausalLM"
    made = served(config=model.config, quant_config=None)
    assert isinstance(made.language_model, theirs)
    for part, parameter in made.named_parameters():
        parameter.data.fill_(0 if "adapter" in part else torch.nan)  # lower ranks are filled up with zeros
    made.load_weights(iter(load_file(tmp_path / "model.safetensors").items()))
    with torch.no_grad():
        batch = Batch(forward_mode=ForwardMode.EXTEND)
        found = made.model(ids, torch.arange(len(ids)), batch)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("registry")
def test_sglang_reads_it_as_a_text_model(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig  # noqa: PLC0415

    compact("llama-gqa", output_norm=False).save_pretrained(tmp_path)
    asked = '{"language_model_only": true}'
    read = ModelConfig(str(tmp_path), trust_remote_code=True, model_override_args=asked)
    assert (read.is_generation, read.is_multimodal, read.num_hidden_layers) == (True, False, 6)
