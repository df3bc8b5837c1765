"""Writing an output folder: checked before the work, complete or untouched after it."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedConfig, PreTrainedModel

from flexigpt.evaluation import Evaluation, is_same, mean_accuracy
from flexigpt.model import FlexiGPTConfig, Plan, plan_in_words, plan_of, plan_summary, source_units, stored_bytes
from flexigpt.record.read import read_evaluation, read_record
from flexigpt.record.record import EVALUATION, RECORD, Record, find_in
from flexigpt.record.tables import block_rows, cost_rows, evaluation_rows, replica_parts, shown_name
from flexigpt.runtime import (
    InputError,
    Track,
    check_output,
    check_space,
    claimed,
    parse_size,
    replace_file,
    replaced_folder,
    silent,
)
from flexigpt.weights import Assembly, load_tokenizer, write_shards

PLAN_PICTURE = "plan.png"  # lies beside a compact model's card

# Stands in every file of a report, so that only such files are ever replaced: in its first bytes.
GENERATOR, FIGURES, _LOOK_AT = "flexigpt report", "figures", 4096

# What a killed process leaves in an output folder, see `claimed`.
_SCRATCH = re.compile(r"\.[^/]+\.writing(/(lock|holder|(new|old)(/.*)?))?")

# What was written before records named the files.
_OLDER = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*_flexigpt.py"),
    *("README.md", "plan.png", "plan.json", RECORD, "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja"),
)

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
        out: the folder; what flexigpt wrote there is replaced.
        model: a compact model, or an ordinary one of its source's family; of one that was assembled, what it shares
            with its source is copied from file to file.
        record: as the flow that made the model returned it.
        source: where the tokenizer lies, if the assembly does not have it; None: no other is written.
        max_shard_size: largest weight file, in bytes or as 5GB.
        extras: further files by their names; the model card shows plan.png, a picture of the plan.
        track: reports each tensor of a model that was assembled.

    Raises:
        InputError: a disk that is full or cannot be written to, or a folder that holds what flexigpt did not write.
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
        write_record(folder, record, out)


def _save_without_weights(model: PreTrainedModel, folder: Path) -> None:
    """Configuration, generation configuration and code, as `save_pretrained` writes them."""
    model.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()


def write_plan(out: str | Path, plan: Plan, record: Record) -> None:
    """Writes plan.json, to edit and apply, and record.json: the scores and distances that the plan rests on.

    Raises:
        InputError: a disk that is full or cannot be written to, or a folder that holds what flexigpt did not write.
    """
    with replaced_folder(out) as folder:
        (folder / "plan.json").write_text(_json_text(plan.to_dict()), encoding="utf-8")
        write_record(folder, record, out)


def write_frontier(out: str | Path, record: Record) -> None:
    """Writes record.json: the sizes, and what was measured of them.

    Raises:
        InputError: as `write_plan`.
    """
    with replaced_folder(out) as folder:
        write_record(folder, record, out)


def write_record(folder: Path, record: Record, out: str | Path) -> None:
    """Writes the record, last, with the names of all files, so that the next run knows whose they are.

    Args:
        folder: with all other files.
        record: what was asked and measured.
        out: whose place the folder takes.

    Raises:
        InputError: an `out` that holds what flexigpt did not write.
    """
    files = sorted([RECORD, *(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())])
    (folder / RECORD).write_text(_json_text(record | {"files": files}), encoding="utf-8")
    check_replaceable(Path(out).expanduser())  # once more: a run takes long, and a user may have left something there


@contextlib.contextmanager
def reserved(out: str | Path, inputs: Iterable[str | Path | None], overwrite: bool) -> Iterator[None]:
    """Within it an output folder is this process's; refuses it before the work begins.

    Args:
        out: the folder.
        inputs: what the work reads: names of models and texts, some of them perhaps paths.
        overwrite: whether what flexigpt wrote there before may be replaced.

    Raises:
        InputError: a place that cannot be written to, or that another process writes to; a folder that is not empty
            (without `overwrite`), that holds what flexigpt did not write (with it), or in which an input lies.
    """
    out = Path(out).expanduser()
    check_output(out, inputs)
    with claimed(out):
        if not overwrite and out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is not empty: give another folder, or --overwrite to replace it")
        check_replaceable(out)
        yield


def check_replaceable(out: Path) -> None:
    """Refuses a folder that holds what flexigpt did not write.

    Raises:
        InputError: no record of flexigpt's, or something that it, and what else flexigpt writes, does not name.
    """
    try:
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not (out / RECORD).is_file():
            raise InputError(f"{out} was not written by flexigpt ({RECORD} is not there): give another folder")
        strange = next(_strangers(out, read_record(out / RECORD).get("files")), None)
    except OSError as error:
        raise InputError(f"{out} cannot be read: {error.strerror}") from error
    if strange is not None:
        raise InputError(f"{strange} was not written by flexigpt: move it elsewhere, or give another folder than {out}")


def _strangers(out: Path, files: Sequence[str] | None) -> Iterator[Path]:
    """What a folder holds beside these files and what flexigpt writes later; None: those of an older flexigpt."""
    folders = {FIGURES, *(str(parent) for name in files or () for parent in PurePosixPath(name).parents)}
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if path.is_dir() and not path.is_symlink():
            known = name in folders
        elif files is None:
            known = any(fnmatchcase(name, pattern) for pattern in _OLDER)
        else:
            known = name in files
        if not (known or name == EVALUATION or _SCRATCH.fullmatch(name) or (path.is_file() and is_report(path))):
            yield path


def is_report(path: Path) -> bool:
    """Whether `flexigpt report` wrote the file: a page or a picture that says so where such files do."""
    with path.open("rb") as file:
        head = file.read(_LOOK_AT)
    if path.suffix.lower() in (".html", ".htm"):
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in head
    return head.startswith(b"\x89PNG") and f"Software\0{GENERATOR}".encode() in head


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
    read_evaluation(Path(folder))


def record_evaluation(folder: str | Path, evaluation: Evaluation) -> None:
    """Writes evaluation.json into a checkpoint that flexigpt wrote, beside what is in it, and a table into its card.

    Raises:
        InputError: an evaluation.json that cannot be read, or a disk that is full or cannot be written to.
    """
    path, card = Path(folder) / EVALUATION, Path(folder) / "README.md"
    before = read_evaluation(Path(folder))
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
        if before.get("revision") == model["revision"]:
            tasks = before.get("tasks", {}) | model.get("tasks", {})
            both = {key: value for key, value in before.items() if key != "tasks_mean"} | model
            model = both | ({"tasks": tasks} | mean_accuracy(tasks) if tasks else {})
        models.append(model)
    models += [one for one in old["models"] if not any(is_same(one["name"], model["name"]) for model in new["models"])]
    commands = dict.fromkeys(command for one in (old, new) for command in (one["command"] or "").splitlines())
    options = old["options"] | new["options"]
    return new | {"command": "\n".join(commands) or None, "options": options, "models": models}


def _json_text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"


def model_card(config: PreTrainedConfig, record: Record, picture: bool = False) -> str:
    """The README.md of a checkpoint: what it is, measured numbers, how to open it, its blocks, how it was made."""
    template = (resources.files("flexigpt.record") / "card.md.j2").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    plan = plan_of(config) if isinstance(config, FlexiGPTConfig) else None
    removed = find_in(record, "removed")
    return environment.from_string(template).render(
        name=shown_name(record["source_name"]),
        on_hub=not Path(record["source_name"]).exists(),
        config=config,
        plan=plan,
        parts=["low-rank adapters", *(replica_parts(config) if isinstance(config, FlexiGPTConfig) else [])],
        removed=removed,
        removed_from=removed and shown_name(removed["source"]),
        cost=cost_rows(record),
        blocks=block_rows(config, record),
        picture=PLAN_PICTURE if picture else "",
        summary=plan_summary(plan, source_units(config)) if plan else "",
        picture_in_words=plan_in_words(plan, source_units(config)) if plan else "",
        command=record.get("command"),
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """The card with what an evaluation says, in place of what one said before; all else in it stays."""
    section = f"## Evaluation\n\n{evaluation_rows(evaluation).markdown()}\n"
    rest = re.sub(r"^## Evaluation\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    before, origin, after = rest.partition("## Origin\n")
    return f"{before}{section}{origin}{after}" if origin else f"{rest.rstrip()}\n\n{section}".lstrip()
