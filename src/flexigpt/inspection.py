"""What a local or hub model consists of; its weights are not read."""

from pathlib import Path
from typing import Any

from rich.table import Table

from flexigpt.accounting import count_parts
from flexigpt.checkpoint import config_dtype, open_empty, plan_of
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM, SharedLinear
from flexigpt.plan import Replica
from flexigpt.tables import megabytes


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
    parts = count_parts(empty)
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
        plan.add_row(str(row["block"]), str(row["base"]), Replica(**row).shown_rank())
    return [parts, plan]


def _kind(inspection: dict[str, Any]) -> str:
    if inspection["plan"] is None:
        return f"{inspection['source_type']}, {inspection['blocks']} blocks"
    replicas = len(inspection["plan"]["replicas"])
    return f"compact {inspection['source_type']}, {inspection['blocks']} blocks, {replicas} of them replicas"
