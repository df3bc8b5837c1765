"""The record: what a flow was asked, what it ran on, and what it measured. JSON-ready."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexigpt.accounting import count_parts
from flexigpt.checkpoint import stored_bytes
from flexigpt.data import TokenizedText
from flexigpt.evaluate import perplexity, streamed_perplexity
from flexigpt.progress import Track
from flexigpt.streaming import StreamedModel

Record = dict[str, Any]
FORMAT = 1  # of what is recorded; raised when an older flexigpt could no longer read it


def new_record(source: str, options: Any, resolved: dict[str, Any]) -> Record:
    """Source, versions, and the options (a dataclass), `resolved` naming what their defaults stood for."""
    given = {name: value for name, value in (asdict(options) | resolved).items() if value is not None}
    plain = (int, float, list, tuple)
    return {
        "format": FORMAT,
        "source_name": source,
        "versions": {name: version(name) for name in ("flexigpt", "torch", "transformers")},
        "options": {name: value if isinstance(value, plain) else str(value) for name, value in given.items()},
    }


def measure_both(
    models: Mapping[str, PreTrainedModel | StreamedModel],
    text: TokenizedText | None,
    *,
    name: str | None,
    window_length: int,
    spill: Path | None = None,
    track: Track,
) -> Record:
    """Stored size of two models and, where there is a text, their perplexity on it.

    Args:
        models: what it was -> what it became, each by the name that it has in record and tables.
        text: what to measure perplexity on, tokenized.
        name: of the text.
        window_length: tokens in a window; windows do not overlap.
        spill: folder for hidden states of the text that memory does not hold; None: it does.
        track: told of each batch.

    Returns:
        `compared` (the two names), the size of each by its name and, where there is a text, `perplexity`: its `text`
        and what was measured, by the same names.
    """
    record: Record = {"compared": list(models)}
    for label, model in models.items():
        record[label] = model_size(model.model if isinstance(model, StreamedModel) else model)
    if text is not None:
        record["perplexity"] = {"text": name}
        for label, model in models.items():
            if isinstance(model, StreamedModel):
                measured = streamed_perplexity(model, text, window_length=window_length, spill=spill, track=track)
            else:
                measured = perplexity(model, text, window_length=window_length, track=track)
            record["perplexity"][label] = measured.to_dict()
    return record


def model_size(model: PreTrainedModel) -> dict[str, Any]:
    """Stored parameters and bytes, and the parameters of each part."""
    parts = {part: number for part, number in count_parts(model).items() if number}
    return {"parameters": model.num_parameters(), "bytes": stored_bytes(model), "parts": parts}


def find_in(record: Record, key: str) -> Any:
    """What the record holds by that key, or else its `origin`, the record of the model that it began with; or None."""
    while key not in record and "origin" in record:
        record = record["origin"]
    return record.get(key)
