"""Numbers in config.json that cannot be are one line, before a model of that size is built."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from families import FAMILIES, tiny_model
from flexigpt.weights import open_empty

WHOLE, DIVIDE = "that has to be a whole number of 1 or more", "the latter has to divide the former"
WRONG: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name} = 0: {WHOLE}") for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")),
    *(({name: -1}, f"{name} = -1: {WHOLE}") for name in ("vocab_size", "num_key_value_heads", "head_dim")),
    ({"intermediate_size": "a"}, f'intermediate_size = "a": {WHOLE}'),
    ({"num_hidden_layers": True}, f"num_hidden_layers = true: {WHOLE}"),
    ({"vocab_size": 4096.0}, f"vocab_size = 4096.0: {WHOLE}"),
    ({"max_position_embeddings": 0}, f"max_position_embeddings = 0: {WHOLE}"),
    ({"num_attention_heads": 5}, f"num_attention_heads = 5 and num_key_value_heads = 2: {DIVIDE}"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: its weights, "),
    ({"vocab_size": 10**9}, "vocab_size = 1000000000 and hidden_size = 32: its weights, "),
    ({"intermediate_size": 10**9}, "intermediate_size = 1000000000 and hidden_size = 32: its weights, "),
    ({"head_dim": 10**400}, "num_attention_heads = 4 and head_dim = 1000"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG, ids=[str(changes)[:40] for changes, _ in WRONG])
@pytest.mark.parametrize("kind", ["source", "compact"])
def test_a_size_that_cannot_be_is_one_line(
    run: Run, tiny_source: Path, tiny_compact: Path, tmp_path: Path, changes: dict[str, Any], reason: str, kind: str
) -> None:
    folder = Path(shutil.copytree(tiny_source if kind == "source" else tiny_compact, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (settings if kind == "source" else settings["text_config"]).update(changes)
    (folder / "config.json").write_text(json.dumps(settings))
    code, printed, errors = run("inspect", folder)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"flexigpt: config.json of {folder} says {reason}")
    assert errors.endswith("; correct it, or get the model again\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_of_a_model_that_is_there_are_fine(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    assert open_empty(str(tmp_path)).num_parameters() == tiny_model(family).num_parameters()
