"""What an evaluation says: rows for a terminal and for Markdown, and two evaluations as one."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from flexigpt.evaluate import Evaluation, is_same, mean_accuracy
from flexigpt.tables import Rows, markdown, megabytes, shown_name

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
