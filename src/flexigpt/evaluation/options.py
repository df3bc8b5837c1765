"""What an evaluation is asked. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexigpt.runtime import InputError, RunOptions, option

_TEXT, _TASKS = "What to measure on a text", "Benchmark tasks"


def _task_names(typed: str) -> list[str]:
    return [name.strip() for name in typed.split(",")]


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RunOptions):
    """What to measure, and how: perplexity, tasks, or both.

    Attributes:
        perplexity: text to measure perplexity on: FILE[#COLUMN], a .txt, .jsonl, .jsonl.gz or .parquet file, or
            NAME[:CONFIG][@SPLIT][#COLUMN] of a data set on the hub; the paper's is JeanKaddour/minipile.
        tasks: benchmarks of the LM Evaluation Harness, by its names; the paper's are arc_easy, arc_challenge, piqa,
            winogrande and hellaswag.
        against: source to compare the models with, on the text of --perplexity: divergence and agreement.
        limit: questions of each task, the first ones; default: all.
        window_length: tokens in a window; default: the shortest context of the models, at most 2048.
        stride: tokens from one window's start to the next's; default: the window length, no overlap.
        num_fewshot: solved examples before each question; default: what the task says, mostly 0.
        batch_size: requests in one forward pass, or auto: as many as fit.
        include_path: folder with task files of your own.
    """

    perplexity: str | None = option(None, group=_TEXT, everyday=True, metavar="TEXT")
    tasks: Sequence[str] | None = option(
        None, group=_TASKS, everyday=True, metavar="arc_easy,piqa,...", parse=_task_names
    )
    against: str | None = option(None, group=_TEXT, everyday=True, metavar="SOURCE")
    limit: int | None = option(None, group=_TASKS, everyday=True, least=1)
    window_length: int | None = option(None, group=_TEXT)
    stride: int | None = option(None, group=_TEXT, command=False)
    num_fewshot: int | None = option(None, group=_TASKS, least=0)
    batch_size: int | str = option("auto", group=_TASKS, metavar="auto|N")
    include_path: Path | None = option(None, group=_TASKS, metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perplexity is None and self.tasks is None:
            raise InputError(
                "nothing to measure: give --perplexity TEXT (the paper's is JeanKaddour/minipile), --tasks, or both"
            )
        tasks = [] if self.tasks is None else list(self.tasks)
        if self.tasks is not None and not (tasks and all(tasks)):
            raise InputError(
                "--tasks names a task that is empty: give names with commas between them, as arc_easy,piqa"
            )
        twice = next((name for name in tasks if tasks.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"--tasks names {twice} twice: give it once")
        size = str(self.batch_size)
        if size != "auto" and not re.fullmatch("[1-9][0-9]{0,4}", size):
            raise InputError(f"--batch-size {size} cannot be used: give auto or a number from 1 to 99,999")
