"""What a model stores, and what a plan decided: as data, as tables, and as a model card."""

from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from flexigpt.architecture import find_architecture
from flexigpt.checkpoint import config_dtype, open_empty, plan_of
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM, SharedLinear
from flexigpt.plan import Plan, Replica
from flexigpt.record import Record, find_in

Rows = tuple[list[str], list[list[str]]]  # headings; rows


def inspect_model(model: str) -> dict[str, Any]:
    """What a local or hub model consists of; its weights are not read.

    Returns:
        JSON-ready: `plan` (None for a source model), `parameters` stored and effective (the linears of a base counted
        again for each of its replicas), `bytes` stored and, for a folder, of its weight files, and `parts`: parameters
        and bytes of each.

    Raises:
        InputError: a model that cannot be opened or is of a family that is not supported.
    """
    empty = open_empty(model)
    config = empty.config
    plan = plan_of(config) if isinstance(empty, FlexiGPTForCausalLM) else None
    dtype = config_dtype(config)
    parts = _count_parts(empty, plan)
    stored = sum(parts.values())
    shared = sum(m.in_features * m.out_features for m in empty.modules() if isinstance(m, SharedLinear))
    files = list(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return {
        "model": model,
        "model_type": config.model_type,
        "source_type": config.get_text_config().model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": config.get_text_config().num_hidden_layers,
        "plan": None if plan is None else plan.to_dict(),
        "parameters": {"stored": stored, "effective": stored + shared},
        "bytes": {"stored": stored * dtype.itemsize, "files": sum(file.stat().st_size for file in files) or None},
        "parts": {part: {"parameters": n, "bytes": n * dtype.itemsize} for part, n in parts.items() if n},
    }


def _count_parts(model: PreTrainedModel, plan: Plan | None) -> dict[str, int]:
    """Parameters of each part; every parameter is in exactly one."""
    if isinstance(model, FlexiGPTForCausalLM):
        blocks, linears = f"language_model.{model.config.blocks}.", model.config.linears
    else:
        architecture = find_architecture(model.config)
        blocks, linears = f"{architecture.blocks}.", list(architecture.linears)
    pruned = set() if plan is None else set(plan.pruned)
    weights = {f"{path}.weight" for path in linears}
    head = model.get_output_embeddings()
    outside = {id(p): "output head" for p in (head.parameters() if head else ())}
    outside |= {id(p): "embeddings" for p in model.get_input_embeddings().parameters()}
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(blocks):
            part = outside.get(id(parameter), "outside the blocks, other")
        else:
            block, _, path = name.removeprefix(blocks).partition(".")
            if int(block) not in pruned:
                part = "kept blocks, linears" if path in weights else "kept blocks, norms and biases"
            elif path.endswith((".adapter_A", ".adapter_B")):
                part = "replicas, adapters"
            elif path.endswith(".output_norm.weight"):
                part = "replicas, output norms"
            else:
                part = "replicas, norms and biases"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def inspection_tables(inspection: dict[str, Any]) -> list[Table]:
    """What `inspect_model` found, for a terminal."""
    parts = Table(title=f"{inspection['model']} ({_kind(inspection)}, {inspection['dtype']})", title_justify="left")
    for heading in ("part", "parameters", "MB"):
        parts.add_column(heading, justify="left" if heading == "part" else "right")
    for part, size in inspection["parts"].items():
        parts.add_row(part, f"{size['parameters']:,}", megabytes(size["bytes"]))
    parts.add_section()
    parts.add_row("stored", f"{inspection['parameters']['stored']:,}", megabytes(inspection["bytes"]["stored"]))
    parts.add_row("effective", f"{inspection['parameters']['effective']:,}", "")
    if inspection["bytes"]["files"]:
        parts.add_row("weight files", "", megabytes(inspection["bytes"]["files"]))
    if not inspection["plan"] or not inspection["plan"]["replicas"]:
        return [parts]
    plan = Table(title="replicas", title_justify="left")
    for heading in ("block", "base", "rank"):
        plan.add_column(heading, justify="right")
    for row in inspection["plan"]["replicas"]:
        plan.add_row(str(row["block"]), str(row["base"]), str(row["rank"]))
    return [parts, plan]


def _kind(inspection: dict[str, Any]) -> str:
    if inspection["plan"] is None:
        return f"{inspection['source_type']}, {inspection['blocks']} blocks"
    replicas = len(inspection["plan"]["replicas"])
    return f"compact {inspection['source_type']}, {inspection['blocks']} blocks, {replicas} of them replicas"


def plan_rows(plan: Plan, record: Record, output_norm: bool = True) -> Rows:
    """Headings and rows of the plan: block, score, base, distance, what is stored; columns of what was measured."""
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
            norms = ", output norms" if output_norm else ""
            row["stored"] = f"adapters of rank {replica.rank}{norms}"
        rows.append(row)
    return list(rows[0]), [list(row.values()) for row in rows]


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
        return plan_rows(plan_of(config), record, bool(config.output_norms))
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
    return ["", first, second, f"of {first}"], rows


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
        lines.append(f"removed: {blocks} of the {removed['num_blocks']} blocks of {_shown_name(removed['source'])}")
    calibration = find_in(record, "calibration")
    if calibration:
        text, (windows, length) = calibration["text"], calibration["windows"]
        short = calibration["asked"] - windows
        fewer = f"; the text is {short} windows short of the {windows + short} asked for" if short else ""
        lines.append(f"{find_in(record, 'block_score')} on {windows} windows of {length} tokens of {text}{fewer}")
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


def model_card(config: PreTrainedConfig, record: Record) -> str:
    """The README.md of a checkpoint: what it is, measured numbers, how to open it, its blocks, how it was made."""
    ran = record.get("command")
    made = (
        f"Made with:\n\n```bash\n{ran}\n```\n" if ran else "Made with the Python API; `record.json` has the options.\n"
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    measured = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in notes(record))
    name, is_local = _shown_name(record["source_name"]), Path(record["source_name"]).exists()
    base_model = "" if is_local else f"base_model: {name}\n"
    title, summary, trust, hint = _card_words(config, record)
    rows = block_rows(config, record)
    blocks = "" if rows is None else f"## Blocks\n\n{_markdown(*rows)}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- flexigpt
---

# {name.rpartition("/")[2]}, {title}

{summary}

{_markdown(*cost_rows(record))}{measured}
## Open it

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("."{trust})
```

{hint}

{blocks}## Origin

{made}
Source: {name}. Versions: {versions}. All that was measured is in `record.json`.
"""


def _card_words(config: PreTrainedConfig, record: Record) -> tuple[str, str, str, str]:
    """What a model card says of its kind of model: in the title, below it, in the snippet, and after the snippet."""
    if isinstance(config, FlexiGPTConfig):
        plan, norms = plan_of(config), " and output norms" if config.output_norms else ""
        summary = (
            f"{len(plan.replicas)} of {plan.num_blocks} blocks are replicas: each borrows the linears of a kept block, "
            f"its base, and\nadds low-rank adapters{norms} of its own\n([FlexiGPT](https://arxiv.org/abs/2501.14713)). "
            "Every tensor is stored once."
        )
        hint = "With `import flexigpt` first, `trust_remote_code` is not needed."
        return "compact", summary, ", trust_remote_code=True", hint
    hint = f"An ordinary checkpoint of the `{config.model_type}` family: transformers is all that it needs."
    removed = find_in(record, "removed")
    if removed is None:
        return "trained", f"All {config.num_hidden_layers} blocks are kept.", "", hint
    summary = (
        f"{len(removed['blocks'])} of {removed['num_blocks']} blocks of {_shown_name(removed['source'])} are removed, "
        "and nothing stands in for them\n(plain removal, [ShortGPT](https://arxiv.org/abs/2403.03853))."
    )
    return "shorter", summary, "", hint


def _shown_name(model: str) -> str:
    """A hub name as it is; of a folder, which means nothing elsewhere, the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
