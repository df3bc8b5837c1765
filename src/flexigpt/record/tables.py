"""What a record says, as rows and as tables for a terminal: what became of each block, what it cost, on which text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from flexigpt.evaluation import Evaluation, is_same, mean_accuracy
from flexigpt.model import FlexiGPTConfig, Plan, Replica, plan_of
from flexigpt.record.record import Record, find_in
from flexigpt.runtime import megabytes

Rows = tuple[list[str], list[list[str]]]  # headings; rows


def plan_rows(plan: Plan, record: Record, more: Sequence[str] = ()) -> Rows:
    """Headings and rows of the plan: block, score, base, distance, what is stored; columns of what was measured.

    `more` is what each replica stores besides its adapters.
    """
    scores, distances, origins = (find_in(record, key) for key in ("scores", "distances", "source_blocks"))
    replicas = {replica.block: replica for replica in plan.replicas}
    rows = []
    for block in range(plan.num_blocks):
        row = {"block": str(block)}
        if origins is not None:
            row["source block"] = str(origins[block])
        if scores is not None:
            row[find_in(record, "block_score")] = f"{scores[block]:.4f}"
        replica = replicas.get(block)
        row["base"] = "" if replica is None else str(replica.base)
        if distances is not None:
            row["distance"] = "" if replica is None else f"{_distance(distances, replica):.4g}"
        row["stored"] = "its own linears"
        if replica is not None:
            row["stored"] = ", ".join((f"adapters of rank {replica.shown_rank()}", *more))
        rows.append(row)
    return list(rows[0]), [list(row.values()) for row in rows]


def replica_parts(config: FlexiGPTConfig) -> list[str]:
    """What each replica of a compact model stores besides its adapters, biases and input norms."""
    parts = {"output norms": bool(config.output_norms), "base scales": config.base_scale}
    return [part for part, there in parts.items() if there]


def _distance(distances: dict[Any, dict[Any, float]], replica: Replica) -> float:
    # In a record that was read from its file, JSON has made strings of the blocks' numbers.
    row = distances.get(replica.block) or distances[str(replica.block)]
    return row[replica.base] if replica.base in row else row[str(replica.base)]


def plan_table(plan: Plan, record: Record) -> Table:
    """The plan, for a terminal."""
    return _block_table(plan_rows(plan, record))


def removal_rows(record: Record) -> Rows:
    """Headings and rows of plain removal: block of the source, score where one was measured, what became of it."""
    removed, scores = find_in(record, "removed"), find_in(record, "scores")
    headings = ["block", *([find_in(record, "block_score")] if scores else []), "became"]
    return headings, [
        [str(block), *([f"{scores[block]:.4f}"] if scores else []), "removed" if block in removed["blocks"] else "kept"]
        for block in range(removed["num_blocks"])
    ]


def block_rows(config: PreTrainedConfig, record: Record) -> Rows | None:
    """What became of each block: the plan of a compact model, or the plain removal that a record tells of."""
    if isinstance(config, FlexiGPTConfig):
        return plan_rows(plan_of(config), record, replica_parts(config))
    return removal_rows(record) if find_in(record, "removed") else None


def result_tables(config: PreTrainedConfig, record: Record) -> list[Table]:
    """What became of each block, where there is something to say, and what it cost, for a terminal."""
    rows = block_rows(config, record)
    return ([] if rows is None else [_block_table(rows)]) + [cost_table(record)]


def _block_table(headings_and_rows: Rows) -> Table:
    headings, rows = headings_and_rows
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("stored", "became") else "right")
    for row in rows:
        kept = row[-1] == "kept" if headings[-1] == "became" else not row[headings.index("base")]
        table.add_row(*row, style="dim" if kept else None)
    return table


def cost_rows(record: Record) -> Rows:
    """Headings and rows of what it cost: parameters, megabytes, perplexity, of the two models that were compared."""
    first, second = record["compared"]
    before, after = record[first], record[second]
    rows = [
        [
            "stored parameters",
            f"{before['parameters']:,}",
            f"{after['parameters']:,}",
            f"{after['parameters'] / before['parameters']:.1%}",
        ],
        ["stored MB", megabytes(before["bytes"]), megabytes(after["bytes"]), f"{after['bytes'] / before['bytes']:.1%}"],
    ]
    if "perplexity" in record:
        was, became = (record["perplexity"][name]["perplexity"] for name in (first, second))
        rows.append(["perplexity", f"{was:.2f}", f"{became:.2f}", f"{became / was:.1%}"])
        rows += _draft_rows(*(record["perplexity"][name].get("draft") for name in (first, second)))
    return ["", first, second, f"of {first}"], rows


def _draft_rows(before: dict[str, float] | None, after: dict[str, float] | None) -> list[list[str]]:
    """What the draft was worth, where it was measured."""
    if before is None or after is None:
        return []
    shown = (
        ("draft's perplexity", "perplexity", ".2f"),
        ("draft agrees", "agreement", ".1%"),
        ("draft accepted", "acceptance", ".1%"),
    )
    return [
        [title, *(format(side[key], form) for side in (before, after)), _share(after[key], before[key])]
        for title, key, form in shown
    ]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def cost_table(record: Record) -> Table:
    """What it cost, for a terminal."""
    headings, rows = cost_rows(record)
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    return table


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
        short = calibration["asked"] - windows
        fewer = f"; the text is {short} windows short of the {windows + short} asked for" if short else ""
        judged = calibration.get("judged", windows)
        judging = f"the first {judged} of " if judged < windows else ""
        lines.append(
            f"{find_in(record, 'block_score')} on {judging}{windows} windows of {length} tokens of {text}{fewer}"
        )
    if "recovery" in record:
        recovery = record["recovery"]
        lines.append(
            f"trained ({recovery['train']}) on {recovery['tokens']:,} tokens of {record['options']['data']} in "
            f"{recovery['steps']:,} steps"
        )
    if "perplexity" in record:
        measured = record["perplexity"][record["compared"][1]]
        untrained = "" if "recovery" in record else ", before any recovery training"
        lines.append(
            f"perplexity per token on {measured['tokens']:,} tokens of {record['perplexity']['text']}, windows of "
            f"{measured['window_length']} without overlap{untrained}"
        )
    return lines


def shown_name(model: str) -> str:
    """A hub name as it is; of a folder, which means nothing elsewhere, the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_ACCURACY = ("acc", "exact_match")  # what begins so is a share, shown in percent

# heading; where the figure stands; factor and digits of what is shown
_FIGURES = (
    ("perplexity", "perplexity", "perplexity", 1, 4),
    ("bits per byte", "perplexity", "bits_per_byte", 1, 4),
    ("divergence", "fidelity", "divergence", 1, 4),
    ("agreement, %", "fidelity", "agreement", 100, 2),
)

_CONDITIONS = ("versions", "device", "dtype")


def evaluation_rows(evaluation: Evaluation) -> Rows:
    """Headings and rows: a measure a row, a model a column, in the order that they were given."""
    models = evaluation["models"]
    rows = [
        ["stored parameters", *(f"{model['parameters']:,}" for model in models)],
        ["stored MB", *(megabytes(model["bytes"]) for model in models)],
    ]
    for heading, group, key, scale, digits in _FIGURES:
        found = [model.get(group) for model in models]
        rows += _row(heading, ["" if one is None else f"{scale * one[key]:.{digits}f}" for one in found])
    names = list(dict.fromkeys(name for model in models for name in model.get("tasks", {})))
    for name in names:
        tasks = [model.get("tasks", {}).get(name) for model in models]
        rows += _row(_heading(name, models), ["" if task is None else _value(task) for task in tasks])
    means = [model.get("tasks_mean") for model in models] if len(names) > 1 else []
    rows += _row("mean of the tasks, %", ["" if mean is None else f"{100 * mean:.2f}" for mean in means])
    return ["", *_columns(models)], rows


def _row(heading: str, cells: list[str]) -> list[list[str]]:
    """One row, or none where no model has that measure."""
    return [[heading, *cells]] if any(cells) else []


def _heading(name: str, models: list[dict[str, Any]]) -> str:
    metric = next(model["tasks"][name]["metric"] for model in models if name in model.get("tasks", {}))
    return f"{name}, {metric}{', %' if metric.startswith(_ACCURACY) else ''}"


def _value(task: dict[str, Any]) -> str:
    scale, digits = (100, 2) if task["metric"].startswith(_ACCURACY) else (1, 4)
    stderr = "" if task["stderr"] is None else f" ± {scale * task['stderr']:.{digits}f}"
    return f"{scale * task['value']:.{digits}f}{stderr}"


def _columns(models: list[dict[str, Any]]) -> list[str]:
    """Names without folders, where these tell the models apart."""
    short = [shown_name(model["name"]) for model in models]
    return short if len(set(short)) == len(short) else [model["name"] for model in models]


def evaluation_table(evaluation: Evaluation) -> Table:
    """Models side by side, for a terminal."""
    headings, rows = evaluation_rows(evaluation)
    table = Table()
    for heading in headings:
        table.add_column(escape(heading), justify="right" if heading else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def evaluation_notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table has to know: which text, how many questions, on what and with which versions."""
    models, versions, lines = evaluation["models"], evaluation["versions"], []
    measured = [model["perplexity"] for model in models if "perplexity" in model]
    seen = {(m["text"], m["window_length"], m["stride"]): m for m in measured}
    for (text, length, stride), one in seen.items():
        counts = {m["tokens"] for m in measured if m["text"] == text}
        tokens = f"{one['tokens']:,} tokens" if len(counts) == 1 else "each model's own tokens"
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
        lines.append(f"tasks: lm_eval {versions['lm_eval']}, {shots}, ± its standard error{questions}")
    for model in models:
        if "truncated" in model:
            lines.append(f"{shown_name(model['name'])}: {model['truncated']} requests did not fit into its context")
    names = ", ".join(f"{name} {versions[name]}" for name in ("flexigpt", "torch", "transformers"))
    return [*lines, f"{evaluation['device']}, {evaluation['dtype']}; {names}"]


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Table and notes in Markdown."""
    notes = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in evaluation_notes(evaluation))
    return markdown(*evaluation_rows(evaluation)) + notes


def merged(old: Evaluation, new: Evaluation) -> Evaluation:
    """Both as one, measure by measure; where both have a measure of a model the new one's.

    What was measured by other versions, on another device, in another dtype or of another revision of a model does not
    stand beside the new: it is left out.
    """
    if any(old.get(name) != new[name] for name in _CONDITIONS):
        return new
    models = []
    for model in new["models"]:
        before: dict[str, Any] = next((other for other in old["models"] if is_same(other["name"], model["name"])), {})
        models.append(_one_model(before, model) if before.get("revision") == model["revision"] else model)
    models += [
        other for other in old["models"] if not any(is_same(other["name"], model["name"]) for model in new["models"])
    ]
    commands = dict.fromkeys(command for one in (old, new) for command in (one["command"] or "").splitlines())
    return new | {
        "command": "\n".join(commands) or None,
        "options": old["options"] | new["options"],
        "models": models,
    }


def _one_model(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    both = before | now
    if "tasks" in both:
        both["tasks"] = before.get("tasks", {}) | now.get("tasks", {})
        both.pop("tasks_mean", None)
        both |= mean_accuracy(both["tasks"])
    return both
