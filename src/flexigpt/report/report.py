"""Reports: what was recorded in checkpoint folders, as one page and as figures beside it."""

import os
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from flexigpt.model import plan_in_words
from flexigpt.record import FIGURES, GENERATOR, PLAN_PICTURE, Picture, find_in, is_report, read_recorded
from flexigpt.report.drawing import palette_css, to_png, to_svg
from flexigpt.report.figures import figures_of
from flexigpt.report.page import page
from flexigpt.report.result_figures import shared_figures
from flexigpt.report.stack import plan_png
from flexigpt.runtime import InputError, existing_parent, replace_file, replaced_folder

_PAGE = "report.html"


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one or several models: an HTML page that needs nothing else, and its figures as PNG files.

    Everything is drawn from what was recorded; no model is loaded. An earlier report in the same place is replaced.

    Args:
        folders: checkpoint or plan folders that flexigpt wrote.
        out: the page (a name that ends in .html) or a folder to write report.html to; None: the folder itself, where
            there is only one. Figures go to the folder `figures` beside the page.

    Returns:
        The page.

    Raises:
        InputError: a folder without a record, or with one that is damaged or of a newer version; a place that cannot be
            written to, or holds something else.
    """
    target = _target(folders, out)
    models = [read_recorded(folder) for folder in folders]
    for model in models:
        if isinstance(model.record.get("bytes"), dict):
            raise InputError(
                f"{model.folder} is an export of {model.record['source_name']}: give the folder of that model, whose "
                "report has what was measured"
            )
    pictures = target.parent / FIGURES
    _check_place(target, pictures)
    prefixes = [f"{number}-{_file_name(model.name)}-" for number, model in enumerate(models, 1)]
    own = [figures_of(model, prefix if len(models) > 1 else "") for model, prefix in zip(models, prefixes, strict=True)]
    shared = shared_figures(models)
    svgs = [{name: Markup(to_svg(drawn)) for name, drawn in each.items()} for each in (*own, shared)]
    text = page(models, svgs[:-1], svgs[-1], palette_css(), GENERATOR)
    with replaced_folder(pictures) as folder:
        for drawn in (drawn for each in (*own, shared) for drawn in each.values()):
            (folder / f"{drawn.name}.png").write_bytes(to_png(drawn))
    replace_file(target, text)
    return target


def card_pictures(folder: str | Path) -> list[Picture]:
    """What a model card shows of a checkpoint that flexigpt wrote: what is stored, recovery, and the plan.

    Raises:
        InputError: a folder without a record, or with one that is damaged or of a newer version.
    """
    model = read_recorded(folder)
    drawn = figures_of(model) | shared_figures([model])
    curve = next((name for name in ("recovery-perplexity", "recovery-cross-entropy") if name in drawn), "")
    chosen = {"storage.png": drawn.get("storage"), "recovery.png": drawn.get(curve)}
    pictures = [Picture(file, one.alt, to_png(one, dpi=110)) for file, one in chosen.items() if one is not None]
    if model.plan is not None:
        units = find_in(model.record, "mlp_units")
        pictures.append(Picture(PLAN_PICTURE, plan_in_words(model.plan, units), plan_png(model.plan, units)))
    return pictures


def _target(folders: Sequence[str | Path], out: str | Path | None) -> Path:
    if not folders:
        raise InputError("no folder is given: give a checkpoint or plan folder that flexigpt wrote")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError(f"{', '.join(map(str, folders))} names a folder twice: give each once")
    if out is None:
        if len(folders) > 1:
            raise InputError("several folders make one report: say where with --out FOLDER, or --out PAGE.html")
        return Path(folders[0]) / _PAGE
    return Path(out) if Path(out).suffix == ".html" else Path(out) / _PAGE


def _check_place(target: Path, pictures: Path) -> None:
    """Refuses to replace what no report wrote."""
    try:
        parent = existing_parent(target)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{parent} is no folder that can be written to: give another --out")
        if target.is_dir() or (target.exists() and not is_report(target)):
            raise InputError(f"{target} was not written by flexigpt report: give another --out")
        if not pictures.exists() and not pictures.is_symlink():
            return
        if pictures.is_symlink() or not pictures.is_dir():
            raise InputError(f"{pictures} is no folder of figures: give another --out")
        strange = [path for path in sorted(pictures.iterdir()) if not path.is_file() or not is_report(path)]
        if strange:
            raise InputError(f"{strange[0]} was not written by flexigpt report: give another --out")
    except OSError as error:
        raise InputError(f"{target.parent} cannot be written to: {error.strerror}") from error


def _file_name(name: str) -> str:
    """A name that is a part of a file's name, and of an id, everywhere."""
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in name)[:40]
