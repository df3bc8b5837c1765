"""What a model stores, and what a plan decided: as data, as tables, and as a model card."""

from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from flexigpt.architecture import find_architecture
from flexigpt.checkpoint import config_dtype, open_empty, plan_of
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM, SharedLinear
from flexigpt.plan import Plan
from flexigpt.record import Record


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


def plan_rows(plan: Plan, record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the plan: block, score, base, distance, what is stored; columns of what was measured."""
    scores, distances, origins = (record.get(key) for key in ("scores", "distances", "source_blocks"))
    replicas = {replica.block: replica for replica in plan.replicas}
    rows = []
    for block in range(plan.num_blocks):
        row = {"block": str(block)}
        if origins is not None:
            row["source block"] = str(origins[block])
        if scores is not None:
            row[record["block_score"]] = f"{scores[block]:.4f}"
        replica = replicas.get(block)
        row["base"] = "" if replica is None else str(replica.base)
        if distances is not None:
            row["distance"] = "" if replica is None else f"{distances[block][replica.base]:.4g}"
        row["stored"] = "its own linears"
        if replica is not None:
            norms = ", output norms" if _has_output_norms(record) else ""
            row["stored"] = f"adapters of rank {replica.rank}{norms}"
        rows.append(row)
    return list(rows[0]), [list(row.values()) for row in rows]


def _has_output_norms(record: Record) -> bool:
    return record["options"].get("output_norm", True)


def plan_table(plan: Plan, record: Record) -> Table:
    """The plan, for a terminal."""
    headings, rows = plan_rows(plan, record)
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "stored" else "right")
    for row in rows:
        table.add_row(*row, style=None if row[headings.index("base")] else "dim")
    return table


def cost_rows(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of what pruning cost: parameters, megabytes, perplexity, before and after."""
    before, after = record["source"], record["compact"]
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
        source, compact = (record["perplexity"][name]["perplexity"] for name in ("source", "compact"))
        rows.append(["perplexity", f"{source:.2f}", f"{compact:.2f}", f"{compact / source:.1%}"])
    return ["", "source", "compact", "of source"], rows


def cost_table(record: Record) -> Table:
    """What pruning cost, for a terminal."""
    headings, rows = cost_rows(record)
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    return table


def notes(record: Record) -> list[str]:
    """What a reader of the tables has to know: on what the blocks were scored and the perplexity was measured."""
    lines = []
    if "calibration" in record:
        text, (windows, length) = record["calibration"]["text"], record["calibration"]["windows"]
        short = record["calibration"]["asked"] - windows
        fewer = f"; the text is {short} windows short of the {windows + short} asked for" if short else ""
        lines.append(f"{record['block_score']} on {windows} windows of {length} tokens of {text}{fewer}")
    if "perplexity" in record:
        measured = record["perplexity"]["compact"]
        lines.append(
            f"perplexity per token on {measured['tokens']:,} tokens of {record['perplexity']['text']}, windows of "
            f"{measured['window_length']} without overlap, before any recovery training"
        )
    return lines


def megabytes(num_bytes: int) -> str:
    """10^6 bytes, as disks are sold."""
    return f"{num_bytes / 1e6:,.2f}"


def model_card(plan: Plan, record: Record) -> str:
    """The README.md of a compact checkpoint: plan, measured numbers, how to open it, how it was made."""
    ran = record.get("command")
    made = (
        f"Made with:\n\n```bash\n{ran}\n```\n" if ran else "Made with the Python API; `record.json` has the options.\n"
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    measured = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in notes(record))
    name, is_local = Path(record["source_name"]).resolve().name, Path(record["source_name"]).exists()
    base_model = "" if is_local else f"base_model: {record['source_name']}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- flexigpt
---

# {name}, compact

{len(plan.replicas)} of {plan.num_blocks} blocks are replicas: each borrows the linears of a kept block, its base, and
adds low-rank adapters{" and output norms" if _has_output_norms(record) else ""} of its own
([FlexiGPT](https://arxiv.org/abs/2501.14713)). Every tensor is stored once.

{_markdown(*cost_rows(record))}{measured}
## Open it

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
```

With `import flexigpt` first, `trust_remote_code` is not needed.

## Plan

{_markdown(*plan_rows(plan, record))}
## Origin

{made}
Source: {name if is_local else record["source_name"]}. Versions: {versions}. All that was measured is in `record.json`.
"""


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
