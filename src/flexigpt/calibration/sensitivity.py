"""What errors of a block's linears cost, and what they are given: second moments, one block in memory at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from flexigpt.calibration.hidden_states import HiddenStates, SavedStates, Stream, calibration_batches, finished_blocks
from flexigpt.calibration.moments import RunningSum, second_moment
from flexigpt.model import watched
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.text import batch_size_for
from flexigpt.weights import StreamedModel

# Numbers in the logits that are held at a time.
_LOGITS = 2**24


def gradient_moments(
    source: StreamedModel,
    windows: torch.Tensor,
    linears: Sequence[str],
    *,
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """By path of each of these linears, E[g g^T] of the gradient g of the loss by what it returns; from the last block
    to the first.

    The text goes through the blocks once forward, where the hidden states that enter each block are kept, and once
    back, where each block runs again for its gradients.

    Args:
        source: a source model.
        windows: (windows, tokens) ids.
        linears: paths within a block.
        spill: folder for files that hold the hidden states; None: memory does, as many copies as there are blocks.
        stage: where the run leaves what it needs to go on after it was killed; blocks that were done are left out.
        track: reports each block, forward and back.

    Yields:
        A block's number, and (outputs, outputs) float64 by path: in nats squared, over the tokens of the text.
    """
    batches, depth = calibration_batches(windows), len(source)
    stream = Stream(source.model, batches, spill)
    entering: list[HiddenStates] = []

    def steps() -> Iterator[tuple[int, dict[str, torch.Tensor]] | None]:
        nonlocal stream
        for index in range(depth):
            source.expect(index + 1)
            entering.append(stream.hidden)
            with source.block(index) as block:
                stream = stream.at(stream.outputs(block, index))
            yield None
        saved = SavedStates(stage, stream.hidden, "backward")
        found = saved.found()
        done = 0 if found is None else found[0]
        if found is None:
            for number, gradient in enumerate(_loss_gradients(source, batches, stream.hidden)):
                stream.hidden[number] = gradient
        for index in reversed(range(depth)):
            if depth - index <= done:
                yield None
                continue
            with source.block(index) as block:
                sums = {path: RunningSum() for path in linears}
                before = stream.at(())
                before.hidden = entering[index]
                for gradients in before.backward(block, index, stream.hidden, linears):
                    for path, gradient in gradients.items():
                        sums[path].add(second_moment(gradient.flatten(0, -2).float()))
            yield index, {path: running.mean(windows.numel()) for path, running in sums.items()}
            entering.pop()
            saved.save(depth - index, {})

    for step in track(steps(), "measuring gradients", 2 * depth):
        if step is not None:
            yield step


@torch.no_grad()
def input_moments(
    source: StreamedModel,
    windows: torch.Tensor,
    linears: Sequence[str],
    *,
    spill: Path | None = None,
    stage: CachedStage | None = None,
    track: Track = silent,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """By path of each of these linears, E[x x^T] of what it is given; from the first block to the last.

    Arguments as of `gradient_moments`.

    Yields:
        A block's number, and (inputs, inputs) float64 by path, over the tokens of the text.
    """
    stream = Stream(source.model, calibration_batches(windows), spill)
    saved = SavedStates(stage, stream.hidden)
    done = (saved.found() or (0, {}))[0]
    for index in track(range(len(source)), "measuring units", len(source)):
        if index < done:
            continue
        source.expect(index + 1)
        with source.block(index) as block, watched(block, linears) as seen:
            sums = {path: RunningSum() for path in linears}
            for number, outputs in enumerate(stream.outputs(block, index)):
                for path, running in sums.items():
                    running.add(second_moment(seen[path][0].flatten(0, -2).float()))
                stream.hidden[number] = outputs
        # Nothing here refers to them any more: who takes one can let go of it.
        yield index, {path: sums.pop(path).mean(windows.numel()) for path in linears}
        saved.save(index + 1, {})


def _loss_gradients(
    source: StreamedModel, batches: Sequence[torch.Tensor], leaving: HiddenStates
) -> Iterator[torch.Tensor]:
    """The gradient of the summed loss by the hidden states that leave the last block, one tensor a batch.

    A few windows at a time, since logits are large. Each token's share of the gradient is its own: second moments over
    tokens are those of an empirical Fisher matrix.
    """
    vocabulary = source.model.config.get_text_config().vocab_size
    for batch, hidden in zip(batches, leaving, strict=True):
        few = batch_size_for(batch.shape[1], vocabulary, _LOGITS)
        parts: list[torch.Tensor] = []
        for ids, states in zip(batch.split(few), hidden.split(few), strict=True):
            states = states.detach().requires_grad_()
            ids = ids.to(states.device)
            with torch.enable_grad(), finished_blocks(source, [states]):
                logits = source.model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                parts.append(*torch.autograd.grad(loss, states))
        yield torch.cat(parts)
