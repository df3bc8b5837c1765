"""Symmetry alignment: a pruned block's weights, changed to lie near its base's while the block computes what it did.

A block does not change when the units of its MLP change places, when its heads do, when a head's values are turned and
its output projection is turned back, or when queries and keys are turned alike. Two blocks' weights differ by such
choices as well as by what they compute; only the latter is worth an adapter's rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedConfig

from flexigpt.model import Plan, Roles, find_architecture
from flexigpt.runtime import CachedStage
from flexigpt.weights import StreamedModel

# Places of heads and turns are chosen in turn; in practice two or three rounds settle them.
_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class BlockSymmetries:
    """What may be changed in a block's weights without changing what the block computes.

    Attributes:
        roles: what the linears compute.
        heads: query heads.
        groups: key-value heads; each serves heads / groups query heads.
        head_size: dimensions of a head.
        rotary_size: of these, the first ones, which positions turn; 0 for none.
    """

    roles: Roles
    heads: int
    groups: int
    head_size: int
    rotary_size: int

    def outputs(self, units: int) -> dict[str, Tensor]:
        """For each role that ends in outputs of its own: which outputs of its linear, in order.

        Args:
            units: of the MLP.
        """
        size = self.head_size
        if self.roles.by_head:
            thirds = torch.arange(3 * self.heads * size).view(self.heads, 3, size)
            places = {role: thirds[:, third].flatten() for third, role in enumerate(("query", "key", "value"))}
        else:
            places = {}
        sizes = {"query": self.heads * size, "key": self.groups * size, "value": self.groups * size}
        ends: dict[str, int] = {}
        for role, count in (sizes | {"gate": units, "up": units}).items():
            path = getattr(self.roles, role)
            if path is not None and role not in places:
                start = ends.get(path, 0)
                places[role] = torch.arange(start, start + count)
                ends[path] = start + count
        return places


def block_symmetries(config: PreTrainedConfig) -> BlockSymmetries:
    """The symmetries of a source's blocks.

    Raises:
        InputError: a model that is not supported.
    """
    roles = find_architecture(config).roles
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return BlockSymmetries(
        roles=roles,
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        head_size=head_size,
        rotary_size=int(head_size * share) if roles.rotary else 0,
    )


@torch.no_grad()
def align(pruned: Mapping[str, Tensor], base: Mapping[str, Tensor], symmetries: BlockSymmetries) -> dict[str, Tensor]:
    """The pruned block's linears in the form that lies nearest to the base's; the block computes what it did.

    The distance is the sum of squared differences of the weights; it never grows. Biases follow and do not count: a
    replica has its own. MLP: the best places of all units (and signs, behind a gate), exactly. Attention: for each pair
    of key-value heads the best turns (orthogonal Procrustes) and places of their query heads, in turn; then the best
    places of the key-value heads.

    Scales (of `up` against `down`, values against outputs, queries against keys) are symmetries, too. They are left
    alone: choosing them lessened the distance, but left adapters more to mend on calibration text
    (benchmarks/LAB_NOTES.md).

    Args:
        pruned: path within the block + ".weight" or ".bias" -> tensor, of all linears. Others are not looked at.
        base: the same of the base, on the same device.
        symmetries: of these blocks.

    Returns:
        The pruned block's tensors under the same names: float64 where the pruned block's are, else float32.
    """
    ours, theirs = _read(pruned, symmetries), _read(base, symmetries)
    _align_units(ours, theirs, symmetries)
    _align_heads(ours, theirs, symmetries)
    return _write(ours, pruned, symmetries)


# A block as its roles: those before an activation or the heads as (outputs, inputs + 1), the bias behind the weights so
# that it follows them (zeros without); `output` and `down` as (outputs, inputs), whose bias no symmetry touches.
_Parts = dict[str, Tensor]


def _read(tensors: Mapping[str, Tensor], symmetries: BlockSymmetries) -> _Parts:
    roles = symmetries.roles

    def weight(path: str) -> Tensor:
        stored = tensors[f"{path}.weight"]
        wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
        return wide.T if roles.transposed else wide

    parts = {"output": weight(roles.output), "down": weight(roles.down)}
    for role, places in symmetries.outputs(parts["down"].shape[1]).items():
        path = getattr(roles, role)
        matrix = weight(path)
        bias = tensors.get(f"{path}.bias")
        column = matrix.new_zeros(len(matrix)) if bias is None else bias.to(matrix)
        parts[role] = torch.cat([matrix, column[:, None]], dim=1)[places.to(matrix.device)]
    return parts


def _write(parts: _Parts, like: Mapping[str, Tensor], symmetries: BlockSymmetries) -> dict[str, Tensor]:
    roles = symmetries.roles
    dtype = parts["down"].dtype
    written: dict[str, Tensor] = {}
    for path in {getattr(roles, role): None for role in parts}:
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in like:
                written[name] = like[name].to(dtype, copy=True)
    turned = (lambda weight: weight.T) if roles.transposed else (lambda weight: weight)
    for role, path in (("output", roles.output), ("down", roles.down)):
        turned(written[f"{path}.weight"]).copy_(parts[role])
    for role, places in symmetries.outputs(parts["down"].shape[1]).items():
        path = getattr(roles, role)
        places = places.to(parts[role].device)
        turned(written[f"{path}.weight"])[places] = parts[role][:, :-1]
        if f"{path}.bias" in written:
            written[f"{path}.bias"][places] = parts[role][:, -1]
    return written


def _assign(scores: Tensor) -> Tensor:
    """For each row the column of its own, so that their scores sum to the most."""
    return torch.from_numpy(linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1]).to(scores.device)


def _align_units(ours: _Parts, theirs: _Parts, symmetries: BlockSymmetries) -> None:
    """Gives each unit of the base the unit of ours that stands in its place."""

    def products(role: str) -> Tensor:
        return theirs[role][:, :-1] @ ours[role][:, :-1].T

    paired = products("up") + theirs["down"].T @ ours["down"]
    signed = symmetries.roles.gate is not None  # what a gate is multiplied by may change sign
    units = _assign(products("gate") + paired.abs() if signed else paired)
    for role in ("gate", "up") if signed else ("up",):
        ours[role] = ours[role][units]
    ours["down"] = ours["down"][:, units]
    if signed:
        signs = torch.where(paired.gather(1, units[:, None])[:, 0] < 0, -1.0, 1.0).to(paired)
        ours["up"] = ours["up"] * signs[:, None]
        ours["down"] = ours["down"] * signs


class _Match(NamedTuple):
    """How one key-value head of ours, with its query heads, stands in for one of the base's.

    `heads`: for each query head of the base, which of ours. `turn` is applied to queries and keys, (head size, head
    size), `mix` to the values, and undone where the output projection takes them. `gain`: inner product with the base.
    """

    heads: Tensor
    turn: Tensor
    mix: Tensor
    gain: float


def _align_heads(ours: _Parts, theirs: _Parts, symmetries: BlockSymmetries) -> None:
    """Gives each key-value head of the base one of ours, turned."""
    groups = symmetries.groups
    products = _head_products(ours, theirs, symmetries)
    # Weights of a norm over all heads stay in their places, and so must the heads.
    movable = symmetries.roles.query_key_norm != "all"
    gains = torch.full((groups, groups), -torch.inf, dtype=torch.float64)
    matches: dict[tuple[int, int], _Match] = {}
    for x in range(groups):
        for y in range(groups) if movable else (x,):
            matches[x, y] = _match({role: cross[x, y] for role, cross in products.items()}, symmetries, movable)
            gains[x, y] = matches[x, y].gain
    chosen = _assign(gains).tolist() if movable else range(groups)
    # (groups, heads of the group, head size, hidden size)
    heads = {
        role: matrix.view(groups, -1, symmetries.head_size, matrix.shape[1]) for role, matrix in _rows(ours).items()
    }
    for role, matrix in heads.items():
        moved = torch.empty_like(matrix)
        for x, y in enumerate(chosen):
            match = matches[x, y]
            by = match.turn if role in ("query", "key") else match.mix
            places = match.heads if role in ("query", "output") else slice(None)
            moved[x] = by.to(matrix) @ matrix[y][places]
        ours[role] = moved.flatten(0, 2)
    ours["output"] = ours["output"].T


def _rows(parts: _Parts) -> _Parts:
    """What the heads do, a row for each of their dimensions."""
    rows = {role: parts[role] for role in ("query", "key", "value")}
    return rows | {"output": parts["output"].T.contiguous()}


def _head_products(ours: _Parts, theirs: _Parts, symmetries: BlockSymmetries) -> _Parts:
    """Inner products of the rows of heads, float64.

    Their shape is (their group, our group, their head in it, our head in it, their dimension, our dimension).
    """
    groups, size = symmetries.groups, symmetries.head_size
    our_rows, their_rows = _rows(ours), _rows(theirs)
    products = {}
    for role, mine in our_rows.items():
        weights = slice(None) if role == "output" else slice(-1)
        cross = their_rows[role][:, weights] @ mine[:, weights].T
        split = cross.view(groups, -1, size, groups, len(mine) // groups // size, size)
        products[role] = split.permute(0, 3, 1, 4, 2, 5).double()
    return products


def _match(products: Mapping[str, Tensor], symmetries: BlockSymmetries, movable: bool) -> _Match:
    """The best match of one pair of key-value heads.

    Query heads and turns are chosen in turn, from two starts: heads where they are (so that nothing gets worse), and
    the turns that suit keys and values alone (which find any places).

    Args:
        products: role -> (their head, our head, their dimension, our dimension).
        symmetries: of the block.
        movable: whether query heads may change places.
    """
    query, output = products["query"], products["output"]
    key, value = products["key"][0, 0], products["value"][0, 0]
    shared = torch.arange(len(query), device=query.device)

    def turned(heads: Tensor) -> _Match:
        key_query, value_output = key + query[shared, heads].sum(0), value + output[shared, heads].sum(0)
        turn, mix = _turn(key_query, symmetries), _rotation(value_output)
        gain = ((turn * key_query).sum() + (mix * value_output).sum()).item()
        return _Match(heads=heads, turn=turn, mix=mix, gain=gain)

    def placed(turn: Tensor, mix: Tensor) -> Tensor:
        return _assign((query * turn).sum((2, 3)) + (output * mix).sum((2, 3)))

    matches = [turned(shared)]
    if movable and len(shared) > 1:
        for heads in (placed(matches[0].turn, matches[0].mix), placed(_turn(key, symmetries), _rotation(value))):
            matches.append(turned(heads))
            for _ in range(_ROUNDS):
                heads = placed(matches[-1].turn, matches[-1].mix)
                if torch.equal(heads, matches[-1].heads):
                    break
                matches.append(turned(heads))
    return max(matches, key=lambda match: match.gain)


def _rotation(products: Tensor) -> Tensor:
    """The orthogonal matrix whose inner product with these is largest (orthogonal Procrustes)."""
    left, _, right = torch.linalg.svd(products)
    return left @ right


def _turn(products: Tensor, symmetries: BlockSymmetries) -> Tensor:
    """Of the orthogonal matrices that queries and keys may both be multiplied by, the one nearest to these products.

    What positions turn may be turned further, in the same planes; where a norm follows, only by half a circle, which
    its weights do not notice.
    """
    normalised = symmetries.roles.query_key_norm != "none"
    turn = torch.zeros_like(products)
    first = torch.arange(symmetries.rotary_size // 2, device=products.device)
    second = first + len(first)
    cosine = products[first, first] + products[second, second]
    sine = products[second, first] - products[first, second]
    if normalised:
        sine = torch.zeros_like(sine)
    length = torch.hypot(cosine, sine)
    cosine = torch.where(length > 0, cosine / length, 1.0)
    sine = torch.where(length > 0, sine / length, 0.0)
    turn[first, first] = turn[second, second] = cosine
    turn[second, first], turn[first, second] = sine, -sine
    rest = slice(symmetries.rotary_size, None)
    still = products[rest, rest]
    turn[rest, rest] = torch.diag(torch.where(still.diagonal() < 0, -1.0, 1.0)) if normalised else _rotation(still)
    return turn


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
        aligned = align(pruned, base, self._symmetries)
        return {path: values.to(self.model.dtype) for path, values in aligned.items()}

    def _of_linears(self, block: int) -> dict[str, torch.Tensor]:
        names = {path: name for path, name in self.names(block).items() if path in self._linears}
        values = self._source.tensors(list(names.values()))
        return {path: values[name] for path, name in names.items()}
