"""The report as one HTML page that needs nothing else: what page.html.j2 is given."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from flexigpt.model import plan_summary
from flexigpt.record import (
    Record,
    Recorded,
    Rows,
    evaluation_rows,
    fidelities,
    find_in,
    frontier_rows,
    held_out,
    notes,
    plan_rows,
    removal_rows,
    shown_name,
    verdict,
)
from flexigpt.runtime import megabytes

Svgs = Mapping[str, Markup]  # by the figure's name

_OF_ONE = {
    "plan": "What became of each block",
    "distances": "Why these bases",
    "adapters": "What replicas mend",
    "storage": "What is stored",
    "settings": "Settings",
}

_OF_ALL = {
    "frontier": "How small it can go",
    "continuations": "The same words, continued",
    "recovery": "Recovery",
    "evaluation": "Evaluation",
}

# What records a section that is left out.
_RECORDED_BY = {
    "continuations": "flexigpt eval OUT SOURCE --perplexity TEXT --record writes how both continue the same words",
    "recovery": "flexigpt recover trains a model back",
    "evaluation": "flexigpt eval --record measures models side by side",
}


def page(models: Sequence[Recorded], own: Sequence[Svgs], shared: Svgs, palette: str, generator: str) -> str:
    """The whole page.

    Args:
        models: one, or several to compare.
        own: the SVGs of each model.
        shared: the SVGs of all together.
        palette: the colours as CSS.
        generator: what wrote the page, for the next report to know it by.
    """
    here = files("flexigpt.report")
    template, style = ((here / name).read_text(encoding="utf-8") for name in ("page.html.j2", "report.css"))
    shown = [_of_one(model, svgs) for model, svgs in zip(models, own, strict=True)]
    there = {
        "frontier": "frontier" in shared,
        "continuations": _continuations(models),
        "recovery": "recovery-cross-entropy" in shared,
        "evaluation": _evaluations(models),
    }
    sections = [
        {"id": name, "heading": heading, "name": name, "model": None}
        for name, heading in _OF_ALL.items()
        if there[name]
    ]
    each = []
    for number, model in enumerate(shown):
        suffix, whose = (f"-{number}", f"{model['name']}: ") if len(shown) > 1 else ("", "")
        for name in model["sections"]:
            heading = _OF_ONE[name]
            each.append({"id": f"{name}{suffix}", "heading": f"{whose}{heading}", "name": name, "model": model})
    first = [one for one in sections if one["name"] in ("frontier", "continuations")]
    later = [one for one in sections if one not in first]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        models=shown,
        shared=shared,
        sections=[*first, *later, *each] if len(shown) > 1 else [*first, *each[:-1], *later, each[-1]],
        recovery=[svg for name, svg in shared.items() if name.startswith("recovery")],
        style=Markup(f"{palette}\n{style}"),
        generator=generator,
        evaluations=there["evaluation"],
        continuations=there["continuations"],
        near=bool(fidelities(models)),
        unrecorded=[
            told for name, told in _RECORDED_BY.items() if not (there[name] or all(m.frontier for m in models))
        ],
        **(_recovery(models) if there["recovery"] else {}),
    )


def _of_one(model: Recorded, svgs: Svgs) -> dict[str, Any]:
    """What is shown of one model: texts, figures, and tables where there is something to show."""
    record, source = model.record, model.chain[0]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    score = find_in(record, "block_score") or ""
    scored = next((note for note in notes(source) if note.startswith(f"{score} on ")), score)
    return {
        "name": model.name,
        "lead": _what_it_is(model),
        "verdict": verdict(model),
        "numbers": _numbers(model),
        "command": record.get("command"),
        "origin": f"Source: {shown_name(source['source_name'])}. {versions}.",
        "svgs": svgs,
        "sections": _sections(model, svgs),
        "stack": _stack_caption(model, f"{scored[:1].upper()}{scored[1:]}"),
        "removed": model.removed,
        "blocks": _block_rows(model),
        "distances": _distance_rows(model) if "distances" in svgs else None,
        "spectra": _spectrum_rows(model) if "adapters" in svgs else None,
        "sizes": _size_rows(model) if model.sizes else None,
        "plain_removal": _beside_plain_removal(model),
        "ladder": frontier_rows(record) if model.frontier else None,
        "settings": [
            (_option_rows(one), None if one is record else one.get("command")) for one in reversed(model.chain)
        ],
    }


def _stack_caption(model: Recorded, scored: str) -> str:
    """What the stack of blocks and the bars beside it show; `scored` is which score on which text."""
    plan, costs, scores = model.plan, find_in(model.record, "sublayer_costs"), find_in(model.record, "scores")
    told = ["The stack of blocks, the first at the top."] if plan else []
    if plan and plan.sublayers:
        told.append("Beside the attention stands the MLP, filled as far as its hidden units are left.")
    if model.bases:
        told.append("A replica computes with the linears of the block that its arrow leads to, its base.")
    if costs and plan and plan.sublayers:
        told.append("Costs are second-order estimates of what the loss would rise by, up to a factor that all share.")
    elif scores:
        told.append(f"{scored}: the lower, the less a block changes what passes through it.")
    return " ".join(told)


def _sections(model: Recorded, svgs: Svgs) -> list[str]:
    """Those that have something to show."""
    there = {"plan": {"plan", "blocks"} & set(svgs) or model.removed, "storage": model.sizes, "settings": True}
    return [name for name in _OF_ONE if there.get(name, name in svgs)]


def _what_it_is(model: Recorded) -> str:
    trained = ", after recovery training" if "recovery" in model.record else ""
    source = shown_name(model.chain[0]["source_name"])
    if model.frontier:
        return f"{source} at {len(model.record['points'])} sizes, before any training."
    if model.plan is not None:
        count, depth = len(model.plan.replicas), model.plan.num_blocks
        if model.plan.sublayers:
            done = f"{plan_summary(model.plan, find_in(model.record, 'mlp_units'))}{trained}."
            return f"{source}, compact: {done}" if model.sizes else f"A plan for {source}: {done}"
        if not model.sizes:
            return f"A plan for {source}: {count} of its {depth} blocks are to become replicas."
        return f"{source}, compact: {count} of {depth} blocks are replicas of kept ones{trained}."
    if model.removed is not None:
        count, depth = len(model.removed["blocks"]), model.removed["num_blocks"]
        return f"{source} without {count} of its {depth} blocks, and nothing in their place{trained}."
    return f"{source}{trained or ', as flexigpt wrote it'}."


def _numbers(model: Recorded) -> list[tuple[str, str, str]]:
    """Size, and perplexity before and after: what it is, the number, what is to be said of it."""
    items, sizes, measured = [], model.sizes, model.perplexities
    if sizes:
        first, last = sizes[0], sizes[-1]
        share = f"{last.bytes / first.bytes:.1%} of {_scaled(first.bytes, 'GB', 'MB')}"
        items.append(("stored", _scaled(last.bytes, "GB", "MB"), share))
        items.append(("parameters", _scaled(last.parameters, "B", "M"), f"of {_scaled(first.parameters, 'B', 'M')}"))
    alike = ("text", "window_length")
    own = [one for one in measured if all(one[key] == measured[-1][key] for key in alike)]
    if own:
        before = ", ".join(f"{one['perplexity']:.2f} {one['label']}" for one in own[:-1])
        more = f"{before}; {own[-1]['tokens']:,} tokens"
        items.append((f"perplexity, {own[-1]['label']}", f"{own[-1]['perplexity']:.2f}", more))
    return items


def _scaled(number: int, billions: str, millions: str) -> str:
    return f"{number / 1e9:,.2f} {billions}" if number >= 1e9 else f"{number / 1e6:,.2f} {millions}"


def _block_rows(model: Recorded) -> Rows | None:
    if model.plan is None:
        return _with_bytes(removal_rows(model.record), model) if model.removed else None
    # Without scores of another numbering, or distances where an edited plan has pairs that were not measured.
    always = ("source_blocks", "mlp_units", "sublayer_costs")
    shown: Record = {key: found for key in always if (found := find_in(model.record, key))}
    scores, distances = find_in(model.record, "scores") or (), model.distances
    if len(scores) == model.plan.num_blocks:
        shown |= {"scores": scores, "block_score": find_in(model.record, "block_score")}
    if distances and all(base in distances.get(block, {}) for block, base in model.bases.items()):
        shown["distances"] = distances
    return _with_bytes(plan_rows(model.plan, shown), model)


def _with_bytes(rows: Rows, model: Recorded) -> Rows:
    """The same with what each block stores."""
    last = model.sizes[-1] if model.sizes else None
    if last is None or len(last.blocks) != len(rows.rows):
        return rows
    cells = [
        [*row, megabytes(round(number * last.itemsize))] for row, number in zip(rows.rows, last.blocks, strict=True)
    ]
    return replace(rows, headings=[*rows.headings, "MB"], rows=cells, align=f"{rows.align}r" if rows.align else "")


def _distance_rows(model: Recorded) -> Rows:
    kept = sorted({j for row in model.distances.values() for j in row})
    rows = [[str(i), *(f"{row[j]:.4g}" if j in row else "" for j in kept)] for i, row in model.distances.items()]
    marked = [
        (number, 1 + kept.index(model.bases[i]))
        for number, i in enumerate(model.distances)
        if model.bases.get(i) in kept
    ]
    title = f"{find_in(model.record, 'base_distance')} distance, the base marked"
    return Rows(["pruned \\ kept", *map(str, kept)], rows, title=title, marked=marked)


def _spectrum_rows(model: Recorded) -> Rows:
    rows = [
        [str(block), linear, *(f"{r}: {share:.1%}" for r, share in zip(one["ranks"], one["mended"], strict=True))]
        for block, linears in find_in(model.record, "adapter_spectra").items()
        for linear, one in linears.items()
    ]
    widest = max(map(len, rows))
    headings = ["block", "linear", *["r: mended"] * (widest - 2)]
    return Rows(headings, [row + [""] * (widest - len(row)) for row in rows])


def _size_rows(model: Recorded) -> Rows:
    sizes = model.sizes
    parts = dict.fromkeys(part for size in sizes for part in size.parts)
    rows = [[part, *(megabytes(size.bytes_of(part)) for size in sizes)] for part in parts]
    rows.append(["all", *(megabytes(size.bytes) for size in sizes)])
    rows.append(["parameters", *(f"{size.parameters:,}" for size in sizes)])
    return Rows(["", *(size.label for size in sizes)], rows)


def _beside_plain_removal(model: Recorded) -> str | None:
    removal = find_in(model.record, "plain_removal")
    if not removal or not model.sizes:
        return None
    more, bare = model.sizes[-1].parameters / removal["parameters"] - 1, f"{removal['parameters']:,}"
    return f"Plain removal of the same blocks would store {bare} parameters; this is {more:.2%} more."


def _option_rows(record: Record) -> Rows:
    rows = [
        [name, json.dumps(value) if isinstance(value, list) else str(value)]
        for name, value in record["options"].items()
    ]
    what = "recovery" if "recovery" in record else "removal" if "removed" in record else "pruning or extension"
    return Rows(["option", "value"], rows, title=f"Options of the {what}", notes=notes(record))


def _recovery(models: Sequence[Recorded]) -> dict[str, Any]:
    """What is shown of training."""
    trained = [model for model in models if "recovery" in model.record]
    columns = [[model.name, *_trained(model)] for model in trained]
    names = ["", "trained", "tokens", "steps", "perplexity before", "perplexity after", "tokens/s"]
    headings, *rows = [list(row) for row in zip(names, *columns, strict=True)]
    stopped = {model.name: model.record["recovery"].get("stopped") for model in trained}
    return {
        "trained": Rows(headings, rows),
        "stopped": [f"{name} stopped early: {reason}" for name, reason in stopped.items() if reason],
        "unmeasured": not all("perplexity" in model.record for model in trained),
    }


def _trained(model: Recorded) -> list[str]:
    recovery, points = model.record["recovery"], held_out(model) if "perplexity" in model.record else []
    ends = [f"{value:.2f}" for _, value in (points[0], points[-1])] if points else ["", ""]
    speed = recovery.get("tokens_per_second")
    shown = f"{speed:,.0f}" if isinstance(speed, int | float) else ""
    what = recovery.get("trained", recovery["train"])
    return [what, f"{recovery['tokens']:,}", f"{recovery['steps']:,}", *ends, shown]


def _continuations(models: Sequence[Recorded]) -> dict[str, dict[str, str]]:
    """Prompt -> model -> what it continued it with, sources first."""
    found: dict[str, dict[str, str]] = {}
    sources = {shown_name(model.chain[0]["source_name"]) for model in models}
    rows = [row for model in models if model.evaluation for row in model.evaluation["models"]]
    for row in sorted(rows, key=lambda row: shown_name(row["name"]) not in sources):
        for one in row.get("continuations", ()):
            found.setdefault(one["prompt"], {}).setdefault(shown_name(row["name"]), one["text"])
    return {prompt: texts for prompt, texts in found.items() if len(texts) > 1}


def _evaluations(models: Sequence[Recorded]) -> list[Rows]:
    """Models measured alike in one table; a model that stands in several evaluations with the same figures once."""
    together: dict[str, dict[str, Any]] = {}
    for evaluation in (model.evaluation for model in models if model.evaluation is not None):
        conditions = [evaluation[name] for name in ("versions", "device", "dtype")]
        alike = json.dumps([*conditions, evaluation["options"].get("limit")], sort_keys=True)
        one = together.setdefault(alike, evaluation | {"models": []})
        one["models"] += [model for model in evaluation["models"] if model not in one["models"]]
    return [evaluation_rows(evaluation) for evaluation in together.values()]
