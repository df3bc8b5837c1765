"""What was recorded is read back as it was; what is damaged is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexigpt import InputError, Plan, Replica
from flexigpt.record import read_recorded

SIZE = {"parameters": 1000, "bytes": 2000, "parts": {"embeddings": 300}}
MEASURED = {"perplexity": 20.0, "tokens": 90, "window_length": 64}
PLAN = Plan(num_blocks=4, replicas=(Replica(block=2, base=1, rank=4),))
FIDELITY = {
    "against": "source",
    "tokens": 12,
    "divergence": 0.5,
    "agreement": 0.75,
    "positions": {"position": [0, 4], "source": [3.0, 2.0], "model": [4, 3.0]},
    "blocks": {"2": {"base": 1, "output": float("inf")}},
}


def pruning() -> dict[str, Any]:
    """What `prune` records, as the first format had it."""
    return {
        "format": 1,
        "source_name": "someone/model",
        "versions": {"flexigpt": "0.1"},
        "options": {"ratio": 0.25, "align": False},
        "command": None,
        "calibration": {"text": "t", "windows": [4, 64], "asked": 4},
        "block_score": "influence",
        "scores": [0.5, 0.25, 0.125, 1],
        "base_distance": "low-rank",
        "distances": {"2": {"0": 4.0, "1": 3}},
        "compared_distances": {"frobenius": {"2": {"0": 4.0, "1": 3}}},
        "adapter_spectra": {"2": {"q_proj": {"ranks": [1, 2], "mended": [0.25, 0.5]}}},
        "compared": ["source", "compact"],
        "source": SIZE,
        "compact": SIZE | {"parameters": 800},
        "perplexity": {"text": "t", "source": MEASURED, "compact": MEASURED | {"perplexity": 30}},
        "plain_removal": {"parameters": 700},
        "later": "a field that only a newer flexigpt knows",
    }


def recovery() -> dict[str, Any]:
    """What `recover` records of a model that was pruned."""
    step = {"step": 1, "tokens": 50, "loss": 2.0, "cross_entropy": 2.0, "divergence": 0, "lr": 0.1}
    return {
        "format": 1,
        "source_name": "pruned",
        "versions": {"flexigpt": "0.1"},
        "options": {"data": "t"},
        "compared": ["before", "after"],
        "before": SIZE | {"parameters": 800},
        "after": SIZE | {"parameters": 800},
        "perplexity": {
            "text": "t",
            "before": MEASURED | {"perplexity": 30.001},
            "after": MEASURED | {"perplexity": 25.0},
        },
        "recovery": {"tokens": 100, "steps": 2, "train": "all", "history": [step | {"tokens_per_second": 9.0}]},
        "origin": pruning(),
    }


def evaluation() -> dict[str, Any]:
    measured = {"text": "t", "tokens": 12, "window_length": 64, "stride": 64, "perplexity": 20, "bits_per_byte": 1.5}
    task = {"metric": "acc", "value": 0.5, "stderr": None, "num_fewshot": None}
    model = {"name": "m", "revision": None, "parameters": 800, "bytes": 1600, "perplexity": measured}
    return {
        "format": 1,
        "versions": {"flexigpt": "0.1", "torch": "2", "transformers": "5", "lm_eval": "0.4"},
        "command": None,
        "device": "cpu",
        "dtype": "float32",
        "options": {},
        "models": [model | {"tasks": {"piqa": task}, "tasks_mean": 0.5, "fidelity": FIDELITY}],
    }


def write(folder: Path, record: Any, evaluated: Any = None) -> Path:
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "plan.json").write_text(json.dumps(PLAN.to_dict()))
    if evaluated is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluated))
    return folder


def test_a_record_is_read_with_its_origin_and_with_blocks_as_numbers(tmp_path: Path) -> None:
    read = read_recorded(write(tmp_path, recovery(), evaluation()))
    assert (read.name, read.plan, read.pruned, read.bases) == (tmp_path.name, PLAN, [2], {2: 1})
    assert [record["source_name"] for record in read.chain] == ["someone/model", "pruned"]
    assert read.distances == {2: {0: 4.0, 1: 3.0}}
    assert [(size.label, size.parameters, size.itemsize) for size in read.sizes] == [
        ("source", 1000, 2.0),
        ("compact", 800, 2.5),
        ("recovered", 800, 2.5),
    ]
    assert [(one["label"], one["perplexity"]) for one in read.perplexities] == [
        ("source", 20.0),
        ("compact", 30.0),
        ("recovered", 25.0),
    ]
    assert read.chain[0]["later"] == "a field that only a newer flexigpt knows"
    assert "command" not in read.chain[0], "null counts as not there"
    assert read.evaluation is not None
    (model,) = read.evaluation["models"]
    assert model["fidelity"]["blocks"] == {2: {"base": 1, "output": float("inf")}}
    assert model["tasks"]["piqa"]["stderr"] is None


def test_a_folder_without_a_record_is_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds no record\.json: give a checkpoint or plan folder that flexigpt wrote"
    ):
        read_recorded(tmp_path)
    with pytest.raises(InputError, match="nowhere is no folder"):
        read_recorded(tmp_path / "nowhere")


def spoilt(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    record = pruning()
    edit(record)
    return record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "record.json: input should be an object"),
        (spoilt(lambda r: r.update(format=2)), "record.json: format: .* 1, not 2: upgrade flexigpt"),
        (spoilt(lambda r: r.update(scores="low")), "record.json: scores: .* array, not 'low'"),
        (spoilt(lambda r: r["scores"].append("x")), "record.json: scores.4: .* number, not 'x'"),
        (spoilt(lambda r: r["scores"].append(True)), "scores.4: .* number, not True"),
        (spoilt(lambda r: r.pop("versions")), "record.json: versions: field required"),
        (spoilt(lambda r: r["distances"].update(x={})), "distances.x.* integer.*, not 'x'"),
        (spoilt(lambda r: r["distances"].update({"77": {}})), "the distances name a block that is not there"),
        (spoilt(lambda r: r.pop("base_distance")), "has distances but no base_distance"),
        (spoilt(lambda r: r["calibration"].update(windows=[1])), "calibration.windows.1: field required"),
        (spoilt(lambda r: r["adapter_spectra"]["2"]["q_proj"]["ranks"].pop()), "q_proj: has columns that differ"),
        (spoilt(lambda r: r.pop("compact")), "record.json: compact: input should be a valid dictionary"),
        (spoilt(lambda r: r["perplexity"].pop("source")), "perplexity.source: input should be a valid dictionary"),
        (spoilt(lambda r: r.update(versions={"torch": "2"})), "versions: does not name flexigpt"),
        (spoilt(lambda r: r.update(source=SIZE | {"parameters": 0})), "source: parameters: .* greater than 0, not 0"),
        (spoilt(lambda r: r.update(source=SIZE | {"bytes": 10**400})), "source: bytes: "),
        (
            spoilt(lambda r: r.update(removed={"blocks": [], "num_blocks": 10**12, "source": "m"})),
            "removed.num_blocks: ",
        ),
        (spoilt(lambda r: r["distances"].update({"x" * 5000: {}})), "record.json: distances.xxx"),
        (spoilt(lambda r: r.update(recovery=recovery()["recovery"])), "a recovery, but does not say of what"),
        (spoilt(lambda r: r.update(origin={"format": 9})), "record.json: origin.format: .*: upgrade flexigpt"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, record: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        read_recorded(write(tmp_path, record))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 280


def test_a_record_whose_origins_have_no_end_is_refused(tmp_path: Path) -> None:
    record = json.dumps(pruning() | {"origin": "HERE"}).partition('"HERE"')
    (tmp_path / "record.json").write_text(record[0] * 5000 + "null" + record[2] * 5000)
    with pytest.raises(InputError, match="recursion limit exceeded"):
        read_recorded(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b""])
def test_what_is_not_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, pruning())
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(InputError, match=r"record.json: invalid JSON: .* or write it again$"):
        read_recorded(tmp_path)


@pytest.mark.parametrize(
    ("evaluated", "reason"),
    [
        ({"format": 1}, "evaluation.json: versions: field required"),
        ({"format": 2}, "evaluation.json: format: .*: upgrade flexigpt"),
        (evaluation() | {"models": [{"name": "m"}]}, "evaluation.json: models.0.parameters: field required"),
        (evaluation() | {"device": 3}, "evaluation.json: device: .*, not 3"),
    ],
)
def test_a_damaged_evaluation_is_refused_in_one_line(tmp_path: Path, evaluated: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_recorded(write(tmp_path, pruning(), evaluated))


@pytest.mark.parametrize("group", ["perplexity", "fidelity"])
def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path, group: str) -> None:
    evaluated = evaluation()
    evaluated["models"][0][group]["perplexity" if group == "perplexity" else "agreement"] = "much"
    with pytest.raises(InputError, match=rf"evaluation.json: models.0.{group}: has a \w+ that is not a number"):
        read_recorded(write(tmp_path, pruning(), evaluated))
