"""Benchmark tasks: the figures are lm_eval's own, the offline samples are its own tasks, bad input is one line."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import ChainMap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Run
from flexigpt import EvalOptions, InputError, evaluate
from flexigpt.evaluation.tasks import Tasks
from forks import Forks

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "examples" / "benchmarks"
OWN_TASKS = Path(lm_eval.tasks.__file__).parent
OWN = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
ASKED = "arc_easy_sample,winogrande_sample,hellaswag_sample"


def questions(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def as_in_the_data_set(name: str) -> list[dict]:
    """The questions with the columns that lm_eval's own task reads."""
    if name != "hellaswag":
        return questions(name)
    rows = []
    for question in questions(name):
        activity, _, context = question["query"].partition(": ")
        columns = {"activity_label": activity, "ctx_a": context, "ctx_b": "", "label": str(question["label"])}
        rows.append(columns | {"endings": question["endings"]})
    return rows


@functools.cache
def _index_of(folder: Path) -> dict[str, Any]:
    return _build([folder])


_build = TaskIndex.build


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval's own 14,000 tasks take it several seconds, and are the same in each test."""

    def build(paths: Iterable[Path], **_: Any) -> dict[str, Any]:
        every = [_index_of(path) if path == OWN_TASKS else _build([path]) for path in paths]
        return dict(ChainMap(*reversed(every)))  # later ones go before

    monkeypatch.setattr(TaskIndex, "build", staticmethod(build))


@pytest.fixture(scope="module")
def lm_evals_own_figures(
    early_forks: Forks, tiny_compact: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the real command line of lm_eval says of a compact checkpoint, run from another folder."""
    folder = tmp_path_factory.mktemp("lm_eval")
    ran = early_forks.run(
        *("-m", "lm_eval", "run", "--model", "hf", "--batch_size", "4", "--limit", "6"),
        *("--model_args", f"pretrained={tiny_compact},trust_remote_code=True,dtype=float32", "--device", "cpu"),
        *("--tasks", ASKED, "--include_path", SAMPLES, "--output_path", folder / "figures.json"),
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
    )
    assert ran.returncode == 0, ran.stderr
    (written,) = folder.glob("**/figures*.json")
    return json.loads(written.read_text())


def test_the_figures_are_exactly_those_of_lm_eval_itself(
    run: Run, tiny_compact: Path, tiny_source: Path, lm_evals_own_figures: dict, tmp_path: Path
) -> None:
    code, printed, shown = run(
        *("eval", tiny_compact, tiny_source, "--tasks", ASKED, "--include-path", SAMPLES),
        *("--limit", "6", "--batch-size", "4", "--dtype", "float32", "--json"),
    )
    assert code == 0
    result = json.loads(printed)
    compact, source = result["models"]
    assert list(compact["tasks"]) == ASKED.split(",") == list(source["tasks"])
    for name, measured in compact["tasks"].items():
        theirs = lm_evals_own_figures["results"][name]
        assert measured["metrics"] == {key.removesuffix(",none"): value for key, value in theirs.items() if "," in key}
        metric = "acc" if name == "winogrande_sample" else "acc_norm"
        assert measured["metric"] == metric
        assert measured["value"] == theirs[f"{metric},none"]
        assert measured["stderr"] == theirs[f"{metric}_stderr,none"]
        assert (measured["samples"], measured["num_fewshot"], measured["version"]) == (6, 0, 1.0)
    assert compact["tasks_mean"] == pytest.approx(sum(task["value"] for task in compact["tasks"].values()) / 3)
    assert result["versions"]["lm_eval"] == "0.4.13"
    code, *rest = (line for line in shown.splitlines() if line)
    assert code.startswith("the tasks run code of the user's own, named in ")
    assert sorted(Path(file).stem for file in code.partition(" in ")[2].split(", ")) == sorted(ASKED.split(","))
    assert all(line.strip().startswith(("1/2 answering", "2/2 answering")) for line in rest)


def test_the_value_is_what_a_loop_over_choices_finds(tiny_source: Path) -> None:
    """Every choice of every question scored by hand, one at a time."""
    options = EvalOptions(tasks=["arc_easy_sample"], include_path=SAMPLES, limit=8)
    measured = evaluate(str(tiny_source), options)["models"][0]["tasks"]["arc_easy_sample"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_source), AutoTokenizer.from_pretrained(tiny_source)
    right = {"acc": 0, "acc_norm": 0}
    for question in questions("arc_easy")[:8]:
        context, gold = (
            f"Question: {question['question']}\nAnswer:",
            question["choices"]["label"].index(question["answerKey"]),
        )
        sums = []
        for choice in question["choices"]["text"]:
            before = tokenizer(context, return_tensors="pt")["input_ids"]
            whole = tokenizer(f"{context} {choice}", return_tensors="pt")["input_ids"]
            scores = model(whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[:, 0]
            sums.append(scores[before.shape[1] - 1 :].sum().item())
        normed = [total / len(choice) for total, choice in zip(sums, question["choices"]["text"], strict=True)]
        right["acc"] += sums.index(max(sums)) == gold
        right["acc_norm"] += normed.index(max(normed)) == gold
    assert {name: measured["metrics"][name] for name in right} == {name: n / 8 for name, n in right.items()}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"asked": {}}, False),
        ({"asked": {"tag": "both"}, "other": {"process_docs": "FUNCTION", "tag": "both"}}, False),
        ({"asked": {"process_docs": "FUNCTION"}}, True),
        ({"asked": {"include": "deep/base.yaml"}, "deep/base": {"task": None, "process_docs": "FUNCTION"}}, True),
        ({"asked": {"task": "one", "tag": ["asked"], "process_docs": "FUNCTION"}}, True),
        ({"asked": {"task": "one", "tag": ["asked"]}, "two": {"task": "two"}}, False),
    ],
)
def test_a_line_says_that_a_task_runs_code_before_it_does(
    tmp_path: Path, files: dict[str, dict[str, Any]], told: bool
) -> None:
    """Alone, by what it includes, and by a tag."""
    for name, more in files.items():
        task = {"task": name, "output_type": "multiple_choice", "dataset_path": "nobody/nothing"} | more
        text = yaml.safe_dump({key: value for key, value in task.items() if value is not None})
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text.replace("FUNCTION", "!function code.run"))
        (tmp_path / name).with_name("code.py").write_text(
            f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nrun = len\n"
        )
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        assert not (tmp_path / "ran").exists()

    with pytest.raises(InputError):  # it has no data
        Tasks(EvalOptions(tasks=["asked"], include_path=tmp_path), note)
    assert len(lines) == (tmp_path / "ran").exists() == told
    assert not told or ".yaml" in lines[0]


@pytest.mark.parametrize("batch_size", [1, 7, "auto"])
def test_the_batch_size_changes_no_figure(tiny_source: Path, batch_size: int | str) -> None:
    asked = {"tasks": ["piqa_sample"], "include_path": SAMPLES, "limit": 12}
    expected = evaluate(str(tiny_source), EvalOptions(**asked, batch_size=3))["models"]
    assert evaluate(str(tiny_source), EvalOptions(**asked, batch_size=batch_size))["models"] == expected


def test_solved_examples_are_drawn_and_recorded(tiny_source: Path) -> None:
    options = EvalOptions(tasks=["piqa_sample"], include_path=SAMPLES, limit=4, num_fewshot=2)
    (entry,) = evaluate([str(tiny_source)], options)["models"]
    assert entry["tasks"]["piqa_sample"]["num_fewshot"] == 2
    # Two solved examples do not fit into 128 tokens: what was cut is told.
    assert entry["truncated"] > 0


@pytest.mark.slow  # groups need the index of all of lm_eval's tasks
def test_a_group_that_lm_eval_sums_up_is_one_row(tiny_source: Path, tmp_path: Path) -> None:
    shutil.copytree(SAMPLES, tmp_path / "tasks")
    group = {
        "group": "science",
        "task": ["arc_easy_sample", "arc_challenge_sample"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "tasks" / "science.yaml").write_text(yaml.safe_dump(group))
    options = EvalOptions(tasks=["science", "piqa_sample"], include_path=tmp_path / "tasks", limit=4)
    tasks = evaluate(str(tiny_source), options)["models"][0]["tasks"]
    assert list(tasks) == ["science", "piqa_sample"]
    assert (tasks["science"]["metric"], tasks["science"]["samples"]) == ("acc", 8)
    options = EvalOptions(tasks=["science", "arc_easy_sample"], include_path=tmp_path / "tasks")
    with pytest.raises(InputError, match="task arc_easy_sample is in science and in arc_easy_sample: leave one out"):
        evaluate(str(tiny_source), options)


@pytest.mark.parametrize("name", OWN)
def test_a_sample_asks_what_lm_evals_own_task_would_ask(name: str) -> None:
    config = load_yaml(OWN_TASKS / OWN[name], resolve_func=True)
    for split in ("training_split", "test_split", "dataset_path", "dataset_name", "tag"):
        config.pop(split, None)
    own_questions = {"validation": Dataset.from_list(as_in_the_data_set(name))}
    own = ConfigurableTask(config=config | {"custom_dataset": lambda **_: own_questions})
    manager = TaskManager(include_path=str(SAMPLES), include_defaults=False)
    sample = manager.load([f"{name}_sample"])["tasks"][f"{name}_sample"]
    asked = []
    for task in (own, sample):
        task.build_all_requests(limit=None, rank=0, world_size=1)
        gold = [task.doc_to_target(doc) for doc in task.eval_docs]
        asked.append(
            (
                [instance.args for instance in task.instances],
                [int(answer) if str(answer).isdigit() else answer for answer in gold],
            )
        )
    assert len(asked[0][0]) >= 80
    assert asked[0] == asked[1]
    assert own.config.metric_list == sample.config.metric_list
    assert own.VERSION == sample.VERSION


BAD_INPUT = {
    "eval SOURCE": "nothing to measure: give --perplexity TEXT",
    "eval SOURCE --tasks remote --include-path remote": "the data of task remote cannot be read",
    "eval SOURCE --tasks arc_easy_sample --include-path nowhere": "--include-path nowhere is no folder",
    "eval SOURCE --tasks arc_easy_sample --include-path empty": "--include-path empty holds no task file",
    "eval SOURCE --tasks arc_easy_sample --include-path broken": "the task file broken/broken.yaml cannot be read",
    "eval SOURCE --tasks x --include-path nameless": "--include-path nameless has a task file without a name",
    "eval SOURCE --tasks wrong --include-path wrong": "task wrong cannot be loaded",
    "eval SOURCE --tasks arc_easy_sample, --include-path SAMPLES": "--tasks names a task that is empty",
    "eval SOURCE --tasks piqa,piqa": "--tasks names piqa twice",
    "eval SOURCE --tasks piqa --batch-size 0": "--batch-size 0 cannot be used: give auto or a number from 1",
    "eval SOURCE --tasks piqa --batch-size big": "--batch-size big cannot be used",
    "eval SOURCE --tasks piqa --limit 0": "--limit 0 is too small",
    "eval SOURCE --tasks piqa --num-fewshot -1": "--num-fewshot -1 is too small: give at least 0",
    "eval SOURCE --tasks piqa_sample --include-path SAMPLES --num-fewshot 40": "--num-fewshot 40 is too many",
    "eval notokenizer --tasks piqa_sample --include-path SAMPLES": "the tokenizer of notokenizer cannot be opened",
    "eval SOURCE nowhere --tasks piqa": "the model nowhere cannot be opened",
    "eval SOURCE SOURCE --tasks piqa": "is given twice",
    "eval COMPACT --perplexity TEXT --against other": "--against other has another tokenizer than",
    "eval unmarked --tasks piqa_sample --include-path SAMPLES": "unmarked has no token for a beginning or an end",
    "eval SOURCE --tasks empty --include-path noanswer": "task empty has an empty answer (to 'Why?'): correct the task",
    "eval SOURCE --tasks spoilt --include-path spoilt": "spoilt cannot be measured (ValueError: not enough values to",
    "eval SOURCE --perplexity TEXT --record": "goes with a checkpoint that flexigpt wrote as the first model",
}


def bad_places(folder: Path, tiny_source: Path) -> None:
    for name in ("empty", "broken", "nameless", "wrong", "remote", "noanswer", "spoilt"):
        (folder / name).mkdir()
    for place, name, kind, last in (
        ("noanswer", "empty", "loglikelihood", {"answer": ""}),
        ("spoilt", "spoilt", "multiple_choice", {"choices": []}),
    ):
        rows = [{"question": "Why?", "answer": " So.", "choices": ["So.", "Not."]}]
        rows.append(rows[0] | last)
        (folder / place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": name, "output_type": kind, "test_split": "test", "doc_to_text": "{{question}}"}
        task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / place / "rows.jsonl")}}}
        task |= {"doc_to_target": "{{answer}}" if kind == "loglikelihood" else 0, "doc_to_choice": "{{choices}}"}
        (folder / place / f"{name}.yaml").write_text(yaml.safe_dump(task))
    shutil.copytree(tiny_source, folder / "unmarked")
    settings = json.loads((folder / "unmarked" / "tokenizer_config.json").read_text())
    (folder / "unmarked" / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key not in ("bos_token", "eos_token")})
    )
    (folder / "broken" / "broken.yaml").write_text("task: [arc_easy_sample\n")
    (folder / "nameless" / "nameless.yaml").write_text("task:\noutput_type: multiple_choice\n")
    (folder / "wrong" / "wrong.yaml").write_text("task: wrong\noutput_type: guessing\n")
    remote = {"task": "remote", "dataset_path": "nobody/nothing", "output_type": "multiple_choice"}
    (folder / "remote" / "remote.yaml").write_text(yaml.safe_dump(remote | {"test_split": "test"}))
    shutil.copytree(tiny_source, folder / "notokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(tiny_source, folder / "other")
    tokenizer = json.loads((folder / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        f"{name}x" if number == 4000 else name: number for name, number in tokenizer["model"]["vocab"].items()
    }
    tokenizer["model"]["merges"] = []
    (folder / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    run: Run,
    command: str,
    tiny_source: Path,
    tiny_compact: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    bad_places(tmp_path, tiny_source)
    before = sorted(tmp_path.rglob("*"))
    places = {"SOURCE": tiny_source, "COMPACT": tiny_compact, "TEXT": text, "SAMPLES": SAMPLES}
    code, printed, errors = run(*(places.get(word, word) for word in command.split()))
    assert (code, printed) == (2, "")
    (line,) = [
        line
        for line in errors.splitlines()
        if line.strip() and not line.startswith(("the tasks run code", "answering: "))
    ]
    assert line.startswith("flexigpt: ")
    assert BAD_INPUT[command] in line
    left = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
    assert left == before


def test_a_task_of_lm_eval_is_found_and_its_data_asked_for(tiny_source: Path) -> None:
    """Offline its data cannot be had: the message says how to go on."""
    with pytest.raises(InputError, match=r"the data of task arc_easy cannot be read.*--include-path"):
        evaluate(str(tiny_source), EvalOptions(tasks=["arc_easy"]))


def test_an_unknown_task_is_told_with_the_nearest_names(tiny_source: Path) -> None:
    options = EvalOptions(tasks=["hellaswg_sample"], include_path=SAMPLES)
    with pytest.raises(InputError, match=r"task hellaswg_sample is unknown: did you mean hellaswag_sample or "):
        evaluate(str(tiny_source), options)


def test_other_commands_do_not_wait_for_lm_eval() -> None:
    code = "import sys, flexigpt.cli; print([m for m in sys.modules if m.split('.')[0] == 'lm_eval'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
