"""Options classes: what a field says of itself, and the checks that need no more than that. No torch.

The command line is made from the fields: type, default, the description in the class's docstring, and what `option`
adds. A class of options is a frozen dataclass, keyword-only; each room owns the fields that it reads, and a flow's
class inherits them, so that its fields are flat: `PruneOptions(ratio=0.3, windows=128)`.
"""

import dataclasses
import math
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flexigpt.runtime.errors import InputError, check_seed, flag


def option(
    default: Any = dataclasses.MISSING,
    *,
    group: str = "Running it",
    everyday: bool = False,
    command: bool = True,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    least: int | None = None,
    most: int = 2**31 - 1,
) -> Any:
    """A field of an options class.

    Args:
        default: of the field; none: it must be given.
        group: heading under which the command's help shows it.
        everyday: whether the short help shows it; the rest is under --help-all.
        command: whether the command has it; False: Python alone.
        metavar: how the help shows the value.
        parse: makes the field's value of what was typed; raises InputError.
        least: the least number that it may be.
        most: the largest whole number that it, or each of several, may be.
    """
    shown = {"group": group, "everyday": everyday, "command": command, "metavar": metavar, "parse": parse}
    return dataclasses.field(default=default, metadata=shown | {"least": least, "most": most})


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values that a field of type `Literal[...]`, or of one with None beside it, may have; empty: any."""
    if get_origin(kind) is Literal:
        return tuple(str(value) for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return tuple(value for part in get_args(kind) for value in choices_of(part))
    return ()


def check_options(options: Any) -> None:
    """Checks each field of an options class by itself: choices, least and largest values, the seed.

    Raises:
        InputError: the first value that cannot be.
    """
    kinds = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, choices = getattr(options, field.name), choices_of(kinds[field.name])
        if value is None:
            continue
        if choices and isinstance(value, str) and value not in choices and str not in get_args(kinds[field.name]):
            raise InputError(f"{flag(field.name)} {value} is unknown: give {', '.join(choices)}")
        least = field.metadata.get("least")
        if least is not None and isinstance(value, int | float) and value < least:
            raise InputError(f"{flag(field.name)} {value} is too small: give at least {least}")
        most = field.metadata.get("most", math.inf)
        large = [
            number for number in (value if isinstance(value, tuple | list) else [value]) if isinstance(number, int)
        ]
        if field.name != "seed" and max(large, default=0) > most:
            raise InputError(f"{flag(field.name)} {max(large)} is too large: give at most {most:,}")
        if field.name == "seed":
            check_seed(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run runs on.

    Attributes:
        dtype: of the weights; auto is the model's own.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto")
    device: str = option("auto")

    def __post_init__(self) -> None:
        check_options(self)
