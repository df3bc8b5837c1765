"""A source whose pruned blocks have been brought near their bases, computing what they did."""

from collections.abc import Sequence
from functools import partial

import torch

from flexigpt.alignment import align, block_symmetries
from flexigpt.architecture import find_architecture
from flexigpt.cache import CachedStage
from flexigpt.plan import Plan
from flexigpt.streaming import StreamedModel


class AlignedSource(StreamedModel):
    """A source in which the linears of each pruned block are aligned to those of its base.

    Args:
        source: the source model.
        plan: which blocks are pruned, and their bases.
        stage: keeps what is aligned.
    """

    def __init__(self, source: StreamedModel, plan: Plan, stage: CachedStage) -> None:
        super().__init__(source.model, self._aligned)
        self._source, self._stage = source, stage
        self._base_of = {replica.block: replica.base for replica in plan.replicas}
        self._symmetries = block_symmetries(source.model.config)
        paths = find_architecture(source.model.config).linears
        self._linears = tuple(f"{path}.{kind}" for path in paths for kind in ("weight", "bias"))

    def expect(self, block: int) -> None:
        """As the source's own."""
        self._source.expect(block)

    def _aligned(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = {}
        for name in names:
            block, _, path = name.removeprefix(f"{self.prefix}.").partition(".")
            if path in self._linears and int(block) in self._base_of:
                found = self._stage.tensors(f"aligned-{block}", partial(self._align, int(block)))
                values[name] = found[path].to(self.device)
        return self._source.tensors([name for name in names if name not in values]) | values

    def _align(self, block: int) -> dict[str, torch.Tensor]:
        pruned, base = (self._of_linears(number) for number in (block, self._base_of[block]))
        dtype = self.model.dtype
        return {path: values.to(dtype) for path, values in align(pruned, base, self._symmetries).items()}

    def _of_linears(self, block: int) -> dict[str, torch.Tensor]:
        names = {path: name for path, name in self.names(block).items() if path in self._linears}
        values = self._source.tensors(list(names.values()))
        return {path: values[name] for path, name in names.items()}
