"""Reports as a reader meets them: what they show is what was recorded, and nothing else is touched."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compacts import narrow
from conftest import Run
from families import tiny_model
from flexigpt import (
    EvalOptions,
    InputError,
    PruneOptions,
    RecoverOptions,
    evaluate,
    plan_only,
    prune,
    recover,
    remove,
    report,
    write_checkpoint,
)
from flexigpt.record import record_evaluation, write_plan
from web_page import Page

CHOOSING: dict[str, Any] = {"ratio": 0.4, "windows": 4, "window_length": 64}
COMMAND = "flexigpt prune '<script>alert(1)</script>' out"


@pytest.fixture(scope="module")
def made(tiny_source: Path, text: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real checkpoints: pruned, that one recovered and evaluated, and plain removal recovered."""
    folder = tmp_path_factory.mktemp("made")
    out = {name: folder / name for name in ("pruned", "recovered", "shorter", "shorter-recovered", "planned")}
    texts = CHOOSING | {"calibration": str(text), "perplexity": str(single)}
    model, _, record = prune(str(tiny_source), PruneOptions.paper(**texts, rank=4))
    write_checkpoint(out["pruned"], model, record | {"command": COMMAND}, source=str(tiny_source))
    shorter, _, record = remove(str(tiny_source), PruneOptions.paper(**texts))
    write_checkpoint(out["shorter"], shorter, record, source=str(tiny_source))
    plan, record = plan_only(str(tiny_source), PruneOptions.paper(**CHOOSING, calibration=str(text), rank=4))
    write_plan(out["planned"], plan, record)
    training = RecoverOptions(data=str(text), tokens="1536", window_length=64, batch_tokens=128, perplexity=str(single))
    for source, target in (("pruned", "recovered"), ("shorter", "shorter-recovered")):
        recover(str(out[source]), out[target], training)
    names = [str(tiny_source), str(out["recovered"])]
    options = EvalOptions(perplexity=str(single), window_length=64, against=str(tiny_source))
    record_evaluation(out["recovered"], evaluate(names, options))
    return out


def read(folder: Path, name: str = "record.json") -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recovered_page(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report([made["recovered"]], tmp_path_factory.mktemp("report")).read_text(encoding="utf-8"))


def shown(value: float) -> str:
    return f"{value:.4g}"


def test_the_page_is_whole_and_loads_nothing(recovered_page: Page, made: dict[str, Path]) -> None:
    page = recovered_page
    assert page.text.startswith("<!DOCTYPE html>")
    assert {"script", "link", "iframe", "img", "object", "image", "use"} & set(page.tags) <= {"use"}
    assert page.references
    inside = {f"#{name}" for name in page.ids}
    assert set(page.references) <= inside
    assert not re.search(r"@import|@font-face|\burl\((?!#)", page.text)
    assert all(place in page.ids for place in re.findall(r"url\(#([^)]+)\)", page.text))
    assert set(re.findall(r"https?://[\w./]+", page.text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert len(page.figures) == 12
    for figure in page.figures:
        assert figure.get("role") == "img"
        assert figure.get("aria-label")
        assert not re.search(r"#[0-9a-f]{6}\b", "".join(figure.itertext()) + str([e.attrib for e in figure.iter()]))


def test_the_tables_hold_what_was_recorded(recovered_page: Page, made: dict[str, Path]) -> None:
    page, record = recovered_page, read(made["recovered"])
    origin = record["origin"]
    bases = {str(row["block"]): str(row["base"]) for row in read(made["recovered"], "config.json")["replicas"]}
    assert page.column("What became of each block", "influence") == [f"{score:.4f}" for score in origin["scores"]]
    stored = [f"{4 * number / 1e6:.2f}" for number in record["after"]["blocks"]]
    assert page.column("What became of each block", "MB") == stored
    headings, *cells = page.tables["low-rank distance, the base marked"]
    assert {row[0]: dict(zip(headings[1:], row[1:], strict=True)) for row in cells} == {
        block: {candidate: shown(value) for candidate, value in row.items()}
        for block, row in origin["distances"].items()
    }
    marked = re.findall(r'<th scope="row">(\d)</th>(?:(?!</tr>).)*class="least">([^<]*)', page.text)
    assert dict(marked) == {block: shown(origin["distances"][block][base]) for block, base in bases.items()}
    assert [row[:1] + row[2:3] for row in page.tables["What became of each block"][1:] if row[2]] == [
        [block, base] for block, base in bases.items()
    ]
    for row in page.tables["Share mended by rank"][1:]:
        spectrum = origin["adapter_spectra"][row[0]][row[1]]
        assert row[2:] == [f"{r}: {s:.1%}" for r, s in zip(spectrum["ranks"], spectrum["mended"], strict=True)]
    assert page.column("Stored MB by part", "recovered")[-1] == f"{record['after']['parameters']:,}"
    assert page.column("Stored MB by part", "source")[-2] == f"{origin['source']['bytes'] / 1e6:.2f}"
    before, after = (f"{record['perplexity'][name]['perplexity']:.2f}" for name in ("before", "after"))
    trained = page.column("Recovery training", "recovered")
    assert re.fullmatch(r"the replicas' own, and LoRA of rank \d+ on the kept blocks", trained[0])
    assert trained[1:5] == ["1,536", "12", before, after]
    assert page.column("Options of the recovery", "option") == list(record["options"])
    options = dict(page.tables["Options of the pruning or extension"][1:])
    assert options["ratio"] == str(origin["options"]["ratio"])
    assert str(origin["calibration"]["text"]) in page.prose


def test_the_evaluation_is_a_table_side_by_side(recovered_page: Page, made: dict[str, Path]) -> None:
    models = read(made["recovered"], "evaluation.json")["models"]
    headings, *rows = recovered_page.tables["Models side by side"]
    assert headings == ["", "source", "recovered"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["perplexity"] == [f"{model['perplexity']['perplexity']:.4f}" for model in models]
    assert cells["divergence"][-1] == f"{models[1]['fidelity']['divergence']:.4f}"


def test_the_head_says_what_it_is_and_what_it_cost(recovered_page: Page, made: dict[str, Path]) -> None:
    record = read(made["recovered"])
    assert "source, compact: 2 of 6 blocks are replicas of kept ones, after recovery training." in recovered_page.prose
    assert f"{record['after']['bytes'] / 1e6:.2f} MB" in recovered_page.prose
    assert f"{record['perplexity']['after']['perplexity']:.2f}" in recovered_page.prose
    assert f"{record['origin']['perplexity']['source']['perplexity']:.2f} source" in recovered_page.prose
    assert f"torch {record['versions']['torch']}" in recovered_page.prose


def test_the_same_records_give_the_same_bytes_whatever_matplotlib_is_set_to(
    made: dict[str, Path], tmp_path: Path
) -> None:
    first = report([made["planned"]], tmp_path / "first")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "text.usetex": True, "svg.hashsalt": "other"}):
        second = report([made["planned"]], tmp_path / "second")
    assert dict(matplotlib.rcParams) == before
    assert first.read_bytes() == second.read_bytes()
    pictures = sorted((tmp_path / "first" / "figures").iterdir())
    assert [path.name for path in pictures] == [f"{name}.png" for name in ("blocks", "distances", "plan")]
    for picture in pictures:
        assert picture.read_bytes() == (tmp_path / "second" / "figures" / picture.name).read_bytes()
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_names_are_text_and_never_markup(made: dict[str, Path], tmp_path: Path) -> None:
    hostile = '<img src=x onerror="alert(1)">&amp; $x_1$ _模'
    folder = tmp_path / hostile
    folder.mkdir()
    record = read(made["recovered"])
    record["command"] = record["origin"]["command"] = COMMAND
    record["origin"]["calibration"]["text"] = record["source_name"] = record["origin"]["source_name"] = hostile
    record["versions"][hostile] = record["options"][hostile] = hostile
    record["origin"]["adapter_spectra"]["9"] = {hostile: {"ranks": [1], "mended": [0.5]}}
    (folder / "record.json").write_text(json.dumps(record))
    evaluation = read(made["recovered"], "evaluation.json")
    evaluation["models"][1]["name"] = evaluation["models"][1]["fidelity"]["against"] = hostile
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = Page(report([folder, made["planned"]], tmp_path / "out").read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.tags)
    assert page.prose.count(hostile) > 8
    assert COMMAND in page.prose
    assert sum(hostile in "".join(figure.itertext()) for figure in page.figures) >= 3


@pytest.mark.parametrize(
    ("name", "headings"),
    [
        ("planned", ["What became of each block", "Why these bases", "Settings"]),
        (
            "pruned",
            ["What became of each block", "Why these bases", "What replicas mend", "What is stored", "Settings"],
        ),
        ("shorter", ["What became of each block", "What is stored", "Settings"]),
    ],
)
def test_sections_of_what_was_not_recorded_are_left_out_and_a_line_says_what_records_them(
    made: dict[str, Path], tmp_path: Path, name: str, headings: list[str]
) -> None:
    page = Page(report([made[name]], tmp_path).read_text(encoding="utf-8"))
    assert re.findall(r"<h2[^>]*>([^<]*)", page.text) == headings
    assert page.prose.count("flexigpt recover trains a model back") == 1
    assert page.prose.count("flexigpt eval --record measures") == 1


def test_a_verdict_leads_with_what_was_measured(recovered_page: Page, made: dict[str, Path]) -> None:
    record = read(made["recovered"])
    source, after = record["origin"]["source"], record["after"]
    was, became = record["origin"]["perplexity"]["source"], record["perplexity"]["after"]
    share = f"{after['bytes'] / source['bytes']:.0%} of the bytes"
    assert f"{share}, perplexity {was['perplexity']:,.0f} \u2192 {became['perplexity']:,.0f}: " in recovered_page.prose


def test_both_models_continue_the_same_words(
    recovered_page: Page, made: dict[str, Path], tiny_source: Path, single: Path
) -> None:
    models = read(made["recovered"], "evaluation.json")["models"]
    prompts = [[one["prompt"] for one in model["continuations"]] for model in models]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 2
    words = " ".join(single.read_text().split())
    tokenizer = AutoTokenizer.from_pretrained(tiny_source)
    for folder, model in zip((tiny_source, made["recovered"]), models, strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        for one in model["continuations"]:
            assert one["prompt"] in words
            ids = tokenizer(one["prompt"], return_tensors="pt").input_ids
            length = ids.shape[1]
            for _ in range(5):  # a token at a time, without a cache
                ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], 1)
            assert one["text"].startswith(tokenizer.decode(ids[0, length:]).rstrip("\ufffd"))
            shown = re.sub(r"\s+", "", one["text"])
            assert shown in re.sub(r"\s+", "", recovered_page.prose)


def test_a_model_whose_blocks_were_given_has_a_page(tiny_compact: Path, run: Run, tmp_path: Path) -> None:
    code, printed, errors = run("report", tiny_compact, "--out", tmp_path / "page.html")
    assert (code, errors) == (0, "")
    assert printed == f"report written to {tmp_path / 'page.html'}, its figures to {tmp_path / 'figures'}\n"
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "influence" not in page.tables["What became of each block"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "page.html"]


def test_several_models_stand_side_by_side(made: dict[str, Path], tmp_path: Path) -> None:
    page = Page(report([made["recovered"], made["shorter-recovered"]], tmp_path).read_text(encoding="utf-8"))
    assert page.tables["Recovery training"][0] == ["", "recovered", "shorter-recovered"]
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert "recovery-perplexity.png" in names
    assert "1-recovered-plan.png" in names
    assert "2-shorter-recovered-blocks.png" in names


def test_a_report_replaces_an_earlier_one_with_all_its_figures(made: dict[str, Path], tmp_path: Path) -> None:
    page = report([made["planned"]], tmp_path)
    stale = tmp_path / "figures" / "stale.png"
    stale.write_bytes((tmp_path / "figures" / "plan.png").read_bytes())
    page.write_text(page.read_text(encoding="utf-8").replace("<h1>", "<h1>old "), encoding="utf-8")
    report([made["planned"]], tmp_path)
    assert not stale.exists()
    assert "<h1>old" not in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]


def test_an_export_has_no_report_of_its_own(run: Run, tmp_path: Path) -> None:
    """It says which model has."""
    narrow(tiny_model("llama")).save_pretrained(tmp_path / "compact")
    assert run("export", tmp_path / "compact", tmp_path / "stock", "--to", "stock")[0] == 0
    code, printed, errors = run("report", tmp_path / "stock")
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert f"stock is an export of {tmp_path / 'compact'}: give the folder of that model" in errors
    assert not (tmp_path / "stock" / "report.html").exists()


def test_a_damaged_record_is_one_line_and_nothing_is_written(made: dict[str, Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    (tmp_path / "config.json").write_bytes((made["pruned"] / "config.json").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    code, printed, errors = run("report", tmp_path)
    assert (code, printed) == (2, "")
    assert re.fullmatch(r"flexigpt: .*record.json: invalid JSON.*\n", errors), errors
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_cannot_be_written_to_or_hold_something_else_are_refused(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = made["pruned"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a" / "figures").mkdir(parents=True)
    (tmp_path / "a" / "figures" / "holiday.png").write_bytes(b"\x89PNG mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.html").write_text("<html>mine</html>")
    (tmp_path / "c.html").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for out, reason in (
        (tmp_path / "file", "file is no folder that can be written to"),
        (tmp_path / "a", "holiday.png was not written by flexigpt report"),
        (tmp_path / "b", "report.html was not written by flexigpt report"),
        (tmp_path / "c.html", "c.html was not written by flexigpt report"),
        (tmp_path / "file" / "page.html", "file is no folder that can be written to"),
    ):
        with pytest.raises(InputError, match=reason):
            report([folder], out)
    with pytest.raises(InputError, match="--out"):
        report([folder, made["shorter"]])
    with pytest.raises(InputError, match="names a folder twice"):
        report([folder, folder], tmp_path / "d")
    with pytest.raises(InputError, match="nowhere is no folder"):
        report([tmp_path / "nowhere"])
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
