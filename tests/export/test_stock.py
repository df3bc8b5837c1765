"""The source's own architecture, opened in plain transformers, against the compact model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import FAMILIES, NUM_BLOCKS, ODD_SETTINGS, block_list, compact_of, initialize_replicas, tiny_model
from families import token_ids
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
    rows += [SublayerReplica(block=block, sublayer=sublayer, form="none") for sublayer, block in GONE]  # type: ignore
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
