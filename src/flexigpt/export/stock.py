"""The source's own architecture: what is gone is there as zeros, replicas as weights of their own."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from flexigpt.export.options import ExportOptions
from flexigpt.model import (
    SOURCE_PREFIX,
    FlexiGPTForCausalLM,
    all_tensors,
    config_with_width,
    empty_model,
    fill_model,
    layout_of,
    materialize,
    mlp_widths,
)
from flexigpt.runtime import InputError
from flexigpt.weights import find_file, load_model, load_tokenizer


def to_stock(model: str, out: Path, options: ExportOptions) -> None:
    """Writes a checkpoint that plain transformers opens without code of ours.

    Raises:
        InputError: a model with output norms, which are no part of the source's architecture.
    """
    made = stock_model(model)
    made.save_pretrained(out)
    path = out / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(with_older_rope(settings), indent=2) + "\n", encoding="utf-8")
    write_tokenizer(model, out)


def stock_model(model: str) -> PreTrainedModel:
    """A compact model on disk as a model of the source's own class, in memory, that computes the same.

    Raises:
        InputError: as `to_stock`.
    """
    compact: Any = load_model(model, device="cpu")
    assert isinstance(compact, FlexiGPTForCausalLM)
    check_foldable(compact)
    if compact.config.replicas:
        compact = materialize(compact)
    return unshrunk(compact)


def check_foldable(compact: FlexiGPTForCausalLM) -> None:
    """Raises InputError where replicas have output norms."""
    config: Any = compact.config
    if config.replicas and config.output_norms:
        raise InputError(
            f"the replicas of this model have output norms, for which {config.text_config.model_type} has no place: "
            "prune with the default preset, or with --preset paper --output-norm none"
        )


def unshrunk(compact: FlexiGPTForCausalLM) -> PreTrainedModel:
    """The source's architecture with each MLP as wide as the widest.

    A unit that is missing has zeros in all of its MLP's linears, so that it writes nothing; so does an attention or an
    MLP whose last linear is zero.

    Args:
        compact: a compact model without shared linears.
    """
    config = config_with_width(compact.config.text_config, max(1, *mlp_widths(compact)))
    config.dtype = compact.dtype
    there = {name.removeprefix(SOURCE_PREFIX): values for name, values in all_tensors(compact).items()}
    return _filled(empty_model(config), there, compact)


def rounded(compact: FlexiGPTForCausalLM, multiple: int, fill_gone: bool = False) -> FlexiGPTForCausalLM:
    """The compact model with units of zeros that make the number of each narrow MLP's units a multiple of another.

    With `fill_gone`, an MLP that is gone gets that many units of zeros.
    """
    config = copy.deepcopy(compact.config)
    config.sublayers = [
        row | {"form": "units", "units": -(-row.get("units", 1) // multiple) * multiple}
        if "units" in row or (fill_gone and row["sublayer"] == "mlp")
        else row
        for row in compact.config.sublayers
    ]
    return cast(FlexiGPTForCausalLM, _filled(empty_model(config), all_tensors(compact), compact))


@torch.no_grad()
def _filled(made: PreTrainedModel, there: Mapping[str, torch.Tensor], compact: FlexiGPTForCausalLM) -> PreTrainedModel:
    """An empty model with wider MLPs, filled with a compact model's tensors by their names in it, and with zeros."""
    prefix, widths = f"{layout_of(made).prefix}.", mlp_widths(compact)
    tensors: dict[str, torch.Tensor] = {}
    for name, wanted in all_tensors(made).items():
        if name not in there:
            tensors[name] = torch.zeros(wanted.shape, dtype=wanted.dtype) if wanted.is_meta else wanted
        elif there[name].shape == wanted.shape:
            tensors[name] = there[name]
        else:
            block = int(name.removeprefix(prefix).partition(".")[0])
            tensors[name] = _padded(there[name], wanted.shape, widths[block])
    fill_model(made, tensors)
    made.generation_config = compact.generation_config
    return made


def _padded(values: torch.Tensor, shape: torch.Size, width: int) -> torch.Tensor:
    """Zeros for missing units in the one dimension that holds them: once, or first all gates and then all values."""
    (where,) = (number for number, size in enumerate(shape) if size != values.shape[number])
    parts = values.split(width, where)
    missing = shape[where] // len(parts) - width
    zeros = values.new_zeros((*values.shape[:where], missing, *values.shape[where + 1 :]))
    return torch.cat([piece for part in parts for piece in (part, zeros)], where)


def with_older_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings at the top level too, where readers older than `rope_parameters` (mlx-lm) look for them."""
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # by the type of layer, or none
        return settings
    plain = rope.get("rope_type", "default") == "default"
    return settings | {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else rope}


def write_tokenizer(model: str, out: Path) -> None:
    """The model's tokenizer, where it has one."""
    if any(find_file(model, name) is not None for name in ("tokenizer_config.json", "tokenizer.json")):
        load_tokenizer(model).save_pretrained(out)
