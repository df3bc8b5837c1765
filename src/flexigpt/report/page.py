"""The report as one HTML page that needs nothing else: no network, no script."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from flexigpt.record import (
    Record,
    Recorded,
    Size,
    evaluation_rows,
    fidelities,
    find_in,
    held_out,
    notes,
    plan_rows,
    removal_rows,
    shown_name,
)
from flexigpt.runtime import megabytes

Svgs = Mapping[str, str]  # by the figure's name


def page(models: Sequence[Recorded], own: Sequence[Svgs], shared: Svgs, palette: str, generator: str) -> str:
    """The whole page.

    Args:
        models: one, or several to compare.
        own: the SVGs of each model.
        shared: the SVGs of all together.
        palette: the colours as CSS.
        generator: what wrote the page, for the next report to know it by.
    """
    several = len(models) > 1
    parts = [
        ("recovery", "Recovery", _recovery(models, shared)),
        ("evaluation", "Evaluation", _evaluation(models, shared)),
    ]
    each = []
    for number, (model, svgs) in enumerate(zip(models, own, strict=True)):
        suffix, whose = (f"-{number}", f"{model.name}: ") if several else ("", "")
        each += [(f"{name}{suffix}", f"{whose}{heading}", content) for name, heading, content in _of_one(model, svgs)]
    ordered = [*parts, *each] if several else [*each[:-1], *parts, each[-1]]
    title = f"flexigpt report: {', '.join(model.name for model in models)}"
    contents = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in ordered)
    style = (files("flexigpt.report") / "report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="{escape(generator)}">
<title>{escape(title)}</title>
<style>
{palette}
{style}</style>
</head>
<body>
<header>
{_heads(models)}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main>
{"".join(section(*part) for part in ordered)}</main>
<footer>Drawn by flexigpt from what it recorded; nothing was computed anew. The figures lie beside this page as PNG
files.</footer>
</body>
</html>
"""


def _heads(models: Sequence[Recorded]) -> str:
    if len(models) == 1:
        return _head(models[0], "h1")
    return f"<h1>{len(models)} models side by side</h1>\n" + "".join(_head(model, "h2") for model in models)


def _head(model: Recorded, level: str) -> str:
    ran = model.record.get("command")
    made = f"<pre><code>{escape(ran)}</code></pre>\n" if ran else paragraph("Made with the Python API.", "caption")
    versions = ", ".join(f"{name} {number}" for name, number in model.record["versions"].items())
    origin = f"Source: {shown_name(model.chain[0]['source_name'])}. {versions}."
    return (
        f"<{level}>{escape(model.name)}</{level}>\n{paragraph(_what_it_is(model), 'lead')}{numbers(_big(model))}"
        f"{made}{paragraph(origin, 'caption')}"
    )


def _what_it_is(model: Recorded) -> str:
    trained = ", after recovery training" if "recovery" in model.record else ""
    source = shown_name(model.chain[0]["source_name"])
    if model.plan is not None:
        count, depth = len(model.plan.replicas), model.plan.num_blocks
        if not model.sizes:
            return f"A plan for {source}: {count} of its {depth} blocks are to become replicas."
        return f"{source}, compact: {count} of {depth} blocks are replicas of kept ones{trained}."
    if model.removed is not None:
        count, depth = len(model.removed["blocks"]), model.removed["num_blocks"]
        return f"{source} without {count} of its {depth} blocks, and nothing in their place{trained}."
    return f"{source}{trained or ', as flexigpt wrote it'}."


def _big(model: Recorded) -> list[tuple[str, str, str]]:
    """Size, and perplexity before and after."""
    items, sizes, measured = [], model.sizes, model.perplexities
    if sizes:
        first, last = sizes[0], sizes[-1]
        items.append(("stored", _bytes(last.bytes), f"{last.bytes / first.bytes:.1%} of {_bytes(first.bytes)}"))
        items.append(("parameters", _count(last.parameters), f"of {_count(first.parameters)}"))
    own = [one for one in measured if (one.text, one.window_length) == (measured[-1].text, measured[-1].window_length)]
    if own:
        before = ", ".join(f"{one.value:.2f} {one.label}" for one in own[:-1])
        items.append((f"perplexity, {own[-1].label}", f"{own[-1].value:.2f}", f"{before}; {own[-1].tokens:,} tokens"))
    return items


def _of_one(model: Recorded, svgs: Svgs) -> list[tuple[str, str, str]]:
    """The sections about one model: (name, heading, content)."""
    return [
        ("influence", "Which blocks change little", _influence(model, svgs)),
        ("plan", "What became of each block", _plan(model, svgs)),
        ("distances", "Why these bases", _distances(model, svgs)),
        ("adapters", "What adapters mend", _adapters(model, svgs)),
        ("storage", "What is stored", _storage(model, svgs)),
        ("settings", "Settings", _settings(model)),
    ]


def _influence(model: Recorded, svgs: Svgs) -> str:
    if "influence" not in svgs:
        return paragraph(
            "No block score was recorded: blocks are scored where --ratio or --target-size says how many to prune.",
            "missing",
        )
    scores, name = find_in(model.record, "scores"), find_in(model.record, "block_score")
    gone = "removed" if model.removed else "pruned"
    rows = [[str(b), f"{score:.4g}", gone if b in model.pruned else "kept"] for b, score in enumerate(scores)]
    scored = next((note for note in notes(model.chain[0]) if note.startswith(f"{name} on ")), name)
    caption = f"{scored[0].upper()}{scored[1:]}: the lower, the less a block changes what passes through it."
    numbers_of_it = table(["block", name, "became"], rows, f"{name} of each block")
    return figure(svgs["influence"], caption) + details("Numbers", numbers_of_it)


def _plan(model: Recorded, svgs: Svgs) -> str:
    if model.plan is None:
        if model.removed is None:
            return paragraph("There is no plan: all blocks are kept.", "missing")
        return paragraph("Nothing stands in for a removed block.") + details(
            "Blocks", str(removal_rows(model.record).html("What became of each block"))
        )
    caption = (
        "The stack of blocks, the first at the top. A replica computes with the linears of the block that its arrow "
        "leads to, its base."
    )
    rows = str(plan_rows(model.plan, _measured_pairs(model)).html("What became of each block"))
    return figure(svgs["plan"], caption, wide=False) + details("Blocks", rows)


def _measured_pairs(model: Recorded) -> Record:
    """The record; without distances where an edited plan holds pairs that were not measured, or another numbering."""
    record, plan = model.record, model.plan
    distances, scores = find_in(record, "distances") or {}, find_in(record, "scores") or ()
    keys = {"scores": scores, "block_score": find_in(record, "block_score")}
    shown: Record = {"source_blocks": find_in(record, "source_blocks")} if find_in(record, "source_blocks") else {}
    if plan is not None and len(scores) == plan.num_blocks:
        shown |= keys
    if distances and plan is not None and all(r.base in distances.get(r.block, {}) for r in plan.replicas):
        shown["distances"] = distances
    return shown


def _distances(model: Recorded, svgs: Svgs) -> str:
    if "distances" not in svgs:
        why = "Plain removal needs no base." if model.removed else "A plan that was given, or an extension, needs none."
        return paragraph(f"No distances were recorded. {why} Pruning without --plan records them.", "missing")
    caption = (
        "Each line is a pruned block: its distance to every kept block, by that block's number (left) and by how far "
        "the two stand from one another (right). A dot marks the base."
    )
    content = figure(svgs["distances"], caption)
    if len(model.distances) == 1:
        content += paragraph(
            "For other distances beside it, prune with --compare-distances full-rank,frobenius.", "missing"
        )
    tables = ""
    for name, rows in model.distances.items():
        kept = sorted({j for row in rows.values() for j in row})
        cells = [[str(i), *(_distance(row.get(j), j == model.bases.get(i)) for j in kept)] for i, row in rows.items()]
        tables += table(["pruned \\ kept", *map(str, kept)], cells, f"{name} distance, the base marked", marked="*")
    return content + details("Numbers", tables)


def _distance(value: float | None, is_base: bool) -> str:
    return "" if value is None else f"{'*' if is_base else ''}{value:.4g}"


def _adapters(model: Recorded, svgs: Svgs) -> str:
    if "adapters" not in svgs:
        why = "Pruning to a checkpoint, not --plan-only, records it."
        if model.removed or find_in(model.record, "source_blocks"):
            why = "Plain removal has no adapters." if model.removed else "An extension's adapters have nothing to mend."
        return paragraph(f"What adapters mend was not recorded. {why}", "missing")
    caption = (
        "The share of |W_i \u2212 W_j|\u00b2, of a pruned block's linear and its base's, that r directions of "
        "the adapter mend. The shaded part is lost: no adapter of this rank brings it back."
    )
    rows = [
        [str(block), linear, *(f"{r}: {share:.1%}" for r, share in zip(one["ranks"], one["mended"], strict=True))]
        for block, linears in find_in(model.record, "adapter_spectra").items()
        for linear, one in linears.items()
    ]
    widest = max(len(row) for row in rows) - 2
    headings = ["block", "linear", *["r: mended"] * widest]
    padded = [row + [""] * (widest + 2 - len(row)) for row in rows]
    return figure(svgs["adapters"], caption) + details("Numbers", table(headings, padded, "Share mended by rank"))


def _storage(model: Recorded, svgs: Svgs) -> str:
    if not model.sizes:
        return paragraph("No sizes were recorded: --plan-only makes no model.", "missing")
    headings, rows = _part_rows(model.sizes)
    content = ""
    if "storage" in svgs:
        content = figure(svgs["storage"], "Stored bytes by part; every tensor counts once, as it is stored once.")
    removal = find_in(model.record, "plain_removal")
    if removal:
        more, bare = model.sizes[-1].parameters / removal["parameters"] - 1, f"{removal['parameters']:,}"
        content += paragraph(
            f"Plain removal of the same blocks would store {bare} parameters; this is {more:.2%} more."
        )
    return content + table(headings, rows, "Stored MB by part")


def _part_rows(sizes: Sequence[Size]) -> tuple[list[str], list[list[str]]]:
    parts = dict.fromkeys(part for size in sizes for part in size.parts)
    rows = [[part, *(megabytes(round(size.parts.get(part, 0) * size.itemsize)) for size in sizes)] for part in parts]
    rows.append(["all", *(megabytes(size.bytes) for size in sizes)])
    rows.append(["parameters", *(f"{size.parameters:,}" for size in sizes)])
    return ["", *(size.label for size in sizes)], rows


def _recovery(models: Sequence[Recorded], shared: Svgs) -> str:
    if "recovery" not in shared:
        return paragraph("No training was recorded: flexigpt recover trains a model back.", "missing")
    trained = [model for model in models if "recovery" in model.record]
    content = figure(shared["recovery"], "What each step of recovery measured; dots are held-out perplexity.")
    rows = []
    for model in trained:
        recovery, points = model.record["recovery"], held_out(model) if "perplexity" in model.record else []
        ends = [f"{value:.2f}" for _, value in (points[0], points[-1])] if points else ["", ""]
        speed = recovery.get("tokens_per_second")
        shown = f"{speed:,.0f}" if isinstance(speed, int | float) else ""
        rows.append([model.name, recovery["train"], f"{recovery['tokens']:,}", f"{recovery['steps']:,}", *ends, shown])
        if "stopped" in recovery:
            content += paragraph(f"{model.name} stopped early: {recovery['stopped']}")
    headings = ["model", "trained", "tokens", "steps", "perplexity before", "after", "tokens/s"]
    content += table(headings, rows, "Recovery training")
    if not all("perplexity" in model.record for model in trained):
        content += paragraph("Held-out perplexity on the way is recorded by flexigpt recover --perplexity.", "missing")
    return content


def _evaluation(models: Sequence[Recorded], shared: Svgs) -> str:
    evaluations = [model.evaluation for model in models if model.evaluation is not None]
    if not evaluations:
        return paragraph("No evaluation was recorded: flexigpt eval --record writes one into the folder.", "missing")
    content = ""
    for evaluation in _under_like_conditions(evaluations):
        content += str(evaluation_rows(evaluation).html("Models side by side"))
    if "positions" in shared:
        caption = "Mean loss by position: whether damage is worse at the start of a window or grows along it."
        content += figure(shared["positions"], caption)
    if "block-errors" in shared:
        caption = "On the source's own inputs to each pruned block: |replica(X) \u2212 block(X)| / |block(X)|."
        content += figure(shared["block-errors"], caption)
    if not fidelities(models):
        content += paragraph(
            "How near models stay to their source is recorded by flexigpt eval --against SOURCE.", "missing"
        )
    return content


def _under_like_conditions(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Models measured alike in one table; a model that stands in several evaluations with the same figures once."""
    together: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        conditions = [evaluation[name] for name in ("versions", "device", "dtype")] + [
            evaluation["options"].get("limit")
        ]
        one = together.setdefault(json.dumps(conditions, sort_keys=True), evaluation | {"models": []})
        one["models"] += [model for model in evaluation["models"] if model not in one["models"]]
    return list(together.values())


def _settings(model: Recorded) -> str:
    content = ""
    for record in reversed(model.chain):
        rows = [
            [name, json.dumps(value) if isinstance(value, list) else str(value)]
            for name, value in record["options"].items()
        ]
        what = "recovery" if "recovery" in record else "removal" if "removed" in record else "pruning or extension"
        content += table(["option", "value"], rows, f"Options of the {what}")
        if record is not model.record and record.get("command"):
            content += f"<pre><code>{escape(record['command'])}</code></pre>\n"
        content += "".join(paragraph(f"{note[0].upper()}{note[1:]}.", "caption") for note in notes(record))
    return details("All settings and texts", content)


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.2f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str, marked: str | None = None) -> str:
    """A table whose first column heads its rows; cells that begin with `marked` stand out, without it."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{escape(first)}</th>{"".join(_cell(cell, marked) for cell in cells)}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _cell(text: str, marked: str | None) -> str:
    if marked is not None and text.startswith(marked):
        return f'<td class="least">{escape(text.removeprefix(marked))}</td>'
    return f"<td>{escape(text)}</td>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def figure(svg: str, caption: str, wide: bool = True) -> str:
    """A figure that scrolls by itself where the page is narrower."""
    label = escape(caption)
    return (
        f'<figure class="{"wide" if wide else "narrow"}">'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{svg}</div>'
        f"<figcaption>{label}</figcaption></figure>\n"
    )


def details(summary: str, content: str) -> str:
    """What opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def section(name: str, heading: str, content: str) -> str:
    """A section that the page's list of contents can lead to."""
    head = f'<h2 id="{name}-h">{escape(heading)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-h">\n{head}\n{content}</section>\n'


def numbers(items: Sequence[tuple[str, str, str]]) -> str:
    """Big numbers: what it is, the number, what is to be said of it."""
    rows = "".join(
        f"<div><dt>{escape(what)}</dt><dd><strong>{escape(number)}</strong>{escape(more)}</dd></div>\n"
        for what, number, more in items
    )
    return f'<dl class="numbers">\n{rows}</dl>\n'
