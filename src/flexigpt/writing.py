"""Writing an output folder: checked before the work, complete or untouched after it."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from flexigpt.checkpoint import load_tokenizer, one_line, plan_of, stored_bytes
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.drawing import drawing
from flexigpt.errors import InputError
from flexigpt.evaluate import Evaluation
from flexigpt.evaluation_tables import evaluation_markdown, merged
from flexigpt.model_card import PLAN_PICTURE, model_card, with_evaluation
from flexigpt.plan import Plan, parse_size
from flexigpt.progress import Track, silent
from flexigpt.record import Record
from flexigpt.shards import write_shards
from flexigpt.streaming import Assembly

RECORD = "record.json"
EVALUATION = "evaluation.json"
_EVALUATION_FILES = (".json", ".md")


def check_output(out: str | Path, inputs: Iterable[str | Path | None], overwrite: bool) -> None:
    """Refuses an output folder before the work begins.

    Args:
        out: the folder.
        inputs: what the work reads: names of models and texts, some of them perhaps paths.
        overwrite: whether what flexigpt wrote there before may be replaced.

    Raises:
        InputError: a place that cannot be written to; a folder that is not empty (without `overwrite`), that flexigpt
            did not write (with it), or in which an input lies.
    """
    out = Path(out)
    try:
        parent = _existing_parent(out)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{parent} is no folder that can be written to: give another one")
        if out.is_symlink() and not out.exists():
            raise InputError(f"{out} is a link to nowhere: give another folder to write to")
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file: give a folder to write to")
        if out.exists() and (os.path.ismount(out) or out.resolve() == Path.cwd()):
            raise InputError(f"{out} cannot be replaced by a new folder: give a folder inside it")
        if not out.is_dir() or not any(out.iterdir()):
            return
        for path in (Path(name) for name in inputs if name):
            if path.exists() and path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{path} lies in {out}, which is to be replaced: give another folder to write to")
        if not overwrite:
            raise InputError(f"{out} is not empty: give another folder, or --overwrite to replace it")
        if not (out / RECORD).is_file():
            raise InputError(f"{out} was not written by flexigpt ({RECORD} is not there): give another folder")
    except OSError as error:
        raise InputError(f"{out} cannot be written to: {error.strerror}") from error


def _existing_parent(out: Path) -> Path:
    return next((folder for folder in out.absolute().parents if folder.exists()), Path("/"))


@contextlib.contextmanager
def replaced_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error, or vanishes.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    out = Path(out).resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        _swap(content, out, temporary / "old")
    except (OSError, SafetensorError) as error:
        raise _write_error(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, out: Path, old: Path) -> None:
    """Two renames; whatever comes between them, Ctrl-C included, the old folder is put back."""
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _write_error(out: Path, error: Exception) -> InputError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(sign in str(error) for sign in ("No space left", "File too large", "StorageFull")):
        return InputError(f"the disk of {out.parent} is full: nothing was written; free space or give another folder")
    return InputError(f"{out} cannot be written: {one_line(error)}")


def check_space(out: str | Path, num_bytes: int, what: str = "the checkpoint needs") -> None:
    """Raises InputError where the disk that `out` will lie on has less free space than a checkpoint needs."""
    folder = _existing_parent(Path(out))
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, {what} {num_bytes / 1e6:,.0f} MB: "
            "free space or give another folder"
        )


def write_checkpoint(
    out: str | Path,
    model: PreTrainedModel | Assembly,
    record: Record,
    *,
    source: str | None = None,
    max_shard_size: int | str = "5GB",
    track: Track = silent,
) -> None:
    """Writes the checkpoint of a compact or an ordinary model; `out` is complete or untouched.

    Weights (each tensor once, in shards where they are large), configuration, a compact model's own code, the source's
    tokenizer, a model card (README.md) with, for a compact model, a picture of its plan (plan.png), and the record
    (record.json).

    Args:
        out: the folder; what is there is replaced, so call `check_output` first.
        model: a compact model, or an ordinary one of its source's family; of one that was assembled, what it shares
            with its source is copied from file to file.
        record: as the flow that made the model returned it.
        source: where the tokenizer lies; None: no tokenizer is written.
        max_shard_size: largest weight file, in bytes or as 5GB.
        track: told of each tensor of a model that was assembled.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    assembly, model = (model, model.model) if isinstance(model, Assembly) else (None, model)
    check_space(out, stored_bytes(model))
    tokenizer = None if source is None else load_tokenizer(source)
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
        if isinstance(model.config, FlexiGPTConfig):
            (folder / PLAN_PICTURE).write_bytes(drawing("plan_picture").plan_png(plan_of(model.config)))
        (folder / "README.md").write_text(model_card(model.config, record), encoding="utf-8")
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


def check_evaluation_file(path: str | Path, overwrite: bool) -> None:
    """Refuses a file for an evaluation before the work begins.

    Raises:
        InputError: a file of another kind, or that is there (without `overwrite`); a place that cannot be written to.
    """
    path = Path(path)
    if path.suffix not in _EVALUATION_FILES:
        raise InputError(f"--output {path} is of an unknown kind: give {' or '.join(_EVALUATION_FILES)}")
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: give a file")
    if path.exists() and not overwrite:
        raise InputError(f"--output {path} is there: give another file, or --overwrite to replace it")
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{parent} is no folder that can be written to: give another one")


def check_recordable(folder: str | Path) -> None:
    """Refuses a model beside which no evaluation can be recorded, before the work begins.

    Raises:
        InputError: a model that flexigpt did not write, a folder that cannot be written to, or an evaluation.json there
            that cannot be read.
    """
    if not (Path(folder) / RECORD).is_file():
        raise InputError(
            f"--record goes with a checkpoint that flexigpt wrote as the first model: {folder} has no {RECORD}; "
            "leave --record out, or give --output"
        )
    if not os.access(folder, os.W_OK):
        raise InputError(f"--record: {folder} cannot be written to")
    _recorded_evaluation(Path(folder) / EVALUATION)


def write_evaluation(path: str | Path, evaluation: Evaluation) -> None:
    """Writes an evaluation as JSON or Markdown, by the file's suffix; the file is complete or untouched.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    path = Path(path)
    replace_file(path, evaluation_markdown(evaluation) if path.suffix == ".md" else _json_text(evaluation))


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


def replace_file(path: Path, text: str) -> None:
    """Written beside its place and renamed."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _json_text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(_json_text(data), encoding="utf-8")
