"""The source's own architecture, opened in plain transformers, against the compact model."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compacts import narrow, shared
from conftest import Run
from families import FAMILIES, ODD_SETTINGS, tiny_model, token_ids
from flexigpt import ExportOptions, FlexiGPTForCausalLM, export
from flexigpt.model import find_architecture


def exported(model: FlexiGPTForCausalLM, folder: Path) -> PreTrainedModel:
    """What plain transformers opens of an export."""
    model.save_pretrained(folder / "compact")
    export(str(folder / "compact"), folder / "stock", ExportOptions(to="stock"))
    return AutoModelForCausalLM.from_pretrained(folder / "stock", trust_remote_code=False)


@pytest.mark.parametrize("family", FAMILIES | ODD_SETTINGS)
@torch.no_grad()
def test_narrow_and_missing_sublayers_compute_the_same_as_zeros(family: str, tmp_path: Path) -> None:
    compact = narrow(tiny_model(family))
    stock = exported(compact, tmp_path)
    assert type(stock) is type(compact.language_model)
    assert getattr(stock.config, find_architecture(stock.config).width) == 30
    ids = token_ids(tokens=48)
    torch.testing.assert_close(stock(input_ids=ids).logits, compact(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_replicas_compute_the_same_folded(family: str, tmp_path: Path) -> None:
    compact = shared(tiny_model(family))
    stock = exported(compact, tmp_path)
    ids = token_ids()
    torch.testing.assert_close(stock(input_ids=ids).logits, compact(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_output_norms_are_refused_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    shared(tiny_model("llama"), output_norm=True).save_pretrained(tmp_path / "compact")
    code, printed, errors = run("export", tmp_path / "compact", tmp_path / "out", "--to", "stock")
    assert (code, printed) == (2, "")
    assert "output norms, for which llama has no place" in errors
    assert "--output-norm none" in errors
    assert not (tmp_path / "out").exists()


def test_others_may_read_it_and_its_licence_goes_along(run: Run, tmp_path: Path) -> None:
    narrow(tiny_model("llama")).save_pretrained(tmp_path / "compact")
    (tmp_path / "compact" / "LICENSE").write_text("do what you like")
    assert run("export", tmp_path / "compact", tmp_path / "out", "--to", "stock")[0] == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "do what you like"
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out" / "record.json").stat().st_mode}


def test_an_ordinary_model_is_refused(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    code, _, errors = run("export", tiny_source, tmp_path / "out", "--to", "stock")
    assert code == 2
    assert "is no compact model but an ordinary llama" in errors


def test_bits_that_a_form_cannot_have_are_refused(run: Run, tiny_compact: Path, tmp_path: Path) -> None:
    for asked, said in (
        (("stock", "4"), "leave it out"),
        (("executorch", "8"), "leave it out"),
        (("gguf", "5"), "give 8 or 4"),
    ):
        code, _, errors = run("export", tiny_compact, tmp_path / "out", "--to", asked[0], "--bits", asked[1])
        assert code == 2
        assert said in errors


def test_the_sizes_are_said_and_the_tokenizer_and_older_rotary_settings_are_there(
    run: Run, tiny_source: Path, tmp_path: Path
) -> None:
    source = AutoModelForCausalLM.from_pretrained(tiny_source)
    compact = narrow(source)
    compact.save_pretrained(tmp_path / "compact")
    AutoTokenizer.from_pretrained(tiny_source).save_pretrained(tmp_path / "compact")
    code, printed, _ = run("export", tmp_path / "compact", tmp_path / "out", "--to", "stock")
    assert code == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    sizes = [sum(p.numel() * 4 for p in model.parameters()) for model in (source, compact, stock)]
    for size, name in zip(sizes, ("unpruned", "compact", "written as stock"), strict=True):
        assert re.search(rf"{name} +. +{size / 1e6:,.2f} ", printed)
    assert sizes[1] < sizes[2] < sizes[0]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 4096
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"]
    code, _, _ = run("export", tmp_path / "compact", tmp_path / "out", "--to", "stock", "--overwrite")
    assert code == 0
