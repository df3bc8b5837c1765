"""Which units of an MLP to keep: the optimal brain surgeon (Hassibi and Stork, 1993) for whole units.

An MLP writes y = W h, h its hidden units. Without some of them, and with W refitted to the rest, y changes by an error
whose cost is e^T G e, G the second moment of the loss's gradient by y (LLM Surgeon, van der Ouderaa et al., 2024). What
each unit costs is known in closed form; the cheapest go, the others are refitted, and so on until none is left.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from flexigpt.replicas.least_squares import damped
from flexigpt.weights import Reader, StreamedModel

# Of the mean eigenvalue of what units give, and of what errors weigh, what is added to all.
_DAMPING = 1e-3

# An MLP loses its units in so many steps.
_STEPS = 64

# Columns of units that are gone are carried along, since copies cost more, until of all columns so many are left.
_COMPACTED = 0.8

# Rows that are moved together then.
_MOVED = 256

# So many rows of updates to the inverse wait for each other: one product of them all is the faster.
_WAITING = 1024


class Elimination(NamedTuple):
    """In which order units go, and what that costs.

    Attributes:
        order: (units,) the first to go first.
        left: (steps + 1,) how many units are left, from all of them to none.
        costs: (steps + 1,) float64, of the loss in nats a token by the second-order estimate, up to a factor that is
            the same for all sublayers of a model.
    """

    order: torch.Tensor
    left: torch.Tensor
    costs: torch.Tensor

    def kept(self, units: int) -> torch.Tensor:
        """The units that stay where so many do, ascending."""
        return self.order[len(self.order) - units :].sort().values


def step_of(units: int) -> int:
    """How many units go at once: a 64th of them, a multiple of 8 where they are many, as matrix units like it."""
    step = max(1, units // _STEPS)
    return step // 8 * 8 if step >= 8 else step


def eliminate(weight: torch.Tensor, inputs: torch.Tensor, errors: torch.Tensor) -> Elimination:
    """Takes all units away, step by step.

    Args:
        weight: W, (outputs, units), any dtype.
        inputs: E[h h^T], (units, units); its memory is used: of a wide MLP each matrix is half a gigabyte.
        errors: G = E[g g^T] of the gradient g of the loss by y, (outputs, outputs), of the same dtype; likewise.
    """
    units = weight.shape[1]
    step = step_of(units)
    weighed = weight.detach().to(errors.dtype).T @ damped(errors, _DAMPING)[0]  # a row for each unit
    root = damped(inputs, _DAMPING)[0]
    inverse = _Inverse(torch.cholesky_inverse(root, out=root).mT)
    here = torch.arange(units, device=weight.device)  # what the columns stand for; of some of them units are gone
    there = torch.ones(units, dtype=torch.bool, device=weight.device)
    order, left, costs, alive = [], [units], [0.0], units
    while alive:
        if alive < _COMPACTED * len(here):
            here, weighed = here[there], weighed[there]
            inverse.compact(there)
            there = there[there]
        prices = (torch.linalg.vector_norm(weighed, dim=1).square() / inverse.diagonal).masked_fill(~there, torch.inf)
        # The first step leaves a multiple of the step's size.
        gone = prices.topk(min(alive % step or step, alive), largest=False).indices.sort().values
        rows = inverse.rows(gone)
        root = damped(rows[:, gone], torch.finfo(rows.dtype).eps)[0]
        of_gone = torch.linalg.solve_triangular(root, weighed[gone], upper=False)
        across = torch.linalg.solve_triangular(root, rows, upper=False)
        costs.append(costs[-1] + of_gone.square().sum(dtype=torch.float64).item())
        order.append(here[gone])
        weighed.addmm_(across.T, of_gone, alpha=-1)
        inverse.take(across)
        there[gone] = False
        alive -= len(gone)
        left.append(alive)
    return Elimination(torch.cat(order).cpu(), torch.tensor(left), torch.tensor(costs, dtype=torch.float64))


class _Inverse:
    """The inverse of the second moments of the units that are left: its Schur complements, one after the other.

    Args:
        matrix: of all units; its memory is used.

    Attributes:
        diagonal: of what is left; nothing where a unit is gone.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix
        self._waiting: list[torch.Tensor] = []
        self.diagonal = matrix.diagonal().clone()

    def rows(self, units: torch.Tensor) -> torch.Tensor:
        """Of these units."""
        rows = self._matrix[units]
        for across in self._waiting:
            rows.addmm_(across[:, units].T, across, alpha=-1)
        return rows

    def take(self, across: torch.Tensor) -> None:
        """Takes A^T A away, of A with a row for each unit that goes."""
        self.diagonal.sub_(across.square().sum(0)).clamp_(min=torch.finfo(across.dtype).tiny)
        self._waiting.append(across)
        if sum(map(len, self._waiting)) >= _WAITING:
            self._settle()

    def compact(self, there: torch.Tensor) -> None:
        """The rows and columns of these units move to the front of the memory: a copy may be half a gigabyte."""
        self._settle()
        kept, front = there.nonzero().flatten(), self._matrix.reshape(-1)
        count = len(kept)
        for start in range(0, count, _MOVED):
            rows = self._matrix[kept[start : start + _MOVED]].index_select(1, kept)
            front[start * count : start * count + rows.numel()] = rows.flatten()
        self._matrix, self.diagonal = front[: count * count].view(count, count), self.diagonal[kept]

    def _settle(self) -> None:
        if self._waiting:
            across = torch.cat(self._waiting)
            self._waiting = []
            self._matrix.addmm_(across.T, across, alpha=-1)


def readers_of_units(
    source: StreamedModel, block: int, paths: Mapping[str, Any], kept: torch.Tensor
) -> dict[str, Reader]:
    """What reads the MLP of a source's block with these of its hidden units alone, by path within the block.

    Args:
        source: the source.
        block: its number.
        paths: of the MLP, as `sublayer_paths` gives them.
        kept: the units, ascending.
    """
    there = {path for path, _ in source.blocks[block].named_parameters()}
    found: dict[str, Reader] = {}
    for linear in (*paths["inner"], paths["outer"]):
        transposed = isinstance(source.blocks[block].get_submodule(linear), Conv1D)
        inner = linear != paths["outer"]
        for name in ("weight", "bias"):
            path = f"{linear}.{name}"
            if path in there and (inner or name == "weight"):
                along = int((name == "weight") and (transposed == inner))
                found[path] = partial(_of_units, source, block, path, along, paths["units"], kept)
    return found


@torch.no_grad()
def _of_units(source: StreamedModel, block: int, path: str, along: int, units: int, kept: torch.Tensor) -> torch.Tensor:
    values = source.parameter(block, path)
    # A linear that computes gates and units computes them one after the other.
    parts = values.split(units, dim=along)
    return torch.cat([part.index_select(along, kept.to(values.device)) for part in parts], dim=along)
