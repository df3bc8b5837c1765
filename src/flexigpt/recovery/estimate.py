"""What training will hold in memory, said before it starts. A GPU's share is tried out instead."""

import psutil
import torch

from flexigpt.evaluation import LOGITS_BUDGET
from flexigpt.model import layout_of, linear_size, parameter_bytes
from flexigpt.recovery.training import Training
from flexigpt.runtime import size_in_words, slow_half

# What libraries take that are loaded later, and what they keep of memory that was given back.
_LATER = 256 * 2**20

# Of a parameter that is trained, in bytes: its gradient, AdamW's two averages, and a copy of these for a checkpoint.
_TRAINED = 4 + 8 + 12

# Copies of the logits of a chunk of tokens, or of perplexity's batch, that exist at a time in float32.
_LOGITS, _MEASURED = 8, 4

# Hidden states that a block keeps for its backward pass beside its linears' inputs and outputs: of norms and sums.
_HIDDEN = 4


def memory_of(training: Training, stored: int) -> int:
    """Bytes that a process holds at most, of a model on the CPU that is ready for training and `stored` as so many."""
    model, settings = training.model, training.settings
    layout, config, itemsize = layout_of(model), model.config.get_text_config(), settings.dtype.itemsize
    per_token = []
    for index, block in enumerate(layout.blocks):
        base = layout.blocks[layout.bases.get(index, index)]
        sizes = [linear_size(base.get_submodule(path)) for path in layout.linears_of(layout.bases.get(index, index))]
        kept = sum(inputs + 2 * outputs for outputs, inputs in sizes) + _HIDDEN * config.hidden_size
        eager = config._attn_implementation != "sdpa" or _drops(block)  # then attention weights are kept
        per_token.append(kept + eager * 4 * config.num_attention_heads * settings.window_length)
    runs = 2 if training.draft is not None else 1
    whole = runs * sum(per_token)
    if settings.activation_checkpointing:
        whole = runs * len(per_token) * config.hidden_size + max(per_token, default=0)
    # Norms, and sums over blocks, compute in float32; so does all where nothing else is asked for.
    step = settings.micro_batch * settings.window_length * whole * (itemsize + 4) // 2
    step += _LOGITS * 4 * training.head.chunk(training.device) * training.head.vocabulary
    measuring = _MEASURED * 4 * max(LOGITS_BUDGET, settings.window_length * training.head.vocabulary)
    teacher = 0 if training.teacher is None else sum(map(parameter_bytes, training.teacher.model.parameters()))
    unread = stored + teacher  # mapped files that no one has read yet
    held = psutil.Process().memory_info().rss + _LATER + unread
    return held + _TRAINED * training.trained_parameters + max(step, measuring)


def _drops(block: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in block.modules())


def lines_of(training: Training, trained: str, stored: int) -> list[str]:
    """What to say of a training before it starts: what is trained, what that takes, and what makes it slow."""
    takes = ""
    if training.device.type == "cpu" and not training.settings.fsdp:
        takes = f", takes at most about {size_in_words(memory_of(training, stored))} of memory"
        takes += " a process" if training.world.size > 1 else ""
    lines = [f"trains {trained}: {training.trained_parameters:,} parameters{takes}"]
    dtype = training.settings.dtype
    if slow_half(training.device, dtype):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        lines.append(
            f"warning: this CPU cannot multiply {name}, so --precision {name} is several times slower than fp32"
        )
    return lines
