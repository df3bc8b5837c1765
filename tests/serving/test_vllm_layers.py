"""Our model for vLLM against transformers' compact model, with vLLM's own layers, configuration and loader, on a CPU.

Attention alone is replaced: its kernels need a GPU. Skipped where vLLM is not installed; its CUDA wheel suffices.
"""

import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_plugins import compact
from torch import nn

from families import token_ids

pytest.importorskip("vllm.model_executor.models.llama", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("default")


class PlainAttention(nn.Module):
    """One sequence at a time, whole and without windows."""

    def __init__(self, heads: int, size: int, scale: float, *, prefix: str, **more: Any) -> None:
        super().__init__()
        from vllm.config import get_current_vllm_config  # noqa: PLC0415 - not installed everywhere

        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self
        self.size, self.scale, self.cap = size, scale, more.get("logits_soft_cap")

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = len(q)
        q, k, v = (part.view(tokens, -1, self.size).transpose(0, 1) for part in (q, k, v))
        k, v = (part.repeat_interleave(len(q) // len(part), dim=0) for part in (k, v))
        scores = q @ k.mT * self.scale
        scores = scores if not self.cap else torch.tanh(scores / self.cap) * self.cap
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    from vllm import distributed  # noqa: PLC0415
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config  # noqa: PLC0415

    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{tried.getsockname()[1]}"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        distributed.init_distributed_environment(1, 0, address, 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
    yield
    distributed.destroy_model_parallel()
    distributed.destroy_distributed_environment()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "family", ["llama-gqa", "llama-biases-tied", "mistral", "qwen2-tied", "qwen3", "granite", "gemma2", "gemma3_text"]
)
def test_with_vllms_layers_it_computes_what_transformers_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import ModelRegistry  # noqa: PLC0415
    from vllm import config as of_vllm  # noqa: PLC0415
    from vllm.model_executor.model_loader.utils import initialize_model  # noqa: PLC0415

    from flexigpt.serving.vllm_model import FlexiGPTForCausalLM  # noqa: PLC0415

    model = compact(family, output_norm=True)
    model.save_pretrained(tmp_path)
    ids = token_ids(batch=1, tokens=12)[0]  # within every window
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    for name in ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3"):
        theirs = importlib.import_module(f"vllm.model_executor.models.{name}")
        monkeypatch.setattr(theirs, "Attention", PlainAttention, raising=False)
    ModelRegistry.register_model("FlexiGPTForCausalLM", FlexiGPTForCausalLM)
    asked = of_vllm.VllmConfig(
        model_config=of_vllm.ModelConfig(
            model=str(tmp_path), skip_tokenizer_init=True, dtype="float32", enforce_eager=True
        ),
        compilation_config=of_vllm.CompilationConfig(mode=0, custom_ops=["none"]),
        device_config=of_vllm.DeviceConfig(device="cpu"),
    )
    with of_vllm.set_current_vllm_config(asked), torch.no_grad():
        made = initialize_model(asked)
        loaded = made.load_weights(iter(load_file(tmp_path / "model.safetensors").items()))
        assert loaded == {name for name, _ in made.named_parameters()}
        assert len(asked.compilation_config.static_forward_context) == 5, "one attention of six is gone"
        found = made.compute_logits(made(ids, torch.arange(len(ids))))
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=2e-4, rtol=1e-4)
