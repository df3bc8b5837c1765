"""Writing an output folder: checked before the work, complete or untouched after it."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flexigpt.evaluation import Evaluation, is_same, mean_accuracy
from flexigpt.model import FlexiGPTConfig, Plan, plan_in_words, plan_of, stored_bytes
from flexigpt.record.record import Record, find_in
from flexigpt.record.tables import block_rows, cost_rows, evaluation_rows, replica_parts, shown_name
from flexigpt.runtime import (
    RECORD,
    InputError,
    Track,
    check_space,
    parse_size,
    replace_file,
    replaced_folder,
    silent,
)
from flexigpt.weights import Assembly, load_tokenizer, write_shards

EVALUATION = "evaluation.json"

_CONDITIONS = ("versions", "device", "dtype")


def write_checkpoint(
    out: str | Path,
    model: PreTrainedModel | Assembly,
    record: Record,
    *,
    source: str | None = None,
    max_shard_size: int | str = "5GB",
    extras: Mapping[str, bytes] | None = None,
    track: Track = silent,
) -> None:
    """Writes the checkpoint of a compact or an ordinary model; `out` is complete or untouched.

    Weights (each tensor once, in shards where they are large), configuration, a compact model's own code, the source's
    tokenizer, a model card (README.md), and the record (record.json).

    Args:
        out: the folder; what is there is replaced, so call `check_output` first.
        model: a compact model, or an ordinary one of its source's family; of one that was assembled, what it shares
            with its source is copied from file to file.
        record: as the flow that made the model returned it.
        source: where the tokenizer lies, if the assembly does not have it; None: no other is written.
        max_shard_size: largest weight file, in bytes or as 5GB.
        extras: further files by their names; the model card shows plan.png, a picture of the plan.
        track: reports each tensor of a model that was assembled.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    assembly, model = (model, model.model) if isinstance(model, Assembly) else (None, model)
    check_space(out, stored_bytes(model))
    opened = None if assembly is None else assembly.tokenizer
    tokenizer = opened or (None if source is None else load_tokenizer(source))
    with replaced_folder(out) as folder:
        if assembly is None:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            _save_without_weights(model, folder)
            size = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size, itemsize=1)
            write_shards(folder, assembly.pieces(), size, track)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", file)  # safetensors lets only the owner read what it writes
        for name, content in (extras or {}).items():
            (folder / name).write_bytes(content)
        card = model_card(model.config, record, picture=PLAN_PICTURE in (extras or {}))
        (folder / "README.md").write_text(card, encoding="utf-8")
        _write_json(folder / RECORD, record)


def _save_without_weights(model: PreTrainedModel, folder: Path) -> None:
    """Configuration, generation configuration and code, as `save_pretrained` writes them."""
    model.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()


def write_plan(out: str | Path, plan: Plan, record: Record) -> None:
    """Writes plan.json, to edit and apply, and record.json: the scores and distances that the plan rests on.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    with replaced_folder(out) as folder:
        _write_json(folder / "plan.json", plan.to_dict())
        _write_json(folder / RECORD, record)


def check_recordable(folder: str | Path) -> None:
    """Refuses a model beside which no evaluation can be recorded, before the work begins.

    Raises:
        InputError: a model that flexigpt did not write, a folder that cannot be written to, or an evaluation.json there
            that cannot be read.
    """
    if not (Path(folder) / RECORD).is_file():
        raise InputError(
            f"--record goes with a checkpoint that flexigpt wrote as the first model: {folder} has no {RECORD}; "
            "leave --record out"
        )
    if not os.access(folder, os.W_OK):
        raise InputError(f"--record: {folder} cannot be written to")
    _recorded_evaluation(Path(folder) / EVALUATION)


def record_evaluation(folder: str | Path, evaluation: Evaluation) -> None:
    """Writes evaluation.json into a checkpoint that flexigpt wrote, beside what is in it, and a table into its card.

    Raises:
        InputError: an evaluation.json that cannot be read, or a disk that is full or cannot be written to.
    """
    path, card = Path(folder) / EVALUATION, Path(folder) / "README.md"
    before = _recorded_evaluation(path)
    together = evaluation if before is None else merged(before, evaluation)
    replace_file(path, _json_text(together))
    replace_file(card, with_evaluation(card.read_text(encoding="utf-8") if card.is_file() else "", together))


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


def _recorded_evaluation(path: Path) -> Evaluation | None:
    if not path.exists():
        return None
    try:
        found: Evaluation = json.loads(path.read_text(encoding="utf-8"))
        sound = found["format"] == 1 and all("name" in model for model in found["models"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: remove it, and record anew") from error
    if not sound:
        raise InputError(f"{path} is not of a format that this flexigpt reads: remove it, and record anew")
    return found


def _json_text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(_json_text(data), encoding="utf-8")


PLAN_PICTURE = "plan.png"  # lies beside a compact model's card


def model_card(config: PreTrainedConfig, record: Record, picture: bool = False) -> str:
    """The README.md of a checkpoint: what it is, measured numbers, how to open it, its blocks, how it was made."""
    ran = record.get("command")
    made = (
        f"Made with:\n\n```bash\n{ran}\n```\n" if ran else "Made with the Python API; `record.json` has the options.\n"
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    name, is_local = shown_name(record["source_name"]), Path(record["source_name"]).exists()
    base_model = "" if is_local else f"base_model: {name}\n"
    title, summary, trust, hint = _card_words(config, record)
    rows = block_rows(config, record)
    shown = f"![{plan_in_words(plan_of(config))}]({PLAN_PICTURE})\n\n" if picture else ""
    blocks = "" if rows is None else f"## Blocks\n\n{shown}{rows.markdown()}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- flexigpt
---

# {name.rpartition("/")[2]}, {title}

{summary}

{cost_rows(record).markdown()}
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


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """The card with what an evaluation says, in place of what one said before; all else in it stays."""
    section = f"## Evaluation\n\n{evaluation_rows(evaluation).markdown()}\n"
    rest = re.sub(r"^## Evaluation\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    before, origin, after = rest.partition("## Origin\n")
    return f"{before}{section}{origin}{after}" if origin else f"{rest.rstrip()}\n\n{section}".lstrip()


def _card_words(config: PreTrainedConfig, record: Record) -> tuple[str, str, str, str]:
    """What a model card says of its kind of model: in the title, below it, in the snippet, and after the snippet."""
    if isinstance(config, FlexiGPTConfig):
        plan, parts = plan_of(config), " and ".join(("low-rank adapters", *replica_parts(config)))
        summary = (
            f"{len(plan.replicas)} of {plan.num_blocks} blocks are replicas: each borrows the linears of a kept block, "
            f"its base, and\nadds {parts} of its own\n([FlexiGPT](https://arxiv.org/abs/2501.14713)). "
            "Every tensor is stored once."
        )
        hint = "With `import flexigpt` first, `trust_remote_code` is not needed."
        return "compact", summary, ", trust_remote_code=True", hint
    hint = f"An ordinary checkpoint of the `{config.model_type}` family: transformers is all that it needs."
    removed = find_in(record, "removed")
    if removed is None:
        return "trained", f"All {config.num_hidden_layers} blocks are kept.", "", hint
    summary = (
        f"{len(removed['blocks'])} of {removed['num_blocks']} blocks of {shown_name(removed['source'])} are removed, "
        "and nothing stands in for them\n(plain removal, [ShortGPT](https://arxiv.org/abs/2403.03853))."
    )
    return "shorter", summary, "", hint
