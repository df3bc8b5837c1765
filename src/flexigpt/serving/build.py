"""A server's own model of the source, built with narrow, missing and shared parts in it.

For servers whose linears have vLLM's names and arguments. Nothing of theirs is copied: their linears of a block are
built smaller, or exchanged.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from flexigpt.serving.parts import Devices, NormedOutput, NoSublayer, SharedColumns, SharedRows

BLOCKS = "model.layers"
# The server's linears of a block -> those of the checkpoint, in the order in which their outputs lie side by side.
_LINEARS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Server:
    """What differs between servers.

    Attributes:
        name: of the program.
        families: that it has a model of its own for with the linears above.
        columns: its classes of the first linear of a sublayer: `gate_up_proj`, `qkv_proj`.
        rows: its class of the last.
        missing: its class of a block that another stage of the pipeline has.
    """

    name: str
    families: frozenset[str]
    columns: tuple[Any, Any]
    rows: Any
    missing: Any


def build(server: Server, config: Any, quantised: bool, devices: Devices, make: Callable[[], nn.Module]) -> Any:
    """The server's model of the source, which `make` makes, as a compact model.

    Raises:
        ValueError: a family, a form or a setting that this cannot serve.
    """
    _check(server, config, quantised, devices)
    with _sized(server, _sizes(config)):
        model = make()
    layers: Any = model.get_submodule(BLOCKS)
    for row in config.sublayers:
        if row["form"] == "none" and not isinstance(layers[row["block"]], server.missing):
            setattr(layers[row["block"]], config.sublayer_paths[row["sublayer"]]["module"], NoSublayer())
    for row in config.replicas:
        block, base = layers[row["block"]], layers[row["base"]]
        elsewhere = [isinstance(one, server.missing) for one in (block, base)]
        if any(elsewhere) and not all(elsewhere):
            raise ValueError(
                f"block {row['block']} and its base {row['base']} are on two stages of the pipeline: "
                "leave out --pipeline-parallel-size"
            )
        if not any(elsewhere):
            _share(block, base, row, config, devices)
    return model


def _check(server: Server, config: Any, quantised: bool, devices: Devices) -> None:
    """Raises ValueError for what this cannot serve."""
    way = f"`flexigpt export --to stock` makes a model that {server.name} serves as any other"
    family, linears = config.text_config.model_type, {name for names in _LINEARS.values() for name in names}
    if family not in server.families or (config.replicas and set(config.linears) != linears):
        raise ValueError(f"compact models of the family {family} in this form are not served by {server.name}: {way}")
    if quantised:
        raise ValueError(f"compact models are served by {server.name} unquantised only: {way}")
    for row in config.sublayers:
        if row.get("units", 0) % devices.count:
            raise ValueError(
                f"the {row['units']} units of block {row['block']} cannot be split over {devices.count} devices: "
                "set --tensor-parallel-size to a divisor of every block's units"
            )


def _sizes(config: Any) -> dict[str, int]:
    """Linears that have not their source's size -> units of the MLP; 0: another module takes the place."""
    attention, mlp = tuple(_LINEARS)[:2], tuple(_LINEARS)[2:]
    sizes = {f"{row['block']}.{path}": 0 for row in config.replicas for path in _LINEARS}
    for row in config.sublayers:
        for path in attention if row["sublayer"] == "attention" else mlp:
            sizes[f"{row['block']}.{path}"] = row.get("units", 0)
    return sizes


@contextlib.contextmanager
def _sized(server: Server, sizes: dict[str, int]) -> Iterator[None]:
    """Within it the server's linears of these names are built at these sizes: no memory is asked for what is pruned."""
    kinds = (*server.columns, server.rows)
    plain = [kind.__init__ for kind in kinds]

    def sized(init: Any, is_row: bool) -> Any:
        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(init).bind(self, *args, **kwargs)
            asked = given.arguments
            units = sizes.get(asked.get("prefix", "").rpartition("layers.")[2])
            if units == 0:
                asked["output_size" if is_row else "input_size" if "input_size" in asked else "hidden_size"] = 1
            elif units is not None and is_row:
                asked["input_size"] = units
            elif units is not None:
                asked["output_sizes"] = [units] * len(asked["output_sizes"])
            init(*given.args, **given.kwargs)

        return build

    try:
        for kind, init in zip(kinds, plain, strict=True):
            kind.__init__ = sized(init, kind is server.rows)
        yield
    finally:
        for kind, init in zip(kinds, plain, strict=True):
            kind.__init__ = init


def _share(block: Any, base: Any, row: dict[str, Any], config: Any, devices: Devices) -> None:
    """Turns one block into a replica of another."""
    for path, linears in _LINEARS.items():
        parent, name = path.split(".")
        ranks = [(row.get("ranks") or {}).get(linear, row["rank"]) for linear in linears]
        kind = SharedRows if len(linears) == 1 else SharedColumns
        setattr(block.get_submodule(parent), name, kind(base.get_submodule(path), devices, ranks, config.base_scale))
    for path in config.output_norms:
        parent, _, name = path.rpartition(".")
        inner = block.get_submodule(path)
        normed = NormedOutput(inner, config.text_config.hidden_size, config.output_norm_eps)
        setattr(block.get_submodule(parent), name, normed)
