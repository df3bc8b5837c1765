"""Other methods that take blocks out of a LLaMA and mend the cut, as their papers say; for benchmarks/real.py.

Each takes a model in memory, float32, which it changes, and calibration windows; blocks are chosen as the paper does.
None trains the whole model.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Windows = torch.Tensor


def streams(model: Any, windows: Windows) -> list[torch.Tensor]:
    """The hidden states that enter each block, and those that leave the last: (tokens, hidden size) each."""
    found: list[list[torch.Tensor]] = [[] for _ in range(len(model.model.layers) + 1)]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1)))
        for layer, rows in zip(model.model.layers, found, strict=False)
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: found[-1].append(args[0].flatten(0, 1))))
    with torch.no_grad():
        for ids in windows.split(8):
            model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in found]


def run_of(hidden: list[torch.Tensor], count: int) -> int:
    """The first of so many neighbouring blocks that turn their input least (angular distance, Gromov et al. 2024)."""
    turned = [
        1 - F.cosine_similarity(hidden[start], hidden[start + count], dim=-1).mean().item()
        for start in range(1, len(hidden) - count)
    ]
    return 1 + min(range(len(turned)), key=turned.__getitem__)


def without(model: Any, blocks: list[int]) -> None:
    """Takes blocks out, in place."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(layer for number, layer in enumerate(layers) if number not in blocks)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(model.model.layers)


def least_squares(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The M of least |targets - inputs M^T|, a thousandth of the mean variance added."""
    inputs, targets = inputs.double(), targets.double()
    moments = inputs.T @ inputs
    moments.diagonal().add_(1e-3 * moments.diagonal().mean())
    return torch.linalg.solve(moments, inputs.T @ targets).T.float()


class Patched(nn.Module):
    """A block, or the norm behind the last, whose input goes through I + M first."""

    def __init__(self, layer: nn.Module, matrix: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.patch = layer, nn.Linear(*matrix.shape, bias=False)
        self.patch.weight = nn.Parameter(matrix)
        self.attention_type = getattr(layer, "attention_type", "full_attention")
        self.self_attn = getattr(layer, "self_attn", None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden_states + self.patch(hidden_states), *args, **kwargs)


def patch_before(model: Any, block: int, matrix: torch.Tensor) -> None:
    """I + M before a block, or before the norm behind the last."""
    if block < len(model.model.layers):
        model.model.layers[block] = Patched(model.model.layers[block], matrix)
    else:
        model.model.norm = Patched(model.model.norm, matrix)


@torch.no_grad()
def ghosted_layers(model: Any, windows: Windows, count: int) -> None:
    """Ghosted Layers (2026, arXiv 2605.15491): removed by influence; at each cut I + M in closed form."""
    hidden = streams(model, windows)
    influence = [1 - F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(hidden)]
    removed = sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])
    patches: dict[int, torch.Tensor] = {}
    for block in removed:
        if block - 1 not in removed:
            last = block
            while last + 1 in removed:
                last += 1
            patches[last + 1] = least_squares(hidden[block], hidden[last + 1] - hidden[block])
    for block, matrix in patches.items():
        patch_before(model, block, matrix)
    without(model, removed)


@torch.no_grad()
def linear_patch(model: Any, windows: Windows, count: int) -> None:
    """LinearPatch (2025, arXiv 2505.24680), untrained: at the cut, channels scaled to their size behind it, after a
    Hadamard transform (of 2^k channels at a time, the largest power that divides the width) that spreads outliers.
    """
    hidden = streams(model, windows)
    start, width = run_of(hidden, count), hidden[0].shape[-1]
    hadamard = torch.ones(1, 1)
    while width % (2 * len(hadamard)) == 0:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / 2**0.5
    turn = torch.block_diag(*[hadamard] * (width // len(hadamard)))
    before, behind = ((hidden[i] @ turn).abs().mean(0) for i in (start, start + count))
    patch = turn @ torch.diag(behind / before) @ turn.T - torch.eye(width)
    patch_before(model, start + count, patch.contiguous())
    without(model, list(range(start, start + count)))


def replace_me(model: Any, windows: Windows, count: int, steps: int = 0) -> None:
    """ReplaceMe (2025, arXiv 2505.02819): a run of blocks becomes a map of the MLP's output before it, by least squares
    or, with steps of Adam from there, by the cosine between what leaves the run and what should.
    """
    hidden = streams(model, windows)
    start = run_of(hidden, count)
    written: list[torch.Tensor] = []
    mlp = model.model.layers[start - 1].mlp
    hook = mlp.register_forward_hook(lambda _, __, output: written.append(output.flatten(0, 1)))
    with torch.no_grad():
        for ids in windows.split(8):
            model.model(input_ids=ids, use_cache=False)
    hook.remove()
    out, wished = torch.cat(written), hidden[start + count]
    rest = hidden[start] - out
    matrix = least_squares(out, wished - rest).requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=1e-4)
    for step in range(steps):
        rows = slice(step * 1024 % len(out), step * 1024 % len(out) + 1024)
        with torch.enable_grad():
            (1 - F.cosine_similarity(rest[rows] + out[rows] @ matrix.T, wished[rows], dim=-1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        mlp.down_proj.weight.copy_(matrix @ mlp.down_proj.weight)
    without(model, list(range(start, start + count)))


def streamline(model: Any, windows: Windows, count: int, passes: int = 9, lr: float = 1e-3) -> None:
    """LLM-Streamline (2024, arXiv 2403.19135): a run of blocks becomes one trained block of the same kind."""
    hidden = streams(model, windows)
    start = run_of(hidden, count + 1)
    layer = model.model.layers[start]
    length = windows.shape[1]
    given, wished = (hidden[i].view(-1, length, hidden[i].shape[-1]) for i in (start, start + count + 1))
    position = model.model.rotary_emb(given[:1], torch.arange(length)[None])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr)
    batches = len(given) // 8
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes * batches)
    with torch.enable_grad():
        for step in range(passes * batches):
            rows = slice(step % batches * 8, step % batches * 8 + 8)
            F.mse_loss(layer(given[rows], position_embeddings=position), wished[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    without(model, list(range(start + 1, start + count + 1)))


PEERS: dict[str, Callable[[Any, Windows, int], None]] = {
    "Ghosted Layers": ghosted_layers,
    "LinearPatch, untrained": linear_patch,
    "ReplaceMe, least squares": replace_me,
    "ReplaceMe, cosine": partial(replace_me, steps=320),
    "LLM-Streamline": streamline,
}
