import os

# Before any library reads them: no test may wait for a network, and tiny tensors only lose by more threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"


@pytest.fixture(scope="session")
def example() -> Path:
    """The shipped model and its texts."""
    return EXAMPLE


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny LLaMA (6 blocks, float32) with the shipped model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "source"
    config = tiny_config("llama-gqa")
    config.vocab_size = 4096
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20,000 characters of the shipped validation text, in 10 documents."""
    rows = (EXAMPLE / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": json.loads(row)["text"][:2000]}) + "\n" for row in rows))
    return path
