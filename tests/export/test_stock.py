"""The source's own architecture, opened in plain transformers, against the compact model."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import Run
from families import (
    FAMILIES,
    NUM_BLOCKS,
    ODD_SETTINGS,
    block_list,
    compact_of,
    initialize_replicas,
    tiny_model,
    token_ids,
)
from flexigpt import ExportOptions, FlexiGPTForCausalLM, Plan, Replica, export
from flexigpt.model import SublayerReplica, find_architecture, sublayer_paths
from flexigpt.replicas import tensors_of_units
from flexigpt.weights import StreamedModel, exchange_parameters

# Of the MLPs; none is as wide as the source's.
KEPT = {0: [0, 3, 4, 7, 20], 1: list(range(30)), 3: list(range(5, 25)), 4: [9], 5: list(range(11))}
GONE = (("mlp", 2), ("attention", 2), ("attention", 4))


def narrow(source: PreTrainedModel) -> FlexiGPTForCausalLM:
    """Every MLP narrower or gone, each to another width, and two attentions gone."""
    rows = [SublayerReplica(block=b, sublayer="mlp", form="units", units=len(kept)) for b, kept in KEPT.items()]
    rows += [SublayerReplica(block=block, sublayer=sublayer, form="none") for sublayer, block in GONE]
    model = compact_of(source, Plan(num_blocks=NUM_BLOCKS, sublayers=tuple(rows)))
    for block, kept in KEPT.items():
        paths = sublayer_paths(source)["mlp"]
        tensors = tensors_of_units(StreamedModel(source), block, paths, torch.tensor(kept))
        exchange_parameters(block_list(model)[block], tensors)
    return model.eval()


def shared(source: PreTrainedModel, output_norm: bool = False) -> FlexiGPTForCausalLM:
    """Blocks 2 and 4 borrow the linears of 1 and 3."""
    rows = (Replica(block=2, base=1, rank=4), Replica(block=4, base=3, rank=4))
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=rows)
    model = compact_of(source, plan, output_norm=output_norm)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.1, seed=0)
    return model.eval()


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


def test_an_ordinary_model_is_refused(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    code, _, errors = run("export", tiny_source, tmp_path / "out", "--to", "stock")
    assert code == 2
    assert "is no compact model but an ordinary llama" in errors


def test_bits_that_a_form_cannot_have_are_refused(run: Run, tiny_compact: Path, tmp_path: Path) -> None:
    for asked, said in ((("stock", "4"), "leave it out"), (("gguf", "5"), "give 8 or 4")):
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
