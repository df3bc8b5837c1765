"""Compact models of three blocks in bfloat16, for what takes long for each block."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import compact_of, initialize_replicas, tiny_config
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from flexigpt.model import SublayerReplica

BLOCKS = 3


def source(family: str) -> PreTrainedModel:
    """A model of three blocks in bfloat16, whose every weight changes the logits."""
    config = tiny_config(family)
    config.num_hidden_layers = BLOCKS
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, parameter.shape[-1] ** -0.5)
    return model


def shared() -> FlexiGPTForCausalLM:
    """The last block borrows the first one's linears, with output norms; biases; the head is the table of tokens."""
    whole = source("llama-biases-tied")
    plan = Plan(num_blocks=BLOCKS, replicas=(Replica(block=2, base=0, rank=4),))
    model = compact_of(whole, plan)
    initialize_replicas(model, whole, plan, adapter_init="svd", norm_init=0.5, seed=0)
    return model


def narrow() -> FlexiGPTForCausalLM:
    """One MLP has fewer units, one is gone, and so is an attention, which leaves the cache a block less."""
    rows = (
        SublayerReplica(block=0, sublayer="mlp", form="units", units=21),
        SublayerReplica(block=1, sublayer="attention", form="none"),
        SublayerReplica(block=2, sublayer="mlp", form="none"),
    )
    model = compact_of(source("mistral"), Plan(num_blocks=BLOCKS, sublayers=rows))
    for path in ("gate_proj", "up_proj", "down_proj"):
        linear = model.block_list[0].mlp.get_submodule(path)
        shape = linear.weight.shape
        linear.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16) * shape[-1] ** -0.5)
    return model
