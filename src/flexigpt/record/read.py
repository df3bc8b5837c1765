"""What flexigpt recorded in a folder, read back and checked: the record, the plan, the evaluation."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexigpt.model import FlexiGPTConfig, Plan, plan_of
from flexigpt.record.record import FORMAT, Record, find_in
from flexigpt.record.tables import shown_name
from flexigpt.record.write import EVALUATION
from flexigpt.runtime import RECORD, InputError
from flexigpt.weights import read_config

# The shape of what is read: a type; [shape] for a list; {int: shape} or {str: shape} for a mapping, whose whole numbers
# JSON has made strings; {"field": shape, "perhaps?": shape, "field|null": shape} for fields, beside which there may be
# others. Null in a field that is perhaps there counts as not there.
_SIZE = {"parameters": int, "bytes": int, "parts?": {str: int}}

_PERPLEXITY = {"perplexity": float, "tokens": int, "window_length": int, "bits_per_byte?": float}

_DISTANCES = {int: {int: float}}

_STEP = {
    "step": int,
    "tokens": int,
    "loss": float,
    "cross_entropy": float,
    "divergence": float,
    "lr": float,
    "tokens_per_second": float,
    "perplexity?": float,
}

_RECORD = {
    "format?": int,
    "source_name": str,
    "versions": {str: str},
    "options": {str: object},
    "command?": str,
    "calibration?": {"text": str, "windows": [int], "asked": int},
    "block_score?": str,
    "scores?": [float],
    "pruning_order?": [int],
    "base_distance?": str,
    "distances?": _DISTANCES,
    "compared_distances?": {str: _DISTANCES},
    "adapter_spectra?": {int: {str: {"ranks": [int], "mended": [float]}}},
    "compared?": [str],
    "perplexity?": {"text": str},
    "plain_removal?": {"parameters": int},
    "removed?": {"blocks": [int], "num_blocks": int, "source": str},
    "source_blocks?": [int],
    "recovery?": {"tokens": int, "steps": int, "train": str, "history": [_STEP], "stopped?": str},
    "origin?": {str: object},
}

_TASK = {"metric": str, "value": float, "stderr|null": float, "num_fewshot|null": int}

_FIDELITY = {
    "against": str,
    "tokens": int,
    "divergence": float,
    "agreement": float,
    "positions?": {"position": [int], "source": [float], "model": [float]},
    "blocks?": {int: {"base": int, "output": float}},
}

_MODEL = {
    "name": str,
    "parameters": int,
    "bytes": int,
    "perplexity?": _PERPLEXITY | {"text": str, "bits_per_byte": float, "stride": int},
    "tasks?": {str: _TASK},
    "tasks_mean?": float,
    "fidelity?": _FIDELITY,
}

_EVALUATION = {
    "format": int,
    "versions": {"flexigpt": str, "torch": str, "transformers": str, "lm_eval?": str},
    "command|null": str,
    "device": str,
    "dtype": str,
    "options": {str: object},
    "models": [_MODEL],
}

_WORDS = {float: "a number", int: "a whole number", str: "a text", list: "a list", dict: "a mapping"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one state of a model stores: `parts` are parameters; a byte count is `itemsize` times as much."""

    label: str
    parameters: int
    bytes: int
    parts: dict[str, int]

    @property
    def itemsize(self) -> float:
        """Bytes of a parameter."""
        return self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured of one state of a model."""

    label: str
    text: str
    window_length: int
    value: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """All that a folder holds but for the weights.

    Attributes:
        name: to show; of the folder.
        folder: that was read.
        record: its fields checked; keys that are blocks are whole numbers.
        plan: of a compact model or a plan folder.
        evaluation: where the model was evaluated.
    """

    name: str
    folder: Path
    record: Record
    plan: Plan | None
    evaluation: dict[str, Any] | None

    @property
    def chain(self) -> list[Record]:
        """The records from the first model to this one."""
        records = [self.record]
        while "origin" in records[0]:
            records.insert(0, records[0]["origin"])
        return records

    @property
    def removed(self) -> dict[str, Any] | None:
        """Of plain removal: `blocks`, `num_blocks`, `source`."""
        found: dict[str, Any] | None = find_in(self.record, "removed")
        return found

    @property
    def pruned(self) -> list[int]:
        """The blocks that replicas stand in for, or that are removed; of an extended model its replicas."""
        if self.plan is not None:
            return self.plan.pruned
        return sorted(self.removed["blocks"] if self.removed else find_in(self.record, "distances") or ())

    @property
    def bases(self) -> dict[int, int]:
        """The base of each replica."""
        return {} if self.plan is None else {replica.block: replica.base for replica in self.plan.replicas}

    @property
    def distances(self) -> dict[str, dict[int, dict[int, float]]]:
        """By name of the distance, the one that chose the bases first."""
        chosen = find_in(self.record, "distances")
        if not chosen:
            return {}
        return {find_in(self.record, "base_distance"): chosen} | (find_in(self.record, "compared_distances") or {})

    @property
    def sizes(self) -> list[Size]:
        """From the source to this model; what only repeats the one before is left out."""
        found: list[Size] = []
        for record in self.chain:
            for label in record.get("compared", ()):
                if "recovery" in record and label == record["compared"][0] and found:
                    continue
                size = record[label]
                shown = "recovered" if "recovery" in record and label == record["compared"][-1] else label
                parts = size.get("parts", {})
                found.append(Size(label=shown, parameters=size["parameters"], bytes=size["bytes"], parts=parts))
        return found

    @property
    def perplexities(self) -> list[Perplexity]:
        """From the source to this model."""
        found: list[Perplexity] = []
        for record in self.chain:
            measured = record.get("perplexity", {})
            for label in record.get("compared", ()) if measured else ():
                value = measured[label]
                if label == "before" and found and round(value["perplexity"], 2) == round(found[-1].value, 2):
                    continue  # the same model, measured twice
                found.append(
                    Perplexity(
                        label={"before": "before recovery", "after": "recovered"}.get(label, label),
                        text=measured["text"],
                        window_length=value["window_length"],
                        value=value["perplexity"],
                        tokens=value["tokens"],
                    )
                )
        return found


def held_out(model: Recorded) -> list[tuple[int, float]]:
    """(tokens trained on, perplexity): before, on the way, and after."""
    recovery, perplexity = model.record["recovery"], model.record["perplexity"]
    before, after = (perplexity[label]["perplexity"] for label in model.record["compared"])
    on_the_way = [(step["tokens"], step["perplexity"]) for step in recovery["history"] if "perplexity" in step]
    return [(0, before), *on_the_way, (recovery["tokens"], after)]


def fidelities(models: Sequence[Recorded]) -> list[tuple[str, dict[str, Any]]]:
    """(name, how near to its source) of each evaluated model of which that was measured."""
    evaluations = [model.evaluation for model in models if model.evaluation is not None]
    rows = [row for evaluation in evaluations for row in evaluation["models"] if "fidelity" in row]
    return [
        (shown_name(row["name"]), row["fidelity"] | {"against": shown_name(row["fidelity"]["against"])}) for row in rows
    ]


def read_recorded(folder: str | Path) -> Recorded:
    """Reads a checkpoint or plan folder that flexigpt wrote; no weight is read.

    Raises:
        InputError: a folder without a record, or a file in it that cannot be read, is damaged or of a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give a checkpoint or plan folder that flexigpt wrote")
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no {RECORD}: give a checkpoint or plan folder that flexigpt wrote")
    record = _check_record(_read(folder / RECORD), _Place(folder / RECORD))
    evaluation = None
    if (folder / EVALUATION).is_file():
        evaluation = _check_evaluation(_read(folder / EVALUATION), _Place(folder / EVALUATION))
    name, plan = folder.resolve().name, _read_plan(folder)
    recorded = Recorded(name=name, folder=folder, record=record, plan=plan, evaluation=evaluation)
    _check_blocks(recorded)
    return recorded


def _check_blocks(recorded: Recorded) -> None:
    """Refuses distances of blocks that the scores or the plan rule out."""
    scores, plan = find_in(recorded.record, "scores"), recorded.plan
    depth = len(scores) if scores else plan.num_blocks if plan else math.inf
    for name, distances in recorded.distances.items():
        if any(not 0 <= block < depth for pruned, row in distances.items() for block in (pruned, *row)):
            raise _damaged(f"{recorded.folder / RECORD}: the {name} distances name a block that is not there")


def _read_plan(folder: Path) -> Plan | None:
    if (folder / "plan.json").is_file():
        return Plan.read(folder / "plan.json")
    if not (folder / "config.json").is_file():
        return None
    config = read_config(str(folder))
    return plan_of(config) if isinstance(config, FlexiGPTConfig) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{path} is not JSON ({error})") from error


def _check_format(data: Any, where: "_Place") -> None:
    number = data.get("format", FORMAT) if isinstance(data, dict) else FORMAT
    if isinstance(number, int) and number > FORMAT:
        raise InputError(f"{where} has format {number}, this flexigpt reads {FORMAT}: upgrade flexigpt")


def _check_record(data: Any, where: "_Place") -> Record:
    """The record with its origins, checked: what flows write together is there together."""
    _check_format(data, where)
    record: Record = _checked(data, _RECORD, where)
    for key in record.get("compared", ()):
        record[key] = _checked(record.get(key), _SIZE, where / key)
        if "perplexity" in record:
            measured = record["perplexity"]
            measured[key] = _checked(measured.get(key), _PERPLEXITY, where / "perplexity" / key)
    for key, named_by in (("distances", "base_distance"), ("scores", "block_score")):
        if record.get(key) and named_by not in record:
            raise _damaged(f"{where} has {key} but no {named_by}")
    if "calibration" in record and len(record["calibration"]["windows"]) != 2:
        raise _damaged(f"{where / 'calibration' / 'windows'} is not their number and their length")
    for block, linears in record.get("adapter_spectra", {}).items():
        for linear, spectrum in linears.items():
            if len(spectrum["ranks"]) != len(spectrum["mended"]) or not spectrum["ranks"]:
                place = where / "adapter_spectra" / block / linear
                raise _damaged(f"{place} has ranks and shares that do not match")
    if "origin" in record:
        record["origin"] = _check_record(record["origin"], where / "origin")
    return record


def _check_evaluation(data: Any, where: "_Place") -> dict[str, Any]:
    _check_format(data, where)
    evaluation: dict[str, Any] = _checked(data, _EVALUATION, where)
    for number, model in enumerate(evaluation["models"]):
        columns = model.get("fidelity", {}).get("positions", {})
        if len({len(columns[name]) for name in ("position", "source", "model") if columns}) > 1:
            place = where / "models" / number / "fidelity" / "positions"
            raise _damaged(f"{place} has columns that differ in length")
    return evaluation


@dataclass(frozen=True)
class _Place:
    """Where in which file a value stands, for messages."""

    file: Path
    keys: tuple[str, ...] = ()

    def __truediv__(self, key: object) -> "_Place":
        return _Place(self.file, (*self.keys, str(key)))

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(self.keys)}" if self.keys else str(self.file)


def _checked(value: Any, shape: Any, where: _Place) -> Any:
    """The value in that shape: whole numbers as keys, optional fields that are null left out.

    Raises:
        InputError: the first place that is not as the shape says.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (kind in (int, float) and isinstance(value, bool)):
        raise _damaged(f"{where} is {_short(value)}, not {_WORDS[kind]}")
    checked: Any = value
    if kind is list:
        return [_checked(item, shape[0], where / number) for number, item in enumerate(checked)]
    return dict(_checked_items(checked, shape, where)) if kind is dict else checked


def _checked_items(value: dict[str, Any], shape: dict[Any, Any], where: _Place) -> Iterator[tuple[Any, Any]]:
    for key, item in value.items():
        if int in shape:
            if not key.isascii() or not key.isdigit():
                raise _damaged(f"{where / _short(key)} is not the number of a block")
            yield int(key), _checked(item, shape[int], where / key)
        elif str in shape or key in shape:
            yield key, _checked(item, shape.get(key, shape.get(str)), where / key)
        elif f"{key}|null" in shape:
            yield key, None if item is None else _checked(item, shape[f"{key}|null"], where / key)
        elif f"{key}?" not in shape:
            yield key, item
        elif item is not None:
            yield key, _checked(item, shape[f"{key}?"], where / key)
    needed = [key.removesuffix("|null") for key in shape if isinstance(key, str) and not key.endswith("?")]
    missing = [key for key in needed if key not in value]
    if missing:
        raise _damaged(f"{where / missing[0]} is not there")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _damaged(what: str) -> InputError:
    return InputError(f"{what}: the file is damaged or was changed by hand; write it anew")
