"""What an export can be asked for. No torch."""

from dataclasses import dataclass
from typing import Literal

from flexigpt.runtime import InputError, check_options, option

_WHAT = "What to write"

FormName = Literal["stock", "gguf", "mlx", "onnx", "executorch"]

# The bits that a form can be quantised to.
_BITS: dict[str, tuple[int, ...]] = {"stock": (), "gguf": (8, 4), "mlx": (8, 4), "onnx": (8, 4), "executorch": ()}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write.

    Attributes:
        to: the form.
        bits: of each weight, 8 or 4; default: the model's own dtype.
    """

    to: FormName = option(group=_WHAT, everyday=True)
    bits: int | None = option(None, group=_WHAT, everyday=True)

    def __post_init__(self) -> None:
        check_options(self)
        known = _BITS[self.to]
        if self.bits is not None and self.bits not in known:
            can = f"give {' or '.join(map(str, known))}" if known else "it is not quantised, leave it out"
            raise InputError(f"--bits {self.bits} cannot be had with --to {self.to}: {can}")
