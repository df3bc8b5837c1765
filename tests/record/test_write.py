"""Checkpoints and evaluations as they are written: what a folder holds, its model card, and what stays on failure."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_tables import PERPLEXITY, recovered
from transformers import AutoTokenizer

from conftest import Run
from families import token_ids
from flexigpt import EvalOptions, InputError, Plan, PruneOptions, Replica, evaluate, prune, remove, write_checkpoint
from flexigpt.record import reserved, result_rows, write_plan
from flexigpt.record.write import check_replaceable, merged
from flexigpt.weights import load_model
from forks import Forks

SAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"


PLAN = Plan(num_blocks=4, replicas=(Replica(block=2, base=1, rank=4),))
RECORD = {"source_name": "someone/model", "versions": {"flexigpt": "1"}, "options": {}}
OURS = {
    "config.json",
    "configuration_flexigpt.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_flexigpt.py",
    "README.md",
    "record.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def compact(tiny_compact: Path, tmp_path: Path) -> Path:
    """A copy to record in."""
    return Path(shutil.copytree(tiny_compact, tmp_path / "compact"))


def section(card: str) -> dict[str, list[str]]:
    """The rows of the card's evaluation, by their headings."""
    assert card.count("## Evaluation\n") == 1
    lines = card.partition("## Evaluation\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {heading: cells for heading, *cells in rows}


def test_it_holds_what_a_hugging_face_folder_holds(tiny_compact: Path) -> None:
    assert {file.name for file in tiny_compact.iterdir()} == OURS
    modes = {file.stat().st_mode & 0o777 for file in tiny_compact.iterdir()}
    assert len(modes) == 1
    config = json.loads((tiny_compact / "config.json").read_text())
    assert config["model_type"] == "flexigpt"
    assert config["format_version"] == 1
    assert [row["block"] for row in config["replicas"]] == [2, 4]
    assert str(Path.home()) not in json.dumps(config)
    assert "/tmp" not in json.dumps(config)


def test_large_checkpoints_are_sharded(tiny_source: Path, tmp_path: Path) -> None:
    model, _, record = prune(str(tiny_source), PruneOptions.paper(blocks=(2, 4), rank=4))
    write_checkpoint(tmp_path / "out", model, record, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    names = [name for shard in shards for name in load_file(shard)]
    assert len(names) == len(set(names))
    assert torch.equal(load_model(str(tmp_path / "out"))(token_ids()).logits, model(token_ids()).logits)


def test_a_disk_that_fills_leaves_the_previous_checkpoint(tiny_source: Path, tmp_path: Path, forks: Forks) -> None:
    """A real write that fails half-way: the process may not write files above 100 KB."""
    out = tmp_path / "out"
    write_plan(out, PLAN, RECORD)
    previous = (out / "record.json").read_text()
    code = """
import resource, sys
from flexigpt.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main(sys.argv[1:])
"""
    arguments = ["--blocks", "2", "--rank", "4", "--preset", "paper", "--overwrite"]
    ran = forks.run("-c", code, "prune", tiny_source, out, *arguments)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("flexigpt: the disk of")
    assert "Traceback" not in ran.stderr
    assert (out / "record.json").read_text() == previous
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def written(compact: Path) -> Path:
    """A checkpoint with all that is written into one later."""
    (compact / "figures").mkdir()
    (compact / "figures" / "plan.png").write_bytes(b"\x89PNG\r\n\x1a\n Software\0flexigpt report")
    for name in ("report.html", "other.html"):
        (compact / name).write_text('<!DOCTYPE html><meta name="generator" content="flexigpt report">')
    (compact / "evaluation.json").touch()
    for name in (".figures.writing/new/plan.png", ".README.md.writing/lock"):  # by a process that was killed
        (compact / name).parent.mkdir(parents=True)
        (compact / name).touch()
    return compact


def test_what_flexigpt_wrote_is_replaced(written: Path) -> None:
    with reserved(written, (), overwrite=True):
        pass
    record = json.loads((written / "record.json").read_text())
    assert record.pop("files") == sorted(path.name for path in written.iterdir() if path.name in OURS)
    (written / "record.json").write_text(json.dumps(record))  # as an older flexigpt had it
    check_replaceable(written)
    write_plan(written, PLAN, record)
    assert sorted(path.name for path in written.iterdir()) == ["plan.json", "record.json"]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "name", ["notes.txt", "mine/config.json", "figures/mine.png", "mine.html", ".mine", ".git/config", "empty/"]
)
def test_what_others_wrote_is_never_removed(run: Run, tiny_source: Path, written: Path, name: str, older: bool) -> None:
    if older:
        record = json.loads((written / "record.json").read_text())
        del record["files"]
        (written / "record.json").write_text(json.dumps(record))
    path = written / name
    (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
    if not path.is_dir():
        path.write_text("mine, from the flexigpt report of yesterday")
    before = sorted(written.rglob("*"))
    code, _, errors = run("prune", tiny_source, written, "--ratio", "0.4", "--overwrite")
    assert code == 2
    first = written / Path(name).parts[0]
    assert re.fullmatch(rf"flexigpt: {first}\S* was not written by flexigpt: move it elsewhere, or give .*\n", errors)
    assert sorted(written.rglob("*")) == before
    with pytest.raises(InputError, match=f"{first}.* was not written by flexigpt"):  # what came during the work
        write_plan(written, PLAN, RECORD)
    assert sorted(written.rglob("*")) == before


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", '{"a": 1}', "null", '{"source_name": "a", "versions": {}, "options": {}}']
)
def test_a_record_of_another_program_is_none(run: Run, tiny_source: Path, tmp_path: Path, record: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.json").write_text(record)
    (out / "thesis.txt").write_text("years of work")
    code, _, errors = run("prune", tiny_source, out, "--ratio", "0.4", "--overwrite")
    assert code == 2
    assert "record.json" in errors
    assert errors.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == ["record.json", "thesis.txt"]


def test_the_output_folder_must_be_empty_or_ours(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/new"):
        with reserved(tmp_path / name, (), overwrite=False):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "empty" / "file").touch()
    for overwrite, reason in (
        (False, "is not empty: give another folder, or --overwrite"),
        (True, "was not written by"),
    ):
        with pytest.raises(InputError, match=reason), reserved(tmp_path / "empty", (), overwrite):
            pass


def test_the_tokenizer_travels_along(tiny_compact: Path, example: Path) -> None:
    text = "It was the best of times."
    assert AutoTokenizer.from_pretrained(tiny_compact)(text) == AutoTokenizer.from_pretrained(example)(text)


def test_the_model_card_states_plan_and_numbers(tiny_compact: Path) -> None:
    card = (tiny_compact / "README.md").read_text()
    record = json.loads((tiny_compact / "record.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{record['compact']['parameters']:,}" in card
    # What a wheel was built for stands in torch's own version, and not always in the wheel's.
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert card.count("adapters of rank 4, output norms") == 2


@pytest.mark.parametrize("output_norm", [0.05, "none"])
def test_a_trained_compact_model_has_a_card_with_its_plan(
    tiny_source: Path, tmp_path: Path, output_norm: float | str
) -> None:
    model, _, _ = prune(str(tiny_source), PruneOptions.paper(blocks=[2], rank=4, output_norm=output_norm))
    write_checkpoint(tmp_path / "out", model, recovered(perplexity=PERPLEXITY), source=str(tiny_source))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# pruned, compact" in card
    assert "base_model: someone/pruned" in card
    assert "1 of 6 blocks are replicas" in card
    assert f"adapters of rank 4{'' if output_norm == 'none' else ', output norms'} |" in card
    assert ("output norm" in card) == (output_norm != "none")
    assert card.count("\nTrained adapters on 12,345 tokens of novels.jsonl in 67 steps.\n") == 1
    assert len(result_rows(model.config, recovered())) == 2


@pytest.mark.parametrize("told", [True, False])
def test_a_trained_ordinary_model_has_a_card_without_one(tiny_source: Path, tmp_path: Path, told: bool) -> None:
    model, _, removal = remove(str(tiny_source), PruneOptions.paper(blocks=[2]))
    record = recovered(**({"origin": removal} if told else {}))
    write_checkpoint(tmp_path / "out", model, record, source=str(tiny_source))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("# source, shorter" if told else "# pruned, trained") in card
    assert ("Removed: 2 of the 6 blocks of source." in card) == told
    assert ("## Blocks" in card) == told
    assert "Trained adapters on 12,345 tokens" in card
    assert "trust_remote_code" not in card
    assert "replica" not in card
    assert len(result_rows(model.config, record)) == 1 + told


def test_what_is_recorded_adds_up_in_the_folder_and_in_the_card(
    run: Run, compact: Path, tiny_source: Path, text: Path
) -> None:
    before = (compact / "README.md").read_text()
    tasks = ("--include-path", SAMPLES, "--limit", "4", "--tasks")
    assert run("eval", compact, tiny_source, "--perplexity", text, "--window-length", "64", "--record")[0] == 0
    assert run("eval", compact, *tasks, "arc_easy_sample", "--record")[0] == 0
    assert run("eval", compact, *tasks, "piqa_sample", "--record")[0] == 0
    recorded = json.loads((compact / "evaluation.json").read_text())
    ours, source = recorded["models"]
    assert list(ours["tasks"]) == ["arc_easy_sample", "piqa_sample"]
    assert ours["tasks_mean"] == pytest.approx(sum(task["value"] for task in ours["tasks"].values()) / 2)
    assert "perplexity" in source
    assert "tasks" not in source
    assert len(recorded["command"].splitlines()) == 3
    card = (compact / "README.md").read_text()
    rows = section(card)
    assert rows["perplexity"] == [f"{model['perplexity']['perplexity']:.4f}" for model in (ours, source)]
    assert rows["mean of the tasks, %"] == [f"{100 * ours['tasks_mean']:.2f}", ""]
    left = card.partition("## Evaluation\n")
    assert left[0] + "## Origin" + left[2].partition("## Origin")[2] == before
    # The same measure again takes the place of the first.
    assert run("eval", compact, "--perplexity", text, "--window-length", "32", "--record")[0] == 0
    again = json.loads((compact / "evaluation.json").read_text())["models"][0]
    assert (again["perplexity"]["window_length"], list(again["tasks"])) == (32, list(ours["tasks"]))


def test_what_others_measured_under_other_conditions_does_not_stand_beside(tiny_source: Path, text: Path) -> None:
    new = evaluate(str(tiny_source), EvalOptions(perplexity=str(text), window_length=64))
    task = {"metric": "acc", "value": 0.5, "stderr": None, "samples": 4, "num_fewshot": 0, "version": 1, "metrics": {}}
    model = {**new["models"][0], "tasks": {"piqa": task}}
    assert merged(new | {"models": [model]}, new)["models"] == [model | {"tasks_mean": 0.5}]
    assert merged(new | {"models": [model | {"revision": "other"}]}, new)["models"] == new["models"]
    for changed in ({"dtype": "bfloat16"}, {"device": "another"}, {"versions": {"torch": "1.0"}}):
        assert merged(new | {"models": [model]} | changed, new)["models"] == new["models"]


def test_an_evaluation_that_is_damaged_is_left_as_it_is(run: Run, compact: Path, text: Path) -> None:
    (compact / "evaluation.json").write_text("{")
    code, _, errors = run("eval", compact, "--perplexity", text, "--window-length", "64", "--record")
    assert code == 2
    assert "evaluation.json: invalid JSON: " in errors
    assert (compact / "evaluation.json").read_text() == "{"
