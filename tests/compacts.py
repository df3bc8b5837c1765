"""Tiny compact models of any family: with narrow and missing sublayers, or with replicas."""

import torch
from transformers import PreTrainedModel

from families import NUM_BLOCKS, compact_of, initialize_replicas
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from flexigpt.model import SublayerReplica, sublayer_paths
from flexigpt.replicas import readers_of_units
from flexigpt.weights import StreamedModel

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
        readers = readers_of_units(StreamedModel(source), block, paths, torch.tensor(kept))
        StreamedModel(model).own(block, readers)
    return model.eval()


def shared(source: PreTrainedModel, output_norm: bool = False) -> FlexiGPTForCausalLM:
    """Blocks 2 and 4 borrow the linears of 1 and 3."""
    rows = (Replica(block=2, base=1, rank=4), Replica(block=4, base=3, rank=4))
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=rows)
    model = compact_of(source, plan, output_norm=output_norm)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.1, seed=0)
    return model.eval()
