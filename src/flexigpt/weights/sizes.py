"""Sizes in config.json that no model has, or not the one whose weights lie beside it: told before any is built."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flexigpt.model import ARCHITECTURES
from flexigpt.runtime import InputError

# As most families call them -> what some call them.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    "hidden_size": ("n_embd",),
    "num_attention_heads": ("n_head", "num_heads"),
    "num_key_value_heads": (),
    "head_dim": (),
    "vocab_size": (),
    "intermediate_size": ("ffn_dim", "n_inner"),
    "max_position_embeddings": ("n_positions",),
}
# Sizes of matrices that are stored, or were before the model was made smaller.
_MATRICES = (
    ("vocab_size", "hidden_size"),
    ("intermediate_size", "hidden_size"),
    ("num_attention_heads", "head_dim", "hidden_size"),
)
# What one of them has at most, for each byte of all files.
_NUMBERS = 8


def check_sizes(model: str, settings: Mapping[str, Any]) -> None:
    """Checks the sizes of a model of a family that is known, of a compact one those of its source.

    Args:
        model: a hub name, or a folder, whose weights tell what cannot be.
        settings: what config.json holds.

    Raises:
        InputError: sizes that cannot be.
    """
    source = settings.get("text_config") if settings.get("model_type") == "flexigpt" else settings
    if not isinstance(source, dict) or source.get("model_type") not in ARCHITECTURES:
        return
    found: dict[str, Any] = {}
    for name, others in _SIZES.items():
        for one in (*others, name):
            if source.get(one) is not None:
                found[name] = source[one]

    def check(holds: bool, why: str, *names: str) -> None:
        if not holds:
            told = " and ".join(f"{name} = {json.dumps(found[name])[:40]}" for name in names if name in found)
            raise InputError(f"config.json of {model} says {told}: {why}; correct it, or get the model again")

    for name, value in found.items():
        check(type(value) is int and value > 0, "that has to be a whole number of 1 or more", name)
    heads = ("num_attention_heads", "num_key_value_heads")
    divides = found.get(heads[0], 0) % found.get(heads[1], 1) == 0
    check(divides, "the latter has to divide the former", *heads)
    tensors, num_bytes = _stored(model)
    for names, most in ((("num_hidden_layers",), tensors), *((names, _NUMBERS * num_bytes) for names in _MATRICES)):
        fits = not tensors or math.prod(found.get(name, 1) for name in names) <= most
        check(fits, f"its weights, {tensors:,} tensors of {num_bytes / 1e6:,.1f} MB in all, hold less", *names)


def _stored(model: str) -> tuple[int, int]:
    """How many tensors and bytes the files of a folder hold; (0, 0): there are none, or none that can be read."""
    files = list(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    tensors = 0
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                tensors += len(file.keys())
        return tensors, sum(path.stat().st_size for path in files)
    except (OSError, SafetensorError):
        return 0, 0
