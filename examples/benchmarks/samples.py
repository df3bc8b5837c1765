"""The questions that lie beside the task files, from wherever the command runs."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.hellaswag.utils import preprocess


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The questions of a .jsonl file of this folder, as the split `validation`; lm_eval hands on more than the file."""
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"validation": Dataset.from_list([json.loads(line) for line in lines])}


def hellaswag_choices(questions: Dataset) -> Dataset:
    """The endings as lm_eval cleans them; the contexts of this copy are clean."""
    return questions.map(lambda question: {"choices": [preprocess(ending) for ending in question["endings"]]})
