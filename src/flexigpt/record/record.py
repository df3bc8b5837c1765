"""The record: what a flow was asked, what it ran on, and what it measured. JSON-ready."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flexigpt.evaluation import perplexity
from flexigpt.model import (
    FlexiGPTForCausalLM,
    Plan,
    SharedLinear,
    config_dtype,
    count_blocks,
    count_parts,
    plan_of,
    quantised_by,
    source_units,
    stored_bytes,
)
from flexigpt.runtime import Cache, InputError, Track, digest, versions
from flexigpt.text import TokenizedText
from flexigpt.weights import Source, StreamedModel, names_in_files, open_empty, open_weights, quantised_parts

Record = dict[str, Any]

# What a flow recorded; beside it, where the model was evaluated, what was measured.
RECORD, EVALUATION = "record.json", "evaluation.json"

FORMAT = 1  # of what is recorded; raised when an older flexigpt could no longer read it


def new_record(source: str, options: Any, resolved: dict[str, Any]) -> Record:
    """Source, versions, and the options (a dataclass), `resolved` naming what their defaults stood for."""
    given = {name: value for name, value in (asdict(options) | resolved).items() if value is not None}
    plain = (int, float, list, tuple)
    return {
        "format": FORMAT,
        "source_name": source,
        "versions": versions(),
        "options": {name: value if isinstance(value, plain) else str(value) for name, value in given.items()},
    }


def measure_both(
    models: Mapping[str, StreamedModel],
    text: TokenizedText | None,
    *,
    name: str | None,
    window_length: int,
    cache: Cache,
    spill: Path | None = None,
    track: Track,
) -> Record:
    """Stored size of two models and, where there is a text, their perplexity on it.

    Args:
        models: what it was, a source, -> what it became, each by the name that it has in record and tables.
        text: what to measure perplexity on, tokenized.
        name: of the text.
        window_length: tokens in a window; windows do not overlap.
        cache: the source's, which keeps its perplexity.
        spill: folder for hidden states of the text that memory does not hold; None: it does.
        track: reports each block.

    Returns:
        `compared` (the two names), the size of each by its name and, where there is a text, `perplexity`: its `text`
        and what was measured, by the same names.
    """
    record: Record = {"compared": list(models)}
    record |= {label: model_size(model.model) for label, model in models.items()}
    if text is None:
        return record
    record["perplexity"] = {"text": name}
    for label, model in models.items():
        measure = partial(perplexity, model, text, window_length=window_length, spill=spill, track=track)
        if isinstance(model, Source):
            with cache.stage("perplexity", text=digest(text.ids), window_length=window_length) as stage:
                record["perplexity"][label] = stage.result or stage.finish(measure())
        else:
            record["perplexity"][label] = measure()
    return record


def model_size(model: PreTrainedModel) -> dict[str, Any]:
    """Stored parameters and bytes, and the parameters of each part and of each block."""
    parts = {part: number for part, number in count_parts(model).items() if number}
    stored = {"parameters": model.num_parameters(), "bytes": stored_bytes(model)}
    return stored | {"parts": parts, "blocks": count_blocks(model)}


def find_in(record: Record, key: str) -> Any:
    """What the record holds by that key, or else its `origin`, the record of the model that it began with; or None."""
    while key not in record and "origin" in record:
        record = record["origin"]
    return record.get(key)


def first_record(record: Record) -> Record:
    """The record of the flow that all began with."""
    while "origin" in record:
        record = record["origin"]
    return record


def json_text(data: dict[str, Any]) -> str:
    """What is recorded, as it is written."""
    return json.dumps(data, indent=2, default=str) + "\n"


def inspect_model(model: str) -> dict[str, Any]:
    """What a local or hub model consists of; of weights on disk it is read which there are, and how large.

    Returns:
        JSON-ready: `plan` (None for a source model), `quantised_by` (a library or None), `parameters` stored and
        effective (the linears of a base counted again for each of its replicas), `bytes` stored and, for a folder, of
        its weight files, `parts`: parameters and bytes of each, and `cache`: what the key/value cache takes.

    Raises:
        InputError: a model that cannot be opened or is of a family that is not supported, weights on disk that do not
            fit it, an export that other programs read.
    """
    form = _exported_as(model)
    if form not in (None, "stock"):
        raise InputError(f"{model} is an export to {form}, whose parts cannot be told: give the model it was made of")
    empty = open_empty(model, quantised=True)
    config = empty.config
    plan = plan_of(config) if isinstance(empty, FlexiGPTForCausalLM) else None
    dtype = config_dtype(config)
    parts = count_parts(empty)
    stored, library = sum(parts.values()), quantised_by(config)
    sizes = {part: n * dtype.itemsize for part, n in parts.items()}
    local = Path(model).is_dir()
    if library is not None:
        found = quantised_parts(open_weights(model), empty)
        sizes = count_parts(empty, lambda name, _: sum(tensor.num_bytes for tensor in found[name]))
    elif local:
        weights = open_weights(model)
        names = names_in_files(weights, empty)
        sizes = count_parts(empty, lambda name, _: weights.tensors[names[name]].num_bytes)
    shared = sum(m.in_features * m.out_features for m in empty.modules() if isinstance(m, SharedLinear))
    files = list(Path(model).glob("*.safetensors")) if local else []
    return {
        "model": model,
        "model_type": config.model_type,
        "source_type": config.get_text_config().model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "quantised_by": library,
        "blocks": config.get_text_config().num_hidden_layers,
        "plan": None if plan is None else plan.to_dict(),
        "parameters": {"stored": stored, "effective": stored + shared},
        "bytes": {"stored": sum(sizes.values()), "files": sum(file.stat().st_size for file in files) or None},
        "parts": {part: {"parameters": n, "bytes": sizes[part]} for part, n in parts.items() if n},
        "mlp_units": None if plan is None else source_units(config),
        "cache": _cache_of(config.get_text_config(), plan, dtype.itemsize),
    }


def _exported_as(model: str) -> str | None:
    """The form of an export in a folder; None: it holds none."""
    try:
        options = json.loads((Path(model) / RECORD).read_bytes())["options"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return options.get("to") if isinstance(options, dict) else None


def _cache_of(config: PreTrainedConfig, plan: Plan | None, itemsize: int) -> dict[str, Any]:
    """What the key/value cache takes: blocks that hold something, their share, bytes a token where heads are known."""
    gone = 0 if plan is None else sum(one.sublayer == "attention" for one in plan.sublayers)
    queries = getattr(config, "num_attention_heads", None)
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or (config.hidden_size // queries if queries else None)
    blocks = config.num_hidden_layers - gone
    known = isinstance(heads, int) and isinstance(size, int)
    return {
        "blocks": blocks,
        "share": blocks / config.num_hidden_layers,
        "bytes_per_token": blocks * heads * size * 2 * itemsize if known else None,
    }
