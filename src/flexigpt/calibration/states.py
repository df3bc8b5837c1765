"""What a text is on its way through a source, kept for as long as models are made of it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from flexigpt.calibration.hidden_states import HiddenStates, Stream
from flexigpt.model import watched


class SourceStates:
    """What each block of a source is given of a text, and what its attention writes; nothing before it is found.

    Attributes:
        folder: where files without a name hold them; None: memory does.
        entering: by block what it is given; behind the last block's, what that one puts out.
        written: by block what the last linear of its attention returns.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.entering: list[HiddenStates] = []
        self.written: list[HiddenStates] = []

    @staticmethod
    def copies(depth: int) -> int:
        """How often they hold the hidden states of a source with so many blocks."""
        return 2 * depth + 1

    @property
    def known(self) -> "SourceStates | None":
        """They themselves once they are found."""
        return self if self.entering else None

    def forget(self) -> None:
        """Lets go of them."""
        self.entering, self.written = [], []

    def outputs(self, stream: Stream, block: nn.Module, index: int, attention: str) -> Iterator[torch.Tensor]:
        """What a block makes of the stream, batch by batch, while what its attention writes is kept.

        Args:
            stream: before the block.
            block: the block.
            index: its number.
            attention: path within it of its attention's last linear.
        """
        self.written.append(HiddenStates((), self.folder))
        with watched(block, [attention]) as seen:
            for output in stream.outputs(block, index):
                self.written[-1].append(seen[attention][1].reshape(output.shape))
                yield output
