"""What other programs would compute differently is refused before anything is written."""

from pathlib import Path

import pytest

from compacts import narrow
from conftest import Run
from families import tiny_model


@pytest.mark.parametrize("form", ["mlx", "gguf"])
def test_what_another_program_would_compute_differently_is_refused(run: Run, tmp_path: Path, form: str) -> None:
    for family, said in (
        ("gpt2", "this is a gpt2: export it --to stock"),
        ("qwen2", "has no windows of attention"),
        ("llama-dynamic", "has no rotary positions of type dynamic"),
        ("qwen3-biases", "has no biases in the attention of qwen3"),
        ("llama", "computes silu in the MLPs, this model gelu"),
    ):
        model = tiny_model(family)
        if family == "llama":
            model.config.hidden_act = "gelu"
        narrow(model).save_pretrained(tmp_path / family)
        code, printed, errors = run("export", tmp_path / family, tmp_path / "out", "--to", form)
        assert (code, printed) == (2, "")
        assert said in errors
        assert not (tmp_path / "out").exists()
