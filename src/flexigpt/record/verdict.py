"""What was measured of a model, in one sentence: its size, what it lost, and what to do next."""

import math
from typing import Any

from flexigpt.record.read import Recorded
from flexigpt.record.record import Record, find_in
from flexigpt.record.tables import beaten_by_8_bits, shown_name
from flexigpt.runtime import megabytes

# Perplexity, as a multiple of the source's: up to the first a model is as good, up to the second near, beyond the third
# it hardly predicts text.
_EQUAL, _NEAR, _BROKEN = 1.02, 1.1, 10.0


def verdict(model: Recorded) -> str | None:
    """One sentence without a full stop; None of a model that was not compared with anything."""
    if model.frontier:
        return _of_sizes(model.record)
    if not model.sizes:
        planned = find_in(model.record, "planned")
        of_what = f" for {planned['share']:.1%} of the parameters, {megabytes(planned['bytes'])} MB" if planned else ""
        none = f"A plan{of_what}: no model was made, and nothing of it was measured"
        return none if model.plan is not None else None
    first, last = model.sizes[0], model.sizes[-1]
    told = [f"{last.bytes / first.bytes:.0%} of the bytes"]
    losses = perplexity_pair(model)
    if losses:
        told.append(f"perplexity {_shown(losses[0])} \u2192 {_shown(losses[1])}")
    means = [one.get("tasks_mean") for one in _evaluated(model)]
    if len(means) == 2 and None not in means:
        told.append(f"mean of the tasks {means[0]:.1%} \u2192 {means[1]:.1%}")
    return f"{', '.join(told)}: {_advice(losses, 'recovery' in model.record)}"


def _of_sizes(record: Record) -> str:
    """Of a ladder of sizes: its knee, or what is smaller and better."""
    source, knee = record["source"], record["points"][record["knee"]]

    def told(one: dict[str, Any]) -> str:
        return f"{one['bytes'] / source['bytes']:.0%} of the bytes, perplexity {_shown(source['perplexity'])} \u2192 "

    if knee in beaten_by_8_bits(record):
        eight = source["int8"]
        better = f"in 8 bits the source itself takes {told(eight)}{_shown(eight['perplexity'])}"
        return f"Quantise first: {better}; pruning alone, the knee is at {told(knee)}{_shown(knee['perplexity'])}"
    return f"The knee is at {told(knee)}{_shown(knee['perplexity'])}; below it the perplexity rises faster than before"


def perplexity_pair(model: Recorded) -> tuple[float, float] | None:
    """Perplexity of the source and of this model on one text: from the record, or else from an evaluation of both."""
    measured = model.perplexities
    alike = [one for one in measured if all(one[key] == measured[-1][key] for key in ("text", "window_length"))]
    if len(alike) > 1 and alike[0] is measured[0]:
        return alike[0]["perplexity"], alike[-1]["perplexity"]
    found = [one["perplexity"] for one in _evaluated(model) if "perplexity" in one]
    if len(found) == 2 and found[0]["text"] == found[1]["text"]:
        return found[0]["perplexity"], found[1]["perplexity"]
    return None


def _evaluated(model: Recorded) -> list[dict[str, Any]]:
    """The source and this model, where one evaluation has both."""
    rows = {shown_name(one["name"]): one for one in (model.evaluation or {}).get("models", ())}
    names = shown_name(model.chain[0]["source_name"]), model.name
    return [rows[name] for name in names] if all(name in rows for name in names) else []


def _advice(losses: tuple[float, float] | None, trained: bool) -> str:
    if losses is None:
        return "what it lost was not measured; flexigpt eval --perplexity TEXT --record measures it"
    times = losses[1] / losses[0] if losses[0] > 0 else math.inf
    if times <= _EQUAL:
        return "as good as the source on this text"
    if times <= _NEAR:
        return "near to the source on this text"
    if not times <= _BROKEN:  # not finite is not below either
        return "it hardly predicts text yet; train it longer" if trained else "unusable before recovery"
    return "still above the source; more training may close the gap" if trained else "recover it before use"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
