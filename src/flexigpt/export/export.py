"""Writes a compact model in a form that another program reads; the folder is complete or untouched."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from flexigpt.export.options import ExportOptions
from flexigpt.model import FlexiGPTConfig, empty_model, stored_bytes
from flexigpt.record import RECORD, Record, Rows, new_record, reserved, write_record
from flexigpt.runtime import InputError, megabytes, replaced_folder
from flexigpt.weights import open_empty, travelling

# What lies beside weights in a folder.
_NO_WEIGHTS = frozenset((".json", ".txt", ".md", ".jinja", ".py", ".model"))


def _to_stock(model: str, out: Path, options: ExportOptions) -> None:
    from flexigpt.export.stock import to_stock  # noqa: PLC0415 - as the others: a form loads what it needs alone

    to_stock(model, out, options)


def _to_gguf(model: str, out: Path, options: ExportOptions) -> None:
    from flexigpt.export.gguf import to_gguf  # noqa: PLC0415

    to_gguf(model, out, options)


def _to_mlx(model: str, out: Path, options: ExportOptions) -> None:
    from flexigpt.export.mlx import to_mlx  # noqa: PLC0415

    to_mlx(model, out, options)


def _to_onnx(model: str, out: Path, options: ExportOptions) -> None:
    from flexigpt.export.onnx import to_onnx  # noqa: PLC0415

    to_onnx(model, out, options)


def _to_executorch(model: str, out: Path, options: ExportOptions) -> None:
    from flexigpt.export.executorch import to_executorch  # noqa: PLC0415

    to_executorch(model, out, options)


# Each writes into an empty folder, which takes its place when all is there.
FORMS: Mapping[str, Callable[[str, Path, ExportOptions], None]] = {
    "stock": _to_stock,
    "gguf": _to_gguf,
    "mlx": _to_mlx,
    "onnx": _to_onnx,
    "executorch": _to_executorch,
}


def export(
    model: str, out: str | Path, options: ExportOptions, *, overwrite: bool = False, command: str | None = None
) -> Record:
    """Writes a compact model in another form.

    Args:
        model: folder or hub name of a compact model.
        out: folder to write to.
        options: the form.
        overwrite: whether what flexigpt wrote to `out` before may be replaced.
        command: as it was typed, for the record.

    Returns:
        The record, which lies beside what was written: `bytes` of the `compact` model, of the same `unpruned`, and
        of the weights that were `written`.

    Raises:
        InputError: a model that is not compact or cannot have that form, a library that is missing, or a folder that
            cannot be written to.
    """
    with reserved(out, (model,), overwrite):
        empty = open_empty(model, quantised=True)
        if not isinstance(empty.config, FlexiGPTConfig):
            raise InputError(
                f"{model} is no compact model but an ordinary {empty.config.model_type}: other programs read it as it "
                "is, and their own tools convert it"
            )
        if getattr(empty.config, "quantization_config", None):
            raise InputError(f"{model} is quantised: export the model that it was made of, with --bits")
        source = empty.config.get_text_config()
        source.dtype = empty.dtype
        sizes = {"unpruned": stored_bytes(empty_model(source)), "compact": stored_bytes(empty)}
        with replaced_folder(out) as folder:
            FORMS[options.to](model, folder, options)
            sizes["written"] = _weight_bytes(folder)
            record = new_record(model, options, {}) | {"command": command, "bytes": sizes}
            _add_papers(model, folder, options.to)
            write_record(folder, record, out)
            _open_to_all(folder)
    return record


def _add_papers(model: str, folder: Path, form: str) -> None:
    """Licence, notices and use policy go along, as many licences ask, and the older form of the tokenizer."""
    for file in travelling(model):
        needed = file.suffix != ".model" or form != "gguf"  # which holds its tokenizer
        if needed and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _open_to_all(folder: Path) -> None:
    """Some libraries write weights that their owner alone can read: a server may run as somebody else."""
    for file in folder.rglob("*"):
        if file.is_file():
            shutil.copymode(folder / RECORD, file)


def _weight_bytes(folder: Path) -> int:
    """Bytes of all files that hold weights."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in _NO_WEIGHTS)
    return sum(file.stat().st_size for file in files)


def export_rows(record: Record) -> Rows:
    """What was written against the compact model and what it was before it was pruned or shared."""
    sizes, form = record["bytes"], record["options"]["to"]
    names = {"unpruned": "unpruned", "compact": "compact", "written": f"written as {form}"}
    rows = [(shown, megabytes(sizes[name]), f"{sizes[name] / sizes['unpruned']:.1%}") for name, shown in names.items()]
    return Rows(("model", "weights, MB", "of the unpruned"), rows)
