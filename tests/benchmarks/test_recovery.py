"""benchmarks/recovery.py: what it compares trains as many parameters."""

import runpy
from pathlib import Path

import textbook
from flexigpt import PruneOptions, remove, write_checkpoint
from flexigpt.recovery.trainable import prepare_training, trained_parameters

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recovery.py"


def test_plain_removal_trains_as_many_parameters_to_within_a_rank(
    tiny_source: Path, tiny_compact: Path, tmp_path: Path
) -> None:
    shorter, _, record = remove(str(tiny_source), PruneOptions.paper(blocks=(2, 4)))
    write_checkpoint(tmp_path / "shorter", shorter, record, source=str(tiny_source))
    rank = runpy.run_path(str(SCRIPT))["matching_lora_rank"](str(tmp_path / "shorter"), str(tiny_compact))
    counts = []
    for folder, given in ((tiny_compact, 4), (tmp_path / "shorter", rank), (tmp_path / "shorter", rank + 1)):
        model = textbook.opened(folder)
        prepare_training(model, "replicas+kept", given, seed=0)
        counts.append(sum(parameter.numel() for parameter in trained_parameters(model).values()))
    wanted, found, more = counts
    assert abs(found - wanted) <= (more - found) / 2
