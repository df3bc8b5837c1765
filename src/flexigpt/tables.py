"""What a record says, as rows and as tables for a terminal: what became of each block, what it cost, on which text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedConfig

from flexigpt.checkpoint import plan_of
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.greedy import MOST_WINDOWS
from flexigpt.plan import Plan, Replica
from flexigpt.record import Record, find_in

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


def plan_in_words(plan: Plan) -> str:
    """Which blocks borrow the linears of which, in a sentence: for those who do not see the picture."""
    borrowers: dict[int, list[int]] = {}
    for replica in plan.replicas:
        borrowers.setdefault(replica.base, []).append(replica.block)
    told = "; ".join(
        f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))} borrow{'' if len(blocks) > 1 else 's'} "
        f"the linears of block {base}"
        for base, blocks in sorted(borrowers.items())
    )
    return f"The stack of {plan.num_blocks} blocks: {told or 'none is a replica'}."


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
        judging = f"the first {MOST_WINDOWS} of " if windows > MOST_WINDOWS and find_in(record, "pruning_order") else ""
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


def megabytes(num_bytes: int) -> str:
    """10^6 bytes, as disks are sold."""
    return f"{num_bytes / 1e6:,.2f}"


def shown_name(model: str) -> str:
    """A hub name as it is; of a folder, which means nothing elsewhere, the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
