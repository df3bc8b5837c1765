"""A user's file, for `make wheel`: mypy checks it against the installed package, whose types have to be there.

Each `type: ignore` has to be needed, and is not where a name's type is unknown.
"""

import flexigpt

options = flexigpt.PruneOptions(ratio=0.3, calibration="text.jsonl")
wrong = flexigpt.PruneOptions(ratio="a third")  # type: ignore[arg-type]


def small(source: str, out: str) -> int:
    """What a user writes."""
    model, plan, record = flexigpt.prune(source, options)
    flexigpt.write_checkpoint(out, model, record, source=source)
    flexigpt.prune(options, source)  # type: ignore[arg-type]
    size: int = plan.num_blocks
    flexigpt.no_such_name  # type: ignore[attr-defined]  # noqa: B018
    return size
