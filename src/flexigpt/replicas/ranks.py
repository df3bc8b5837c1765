"""A rank for each adapter: the parameters of all of them are spent where they mend most."""

import dataclasses
import heapq
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from flexigpt.calibration import Stream, calibration_batches, input_moments, output_weights
from flexigpt.model import ModelShape, Plan, Replica, find_architecture
from flexigpt.replicas.least_squares import damped_root, least_squares_scale, output_root, weighed
from flexigpt.runtime import CachedStage, Track, silent
from flexigpt.weights import StreamedModel

# Of a linear in a replica: block and path.
Place = tuple[int, str]


@torch.no_grad()
def spread_ranks(
    source: StreamedModel,
    plan: Plan,
    windows: torch.Tensor,
    shape: ModelShape,
    stage: CachedStage,
    *,
    spill: Path | None = None,
    track: Track = silent,
) -> Plan:
    """The plan with a rank for each linear of each replica; no more parameters in adapters than it had.

    What rank r leaves of a pruned block's linear W_i is counted by what it moves: |K (W_i - s W_j) L|_F^2 beyond the r
    leading singular values, with L L^T = E[x x^T] of its inputs and K^T K = G of `output_weights`, as a share of the
    energy of what the block adds to the residual stream. Parameters go where that falls most for each.

    Args:
        source: whose blocks are replaced.
        plan: its ranks say how many parameters there are to spend.
        windows: calibration windows, (windows, tokens) ids.
        shape: of the source; it says whether bases are scaled.
        stage: keeps what is measured.
        spill: folder for files that hold the hidden states; None: memory does.
        track: reports each block that text goes through.
    """
    if stage.result is None:
        spectra: dict[Place, torch.Tensor] = {}
        replaced = {replica.block: replica for replica in plan.replicas}
        depth = max(replaced, default=-1) + 1
        text = Stream(source.model, calibration_batches(windows), spill)
        for index in track(range(depth), "spreading ranks", depth):
            source.expect(index + 1)
            if index not in replaced:
                with source.block(index) as block:
                    text.advance(block, index)
                continue
            measure = partial(_Weighed(source, text, index, windows.numel()).spectra, replaced[index], shape)
            spectra |= {(index, path): values for path, values in stage.tensors(f"spectra-{index}", measure).items()}
        budget = sum(shape.adapter_parameters(replica) for replica in plan.replicas)
        costs = {place: sum(shape.linears[place[1]]) for place in spectra}
        spent = spend(spectra, costs, budget)
        stage.finish({str(r.block): {path: spent[r.block, path] for path in shape.linears} for r in plan.replicas})
    replicas = (dataclasses.replace(replica, ranks=stage.result[str(replica.block)]) for replica in plan.replicas)
    return dataclasses.replace(plan, replicas=tuple(replicas))


def spend(spectra: Mapping[Place, torch.Tensor], costs: Mapping[Place, int], budget: int) -> dict[Place, int]:
    """Ranks, each at least 1, that mend most within a budget, but for the last few parameters.

    Args:
        spectra: what each further rank mends, descending.
        costs: parameters of one rank.
        budget: parameters in all.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(costs.values())
    gains = [(-values[1].item() / costs[place], place) for place, values in spectra.items() if len(values) > 1]
    heapq.heapify(gains)
    while gains:
        _, place = heapq.heappop(gains)
        if costs[place] > left:
            continue  # a cheaper one may still fit
        left -= costs[place]
        ranks[place] += 1
        if ranks[place] < len(spectra[place]):
            heapq.heappush(gains, (-spectra[place][ranks[place]].item() / costs[place], place))
    return ranks


class _Weighed:
    """A block that is to be replaced, after a text has gone through it: inputs of its linears, and what errors weigh.

    Args:
        source: whose block it is.
        text: what it is given; afterwards what it makes of that.
        index: of the block.
        tokens: in the text.
    """

    def __init__(self, source: StreamedModel, text: Stream, index: int, tokens: int) -> None:
        architecture = find_architecture(source.model.config)
        inner = [path for path in architecture.linears if path not in architecture.output_norms]
        self._source, self._tokens = source, tokens
        with source.block(index) as block:
            self._weights = output_weights(text, block, index, inner)
            self._moments, self._first_of, added = input_moments(text, block, index, architecture.linears)
        # Of a block that adds nothing, nothing is worth mending.
        self._energy = torch.where(added > 0, added.clamp(min=1e-30), torch.inf) / tokens

    def spectra(self, replica: Replica, shape: ModelShape) -> dict[str, torch.Tensor]:
        """What each further rank of an adapter would mend, by path, descending; to be asked for once."""
        found: dict[str, torch.Tensor] = {}
        for first in list(self._moments):  # one at a time: an MLP's inputs have the largest matrix of all
            root = damped_root(self._moments.pop(first))
            for path in (path for path in shape.linears if self._first_of[path] == first):
                blocks = replica.block, replica.base
                left = output_root(self._weights.pop(path, None))
                wanted, given = (weighed(left, self._source.weight_matrix(i, path).double() @ root) for i in blocks)
                scale = least_squares_scale(wanted, given) if shape.base_scale else 1.0
                # Both sums over the text become means; where all outputs weigh alike there is only the inputs'.
                means = self._tokens if left is None else self._tokens**2
                found[path] = _squared_singular_values(wanted - scale * given) / (means * self._energy)
        return found


def _squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Descending, as many as an adapter may have ranks and be smaller than the matrix."""
    outputs, inputs = matrix.shape
    smaller = matrix if outputs < inputs else matrix.T
    most = max(1, outputs * inputs // (outputs + inputs))
    return torch.linalg.eigvalsh(smaller @ smaller.T).flip(0)[:most].clamp(min=0)
