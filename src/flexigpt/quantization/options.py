"""What quantisation is asked. No torch."""

from dataclasses import dataclass

from flexigpt.runtime import InputError, check_options, option

_MEASURE = "What to measure"

# Bits of a weight -> the library that stores them.
LIBRARIES = {8: "torchao", 4: "bitsandbytes"}


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How small, and what to measure before and after.

    Attributes:
        bits: of each weight of the blocks' linears: 8 (torchao, a scale for each output) or 4 (bitsandbytes, NF4).
        perplexity: text to measure perplexity and agreement on, before and after: a .txt, .jsonl, .jsonl.gz or
            .parquet file, or NAME[:CONFIG][@SPLIT] of a data set on the hub; default: none.
        window_length: tokens in a window; default: the model's context, at most 2048.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """

    bits: int = option(group="How small", everyday=True, metavar="8|4")
    perplexity: str | None = option(None, group=_MEASURE, everyday=True, metavar="FILE|NAME")
    window_length: int | None = option(None, group=_MEASURE)
    device: str = option("auto")

    def __post_init__(self) -> None:
        check_options(self)
        if self.bits not in LIBRARIES:
            raise InputError(f"--bits {self.bits} cannot be used: give {' or '.join(map(str, LIBRARIES))}")
