"""Which text a model is calibrated on. No torch."""

from dataclasses import dataclass

from flexigpt.runtime import check_options, option
from flexigpt.text import TextNames, shares_of

TEXT_GROUP = "Text"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which text a model is calibrated on.

    Attributes:
        calibration: text that decides what is pruned, and that what is left is refitted to: a .txt, .jsonl, .jsonl.gz
            or .parquet file, or NAME[:CONFIG][@SPLIT] of a data set on the hub; given several times, a mixture in
            equal parts, or with =SHARE of the tokens after each. It is read only where something needs it.
        windows: calibration windows; more fit better, and take longer.
        window_length: tokens in a window, of perplexity too; default: the model's context, at most 2048.
    """

    calibration: TextNames = option("JeanKaddour/minipile", group=TEXT_GROUP, everyday=True, metavar="FILE|NAME")
    windows: int = option(64, group=TEXT_GROUP, least=1)
    window_length: int | None = option(None, group=TEXT_GROUP)

    def __post_init__(self) -> None:
        check_options(self)
        shares_of(self.calibration)
