"""The source that a flow works on: checked by its configuration alone, then opened with the texts that it needs."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexigpt.calibration import SourceStates
from flexigpt.model import ModelShape, default_rank, find_architecture, model_shape, num_blocks
from flexigpt.pruning.options import ExtendOptions, PruneOptions
from flexigpt.record import Record, measure_both, new_record
from flexigpt.replicas import ReplicaOptions
from flexigpt.runtime import Cache, InputError, Timed, Track, parse_share, parse_size
from flexigpt.text import TokenizedText, calibration_windows, check_tokenizer, check_window_length, tokenize_text
from flexigpt.weights import Assembly, Source, check_finite, load_tokenizer, open_empty

Asked = TypeVar("Asked", bound=PruneOptions | ExtendOptions)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a flow reads besides the model.

    Attributes:
        tokenizer: of the source; None where no text is read.
        text: to measure perplexity on; None: it is not measured.
        windows: calibration windows, (windows, tokens) ids; none where no calibration text is read.
    """

    tokenizer: PreTrainedTokenizerBase | None
    text: TokenizedText | None
    windows: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CheckedSource(Generic[Asked]):
    """A source as its configuration tells, before any text or weight is read.

    Attributes:
        name: folder or hub name.
        options: of the flow; `window_length` and `rank` are what will be used.
        empty: the model, its parameters on the meta device, in the dtype that is asked for.
        shape: of the source, and of replicas as the options make them.
        memory: bytes that a block and hidden states may take.
    """

    name: str
    options: Asked
    empty: PreTrainedModel
    shape: ModelShape
    memory: int

    @classmethod
    def check(cls, name: str, options: Asked, replicas: ReplicaOptions) -> Self:
        """Refuses what the configuration rules out.

        Args:
            name: folder or hub name.
            options: of the flow.
            replicas: how replicas are made.

        Raises:
            InputError: a source that cannot be opened or is not supported, a window or a memory that does not fit.
        """
        empty = open_empty(name, options.dtype)
        find_architecture(empty.config)  # refuses a compact model before any text is read
        shape = model_shape(empty, replicas.has_norms)
        used: dict[str, Any] = {"window_length": check_window_length(options.window_length, empty.config)}
        memory = None
        if isinstance(options, PruneOptions):
            memory = options.memory
        resolved = dataclasses.replace(options, **used)
        return cls(name=name, options=resolved, empty=empty, shape=shape, memory=_memory(memory, empty, shape))

    @property
    def depth(self) -> int:
        """Blocks of the source."""
        return num_blocks(self.empty.config)

    @property
    def itemsize(self) -> int:
        """Bytes of a stored parameter."""
        return self.empty.dtype.itemsize

    @property
    def window_length(self) -> int:
        """For calibration and perplexity."""
        assert self.options.window_length is not None
        return self.options.window_length

    @property
    def rank(self) -> int:
        """Of the adapters, once `with_rank` has found it."""
        assert isinstance(self.options.rank, int)
        return self.options.rank

    def with_rank(self, replicas: int) -> Self:
        """The same with the rank that so many replicas have.

        Raises:
            InputError: a rank, or a share of the source's parameters, that no adapter can have.
        """
        asked = self.options.rank
        if isinstance(asked, str):
            of_a_rank = replicas * self.shape.adapter_parameters(1) / self.shape.parameters
            rank = int(parse_share(asked) / of_a_rank + 1e-9)
            if not 1 <= rank <= self.shape.max_rank:
                # Rounded up, so that what is advised will do.
                limits = (1, self.shape.max_rank)
                least, most = (f"{math.ceil(1e5 * of_a_rank * limit) / 1e3:g}%" for limit in limits)
                raise InputError(
                    f"--rank {asked} is out of range for {replicas} replicas: give {least} (rank 1) to {most} (rank "
                    f"{self.shape.max_rank})"
                )
        else:
            rank = default_rank(self.shape.hidden_size) if asked is None else asked
            self.shape.check_rank(rank)
        return dataclasses.replace(self, options=dataclasses.replace(self.options, rank=rank))

    def needs_file(self, tokens: int) -> bool:
        """Whether the hidden states of so many tokens, each copy counted, do not fit beside a block."""
        return (self.shape.block_parameters + tokens * self.shape.hidden_size) * self.itemsize > self.memory

    def read(self) -> Texts:
        """Reads the texts, as far as they are needed."""
        options, tokenizer, text = self.options, None, None
        windows = torch.empty((0, self.window_length), dtype=torch.int64)
        calibrates = isinstance(options, PruneOptions) and options.calibrates
        if calibrates or options.perplexity is not None:
            tokenizer = load_tokenizer(self.name)
            check_tokenizer(self.name, tokenizer, self.empty.config)
            if options.perplexity is not None:
                text = tokenize_text(options.perplexity, tokenizer, window_length=self.window_length)
            if isinstance(options, PruneOptions) and calibrates:
                windows = calibration_windows(
                    options.calibration,
                    tokenizer,
                    windows=options.windows,
                    window_length=self.window_length,
                    seed=options.seed,
                )
        return Texts(tokenizer=tokenizer, text=text, windows=windows)

    def open(self, texts: Texts, track: Track) -> "Workspace[Asked]":
        """Opens the weights, and refuses such as are not finite."""
        timed, options = Timed(track), self.options
        source = Source(self.name, options.dtype, options.device, self.empty)
        cache = source.cache(None)
        with cache.stage("finite") as stage:
            if stage.result is None:
                check_finite(source, timed)
                stage.finish(True)
        return Workspace(**vars(self), **vars(texts), source=source, cache=cache, track=timed)


def _memory(given: str | None, empty: PreTrainedModel, shape: ModelShape) -> int:
    """Bytes that a block and hidden states may take."""
    if given is None:
        return int(psutil.virtual_memory().available) // 2
    memory, block_bytes = parse_size(given, itemsize=1), shape.block_parameters * empty.dtype.itemsize
    if memory < block_bytes:
        raise InputError(
            f"--memory {given} is too small: one block alone takes {math.ceil(block_bytes / 2**20):,} MiB; give more"
        )
    return memory


@dataclass(frozen=True, kw_only=True)
class Workspace(CheckedSource[Asked], Texts):
    """What a flow works on, opened once.

    Attributes:
        source: the source, of which only the blocks in use are in memory.
        cache: keeps what is measured of this source.
        track: reports the progress of each stage, and times them.
        states: what the calibration text is on its way through the source, once a stage has kept it.
    """

    source: Source
    cache: Cache
    track: Timed
    states: SourceStates = field(default_factory=SourceStates)

    def hidden_in(self, copies: int, ids: torch.Tensor | None = None) -> Path | None:
        """Where hidden states go: a folder, or None, where memory holds so many copies of them beside a block.

        Args:
            copies: how often they are held.
            ids: tokens of the text; None: those of the calibration windows.
        """
        tokens = self.windows.numel() if ids is None else ids.numel()
        if ids is None and self.states.known is not None and self.states.folder is None:
            copies += SourceStates.copies(self.depth)
        return self.cache.folder if self.needs_file(copies * tokens) else None

    def read(self) -> Texts:
        """They are read already."""
        return self

    def open(self, texts: Texts, track: Track) -> Self:
        """It is open already, and goes on reporting where it did."""
        return self

    def record(self) -> Record:
        """What the record of a flow begins with."""
        return new_record(self.name, self.options, {})

    def compared(self, label: str, assembly: Assembly) -> Record:
        """Sizes of the source and of what it became, perplexities where there is a text, and how long all stages took.

        Args:
            label: what the record calls the model that it became.
            assembly: that model; it gets the tokenizer.
        """
        assembly.tokenizer = self.tokenizer
        measured = measure_both(
            {"source": self.source, label: assembly},
            self.text,
            name=self.options.perplexity,
            window_length=self.window_length,
            spill=None if self.text is None else self.hidden_in(1, self.text.ids),
            cache=self.cache,
            track=self.track,
        )
        return measured | self.took()

    def took(self) -> Record:
        """Seconds of each stage, and of all."""
        return {"stages": self.track.seconds, "seconds": round(self.track.total, 1)}


def checked_source(source: str | Workspace[PruneOptions], options: PruneOptions) -> CheckedSource[PruneOptions]:
    """`CheckedSource.check`; of a source that was opened for options with the same texts and dtype, that one."""
    if isinstance(source, Workspace):
        return dataclasses.replace(source, options=dataclasses.replace(options, window_length=source.window_length))
    return CheckedSource.check(source, options, options)
