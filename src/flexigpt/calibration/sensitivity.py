"""What errors of a block's linears cost: second moments of the loss's gradient, one block in memory at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from flexigpt.calibration.hidden_states import HiddenStates, SavedStates, Stream, calibration_batches, finished_blocks
from flexigpt.calibration.moments import RunningMoment
from flexigpt.calibration.probe import Probe
from flexigpt.calibration.states import SourceStates
from flexigpt.model import Widened, fast_half, find_architecture
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.text import batch_size_for
from flexigpt.weights import StreamedModel

# Numbers in the logits that are held at a time.
_LOGITS = 2**24


class Sensitivity(NamedTuple):
    """Of one linear, over the tokens of a text, float32.

    Attributes:
        inputs: E[x x^T] of what it is given, (inputs, inputs).
        errors: E[g g^T] of the gradient g of the loss in nats by what it returns, (outputs, outputs).
    """

    inputs: torch.Tensor
    errors: torch.Tensor


def sensitivities(
    source: StreamedModel,
    windows: torch.Tensor,
    linears: Sequence[str],
    *,
    spill: Path | None = None,
    states: SourceStates | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """The sensitivities of these linears of each block, from the last block to the first.

    The text goes through the blocks once forward, where the hidden states that enter each block are kept, and once
    back, where each block runs again for its gradients.

    Args:
        source: a source model.
        windows: (windows, tokens) ids.
        linears: paths within a block.
        spill: folder for files that hold the hidden states; None: memory does, as many copies as there are blocks.
        states: keeps what the text is on its way through the source; None: nothing is kept.
        stage: where the run leaves what it needs to go on after it was killed; blocks that were done are left out.
        track: reports each block, forward and back.
    """
    batches, depth = calibration_batches(windows, source.blocks), len(source)
    stream = Stream(source.model, batches, spill)
    entering: list[HiddenStates] = []
    probe, attention = Probe(source.model, windows), find_architecture(source.model.config).roles.output
    for index in track(range(depth), "running the source", depth):
        source.expect(index + 1)
        entering.append(stream.hidden)
        with source.block(index) as block:
            passed = stream.outputs(block, index)
            stream = stream.at(passed if states is None else states.outputs(stream, block, index, attention))
    if states is not None:
        states.entering = [*entering, stream.hidden]
        stream = stream.at(stream.hidden)
    saved = SavedStates(stage, stream.hidden)
    found = saved.found()
    done = 0 if found is None else found[0]

    def back() -> Iterator[tuple[int, dict[str, Sensitivity]] | None]:
        if found is None:
            for number, gradient in enumerate(_loss_gradients(source, batches, stream.hidden)):
                stream.hidden[number] = gradient
        for index in reversed(range(depth)):
            if depth - index <= done:
                yield None
                continue
            with source.block(index) as block:
                sums = {path: (RunningMoment(), RunningMoment()) for path in linears}
                before = stream.over(entering[index])
                last = _added(block, index, before, probe)
                for seen in before.backward(block, index, stream.hidden, linears, last):
                    for path, (given, gradient) in seen.items():
                        for running, values in zip(sums[path], (given, gradient), strict=True):
                            running.add(values.flatten(0, -2).float())
            tokens = windows.numel()
            # Nothing here refers to them any more: who takes one can let go of it.
            yield index, {p: Sensitivity(*(running.total(tokens) for running in sums.pop(p))) for p in linears}
            entering.pop()
            saved.save(depth - index, {})

    for step in track(back(), "measuring sensitivities", depth):
        if step is not None:
            yield step


def _added(block: nn.Module, index: int, before: Stream, probe: Probe) -> nn.Linear | None:
    """The MLP's last linear, where all that a block does with what it writes is to add it."""
    architecture = find_architecture(before.config)
    last = block.get_submodule(architecture.roles.down)
    if architecture.output_norms[1] != architecture.roles.down or type(last) is not nn.Linear:
        return None
    factor = probe.residual_factor(block, index, before.hidden[0], architecture.output_norms)
    return None if factor is None else last


def _loss_gradients(
    source: StreamedModel, batches: Sequence[torch.Tensor], leaving: HiddenStates
) -> Iterator[torch.Tensor]:
    """The gradient of the summed loss by the hidden states that leave the last block, one tensor a batch.

    A few windows at a time, since logits are large. Each token's share of the gradient is its own: second moments over
    tokens are those of an empirical Fisher matrix.
    """
    widened = Widened()
    source.model.requires_grad_(False)  # its weights get no gradient, and need nothing kept for one
    vocabulary = source.model.config.get_text_config().vocab_size
    for batch, hidden in zip(batches, leaving, strict=True):
        few = batch_size_for(batch.shape[1], vocabulary, _LOGITS)
        parts: list[torch.Tensor] = []
        for ids, states in zip(batch.split(few), hidden.split(few), strict=True):
            states = states.detach().requires_grad_()
            ids = ids.to(states.device)
            with torch.enable_grad(), fast_half(source.model, widened), finished_blocks(source, [states]):
                logits = source.model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                parts.append(*torch.autograd.grad(loss, states))
        yield torch.cat(parts)
