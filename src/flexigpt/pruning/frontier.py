"""How small a model can go: perplexity by stored size, of what `prune` makes and of plain removal at the same size,
each in 8 bits too where torchao is installed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from flexigpt.model import stored_bytes
from flexigpt.pruning.allocation import OutOfReach
from flexigpt.pruning.assemble import assembled
from flexigpt.pruning.options import FrontierOptions, PruneOptions
from flexigpt.pruning.remove import assemble_removed
from flexigpt.pruning.source import CheckedSource, Workspace
from flexigpt.record import Record, measure_both
from flexigpt.runtime import InputError, Track, digest, parse_share, silent
from flexigpt.text import shown_texts
from flexigpt.weights import EightBits, StreamedModel

# Of the source's parameters, between which sizes `prune` looks for the smallest that loses no more than asked, and how
# near it comes.
_LEAST, _NEAR = 0.2, 0.005

# Of a longer text a ladder is measured on windows of so many tokens, evenly spread. On novels the standard error of
# what a size loses, in the logarithm of the perplexity, is 3 to 6 % of that then (docs/pruning.md).
_TOKENS = 2**15

# Every model can come down to this share of its parameters.
_REACHED = 0.9

# What the points of a frontier have of a model.
Point = dict[str, Any]


def frontier(
    source: str, options: FrontierOptions, track: Track = silent, note: Callable[[Record], None] | None = None
) -> Record:
    """Measures a ladder of sizes: those that plain removal of so many blocks has, so that both store as much.

    The source is opened, and the text calibrated on, once for all sizes. A run that is killed finds the points again
    that it had measured.

    Args:
        source: folder or hub name of a source model.
        options: of the ladder.
        track: reports the progress of each stage.
        note: is called with `source` and `points` so far: first without points, then when each is measured.

    Returns:
        The record: the source's size and perplexity, `points` from the largest to the smallest: `parameters`, `share`
        of the source's, `perplexity` of what `prune` makes, `removed`: blocks, parameters and perplexity of plain
        removal; each with `int8`, bytes and perplexity of the same as `quantize` stores it in 8 bits, where torchao is
        installed and can quantise it; `knee`: number of the point behind which the perplexity rises faster than before;
        `measured`: on how many `windows` of the text, evenly spread, of how many that are `there`, and the `sizes`
        asked for.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    ladder = _Ladder(source, options.of_prune(), track, in_8_bits=True, tokens=_TOKENS)
    workspace, points = ladder.workspace, list[Point]()
    measured: Record = {"source": ladder.source(), "points": points}
    tell = note or (lambda _: None)
    tell(measured)
    for count in options.removed_of(workspace.depth):
        plain = ladder.removed(count)
        point = ladder.pruned(plain["parameters"]) | {"removed": {"blocks": count, **plain}}
        points.append(point | {"share": point["parameters"] / workspace.shape.parameters})
        tell(measured)
    record = workspace.record() | measured | {"text": options.perplexity}
    shape = list(workspace.windows.shape)
    record["calibration"] = {"text": shown_texts(options.calibration), "windows": shape, "asked": options.windows}
    record["measured"] = ladder.windows | {"sizes": options.sizes}
    record["options"] = dataclasses.asdict(options)
    return record | {"knee": knee([(p["share"], p["perplexity"]) for p in points])} | workspace.took()


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Number of the point that lies farthest below the line from the first to the last, in (share, log perplexity)."""
    scaled = [(share, math.log(value)) for share, value in points]
    (first, high), (last, low) = scaled[0], scaled[-1]
    slope = (low - high) / (last - first) if last != first else 0.0
    below = [high + slope * (share - first) - value for share, value in scaled]
    return max(range(len(below)), key=below.__getitem__)


def sized(source: str, options: PruneOptions, track: Track = silent) -> PruneOptions:
    """The options with a size in the place of the loss, where one is given: the smallest, to half a percent of the
    source's parameters, whose perplexity is within it.

    Raises:
        InputError: a loss that even the largest size of the search exceeds; and as `prune`.
    """
    if options.max_loss is None:
        return options
    loss = parse_share(options.max_loss)
    ladder = _Ladder(source, dataclasses.replace(options, max_loss=None, ratio=0.5), track)
    allowed = ladder.source()["perplexity"] * (1 + loss)
    total = ladder.workspace.shape.parameters
    too_small, enough = _LEAST, 1.0
    while enough - too_small > _NEAR:
        share = (too_small + enough) / 2
        try:
            keeps = ladder.pruned(int(share * total))["perplexity"] <= allowed
        except OutOfReach:
            if share > _REACHED:
                raise
            keeps = False
        too_small, enough = (too_small, share) if keeps else (share, enough)
    if enough == 1.0:
        raise InputError(f"--max-loss {options.max_loss} is out of reach: nothing can go without more; give more")
    return dataclasses.replace(options, max_loss=None, target_size=str(int(enough * total)))


class _Ladder:
    """Sizes of one source, each measured once.

    Args:
        source: folder or hub name.
        options: of the models that are made, but for their size.
        track: reports the progress of each stage.
        in_8_bits: whether each is measured in 8 bits too, where that is possible.
        tokens: of the text that are measured, the same for each; None: all.
    """

    def __init__(
        self, source: str, options: PruneOptions, track: Track, in_8_bits: bool = False, tokens: int | None = None
    ) -> None:
        checked = CheckedSource.check(source, options, options)
        texts, length = checked.read(), checked.window_length
        assert texts.text is not None
        text = texts.text if tokens is None else texts.text.sample(max(1, tokens // length), length)
        self.windows = {"windows": text.windows(length), "there": texts.text.windows(length)}
        self.workspace: Workspace[PruneOptions] = checked.open(dataclasses.replace(texts, text=text), track)
        self._options, self._in_8_bits = options, in_8_bits and _quantises(self.workspace.source)

    def source(self) -> Point:
        """The source itself."""
        source = self.workspace.source
        eight = self._measured(lambda: self._eight(source), removed=0) if self._in_8_bits else {}
        return self._measure(source) | eight

    def _eight(self, model: StreamedModel) -> Point:
        """The same model in 8 bits, where that is asked for."""
        if not self._in_8_bits:
            return {}
        eight = EightBits(model)
        return {"int8": {"bytes": eight.bytes, "perplexity": self._measure(eight)["perplexity"]}}

    def _measure(self, model: StreamedModel) -> Point:
        workspace = self.workspace
        assert workspace.text is not None
        measured = measure_both(
            {"model": model},
            workspace.text,
            name=self._options.perplexity,
            window_length=workspace.window_length,
            cache=workspace.cache,
            spill=workspace.hidden_in(1, workspace.text.ids),
            track=workspace.track,
        )
        return _point(measured, "model")

    def pruned(self, parameters: int) -> Point:
        """What `prune` makes of so many parameters."""
        options = dataclasses.replace(self._options, ratio=None, target_size=str(parameters))

        def made() -> Point:
            with assembled(self.workspace, options) as (assembly, _, record):
                return _point(record, "compact") | self._eight(assembly)

        return self._measured(made, parameters=parameters)

    def removed(self, blocks: int) -> Point:
        """What is left when so many blocks are removed, the others refitted."""
        options = dataclasses.replace(
            self._options, ratio=None, target_size=str(self.workspace.shape.removed_parameters(blocks)), remove=True
        )

        def made() -> Point:
            with assemble_removed(self.workspace, options) as (assembly, _, record):
                return _point(record, "shorter") | self._eight(assembly)

        return self._measured(made, removed=blocks)

    def _measured(self, make: Callable[[], Point], **which: int) -> Point:
        workspace = self.workspace
        assert workspace.text is not None
        depends: dict[str, Any] = {"windows": digest(workspace.windows), "text": digest(workspace.text.ids), **which}
        depends["refit_kept"] = self._options.refit_kept
        depends |= {"bits": 8} if self._in_8_bits else {}
        with workspace.cache.stage("frontier", window_length=workspace.window_length, **depends) as stage:
            found: Point = stage.result or stage.finish(make())
            return found


def _quantises(source: StreamedModel) -> bool:
    """Whether torchao is installed, and knows the source's linears."""
    try:
        return EightBits(source).bytes < stored_bytes(source.model)
    except ImportError:
        return False


def _point(record: Record, label: str) -> Point:
    size = {key: record[label][key] for key in ("parameters", "bytes")}
    return size | {"perplexity": record["perplexity"][label]["perplexity"]}
