"""What commands share: help of options, progress bars, printing, writing what a flow made. No command, no app."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexigpt.pruning import Estimate
from flexigpt.record import Record, notes, result_tables, write_checkpoint
from flexigpt.report import plan_picture
from flexigpt.runtime import Track, check_space, default_folder
from flexigpt.weights import Assembly

T = TypeVar("T")

stdout = Console(soft_wrap=True)

_STEP_LINES = 20

OVERWRITE = "replace the checkpoint or plan in OUT."


class Bars:
    """Progress bars on stderr, one for each stage, with the time left."""

    def __init__(self, shown: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True, soft_wrap=True),
            disable=not shown,
        )

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        return iter(self._progress.track(items, total=total, description=stage))

    def tell(self, values: dict[str, float], steps: int) -> None:
        """A line about a step of training, for some twenty steps of a run and wherever perplexity was measured."""
        step = int(values["step"])
        if step * _STEP_LINES // steps > (step - 1) * _STEP_LINES // steps or "perplexity" in values:
            self._progress.console.print(step_line(values, steps), highlight=False)


def step_line(values: dict[str, float], steps: int) -> str:
    """What a step of training gave, in one line."""
    parts = [f"step {int(values['step'])}/{steps}", f"loss {values['loss']:.4f}"]
    if values["divergence"]:
        parts.append(f"(cross-entropy {values['cross_entropy']:.4f}, divergence {values['divergence']:.4f})")
    if "draft_divergence" in values:
        parts.append(f"draft's divergence {values['draft_divergence']:.4f}")
    parts += [f"lr {values['lr']:.2e}", f"{values['tokens_per_second']:,.0f} tokens/s"]
    if "model_flops_utilisation" in values:
        parts.append(f"{values['model_flops_utilisation']:.1%} of peak FLOPs")
    if "perplexity" in values:
        parts.append(f"held-out perplexity {values['perplexity']:.2f}")
    return "  ".join(parts)


def print_json(data: dict[str, Any]) -> None:
    """Data on stdout, for programs."""
    print(json.dumps(data, indent=2))


def tell_estimate(estimate: Estimate, out: Path) -> None:
    """Says on stderr what a run will take.

    Raises:
        InputError: a disk too small for it.
    """
    check_space(out, estimate.written)
    check_space(default_folder(), estimate.scratch, "scratch files in the cache need")
    print(estimate.line(), file=sys.stderr)


def write_and_show(out: Path, source: str, assembly: Assembly, record: Record, track: Track) -> None:
    """Writes a checkpoint, and prints what became of its blocks, what it cost, and where it lies."""
    extras = plan_picture(assembly.model.config)
    write_checkpoint(out, assembly, record, source=source, extras=extras, track=track)
    for table in result_tables(assembly.model.config, record):
        stdout.print(table)
    for note in notes(record):
        print(note)
    print(f"checkpoint written to {out}")
