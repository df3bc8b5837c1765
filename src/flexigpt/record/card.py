"""The model card of a checkpoint (README.md): made from what lies in its folder, and made again with a hub's names."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment
from transformers import PreTrainedConfig

from flexigpt.evaluation import Evaluation
from flexigpt.model import FlexiGPTConfig, plan_of, plan_summary, source_units
from flexigpt.record.read import read_recorded
from flexigpt.record.record import RECORD, Record, find_in, first_record, json_text
from flexigpt.record.tables import block_rows, cost_rows, evaluation_rows, replica_parts, shown_name
from flexigpt.runtime import InputError, one_line, replace_file
from flexigpt.weights import find_file, read_config

CARD = "README.md"

# Sections that are made; others are a person's own, and stay.
_MADE = ("Open it", "Limitations", "Recovery", "Blocks", "Evaluation", "Origin")
_LICENSE = ("license", "license_name", "license_link")
_FROM_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


class Picture(NamedTuple):
    """A picture of the card.

    Attributes:
        file: its name in the checkpoint's folder.
        alt: what it shows, in words.
        png: its content.
    """

    file: str
    alt: str
    png: bytes


def write_card(
    model: str | Path,
    repository: str | None = None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    draw: Callable[[Path], Sequence[Picture]] = lambda _: (),
) -> None:
    """Makes the card of a checkpoint again, from what is recorded beside it; sections that a person added stay.

    Args:
        model: a folder that flexigpt wrote.
        repository: OWNER/NAME on the hub, which the snippet then opens; None: what the card says already.
        license: as the hub calls it; None: the source's, as far as its card or configuration says it.
        base_model: the source's name on the hub; None: what is known of it.
        draw: makes pictures of the checkpoint, once nothing else is wrong; they are written beside the card, which
            shows them.

    Raises:
        InputError: a folder that is no such checkpoint or cannot be written to, or a name that the hub does not take.
    """
    folder = Path(model)
    for name, what in ((repository, "repository"), (base_model, "--base-model")):
        _check_name(name, what)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise InputError(f"--license {license} is no licence of the hub: give one as apache-2.0, llama3.2 or other")
    recorded, config = read_recorded(folder), _config(folder)
    if "compared" not in recorded.record:
        raise InputError(f"{folder} holds an export, which has no card: give the checkpoint that it was made of")
    card = folder / CARD
    before = _written_before(card)
    front = front_matter(card)
    if license is not None and license != front.get("license"):
        front = {name: value for name, value in front.items() if name not in _LICENSE} | {"license": license}
    if front.get("license") == "other" and "license_link" not in front and (folder / "LICENSE").is_file():
        front |= {"license_name": "license-of-the-source", "license_link": "LICENSE"}
    given = {"model_name": repository, "base_model": base_model}
    front |= {name: value for name, value in given.items() if value is not None}
    pictures = draw(folder)
    shown = {picture.file: picture.alt for picture in pictures}
    text = model_card(config, recorded.record, front, shown, has_chat(folder), recorded.evaluation)
    for picture in pictures:
        replace_file(folder / picture.file, picture.png)
    replace_file(card, _with_own_sections(text, before))
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if "files" in record:  # so that the next run knows whose they are
        record["files"] = sorted({*record["files"], CARD, *shown})
        replace_file(folder / RECORD, json_text(record))


def _written_before(card: Path) -> str:
    """The card as a person may have changed it: what cannot be kept is not overwritten.

    Raises:
        InputError: it is no text, or its settings no YAML.
    """
    if not card.exists():
        return ""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{card} cannot be read, so it is not written again: {one_line(error)}") from error
    if text.startswith("---"):
        try:
            metadata_load(card)
        except Exception as error:
            raise InputError(
                f"the settings at the top of {card} are no YAML: put them right, or remove them"
            ) from error
    return text


def _config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model, so it has no card: give a checkpoint that flexigpt wrote")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to")
    return read_config(str(folder))


def _check_name(name: str | None, what: str) -> None:
    if name is None:
        return
    try:
        validate_repo_id(name)
        if "/" in name:
            return
    except HFValidationError:
        pass
    raise InputError(f"{what} {name} is no name on the hub: give OWNER/NAME, as in me/small-llama")


def front_matter(card: Path | None) -> dict[str, Any]:
    """What stands at the top of a card, for the hub; nothing where there is no card, or what cannot be read."""
    try:
        return dict((None if card is None else metadata_load(card)) or {})
    except Exception:  # whatever a person wrote there is YAML, or is not
        return {}


def inherited(source: str) -> dict[str, Any]:
    """What the card of a model that is made of a source says of the source: its licence, and its name on the hub.

    Of a source that flexigpt made, what its own card says; else what its card or configuration says, and its name.
    """
    front = front_matter(find_file(source, CARD))
    said = {name: front[name] for name in _LICENSE if name in front}
    config = find_file(source, "config.json")
    in_config = None if config is None else json.loads(config.read_text(encoding="utf-8")).get("license")
    if not said and isinstance(in_config, str):
        said["license"] = in_config
    made = find_file(source, RECORD) is not None
    base = front.get("base_model") if made else hub_name(source)
    return said if base is None else said | {"base_model": base}


def hub_name(source: str) -> str | None:
    """The name on the hub of a source, which may be a folder of the hub's cache; None: a folder has none."""
    if not Path(source).exists():
        return source
    parts = Path(source).absolute().parts
    cached = _FROM_CACHE.fullmatch(parts[-3]) if len(parts) > 2 and parts[-2] == "snapshots" else None
    return f"{cached[1]}/{cached[2]}" if cached else None


def has_chat(folder: Path) -> bool:
    """Whether the tokenizer there has a chat template."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
    )


def model_card(
    config: PreTrainedConfig,
    record: Record,
    front: Mapping[str, Any],
    pictures: Mapping[str, str],
    chat: bool = False,
    evaluation: Evaluation | None = None,
) -> str:
    """The README.md of a checkpoint: what it is, measured numbers, how to open it, its limits, blocks and origin.

    Args:
        config: of the model.
        record: of the flow that made it.
        front: what its top says of names and licence, and what a person added there.
        pictures: file -> what it shows, of those beside the card.
        chat: whether the tokenizer has a chat template.
        evaluation: where the model was evaluated.
    """
    template = (resources.files("flexigpt.record") / "card.md.j2").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    plan = plan_of(config) if isinstance(config, FlexiGPTConfig) else None
    removed, source = find_in(record, "removed"), first_record(record)["source_name"]
    repository = front.get("model_name")
    fixed = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fixed |= {"base_model_relation": "finetune"} if "base_model" in front else {}
    tags = [*dict.fromkeys([*(front.get("tags") or []), "flexigpt"])]
    text = environment.from_string(template).render(
        front=ModelCardData(ignore_metadata_errors=True, **(dict(front) | fixed | {"tags": tags})).to_yaml(),
        title=repository.rpartition("/")[2] if repository else None,
        repository=repository or ".",
        name=front.get("base_model") if isinstance(front.get("base_model"), str) else shown_name(source),
        maker=shown_name(record["source_name"]),
        chat=chat,
        config=config,
        plan=plan,
        parts=["low-rank adapters", *(replica_parts(config) if isinstance(config, FlexiGPTConfig) else [])],
        removed=removed,
        removed_from=removed and shown_name(removed["source"]),
        cost=cost_rows(record),
        quantization=find_in(record, "quantization"),
        limits=list(_limits(config, record, evaluation)),
        blocks=block_rows(config, record),
        pictures=pictures,
        summary=plan_summary(plan, source_units(config)) if plan else "",
        command=record.get("command"),
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )
    text = text if evaluation is None else with_evaluation(text, evaluation)
    for path in sorted(_local_paths(record) | _local_paths(evaluation or {}), key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text


def _local_paths(told: Record | Evaluation) -> set[str]:
    """What was given by its whole path, which means nothing elsewhere and may tell who worked where."""
    words = [word.rpartition("=")[0] or word for word in _values(told)] + list(_values(told))
    words.append(told.get("source_name", ""))
    more = _local_paths(told["origin"]) if "origin" in told else set()
    return more | {word for word in words if Path(word).is_absolute() and Path(word).name}


def _values(told: Record | Evaluation) -> Iterator[str]:
    """What was typed, and what options were given, each text of a mixture on its own."""
    for word in shlex.split(told.get("command") or ""):
        yield word.partition("=")[2] if word.startswith("--") and "=" in word else word
    for value in told.get("options", {}).values():
        yield from map(str, value if isinstance(value, list | tuple) else (value,))


def _limits(config: PreTrainedConfig, record: Record, evaluation: Evaluation | None) -> Iterator[str]:
    """What a user of the model has to expect, each from something that was measured, or was not."""
    cost, smaller = cost_rows(record), find_in(record, "removed") or getattr(config, "model_type", "") == "flexigpt"
    row = next((row for row in cost.rows if row[0] == "perplexity"), None)
    if row is None:
        yield "Its perplexity was not recorded."
    else:
        of_source = f"of the source {row[1]}" if row[1] else "of the source it was not measured"
        text = record["perplexity"]["text"]
        yield f"Its perplexity on {text} is {row[-2]}, {of_source}. On text unlike that, more may be lost."
    calibration = find_in(record, "calibration")
    if calibration:
        windows, length = calibration["windows"]
        chosen = f"{windows * length:,} tokens of {calibration['text']}"
        yield f"What is left was chosen on {chosen}: what only other text needs may be gone."
    if smaller and not find_in(record, "recovery"):
        yield "It was not trained after it was made smaller; `flexigpt recover` wins back a part of what was lost."
    if getattr(config, "replicas", None):
        yield "Replicas save storage, not time: every block computes what its source's does, and its adapters too."
    yield from _measured_limits(evaluation)
    yield (
        "Nothing was measured of other languages, of conversation, or of what the source refuses or must not say: what "
        "its card claims of these need not hold here."
    )


def _measured_limits(evaluation: Evaluation | None) -> Iterator[str]:
    """Tasks on which it does worse than the model beside it, by more than chance explains."""
    models = evaluation["models"] if evaluation else []
    tasks = models[0].get("tasks", {}) if models else {}
    if not tasks:
        yield "No benchmark task is recorded."
        return
    for other in models[1:]:
        worse = []
        for name, task in other.get("tasks", {}).items():
            ours = tasks.get(name, task)
            doubt = 2 * ((ours["stderr"] or 0) ** 2 + (task["stderr"] or 0) ** 2) ** 0.5
            if task["value"] - ours["value"] > doubt:
                worse.append(f"{name} ({task['value']:.1%} there, {ours['value']:.1%} here)")
        if worse:
            yield f"Worse than {shown_name(other['name'])}, by more than twice the standard error: {', '.join(worse)}."


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """The card with what an evaluation says, in place of what one said before; all else in it stays."""
    section = f"## Evaluation\n\n{evaluation_rows(evaluation).markdown()}\n"
    rest = re.sub(r"^## Evaluation\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    return _before_origin(rest, section)


def _with_own_sections(card: str, before: str) -> str:
    """The card with the sections of an earlier one that no card of ours has."""
    sections = re.findall(r"^## (.*)\n((?s:.*?))(?=^## |\Z)", before, flags=re.MULTILINE)
    own = "".join(f"## {heading}\n{text.rstrip()}\n\n" for heading, text in sections if heading not in _MADE)
    return _before_origin(card, own) if own else card


def _before_origin(card: str, section: str) -> str:
    before, origin, after = card.partition("## Origin\n")
    return f"{before}{section}{origin}{after}" if origin else f"{card.rstrip()}\n\n{section}".lstrip()
