"""Compact models under transformers' own tensor parallelism, in each of two processes.

Arguments: checkpoint folders. Into each the first process writes `split.json`: how far logits, gradients and generated
tokens are from those of one process.
"""

import faulthandler
import json
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from families import token_ids
from flexigpt import FlexiGPTForCausalLM  # noqa: F401 - registers it


def measured(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits, gradients by name, generated tokens."""
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits
    greedy = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return found | {"tokens": model.generate(ids, **greedy).float()}


def compare(folder: str) -> None:
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    lie = {name: list(p.to_local().shape) for name, p in split.named_parameters() if hasattr(p, "to_local")}
    one, two = measured(AutoModelForCausalLM.from_pretrained(folder)), measured(split)
    far = {name: ((two[name] - value).abs().max() / value.abs().max()).item() for name, value in one.items()}
    far["every process"] = max(far.values())
    worst = torch.tensor(far["every process"])
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    if distributed.get_rank() == 0:
        result = {"far": far | {"every process": worst.item()}, "lie": lie}
        Path(folder, "split.json").write_text(json.dumps(result))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)  # who waits for whom
    for checkpoint in sys.argv[1:]:
        compare(checkpoint)
    distributed.destroy_process_group()
