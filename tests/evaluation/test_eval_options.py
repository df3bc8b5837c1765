"""What an evaluation can be asked, checked before anything is loaded."""

import subprocess
import sys
from typing import Any

import pytest

from flexigpt import EvalOptions, InputError


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "nothing to measure: give --perplexity TEXT"),
        ({"tasks": []}, "names a task that is empty"),
        ({"tasks": ["piqa", ""]}, "names a task that is empty"),
        ({"tasks": ["piqa", "piqa"]}, "names piqa twice"),
        ({"perplexity": "t", "dtype": "float99"}, "--dtype float99 is unknown: give auto, float32, bfloat16, float16"),
        ({"tasks": ["piqa"], "limit": 0}, "--limit 0 is too small: give at least 1"),
        ({"tasks": ["piqa"], "num_fewshot": -1}, "--num-fewshot -1 is too small: give at least 0"),
        ({"tasks": ["piqa"], "batch_size": 0}, "--batch-size 0 cannot be used: give auto or a number from 1"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        EvalOptions(**given)


def test_options_wait_for_neither_torch_nor_transformers() -> None:
    code = "import sys; from flexigpt.evaluation import EvalOptions; EvalOptions(perplexity='t')\n"
    code += "print({'torch', 'transformers', 'lm_eval'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
