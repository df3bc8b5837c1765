"""`flexigpt inspect` counts what is stored, or says why it cannot."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from compacts import narrow
from conftest import Run
from families import tiny_model


def test_bytes_are_those_of_the_files(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    """Where config.json says float32, and the weights are in half precision."""
    shutil.copytree(tiny_source, tmp_path / "half")
    weights = {name: values.half() for name, values in load_file(tiny_source / "model.safetensors").items()}
    save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    code, printed, _ = run("inspect", tmp_path / "half", "--json")
    assert code == 0
    stored = sum(values.nbytes for values in weights.values())
    found = json.loads(printed)
    assert found["bytes"]["stored"] == stored == sum(part["bytes"] for part in found["parts"].values())


def test_weights_that_are_damaged_or_missing_are_one_line(run: Run, tiny_compact: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(tiny_compact, tmp_path / "model")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, printed, errors = run("inspect", tmp_path / "model")
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert "model are damaged" in errors
    assert errors.endswith("copy or download them again\n")
    weights.unlink()
    code, printed, errors = run("inspect", tmp_path / "model")
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert "holds no weights" in errors


def test_of_an_export_what_is_stored_or_that_others_read_it(run: Run, tmp_path: Path) -> None:
    narrow(tiny_model("llama")).save_pretrained(tmp_path / "compact")
    for form in ("stock", "mlx"):
        assert run("export", tmp_path / "compact", tmp_path / form, "--to", form)[0] == 0
    code, printed, _ = run("inspect", tmp_path / "stock", "--json")
    assert code == 0
    stored = load_file(tmp_path / "stock" / "model.safetensors")
    assert json.loads(printed)["parameters"]["stored"] == sum(values.numel() for values in stored.values())
    code, printed, errors = run("inspect", tmp_path / "mlx")
    assert (code, printed) == (2, "")
    assert errors.endswith("mlx is an export to mlx, whose parts cannot be told: give the model it was made of\n")
