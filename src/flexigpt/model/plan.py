"""The plan (what stands in the place of what is pruned) and parameter accounting. No torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from flexigpt.runtime import InputError, unique_names

# Of the file that `--plan-only` writes; a checkpoint's configuration has its own. Version 2 has sublayers; the least
# that says it all is written.
PLAN_FORMAT_VERSION = 2

SublayerName = Literal["attention", "mlp"]

# What a pruned sublayer becomes.
FormName = Literal["units", "none"]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One logical block that borrows the linears of another.

    Attributes:
        block: the logical block, from 0.
        base: the kept block whose linears it borrows.
        rank: rank of its adapters, one pair for each linear.
        ranks: of the linears, by path within the block, whose adapter has another one.
    """

    block: int
    base: int
    rank: int
    ranks: Mapping[str, int] | None = None

    def rank_of(self, linear: str) -> int:
        """Rank of the adapter of one linear, given by its path within the block."""
        return (self.ranks or {}).get(linear, self.rank)

    def shown_rank(self) -> str:
        """The rank, or from which to which where linears have ranks of their own."""
        ranks = sorted([self.rank, *(self.ranks or {}).values()])
        return f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"

    def to_dict(self) -> dict[str, Any]:
        """A row of the plan, JSON-ready."""
        row = {"block": self.block, "base": self.base, "rank": self.rank}
        return row if self.ranks is None else row | {"ranks": dict(self.ranks)}


@dataclass(frozen=True, kw_only=True)
class SublayerReplica:
    """What stands in the place of one pruned sublayer, the attention or the MLP of a block.

    Attributes:
        block: the logical block, from 0.
        sublayer: attention or mlp.
        form: units (an MLP with fewer of its own hidden units) or none (the sublayer writes nothing).
        units: how many are left, for the form units.
    """

    block: int
    sublayer: SublayerName
    form: FormName
    units: int | None = None

    def __post_init__(self) -> None:
        where = f"the plan's {self.sublayer} of block {self.block}"
        for name, kind in (("sublayer", SublayerName), ("form", FormName)):
            if getattr(self, name) not in get_args(kind):
                given = getattr(self, name)
                raise InputError(f"{where} has {name} {given!r}: expected {' or '.join(get_args(kind))}")
        if self.form == "units" and self.sublayer == "attention":
            raise InputError(f"{where} has the form units, which is for an mlp: give it the form none")
        if self.form == "units" and (type(self.units) is not int or self.units < 1):
            raise InputError(f"{where} has units = {self.units!r}: the form units needs a whole number above 0")
        if self.form == "none" and self.units is not None:
            raise InputError(f"{where} has units, which the form none has no use for: leave them out")

    def to_dict(self) -> dict[str, Any]:
        """A row of the plan, JSON-ready."""
        row = {"block": self.block, "sublayer": self.sublayer, "form": self.form}
        return row if self.units is None else row | {"units": self.units}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that pruning or extension decides. What it does not name is kept as it is.

    Attributes:
        num_blocks: logical blocks of the compact model.
        replicas: of whole blocks, in order of their blocks.
        sublayers: replicas of single sublayers, in order of their blocks, attention before MLP.

    Raises:
        InputError: a block that does not exist, is named twice or is its own base; a base that is itself a replica or
            has a pruned sublayer; a rank below 1.
    """

    num_blocks: int
    replicas: tuple[Replica, ...] = ()
    sublayers: tuple[SublayerReplica, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", tuple(sorted(self.replicas, key=lambda replica: replica.block)))
        object.__setattr__(self, "sublayers", tuple(sorted(self.sublayers, key=lambda one: (one.block, one.sublayer))))
        self._check_replicas()
        self._check_sublayers()

    def _check_sublayers(self) -> None:
        taken = {*self.pruned, *(replica.base for replica in self.replicas)}
        seen: set[tuple[int, str]] = set()
        for one in self.sublayers:
            where = f"the plan's {one.sublayer} of block {one.block}"
            if not 0 <= one.block < self.num_blocks:
                raise InputError(
                    f"the plan names block {one.block}, but the model has blocks 0 to {self.num_blocks - 1}: "
                    "correct the plan"
                )
            if one.block in taken:
                raise InputError(f"{where} is that of a replica or of its base: leave one of the two out")
            if (one.block, one.sublayer) in seen:
                raise InputError(f"{where} is named more than once: keep one of its rows")
            seen.add((one.block, one.sublayer))

    def _check_replicas(self) -> None:
        blocks = [replica.block for replica in self.replicas]
        for replica in self.replicas:
            for role, block in (("block", replica.block), ("base", replica.base)):
                if not 0 <= block < self.num_blocks:
                    raise InputError(
                        f"the plan names {role} {block}, but the model has blocks 0 to {self.num_blocks - 1}: "
                        "correct the plan"
                    )
            if blocks.count(replica.block) > 1:
                raise InputError(f"the plan names block {replica.block} more than once: keep one of its rows")
            if replica.base == replica.block:
                raise InputError(f"the plan makes block {replica.block} its own base: name a kept block instead")
            if replica.base in blocks:
                raise InputError(
                    f"the plan gives block {replica.block} the base {replica.base}, which is itself pruned: "
                    f"name a kept block, one of {self.kept}"
                )
            least = min([replica.rank, *(replica.ranks or {}).values()])
            if least < 1:
                raise InputError(f"the plan gives block {replica.block} rank {least}: a rank is at least 1")

    @property
    def pruned(self) -> list[int]:
        """The logical blocks that are replicas, ascending."""
        return [replica.block for replica in self.replicas]

    @property
    def kept(self) -> list[int]:
        """The logical blocks that keep their own linears, ascending."""
        pruned = {replica.block for replica in self.replicas}
        return [block for block in range(self.num_blocks) if block not in pruned]

    def _repr_html_(self) -> str:
        """How a notebook shows it: a row for each block that changes."""
        rows = [(one.block, "block", f"replica of {one.base}, rank {one.shown_rank()}") for one in self.replicas]
        for one in self.sublayers:
            rows.append((one.block, one.sublayer, "gone" if one.units is None else f"{one.units:,} units"))
        cells = "".join(f"<tr><th>{row[0]}</th><td>{row[1]}</td><td>{row[2]}</td></tr>" for row in sorted(rows))
        heading = "<tr><th>block</th><th>what</th><th>becomes</th></tr>"
        return f"<table>{heading}{cells}</table><p>Everything else of {self.num_blocks} blocks is kept.</p>"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data: what `--plan-only` writes and `--plan` reads."""
        data = {
            "format_version": 2 if self.sublayers else 1,
            "num_blocks": self.num_blocks,
            "replicas": [replica.to_dict() for replica in self.replicas],
        }
        return data | {"sublayers": [one.to_dict() for one in self.sublayers]} if self.sublayers else data

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """Reads what `to_dict` wrote.

        Raises:
            InputError: keys that are missing or unknown, values that are not whole numbers, a newer format version,
                or a broken invariant.
        """
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is int and version not in range(1, PLAN_FORMAT_VERSION + 1):
            raise InputError(
                f"the plan has format version {version}, this flexigpt reads versions up to "
                f"{PLAN_FORMAT_VERSION}: upgrade flexigpt or write the plan again with --plan-only"
            )
        if version == 1 and type(version) is int and "sublayers" in data:
            raise InputError("the plan has sublayers, which version 1 does not know: give it format_version 2")
        known = {"format_version", "num_blocks", "replicas"} | ({"sublayers"} if version == 2 else set())
        _check_keys(data, known, "the plan")
        return cls.of_rows(data["num_blocks"], data["replicas"], data.get("sublayers", []))

    @classmethod
    def of_rows(cls, num_blocks: int, rows: Any, sublayers: Any = ()) -> "Plan":
        """The plan of rows as `to_dict` writes them; the configuration of a compact model holds such rows.

        Raises:
            InputError: as `from_dict`.
        """
        if not isinstance(rows, list):
            raise InputError("the plan's replicas are no list: expected rows of block, base and rank")
        for number, row in enumerate(rows):
            where = f"row {number} of the plan's replicas"
            _check_ranks(row, where)
            numbers = {key: row[key] for key in row if key != "ranks"} if isinstance(row, dict) else row
            _check_keys(numbers, {"block", "base", "rank"}, where)
        replicas = tuple(Replica(**row) for row in rows)
        return cls(num_blocks=num_blocks, replicas=replicas, sublayers=_sublayers_of(sublayers))

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Reads a plan file (JSON).

        Raises:
            InputError: a file that is missing or is not a valid plan; the message names the file.
        """
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"), object_pairs_hook=unique_names)
        except InputError as error:
            raise InputError(f"the plan {path} {error}: leave one of them out") from error
        except OSError as error:
            reason = error.strerror
            raise InputError(
                f"the plan {path} cannot be read ({reason}): give a file that --plan-only wrote"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"the plan {path} is not JSON ({error}): give a file that --plan-only wrote") from error
        return cls.from_dict(data)


def _check_keys(data: Any, expected: set[str], where: str) -> None:
    if not isinstance(data, dict) or set(data) != expected:
        given = ", ".join(sorted(data)) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{where} has {given or 'nothing'}: expected exactly {', '.join(sorted(expected))}")
    for key, value in data.items():
        if key not in ("replicas", "sublayers") and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{where} has {key} = {value!r}: expected a whole number")


def _sublayers_of(rows: Any) -> tuple[SublayerReplica, ...]:
    if not isinstance(rows, list | tuple):
        raise InputError("the plan's sublayers are no list: expected rows of block, sublayer, form and its number")
    found = []
    for number, row in enumerate(rows):
        where = f"row {number} of the plan's sublayers"
        least, most = {"block", "sublayer", "form"}, {"block", "sublayer", "form", "units"}
        if not isinstance(row, dict) or not least <= set(row) <= most:
            given = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{where} has {given or 'nothing'}: expected block, sublayer, form, and units of them")
        if type(row["block"]) is not int:
            raise InputError(f"{where} has block = {row['block']!r}: expected a whole number")
        found.append(SublayerReplica(**row))
    return tuple(found)


def _check_ranks(row: Any, where: str) -> None:
    ranks = row.get("ranks", {}) if isinstance(row, dict) else {}
    if not isinstance(ranks, dict) or any(type(rank) is not int for rank in ranks.values()):
        raise InputError(f"{where} has ranks = {ranks!r}: expected a whole number for each linear's path")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a source model that accounting needs; every block has the same shape.

    Attributes:
        parameters: stored parameters of the whole source.
        block_parameters: parameters of one block.
        linears: name -> (outputs, inputs) of each linear of a block.
        hidden_size: width of the residual stream, hence of an output norm.
        num_output_norms: output norms of one replica; 0 where they are switched off.
    """

    parameters: int
    block_parameters: int
    linears: Mapping[str, tuple[int, int]]
    hidden_size: int
    num_output_norms: int

    @property
    def linear_parameters(self) -> int:
        """Weights of the linears of one block: what a replica does not store. Biases and input norms it keeps."""
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def max_rank(self) -> int:
        """The highest rank that no linear's adapter exceeds."""
        return min(min(size) for size in self.linears.values())

    def adapter_parameters(self, rank: int | Replica) -> int:
        """Of one replica, of which only the rank is known, or all."""
        ranks = [rank if isinstance(rank, int) else rank.rank_of(path) for path in self.linears]
        return sum(r * sum(size) for r, size in zip(ranks, self.linears.values(), strict=True))

    def replica_parameters(self, rank: int | Replica) -> int:
        """Adapters and output norms of one replica: what it adds to plain removal, but for biases and norms."""
        return self.adapter_parameters(rank) + self.num_output_norms * self.hidden_size

    def removed_parameters(self, num_pruned: int) -> int:
        """Stored parameters after plain removal of `num_pruned` blocks."""
        return self.parameters - num_pruned * self.block_parameters

    def stored_parameters(self, ranks: Iterable[int | Replica]) -> int:
        """Stored parameters of the compact model that has these replicas, or replicas of these ranks."""
        return self.parameters + sum(self.replica_parameters(rank) - self.linear_parameters for rank in ranks)

    def check_rank(self, rank: int) -> None:
        """Raises InputError where an adapter of this rank would be larger than a linear."""
        name, size = min(self.linears.items(), key=lambda item: min(item[1]))
        if rank > self.max_rank:
            raise InputError(
                f"rank {rank} is above the size of {name} ({size[0]} x {size[1]}): give a rank up to {self.max_rank}"
            )

    def check_replica(self, replica: Replica) -> None:
        """Raises InputError for ranks that the linears do not have room for, or of a linear that is not there."""
        self.check_rank(replica.rank)
        for path, rank in (replica.ranks or {}).items():
            if path not in self.linears:
                raise InputError(
                    f"the plan gives block {replica.block} a rank for {path}, which is not there: name linears of "
                    f"{', '.join(self.linears)}"
                )
            if rank > min(self.linears[path]):
                outputs, inputs = self.linears[path]
                raise InputError(
                    f"rank {rank} of block {replica.block} is above the size of {path} ({outputs} x {inputs}): give a "
                    f"rank up to {min(outputs, inputs)}"
                )

    def parameters_at(self, ratio: float, num_blocks: int) -> int:
        """What is stored where that share of the blocks' parameters is pruned."""
        return self.parameters - round(ratio * num_blocks * self.block_parameters)

    def check_target(self, target: int) -> None:
        """Raises InputError where the source meets a target already."""
        if target >= self.parameters:
            raise InputError(
                f"the source has {self.parameters:,} parameters, which meets the target of {target:,} already: "
                "give a smaller --target-size"
            )

    def num_pruned_for(self, target_parameters: int, rank: int, num_blocks: int) -> int:
        """The fewest pruned blocks that bring the stored parameters down to the target.

        Raises:
            InputError: a target that the source meets already, or that no number of pruned blocks reaches.
        """
        sizes = [self.stored_parameters([rank] * n) for n in range(1, num_blocks)]
        return self._fewest(target_parameters, sizes, f" at rank {rank}", " or a lower --rank")

    def num_removed_for(self, target_parameters: int, num_blocks: int) -> int:
        """The fewest blocks whose plain removal brings the stored parameters down to the target.

        Raises:
            InputError: as `num_pruned_for`.
        """
        sizes = [self.removed_parameters(n) for n in range(1, num_blocks)]
        return self._fewest(target_parameters, sizes)

    def _fewest(self, target: int, sizes: Sequence[int], where: str = "", remedy: str = "") -> int:
        """The first of the sizes, which are those with one pruned block, two and so on, that meets the target."""
        self.check_target(target)
        for num_pruned, size in enumerate(sizes, start=1):
            if size <= target:
                return num_pruned
        raise InputError(
            f"the target of {target:,} parameters is out of reach:{where} the least is "
            f"{min(sizes, default=self.parameters):,}; give a larger --target-size{remedy}"
        )


# The paper's rank 256 at LLaMA-2 7B's hidden size 4096.
_HIDDEN_SIZE_PER_RANK = 16


def default_rank(hidden_size: int) -> int:
    """Rank of the adapters where none is asked for."""
    return max(1, hidden_size // _HIDDEN_SIZE_PER_RANK)


def plan_summary(plan: Plan, units: int | None = None) -> str:
    """What was done, in a line without a full stop; `units` is how many hidden units an MLP of the source has."""
    narrow = [one.units for one in plan.sublayers if one.units is not None]
    parts = [f"{len(plan.replicas)} of {plan.num_blocks} blocks borrow another's linears"] if plan.replicas else []
    if narrow:
        left = f"{sum(narrow) / (len(narrow) * units):.0%}" if units else f"{sum(narrow):,}"
        parts.append(
            f"{_counted(len(narrow), 'MLP', 'keep')} {left} of {'its' if len(narrow) == 1 else 'their'} hidden units"
        )
    gone = [one.sublayer for one in plan.sublayers if one.form == "none"]
    counts = {"attention": gone.count("attention"), "MLP": gone.count("mlp")}
    told = [_counted(count, name) for name, count in counts.items() if count]
    if told:
        parts.append(f"{' and '.join(told)} {'is' if len(gone) == 1 else 'are'} gone")
    return "; ".join(parts) or "all blocks are kept"


def plan_in_words(plan: Plan, units: int | None = None) -> str:
    """What became of which block, in a sentence: for those who do not see the picture. `units` as in `plan_summary`."""
    borrowers: dict[int, list[int]] = {}
    for replica in plan.replicas:
        borrowers.setdefault(replica.base, []).append(replica.block)
    told = [f"{_blocks(blocks, 'borrow')} the linears of block {base}" for base, blocks in sorted(borrowers.items())]
    narrow = [f"{one.units:,} in block {one.block}" for one in plan.sublayers if one.units is not None]
    if narrow:
        all_of_them = f"{units:,} hidden units" if units else "hidden units"
        told.append(f"of their {all_of_them} MLPs keep {', '.join(narrow)}")
    for sublayer, name in (("attention", "attention"), ("mlp", "MLP")):
        gone = [one.block for one in plan.sublayers if (one.sublayer, one.form) == (sublayer, "none")]
        told += [f"{_blocks(gone, 'lack')} the {name}"] if gone else []
    return f"The stack of {plan.num_blocks} blocks: {'; '.join(told) or 'none is a replica'}."


def _counted(count: int, name: str, verb: str = "") -> str:
    """1 MLP keeps, 2 MLPs keep."""
    one = count == 1
    return f"{count} {name}{'' if one else 's'}" + (f" {verb}{'s' if one else ''}" if verb else "")


def _blocks(blocks: Sequence[int], verb: str) -> str:
    """Block 2 borrows, blocks 2, 4 borrow."""
    one = len(blocks) == 1
    return f"block{'' if one else 's'} {', '.join(map(str, blocks))} {verb}{'s' if one else ''}"
