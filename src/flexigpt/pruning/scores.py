"""Block scores: which blocks are pruned."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from flexigpt.calibration import (
    BlockStatistic,
    Stream,
    block_means,
    calibration_batches,
    check_means,
    finished_blocks,
)
from flexigpt.evaluation import windows_perplexity
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import CheckedSource, Workspace
from flexigpt.record import Record
from flexigpt.runtime import CachedStage, InputError, digest, parse_size
from flexigpt.text import shown_texts

# Of the calibration windows, so many judge candidates: every one of them costs forward passes.
MOST_WINDOWS = 32

# Stands in for the length of a hidden state that is zero.
_LEAST_NORM = 1e-8


def influence(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Block influence (eq. 1): 1 - cos(X_i, X_{i+1}) of each token. (tokens, hidden) twice -> (tokens,)."""
    return 1 - _cosine(inputs, outputs)


def angular(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Angular distance arccos(cos(X_i, X_{i+1})) / pi of each token (Gromov et al. 2024, eq. 7)."""
    return _cosine(inputs, outputs).clamp(-1, 1).arccos() / math.pi


def relative_magnitude(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """|X_{i+1} - X_i| / |X_{i+1}| of each token (Samragh et al. 2023, section 3.1)."""
    return (outputs - inputs).norm(dim=-1) / outputs.norm(dim=-1).clamp(min=_LEAST_NORM)


def _cosine(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Of each token; 1 where a block leaves a token as it was, if that is zero, which has no direction."""
    return torch.where((inputs == outputs).all(-1), 1.0, F.cosine_similarity(inputs, outputs, dim=-1, eps=_LEAST_NORM))


# A score is the mean over tokens of its statistic; the blocks of lowest score are pruned.
STATISTICS: Mapping[str, BlockStatistic] = {
    "influence": influence,
    "angular": angular,
    "relative-magnitude": relative_magnitude,
}


def num_pruned_at(ratio: float, num_blocks: int) -> int:
    """floor(ratio x blocks), safe from rounding (0.29 x 100 is 29).

    Raises:
        InputError: a ratio that prunes nothing.
    """
    num_pruned = math.floor(ratio * num_blocks + 1e-9)
    if num_pruned == 0:
        raise InputError(
            f"ratio {ratio} of {num_blocks} blocks prunes nothing: give at least {math.ceil(1000 / num_blocks) / 1000}"
        )
    return num_pruned


def check_blocks(blocks: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Blocks to prune that a user named, ascending.

    Raises:
        InputError: none, one that does not exist, one named twice, or all of them.
    """
    given = ", ".join(map(str, blocks)) or "none"
    strange = sorted(set(blocks) - set(range(num_blocks)))
    if not blocks or strange or len(set(blocks)) < len(blocks):
        raise InputError(f"blocks {given} cannot be pruned: name some of 0 to {num_blocks - 1}, each once")
    if len(blocks) == num_blocks:
        raise InputError(f"pruning all {num_blocks} blocks leaves none: keep at least one")
    return tuple(sorted(blocks))


def lowest(scores: Sequence[float], num_pruned: int) -> tuple[int, ...]:
    """The blocks of lowest score, ascending by block; the earlier block first where scores are equal."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda block: scores[block])[:num_pruned]))


def pruned_or_count(checked: CheckedSource[PruneOptions]) -> Sequence[int] | int:
    """The blocks to prune, or, where their scores decide, how many.

    Raises:
        InputError: a ratio, blocks or a size that the source rules out.
    """
    options, shape, depth = checked.options, checked.shape, checked.depth
    if options.blocks is not None:
        return check_blocks(options.blocks, depth)
    if options.ratio is not None:
        return num_pruned_at(options.ratio, depth)
    assert options.target_size is not None
    target = parse_size(options.target_size, checked.itemsize)
    if options.remove:
        return shape.num_removed_for(target, depth)
    return shape.num_pruned_for(target, checked.with_rank(1).rank, depth)


class Choice(NamedTuple):
    """What a score chose.

    Attributes:
        blocks: the pruned blocks, ascending.
        record: what the record says of it: `scores` of all blocks, and `pruning_order` where they were chosen one after
            the other.
    """

    blocks: tuple[int, ...]
    record: Record


class ByHiddenStates(NamedTuple):
    """The blocks whose hidden states have the lowest mean of a statistic.

    Attributes:
        name: a key of STATISTICS.
    """

    name: str

    def choose(self, workspace: Workspace[PruneOptions], count: int) -> Choice:
        """Chooses so many blocks; with 0 it only scores. All statistics are found in one pass, and kept."""
        windows, source = workspace.windows, workspace.source
        with workspace.cache.stage("scores", windows=digest(windows)) as stage:
            if stage.result is None:
                spill = workspace.hidden_in(1)
                found = block_means(source, windows, STATISTICS, spill=spill, stage=stage, track=workspace.track)
                stage.finish(found)
            scores = stage.result[self.name]
        return Choice(lowest(scores, count), {"scores": scores})


class ByRemoval:
    """Blocks are chosen one after the other, each time that of the least perplexity without it and those before it.

    The first MOST_WINDOWS of the calibration windows judge. Every step is kept, so that a killed run goes on there and
    a larger count costs only what is new.
    """

    def choose(self, workspace: Workspace[PruneOptions], count: int) -> Choice:
        """Chooses so many blocks; with 0 it does nothing. Scores are not finite where the model overflows."""
        if count == 0:
            return Choice((), {})
        workspace = dataclasses.replace(workspace, windows=workspace.windows[:MOST_WINDOWS])
        order: list[int] = []
        perplexities = [math.nan] * workspace.depth

        def work() -> Iterator[None]:
            depends = {"windows": digest(workspace.windows)}
            for _ in range(count):
                with workspace.cache.stage("removal", chosen=sorted(order), **depends) as stage:
                    yield from self._step(workspace, order, stage)
                    found = {int(block): value for block, value in stage.result.items()}
                for block, value in found.items():
                    perplexities[block] = value
                # NaN is not less than anything: a block without which the model overflows comes behind all others.
                order.append(min(found, key=lambda block: math.inf if math.isnan(found[block]) else found[block]))

        candidates = sum(workspace.depth - step for step in range(count))
        for _ in workspace.track(work(), "removing blocks", candidates):
            pass
        return Choice(tuple(sorted(order)), {"scores": perplexities, "pruning_order": order})

    def _step(self, workspace: Workspace[PruneOptions], chosen: list[int], stage: CachedStage) -> Iterator[None]:
        """Leaves perplexity by number of each block not chosen yet as the stage's result; yields once for each.

        It takes about half as many forward passes as there are blocks, with one block in memory at a time: the hidden
        states of all candidates go through the blocks together, and a candidate's part from the others' where it is
        left out.
        """
        source = workspace.source
        others = [index for index in range(len(source)) if index not in chosen]
        if stage.result is not None:
            yield from (None for _ in others)
            return
        batches = calibration_batches(workspace.windows, source.blocks)
        whole = Stream(source.model, batches, workspace.hidden_in(len(source)))
        without: dict[int, Stream] = {}
        for index in others:
            source.expect(index + 1)
            leaving = whole.at(whole.hidden)
            with source.block(index) as block:
                for stream in (*without.values(), whole):
                    stream.advance(block, index)
            without[index] = leaving
            yield
        found = {}
        for index, stream in without.items():
            with finished_blocks(source, stream.hidden):
                found[str(index)] = windows_perplexity(source.model, batches)
        stage.finish(found)


BLOCK_SCORES: Mapping[str, ByHiddenStates | ByRemoval] = {
    **{name: ByHiddenStates(name) for name in STATISTICS},
    "removal-perplexity": ByRemoval(),
}


def scored(workspace: Workspace[PruneOptions], pruned: Sequence[int] | int) -> tuple[tuple[int, ...], Record]:
    """The blocks to prune, and what the record says of calibration text and scores: nothing where no text is read.

    Args:
        workspace: of the flow.
        pruned: the blocks, or how many their scores choose.

    Raises:
        InputError: scores that are not finite.
    """
    windows, options = workspace.windows, workspace.options
    blocks = () if isinstance(pruned, int) else tuple(pruned)
    if not len(windows):
        return blocks, {}
    text = {"text": shown_texts(options.calibration), "windows": list(windows.shape), "asked": options.windows}
    choice = BLOCK_SCORES[options.block_score].choose(workspace, pruned if isinstance(pruned, int) else 0)
    check_means(choice.record.get("scores", ()))
    if "pruning_order" in choice.record:
        text["judged"] = min(len(windows), MOST_WINDOWS)
    by = {"block_score": options.block_score} if choice.record else {}
    return choice.blocks or blocks, {"calibration": text, **by, **choice.record}
