"""What a record says, as tables: what became of each block, what it cost, on which text; models side by side."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from flexigpt.evaluation import METRICS, Evaluation
from flexigpt.model import FlexiGPTConfig, Plan, Replica, SublayerReplica, plan_of, plan_summary, source_units
from flexigpt.record.record import Record, find_in, first_record
from flexigpt.runtime import megabytes
from flexigpt.text import shown_texts

_FRAMED = 6  # columns at most of a table with a frame: with more it would not fit into 80 columns of a terminal


@dataclass(frozen=True)
class Rows:
    """A table with its notes, to be shown in a terminal, in Markdown or on a page.

    Attributes:
        headings: of the columns.
        rows: cells, as they are shown.
        align: `l` or `r` for each column; default: the first to the left, the others to the right.
        notes: what a reader has to know, below the table: lines without a capital and a full stop.
        title: above the table.
        dim: numbers of the rows that matter less.
        sums: number of the row with which sums begin.
        marked: (row, column) of the cells that stand out on a page.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    _: KW_ONLY
    align: str = ""
    notes: Sequence[str] = ()
    title: str = ""
    dim: Collection[int] = ()
    sums: int | None = None
    marked: Collection[tuple[int, int]] = ()

    @property
    def _sides(self) -> str:
        return self.align or "l".ljust(len(self.headings), "r")

    def terminal(self) -> Group:
        """For a terminal, to be printed by rich; without a frame where it is wide."""
        wide = len(self.headings) > _FRAMED
        look: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False} if wide else {}
        table = Table(title=Text(self.title) if self.title else None, title_justify="left", **look)
        for number, (heading, side) in enumerate(zip(self.headings, self._sides, strict=True)):
            words = [word for row in (self.headings, *self.rows) for word in row[number].split()]
            least = max(map(len, words), default=0) if wide else None  # or rich would break words
            justify: Any = "left" if side == "l" else "right"
            table.add_column(Text(heading), justify=justify, overflow="fold", min_width=least)
        for number, row in enumerate(self.rows):
            style = "dim" if number in self.dim else None
            table.add_row(*map(Text, row), style=style, end_section=number + 1 == self.sums)
        return Group(table, *map(Text, self.notes))

    def _repr_html_(self) -> str:
        return self.html(self.title)  # how a notebook shows it

    def markdown(self) -> str:
        """In Markdown, without the title."""
        lines = [self.headings, ["---" if side == "l" else "---:" for side in self._sides], *self.rows]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        table = "".join(f"| {' | '.join(line)} |\n" for line in cells)
        return table + "".join(f"\n{_sentence(note)}\n" for note in self.notes)

    def html(self, caption: str) -> Markup:
        """For a page: the first column heads its rows; it scrolls by itself where the page is narrower."""
        head = Markup().join(Markup('<th scope="col">{}</th>').format(heading) for heading in self.headings)
        body = Markup()
        for number, (first, *cells) in enumerate(self.rows):
            body += Markup('<tr><th scope="row">{}</th>').format(first)
            for column, cell in enumerate(cells, 1):
                least = Markup(' class="least"') if (number, column) in self.marked else ""
                body += Markup("<td{}>{}</td>").format(least, cell)
            body += Markup("</tr>\n")
        notes = Markup().join(Markup('<p class="caption">{}</p>\n').format(_sentence(note)) for note in self.notes)
        return Markup(
            '<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
            "<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n{notes}"
        ).format(caption=caption, head=head, body=body, notes=notes)


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


_BAR = 12  # characters of the longest bar

_COSTS = "costs are of leaving the whole attention or MLP out: second-order estimates, up to a factor in nats a token"


def plan_rows(plan: Plan, record: Record, more: Sequence[str] = (), units: int | None = None) -> Rows:
    """The plan: block, score, base, distance, what is stored, or what is left of it; columns of what was measured.

    `more` is what each replica stores besides its adapters, `units` how many hidden units an MLP of the source has.
    """
    scores, distances, origins = (find_in(record, key) for key in ("scores", "distances", "source_blocks"))
    costs: dict[str, list[float]] = (find_in(record, "sublayer_costs") if plan.sublayers else None) or {}
    units = units or find_in(record, "mlp_units")
    forms: dict[tuple[int, str], SublayerReplica] = {(one.block, one.sublayer): one for one in plan.sublayers}
    replicas = {replica.block: replica for replica in plan.replicas}
    rows = []
    for block in range(plan.num_blocks):
        row = {"block": str(block)}
        if origins is not None:
            row["source block"] = str(origins[block])
        if scores is not None:
            row[find_in(record, "block_score")] = f"{scores[block]:.4f}"
        replica = replicas.get(block)
        for name, sublayer in (("attention", "attention"), ("MLP", "mlp")) if plan.sublayers else ():
            row[name] = "" if replica is not None else _left(forms.get((block, sublayer)), units)
        for name, sublayer in (("attention's cost", "attention"), ("MLP's cost", "mlp")) if costs else ():
            row[name] = f"{costs[sublayer][block]:.3g}"
        if plan.replicas or not plan.sublayers:
            row["base"] = "" if replica is None else str(replica.base)
            if distances is not None:
                row["distance"] = "" if replica is None else f"{_distance(distances, replica):.4g}"
            row["stored"] = "its own linears"
            if replica is not None:
                row["stored"] = ", ".join((f"adapters of rank {replica.shown_rank()}", *more))
        rows.append(list(row.values()))
    dim = [block for block in plan.kept if not {(block, "attention"), (block, "mlp")} & forms.keys()]
    align = "r" * len(row) if list(row)[-1] != "stored" else "l".rjust(len(row), "r")
    return Rows(list(row), rows, align=align, dim=dim, notes=[_COSTS] if costs else [])


def _left(form: SublayerReplica | None, units: int | None) -> str:
    """What is left of a sublayer."""
    if form is None or form.units is None:
        return "kept" if form is None else "gone"
    return f"{form.units:,} of {units:,} units" if units else f"{form.units:,} units"


def replica_parts(config: FlexiGPTConfig) -> list[str]:
    """What each replica of a compact model stores besides its adapters, biases and input norms."""
    parts = {"output norms": bool(config.output_norms), "base scales": config.base_scale}
    return [part for part, there in parts.items() if there]


def _distance(distances: dict[Any, dict[Any, float]], replica: Replica) -> float:
    # In a record that was read from its file, JSON has made strings of the blocks' numbers.
    row = distances.get(replica.block) or distances[str(replica.block)]
    return row[replica.base] if replica.base in row else row[str(replica.base)]


def removal_rows(record: Record) -> Rows:
    """Plain removal: block of the source, score where one was measured, what became of it."""
    removed, scores = find_in(record, "removed"), find_in(record, "scores")
    kept = [block for block in range(removed["num_blocks"]) if block not in removed["blocks"]]
    rows = [
        [str(block), *([f"{scores[block]:.4f}"] if scores else []), "kept" if block in kept else "removed"]
        for block in range(removed["num_blocks"])
    ]
    headings = ["block", *([find_in(record, "block_score")] if scores else []), "became"]
    return Rows(headings, rows, align="l".rjust(len(headings), "r"), dim=kept)


def block_rows(config: PreTrainedConfig, record: Record) -> Rows | None:
    """What became of each block: the plan of a compact model, or the plain removal that a record reports."""
    if isinstance(config, FlexiGPTConfig):
        return plan_rows(plan_of(config), record, replica_parts(config), source_units(config))
    return removal_rows(record) if find_in(record, "removed") else None


def result_rows(config: PreTrainedConfig, record: Record) -> list[Rows]:
    """What became of each block, where there is something to say, and what it cost."""
    rows = block_rows(config, record)
    return [cost_rows(record)] if rows is None else [rows, cost_rows(record)]


def frontier_series(record: Record) -> list[dict[str, Any]]:
    """Of a ladder of sizes, or of as much of it as is measured: `series` (what was done to the model), `bytes`,
    `perplexity`, `chosen` of the knee; those in 8 bits, where they were measured, after the others."""
    rows = []
    for number, one in enumerate(record["points"]):
        rows.append({"series": "flexigpt prune", "chosen": number == record.get("knee")} | one)
        rows.append({"series": "plain removal"} | one["removed"])
    rows.append({"series": "source"} | record["source"])
    return rows + [{"series": f"{row['series']}, 8 bits"} | row["int8"] for row in rows if row.get("int8")]


def beaten_by_8_bits(record: Record) -> list[dict[str, Any]]:
    """The sizes of a ladder that are worse than the source in 8 bits, which is as small or smaller."""
    eight = record["source"].get("int8")
    if not eight:
        return []
    larger = [one for one in record["points"] if one["bytes"] >= eight["bytes"]]
    return [one for one in larger if one["perplexity"] > eight["perplexity"]]


def frontier_rows(record: Record) -> Rows:
    """Sizes from the largest to the smallest: perplexity of what `prune` makes, and of plain removal; in 8 bits too, or
    else, where 80 columns have room for them, parameters and bars."""
    source, points = record["source"], record["points"]
    headings = ["size", "MB", "perplexity", "plain removal"]
    rows = [[f"{its.get('share', 1):.1%}", *_worth(its, its.get("removed", {}))] for its in (source, *points)]
    measured, name = record.get("measured"), shown_name(record["text"])
    if measured and measured["windows"] < measured["there"]:
        name = f"{measured['windows']:,} of the {measured['there']:,} windows of {name}"
    notes = [f"perplexity on {name}, untrained"]
    if source.get("int8"):
        headings += ["8-bit MB", "8-bit perplexity", "8-bit plain removal"]
        for row, its in zip(rows, (source, *points), strict=True):
            row += _worth(its.get("int8", {}), its.get("removed", {}).get("int8", {}))
    else:
        headings = ["size", "parameters", *headings[1:], "loss"]
        losses = [math.log(its["perplexity"] / source["perplexity"]) for its in (source, *points)]
        for row, its, loss in zip(rows, (source, *points), losses, strict=True):
            row.insert(1, f"{its['parameters']:,}")
            row.append("#" * round(_BAR * loss / (max(losses) or 1)))
        notes[0] += "; bars: its logarithm above the source's"
    notes.append(
        f"the knee is at {points[record['knee']]['share']:.0%}: below it the perplexity rises faster than before"
    )
    if measured and len(points) < measured["sizes"]:
        notes.append(
            f"{len(points)} sizes, not the {measured['sizes']} asked for: each is that of a whole number of blocks, "
            "and no other number lies between the largest and the smallest"
        )
    beaten = beaten_by_8_bits(record)
    if beaten:
        eight, worse = (
            f"{megabytes(one['bytes'])} MB, at perplexity {one['perplexity']:.2f}"
            for one in (source["int8"], beaten[-1])
        )
        notes.append(
            f"in 8 bits the source itself takes {eight}; pruned to {beaten[-1]['share']:.0%} it takes {worse}: "
            "quantise first, and prune to come below that"
        )
    return Rows(headings, rows, align="rrrrrrr" if source.get("int8") else "rrrrrl", notes=notes)


def _worth(one: dict[str, Any], removed: dict[str, Any]) -> list[str]:
    """Megabytes and perplexity of what `prune` makes, and the perplexity of plain removal, where they are there."""
    shown = [f"{its['perplexity']:.2f}" if its else "" for its in (one, removed)]
    return [megabytes(one["bytes"]) if one else "", *shown]


def cost_rows(record: Record) -> Rows:
    """What it cost: parameters, megabytes, perplexity, of the models that were compared, and of their source."""
    names: list[str] = record["compared"]
    sizes, measured = [record[name] for name in names], dict(record.get("perplexity", {}))
    first = first_record(record)
    headings = names
    if first is not record and "compared" in first:
        source = first["compared"][0]
        headings, sizes = ["source", *names], [first[source], *sizes]
        measured["source"] = _on_same_text(first.get("perplexity", {}), source, measured, names)
    rows = [
        _compared("stored parameters", [size["parameters"] for size in sizes], "{:,}".format),
        _compared("stored MB", [size["bytes"] for size in sizes], megabytes),
    ]
    if "perplexity" in record:
        states: list[dict[str, Any]] = [measured[name] or {} for name in headings]
        rows.append(_compared("perplexity", [state.get("perplexity") for state in states], "{:.2f}".format))
        if all("draft" in measured[name] for name in names):
            drafts = [state.get("draft", {}) for state in states]
            rows += [
                _compared(title, [draft.get(key) for draft in drafts], form)
                for title, key, form in (
                    ("draft's perplexity", "perplexity", "{:.2f}".format),
                    ("draft agrees", "agreement", "{:.1%}".format),
                    ("draft accepted", "acceptance", "{:.1%}".format),
                )
            ]
    if "fidelity" in record:
        blank = [""] * (len(headings) - 1)
        rows.append(["same likeliest token", *blank, f"{record['fidelity']['agreement']:.1%}", ""])
    return Rows(["", *headings, f"of {headings[0]}"], rows, notes=notes(record))


def _on_same_text(before: Record, name: str, measured: Record, names: Sequence[str]) -> dict[str, Any] | None:
    """What was measured of a source, if it is of the text and windows that the others were measured on."""
    there, here = before.get(name), measured.get(names[0])
    alike = there and here and all(there[key] == here[key] for key in ("tokens", "window_length"))
    return there if alike and before["text"] == measured["text"] else None


def _compared(title: str, values: Sequence[float | None], shown: Callable[[Any], str]) -> list[str]:
    """A row, and the last value's share of the first one."""
    first, last = values[0], values[-1]
    share = f"{last / first:.1%}" if first and last is not None else ""
    return [title, *("" if value is None else shown(value) for value in values), share]


def notes(record: Record) -> list[str]:
    """What a reader of the tables has to know: which text scored, trained and measured, and how much of it."""
    lines = []
    removed = find_in(record, "removed")
    if removed:
        blocks = ", ".join(map(str, removed["blocks"]))
        lines.append(f"removed: {blocks} of the {removed['num_blocks']} blocks of {shown_name(removed['source'])}")
    calibration = find_in(record, "calibration")
    if calibration:
        text, (windows, length) = calibration["text"], calibration["windows"]
        short = calibration.get("asked", windows) - windows
        fewer = f"; the text is {short} windows short of the {windows + short} asked for" if short else ""
        judged = calibration.get("judged", windows)
        judging = f"the first {judged} of " if judged < windows else ""
        measured = find_in(record, "block_score") or "calibrated"
        lines.append(f"{measured} on {judging}{windows} windows of {length} tokens of {text}{fewer}")
    if "planned" in record:
        planned = record["planned"]
        lines.append(
            f"the model will store {planned['parameters']:,} parameters, {planned['share']:.1%} of the source's: "
            f"{megabytes(planned['bytes'])} MB"
        )
    if "recovery" in record:
        recovery = record["recovery"]
        tried = len(recovery.get("trials", ()))
        lines.append(
            f"trained {recovery.get('trained', recovery['train'])} on {recovery['tokens']:,} tokens of "
            f"{shown_texts(record['options']['data'])} in {recovery['steps']:,} steps"
            + (f", --lr {record['options'].get('lr')} the best of {tried} tried" if tried else "")
        )
    if "quantization" in record:
        how = "linears of the blocks in {bits} bits ({library} {version}), the rest as it was"
        lines.append(how.format(**record["quantization"]))
    if "perplexity" in record:
        measured = record["perplexity"][record["compared"][1]]
        untrained = "" if "recovery" in record or "quantization" in record else ", before any recovery training"
        lines.append(
            f"perplexity per token on {measured['tokens']:,} tokens of {record['perplexity']['text']}, windows of "
            f"{measured['window_length']} without overlap{untrained}"
        )
    return lines


def shown_name(model: str) -> str:
    """A hub name as it is; of a folder, which means nothing elsewhere, the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def inspection_rows(inspection: dict[str, Any]) -> list[Rows]:
    """What `inspect_model` found: the parts, and the replicas where there are some."""
    kind, plan = f"{inspection['source_type']}, {inspection['blocks']} blocks", inspection["plan"]
    if plan is not None:
        plan = Plan.from_dict(plan)
        narrow = plan.sublayers and not plan.replicas
        kind = f"compact {kind}" + ("" if narrow else f", {len(plan.replicas)} of them replicas")
    parameters, stored = inspection["parameters"], inspection["bytes"]
    rows = [[part, f"{size['parameters']:,}", megabytes(size["bytes"])] for part, size in inspection["parts"].items()]
    sums = [
        ["stored", f"{parameters['stored']:,}", megabytes(stored["stored"])],
        ["effective", f"{parameters['effective']:,}", ""],
        *([["weight files", "", megabytes(stored["files"])]] if stored["files"] else []),
    ]
    by = "" if inspection["quantised_by"] is None else f", quantised by {inspection['quantised_by']}"
    title = f"{inspection['model']} ({kind}, {inspection['dtype']}{by})"
    notes = [_cache_note(inspection["cache"], inspection["blocks"])]
    tables = [Rows(["part", "parameters", "MB"], rows + sums, title=title, sums=len(rows), notes=notes)]
    if plan is not None and plan.sublayers:
        of_blocks = plan_rows(plan, {}, units=inspection["mlp_units"])
        tables.append(replace(of_blocks, title=plan_summary(plan, inspection["mlp_units"])))
    elif plan is not None and plan.replicas:
        replicas = [[str(one.block), str(one.base), one.shown_rank()] for one in plan.replicas]
        tables.append(Rows(["block", "base", "rank"], replicas, align="rrr", title="replicas"))
    return tables


def _cache_note(cache: dict[str, Any], blocks: int) -> str:
    """How large the key/value cache is."""
    parts = [] if cache["bytes_per_token"] is None else [f"{cache['bytes_per_token']:,} bytes a token"]
    if cache["share"] < 1 or not parts:
        parts.append(f"{cache['share']:.1%} of the source's, as {cache['blocks']} of {blocks} blocks have attention")
    return f"key/value cache: {', '.join(parts)}"


_ACCURACY = ("acc", "exact_match")  # what begins so is a share, shown in percent


def evaluation_rows(evaluation: Evaluation) -> Rows:
    """A measure a row, a model a column, in the order that they were given."""
    models = evaluation["models"]
    rows = [
        ["stored parameters", *(f"{model['parameters']:,}" for model in models)],
        ["stored MB", *(megabytes(model["bytes"]) for model in models)],
    ]
    better: dict[str, list[str]] = {"lower": [], "higher": []}
    for name, metric in METRICS.items():
        found = [model.get("fidelity" if metric.against else "perplexity", {}).get(name) for model in models]
        if metric.heading and any(value is not None for value in found):
            cells = ["" if value is None else metric.shown(value) for value in found]
            rows.append([f"{metric.heading}{', %' if metric.percent else ''}", *cells])
            better[metric.better].append(metric.heading)
    tasks = {name: task["metric"] for model in models for name, task in model.get("tasks", {}).items()}
    for name, measure in tasks.items():
        percent = measure.startswith(_ACCURACY)
        cells = [_value(model.get("tasks", {}).get(name), percent) for model in models]
        rows.append([f"{name}, {measure}{', %' if percent else ''}", *cells])
    means = [model.get("tasks_mean") for model in models]
    if len(tasks) > 1 and any(mean is not None for mean in means):
        rows.append(["mean of the tasks, %", *("" if mean is None else f"{100 * mean:.2f}" for mean in means)])
    ways = "; ".join(f"{way} is better: {', '.join(names)}" for way, names in better.items() if names)
    short = [shown_name(model["name"]) for model in models]  # without folders, where these tell the models apart
    columns = short if len(set(short)) == len(short) else [model["name"] for model in models]
    return Rows(["", *columns], rows, notes=[*([ways] if ways else []), *_evaluation_notes(evaluation)])


def _value(task: dict[str, Any] | None, percent: bool) -> str:
    if task is None:
        return ""
    scale, digits = (100, 2) if percent else (1, 4)
    stderr = "" if task["stderr"] is None else f" ± {scale * task['stderr']:.{digits}f}"
    return f"{scale * task['value']:.{digits}f}{stderr}"


def _evaluation_notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table has to know: which text, how many questions, on what and with which versions."""
    models, versions, lines = evaluation["models"], evaluation["versions"], []
    seen: dict[tuple[str, int, int], set[int]] = {}
    for one in (model["perplexity"] for model in models if "perplexity" in model):
        seen.setdefault((one["text"], one["window_length"], one["stride"]), set()).add(one["tokens"])
    for (text, length, stride), counts in seen.items():
        tokens = f"{min(counts):,} tokens" if len(counts) == 1 else "each model's own tokens"
        lines.append(f"perplexity per token on {tokens} of {text}, windows of {length}, stride {stride}")
    sources = dict.fromkeys(model["fidelity"]["against"] for model in models if "fidelity" in model)
    lines += [
        f"divergence from {shown_name(source)} in nats a token, and agreement with it on the likeliest token"
        for source in sources
    ]
    tasks = {name: task for model in models for name, task in model.get("tasks", {}).items()}
    if tasks:
        shots = ", ".join(f"{number}-shot" for number in sorted({task["num_fewshot"] or 0 for task in tasks.values()}))
        limit = evaluation["options"].get("limit")
        questions = "" if limit is None else f", only the first {limit} questions of each task"
        lines.append(f"tasks: lm_eval {versions.get('lm_eval', '')}, {shots}, ± its standard error{questions}")
    for model in models:
        if "truncated" in model:
            lines.append(f"{shown_name(model['name'])}: {model['truncated']} requests did not fit into its context")
    names = ", ".join(f"{name} {versions[name]}" for name in ("flexigpt", "torch", "transformers") if name in versions)
    return [*lines, f"{evaluation['device']}, {evaluation['dtype']}; {names}"]
