"""What flexigpt recorded in a folder, read back and checked: the record, the plan, the evaluation."""

# ruff: noqa: UP013 - what has few fields is a line

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic wants it from there before Python 3.12

from flexigpt.evaluation import METRICS, Evaluation
from flexigpt.model import FlexiGPTConfig, Plan, plan_of
from flexigpt.record.record import EVALUATION, FORMAT, RECORD, Record, find_in
from flexigpt.record.tables import frontier_series, shown_name
from flexigpt.runtime import InputError
from flexigpt.weights import find_file, read_config


def _alike(columns: dict[str, Any]) -> dict[str, Any]:
    lengths = {len(column) for column in columns.values() if isinstance(column, list)}
    if len(lengths) > 1 or 0 in lengths:
        raise PydanticCustomError("columns", "has columns that differ in length, or are empty")
    return columns


def _of_ours(versions: dict[str, str]) -> dict[str, str]:
    if "flexigpt" not in versions:
        raise PydanticCustomError("ours", "does not name flexigpt, which writes them")
    return versions


def _in_numbers(measured: dict[str, Any]) -> dict[str, Any]:
    for name, metric in METRICS.items():
        if metric.heading and not isinstance(measured.get(name, 0), int | float):
            raise PydanticCustomError("number", "has a {name} that is not a number", {"name": name})
    return measured


# What is read, as pydantic checks it; there may be more beside it. Numbers are such as there are: tables hold them.
_Count = Annotated[int, Field(ge=0, le=2**63)]
_Stored = Annotated[int, Field(gt=0, le=2**63)]
_Block = Annotated[int, Field(ge=0, le=2**16)]
_Planned = TypedDict("_Planned", {"parameters": _Stored, "bytes": _Stored, "share": float})
_Perplexity = TypedDict("_Perplexity", {"perplexity": float, "tokens": _Count, "window_length": _Count})
_Spectrum = TypedDict("_Spectrum", {"ranks": list[_Count], "mended": list[float]})
_Calibration = TypedDict("_Calibration", {"text": str, "windows": tuple[_Count, _Count], "asked": NotRequired[_Count]})
_Removed = TypedDict("_Removed", {"blocks": list[_Block], "num_blocks": _Block, "source": str})
_Costs = TypedDict("_Costs", {"attention": list[float], "mlp": list[float]})
_Text = TypedDict("_Text", {"text": str})
_Parameters = TypedDict("_Parameters", {"parameters": _Count})


_Quantization = TypedDict("_Quantization", {"bits": _Count, "library": str, "version": str})
_Nearness = TypedDict("_Nearness", {"agreement": float, "divergence": float, "tokens": _Count})


class _Size(TypedDict):
    parameters: _Stored
    bytes: _Stored
    parts: NotRequired[dict[str, _Count]]
    part_bytes: NotRequired[dict[str, _Count]]
    blocks: NotRequired[list[_Count]]


class _Worth(TypedDict):
    bytes: _Stored
    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Made(_Worth):
    parameters: _Stored
    int8: NotRequired[_Worth]


class _Rung(_Made):
    share: float
    removed: _Made


class _Measured(TypedDict):
    windows: _Count
    there: _Count
    sizes: _Count


class _Ladder(TypedDict):
    source: _Made
    points: list[_Rung]
    knee: _Count
    text: str
    measured: NotRequired[_Measured]


class _Step(TypedDict):
    step: _Count
    tokens: _Count
    loss: float
    cross_entropy: float
    divergence: float
    lr: float
    tokens_per_second: float
    perplexity: NotRequired[float]


class _Trial(TypedDict):
    lr: float
    loss: float | None
    steps: _Count


class _Recovery(TypedDict):
    tokens: _Count
    steps: _Count
    train: str
    history: list[_Step]
    trials: NotRequired[list[_Trial]]
    stopped: NotRequired[str]


class _Record(TypedDict):
    format: NotRequired[Annotated[int, Field(le=FORMAT)]]
    source_name: str
    versions: Annotated[dict[str, str], AfterValidator(_of_ours)]
    options: dict[str, Any]
    command: NotRequired[str | None]
    calibration: NotRequired[_Calibration | None]
    block_score: NotRequired[str | None]
    scores: NotRequired[list[float] | None]
    sublayer_costs: NotRequired[Annotated[_Costs, AfterValidator(_alike)] | None]
    mlp_units: NotRequired[_Stored | None]
    base_distance: NotRequired[str | None]
    distances: NotRequired[dict[int, dict[int, float]] | None]
    adapter_spectra: NotRequired[dict[int, dict[str, Annotated[_Spectrum, AfterValidator(_alike)]]] | None]
    fitted: NotRequired[bool | None]
    compared: NotRequired[tuple[str, str] | None]
    perplexity: NotRequired[_Text | None]
    planned: NotRequired[_Planned | None]
    plain_removal: NotRequired[_Parameters | None]
    removed: NotRequired[_Removed | None]
    source_blocks: NotRequired[list[_Block] | None]
    points: NotRequired[list[_Rung] | None]
    recovery: NotRequired[_Recovery | None]
    quantization: NotRequired[_Quantization | None]
    fidelity: NotRequired[_Nearness | None]
    files: NotRequired[list[str] | None]
    origin: NotRequired["_Record | None"]


_Task = TypedDict("_Task", {"metric": str, "value": float, "stderr": float | None, "num_fewshot": _Count | None})
_OnText = TypedDict("_OnText", {"text": str, "tokens": _Count, "window_length": _Count, "stride": _Count})
_Positions = TypedDict("_Positions", {"position": list[_Count], "source": list[float], "model": list[float]})
_Error = TypedDict("_Error", {"base": _Block, "output": float})


class _Fidelity(TypedDict):
    against: str
    tokens: _Count
    positions: NotRequired[Annotated[_Positions, AfterValidator(_alike)]]
    blocks: NotRequired[dict[int, _Error]]


class _Continuation(TypedDict):
    prompt: str
    text: str


class _Model(TypedDict):
    name: str
    parameters: _Count
    bytes: _Count
    perplexity: NotRequired[Annotated[_OnText, AfterValidator(_in_numbers)]]
    tasks: NotRequired[dict[str, _Task]]
    tasks_mean: NotRequired[float]
    fidelity: NotRequired[Annotated[_Fidelity, AfterValidator(_in_numbers)]]
    continuations: NotRequired[list[_Continuation]]


class _Evaluation(TypedDict):
    format: Annotated[int, Field(le=FORMAT)]
    versions: dict[str, str]
    command: str | None
    device: str
    dtype: str
    options: dict[str, Any]
    models: list[_Model]


# States that only repeat the one before.
_REPEATED = ("before recovery", "before quantisation")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one state of a model stores: `parts` and `blocks` are parameters, a byte count is `itemsize` times as much,
    or `part_bytes` where they are quantised.

    `blocks` is empty where an older flexigpt wrote the record.
    """

    label: str
    parameters: int
    bytes: int
    parts: dict[str, int]
    blocks: list[int]
    part_bytes: dict[str, int]

    @property
    def itemsize(self) -> float:
        """Bytes of a parameter."""
        return self.bytes / self.parameters if self.parameters else 0.0

    def bytes_of(self, part: str) -> int:
        """Bytes of a part."""
        return self.part_bytes.get(part, 0) if self.part_bytes else round(self.parts.get(part, 0) * self.itemsize)


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
    evaluation: Evaluation | None

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
        return sorted(self.removed["blocks"] if self.removed else self.distances)

    @property
    def bases(self) -> dict[int, int]:
        """The base of each replica."""
        return {} if self.plan is None else {replica.block: replica.base for replica in self.plan.replicas}

    @property
    def distances(self) -> dict[int, dict[int, float]]:
        """Pruned block -> candidate -> distance, by which the bases were chosen."""
        return find_in(self.record, "distances") or {}

    @property
    def frontier(self) -> list[dict[str, Any]]:
        """What `frontier_series` gives of a ladder of sizes; empty of anything else."""
        return frontier_series(self.record) if self.record.get("points") else []

    def _states(self) -> Iterator[tuple[Record, str, str]]:
        """(record, name in it, name to show) of each state that was compared, from the source to this model."""
        for record in self.chain:
            names = record.get("compared", ())
            shown = ("before recovery", "recovered") if "recovery" in record else names
            shown = ("before quantisation", "quantised") if "quantization" in record else shown
            yield from ((record, name, label) for name, label in zip(names, shown, strict=False))

    @property
    def sizes(self) -> list[Size]:
        """From the source to this model; what only repeats the one before is left out."""
        found: list[Size] = []
        for record, name, label in self._states():
            if label not in _REPEATED or not found:
                stored = record[name]
                parts, blocks = stored.get("parts", {}), stored.get("blocks", [])
                size = Size(
                    label=label,
                    parameters=stored["parameters"],
                    bytes=stored["bytes"],
                    parts=parts,
                    blocks=blocks,
                    part_bytes=stored.get("part_bytes", {}),
                )
                found.append(size)
        return found

    @property
    def perplexities(self) -> list[dict[str, Any]]:
        """`label`, `text`, `perplexity`, `tokens` and `window_length` of each state, from the source to this model."""
        found: list[dict[str, Any]] = []
        for record, name, label in self._states():
            if "perplexity" not in record:
                continue
            one = record["perplexity"][name] | {"text": record["perplexity"]["text"], "label": label}
            same = found and round(one["perplexity"], 2) == round(found[-1]["perplexity"], 2)
            if label not in _REPEATED or not same:  # the same model, measured twice
                found.append(one)
        return found


def held_out(model: Recorded) -> list[tuple[int, float]]:
    """(tokens trained on, perplexity): before, on the way, and after."""
    recovery, perplexity = model.record["recovery"], model.record["perplexity"]
    before, after = (perplexity[label]["perplexity"] for label in model.record["compared"])
    on_the_way = [(step["tokens"], step["perplexity"]) for step in recovery["history"] if "perplexity" in step]
    return [(0, before), *on_the_way, (recovery["tokens"], after)]


def fidelities(models: Sequence[Recorded]) -> list[tuple[str, dict[str, Any]]]:
    """(name, how near to its source) of each evaluated model of which that was measured."""
    rows = [row for model in models if model.evaluation for row in model.evaluation["models"] if "fidelity" in row]
    return [
        (shown_name(row["name"]), row["fidelity"] | {"against": shown_name(row["fidelity"]["against"])}) for row in rows
    ]


def read_recorded(folder: str | Path) -> Recorded:
    """Reads a checkpoint or plan folder that flexigpt wrote; no weight is read.

    Raises:
        InputError: a folder without a record, or a file in it that cannot be read, is damaged or of a newer version.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # not by Path, which raises where the name is too long
        raise InputError(f"{folder} is no folder: give a checkpoint or plan folder that flexigpt wrote")
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"{folder} holds no {RECORD}: give a checkpoint or plan folder that flexigpt wrote")
    record = read_record(path)
    recorded = Recorded(
        name=folder.resolve().name,
        folder=folder,
        record=record,
        plan=_read_plan(folder),
        evaluation=read_evaluation(folder),
    )
    plan = recorded.plan
    scores = find_in(record, "scores")
    depth = len(scores) if scores else plan.num_blocks if plan else math.inf
    costs = find_in(record, "sublayer_costs")
    if costs and plan and len(costs["mlp"]) != plan.num_blocks:
        raise _damaged(f"{path}: there are sublayer_costs of {len(costs['mlp'])} blocks, and {plan.num_blocks} blocks")
    if any(not 0 <= block < depth for pruned, row in recorded.distances.items() for block in (pruned, *row)):
        raise _damaged(f"{path}: the distances name a block that is not there")
    return recorded


def read_record(path: Path) -> Record:
    """A record, its fields checked; keys that are blocks are whole numbers.

    Raises:
        InputError: one that cannot be read, is damaged, of a newer version, or not flexigpt's.
    """
    return _completed(_checked(_Record, _read(path), str(path)), str(path))


def record_of(model: str) -> Record | None:
    """What is recorded beside a local or hub model's weights, if anything is: the origin of what is made of it.

    Raises:
        InputError: a record that cannot be read.
    """
    file = find_file(model, RECORD)
    if file is None:
        return None
    read_record(file)
    found: Record = json.loads(file.read_text(encoding="utf-8"))
    found.pop("files", None)  # of another folder
    return found


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation that is recorded in a folder, if one is.

    Raises:
        InputError: one that cannot be read, is damaged or of a newer version.
    """
    path = folder / EVALUATION
    return _checked(_Evaluation, _read(path), str(path)) if path.is_file() else None


def _read_plan(folder: Path) -> Plan | None:
    if (folder / "plan.json").is_file():
        return Plan.read(folder / "plan.json")
    if not (folder / "config.json").is_file():
        return None
    config = read_config(str(folder))
    return plan_of(config) if isinstance(config, FlexiGPTConfig) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _completed(found: Record, where: str) -> Record:
    """The record with its origins, in which what flows write together is there together, and nothing is null."""
    record = {key: value for key, value in found.items() if value is not None}
    if "recovery" in record and not ("compared" in record and isinstance(record["options"].get("data"), str | list)):
        raise _damaged(f"{where} has a recovery, but does not say of what")
    for name in record.get("compared", ()):
        record[name] = _checked(_Size, record.get(name), f"{where}: {name}")
        if "perplexity" in record:
            measured = record["perplexity"]
            measured[name] = _checked(_Perplexity, measured.get(name), f"{where}: perplexity.{name}")
    if record.get("points"):
        _checked(_Ladder, record, where)
        if record["knee"] >= len(record["points"]):
            raise _damaged(f"{where}: there are {len(record['points'])} points, and the knee is {record['knee']}")
    for key, named_by in (("distances", "base_distance"), ("scores", "block_score")):
        if record.get(key) and named_by not in record:
            raise _damaged(f"{where} has {key} but no {named_by}")
    if "origin" in record:
        record["origin"] = _completed(record["origin"], f"{where}: origin")
    return record


def _checked(kind: Any, data: Any, where: str) -> dict[str, Any]:
    """JSON, or a part of what was read of it; keys that are blocks become whole numbers."""
    kind = TypeAdapter(kind)
    try:
        check = kind.validate_json if isinstance(data, bytes) else kind.validate_python
        return check(data, strict=True, extra="allow")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, given = ".".join(map(str, first["loc"])), first["input"]
        found = f", not {given!r}"[:50] if place and isinstance(given, str | int | float | None) else ""
        problem = f"{where}: {place[:60] + ': ' if place else ''}{first['msg'][0].lower()}{first['msg'][1:]}{found}"
        raise InputError(f"{problem}: upgrade flexigpt") if place.endswith("format") else _damaged(problem) from error


def _damaged(what: str) -> InputError:
    return InputError(f"{what}: the file is damaged or was changed by hand; remove it, or write it again")
