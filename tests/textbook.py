"""Training as a textbook writes it, to compare recovery with: one batch, one backward pass, plain AdamW."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def text_ids(text: Path, model: Path) -> list[int]:
    """The token ids of a text of one document, between its separators."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def batches_of(ids: list[int], windows: int, length: int, steps: int) -> list[torch.Tensor]:
    """The first batches: each of so many windows of `length` tokens and the token after."""
    starts = [[(step * windows + row) * length for row in range(windows)] for step in range(steps)]
    return [torch.tensor([ids[start : start + length + 1] for start in rows]) for rows in starts]


def batch_loss(
    model: PreTrainedModel, batch: torch.Tensor, teacher: PreTrainedModel | None = None, weight: float = 0.0
) -> torch.Tensor:
    """The mean over all tokens of a batch, of two stock models side by side."""
    logits = model(input_ids=batch[:, :-1]).logits.flatten(0, 1)
    loss = (1 - weight) * F.cross_entropy(logits, batch[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = teacher(input_ids=batch[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
    return loss + weight * F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def train(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    *,
    steps: int,
    lr: float,
    warmup: int,
    clip: float = 1.0,
    replica_lr: float | None = None,
) -> list[dict[str, float]]:
    """Trains what requires gradients; what each step measured. Adapters and output norms may get another rate."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = [name for name in named if "adapter_" in name or "output_norm" in name]
    trained = list(named.values())
    groups = [
        {"params": [named[name] for name in named if name not in own], "lr": lr},
        {"params": [named[name] for name in own], "lr": lr if replica_lr is None else replica_lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history = []
    for batch in batches:
        loss = batch_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        history.append({"loss": loss.item(), "lr": schedule.get_last_lr()[0], "gradient_norm": norm.item()})
        optimizer.step()
        schedule.step()
    return history


def opened(folder: Path) -> PreTrainedModel:
    """The model in a folder, in eval mode, nothing of it trained."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The stored tensors by name."""
    return load_file(folder / "model.safetensors")


def naive_truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def naive_unmended(first: torch.Tensor, second: torch.Tensor, rank: int) -> torch.Tensor:
    """Equations 2 to 4, word for word: three full SVDs."""
    difference = naive_truncated(first, rank) - naive_truncated(second, rank)
    return (difference - naive_truncated(difference, rank)).norm()
