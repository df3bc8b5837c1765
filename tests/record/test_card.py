"""The model card: what a visitor of the hub reads, copies and runs, and what it goes on saying after recovery."""

import json
import os
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from conftest import Run
from flexigpt import PruneOptions, prune, write_checkpoint
from flexigpt.record import find_in
from flexigpt.record.card import hub_name, with_evaluation
from flexigpt.record.write import check_replaceable
from forks import Forks

LICENCE = {"LICENSE": "do what you like", "USE_POLICY.md": "but no harm", "tokenizer.model": "pieces"}


def front(folder: Path) -> dict[str, Any]:
    """What the hub reads at the top of the card."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def snippet(folder: Path) -> str:
    """The Python code of the card."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def published(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact model of a source with a licence."""
    folder = tmp_path_factory.mktemp("published")
    source = Path(shutil.copytree(tiny_source, folder / "source"))
    for name, content in LICENCE.items():
        (source / name).write_text(content)
    (source / "README.md").write_text("---\nlicense: llama3.2\nlanguage: en\n---\n\n# A source\n")
    model, _, record = prune(str(source), PruneOptions.paper(blocks=(2, 4), rank=4))
    write_checkpoint(folder / "compact", model, record, source=str(source))
    return folder / "compact"


@pytest.fixture
def compact(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "compact"))


@pytest.fixture
def recovered(run: Run, compact: Path, text: Path, tmp_path: Path) -> Path:
    given = ("--data", text, "--tokens", 128, "--batch-tokens", 64, "--window-length", 16, "--perplexity", text)
    assert run("recover", compact, tmp_path / "recovered", *given)[0] == 0
    return tmp_path / "recovered"


def test_licence_policy_and_tokenizer_travel_with_the_weights(compact: Path) -> None:
    assert {name: (compact / name).read_text() for name in LICENCE} == LICENCE
    assert front(compact)["license"] == "llama3.2"
    assert "base_model" not in front(compact)  # a folder has no name on the hub


@pytest.mark.parametrize("chat", [False, True])
def test_a_visitor_of_the_hub_runs_the_snippet_without_flexigpt(
    run: Run, compact: Path, tmp_path: Path, early_forks: Forks, chat: bool
) -> None:
    """From a folder laid out as the hub's cache, without a connection."""
    if chat:
        (compact / "chat_template.jinja").write_text(
            "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        )
    code, printed, _ = run("card", compact, "me/small-llama", "--base-model", "someone/large-llama")
    assert (code, printed) == (0, f"model card written to {compact / 'README.md'}\n")
    stored = tmp_path / "hub" / "models--me--small-llama"
    commit = f"{1:040x}"
    shutil.copytree(compact, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    assert ("apply_chat_template" in snippet(compact)) == chat
    program = f"import sys\nsys.modules['flexigpt'] = None\n{snippet(compact)}\nprint(type(model).__name__)"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "code")}
    ran = early_forks.run("-c", program, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("\nFlexiGPTForCausalLM\n")
    assert len(ran.stdout) > 60, "nothing was generated"


def test_what_the_hub_reads_is_what_was_given(run: Run, compact: Path) -> None:
    asked = ("me/small", "--license", "apache-2.0", "--base-model", "someone/large")
    assert run("card", compact, *asked)[0] == 0
    expected = {
        "license": "apache-2.0",
        "model_name": "me/small",
        "base_model": "someone/large",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flexigpt"],
    }
    assert front(compact) == expected
    assert run("card", compact)[0] == 0  # again, with what it says already
    assert front(compact) == expected
    assert 'name = "me/small"' in snippet(compact)
    assert run("card", compact, "--license", "other")[0] == 0
    assert (front(compact)["license"], front(compact)["license_link"]) == ("other", "LICENSE")


def test_pictures_lie_beside_the_card_and_belong_to_the_checkpoint(run: Run, compact: Path) -> None:
    assert run("card", compact)[0] == 0
    card = (compact / "README.md").read_text()
    shown = re.findall(r"!\[(.+?)\]\((.*?)\)", card, re.DOTALL)
    assert [file for _, file in shown] == ["storage.png", "plan.png"]
    assert all((compact / file).read_bytes().startswith(b"\x89PNG") for _, file in shown)
    check_replaceable(compact)


def test_no_folder_of_ours_stands_on_it(run: Run, compact: Path, text: Path) -> None:
    assert run("card", compact)[0] == 0
    assert run("eval", compact, "--perplexity", text, "--window-length", 64, "--record")[0] == 0
    assert run("card", compact)[0] == 0
    card = (compact / "README.md").read_text()
    assert str(compact.parent) not in card
    assert str(text.parent) not in card
    assert card.count("## Evaluation\n") == 1


def test_what_a_person_wrote_stays(run: Run, compact: Path) -> None:
    card = compact / "README.md"
    mine = "## Intended use\n\nNovels.\n\n### Not\n\nAnything else.\n"
    text = (
        card.read_text()
        .replace("## Origin\n", f"{mine}\n## Origin\n")
        .replace("\ntags:", "\nlanguage: en\ntags:\n- mine")
    )
    card.write_text(text)
    for _ in range(2):
        assert run("card", compact, "me/small")[0] == 0
        assert card.read_text().count(mine) == 1
        assert front(compact)["language"] == "en"
        assert front(compact)["tags"] == ["mine", "flexigpt"]


def test_after_recovery_it_still_compares_with_the_source(run: Run, compact: Path, recovered: Path) -> None:
    record = json.loads((recovered / "record.json").read_text())
    card = (recovered / "README.md").read_text()
    was, before, after = find_in(record, "source"), record["before"], record["after"]
    numbers = [f"{size['parameters']:,}" for size in (was, before, after)]
    share = f"{after['parameters'] / was['parameters']:.1%}"
    assert "| source | before | after | of source |" in card
    assert f"| stored parameters | {' | '.join([*numbers, share])} |" in card
    assert numbers[0] != numbers[1]
    assert "\nSource: source, by way of compact. " in card
    assert {name: (recovered / name).read_text() for name in LICENCE} == LICENCE
    assert front(recovered)["license"] == "llama3.2"
    assert "was not trained" in (compact / "README.md").read_text()
    assert "was not trained" not in card
    assert run("card", recovered, "me/small")[0] == 0
    assert "](recovery.png)" in (recovered / "README.md").read_text()
    check_replaceable(recovered)


def test_after_recovery_the_sources_name_is_known_from_the_card(run: Run, compact: Path, text: Path) -> None:
    assert run("card", compact, "me/small", "--base-model", "someone/large")[0] == 0
    out = compact.parent / "again"
    given = ("--data", text, "--tokens", 64, "--batch-tokens", 64, "--window-length", 16)
    assert run("recover", compact, out, *given)[0] == 0
    assert front(out)["base_model"] == "someone/large"
    assert "model_name" not in front(out)
    assert (out / "plan.png").read_bytes() == (compact / "plan.png").read_bytes()


def test_limits_are_what_was_measured(run: Run, compact: Path) -> None:
    task = {"metric": "acc", "stderr": 0.02, "num_fewshot": 0}
    sizes = {"parameters": 1, "bytes": 4}
    ours = {name: task | {"value": value} for name, value in {"arc": 0.25, "piqa": 0.6, "mmlu": 0.3}.items()}
    theirs = {name: task | {"value": value} for name, value in {"arc": 0.44, "piqa": 0.62, "mmlu": 0.3}.items()}
    models = [sizes | {"name": "small", "tasks": ours}, sizes | {"name": "large", "tasks": theirs}]
    told = {"format": 1, "versions": {}, "command": None, "device": "cpu", "dtype": "float32", "options": {}}
    (compact / "evaluation.json").write_text(json.dumps(told | {"models": models}))
    assert run("card", compact)[0] == 0
    card = (compact / "README.md").read_text()
    assert "- Worse than large, by more than twice the standard error: arc (44.0% there, 25.0% here).\n" in card
    assert with_evaluation(card, told | {"models": models}) == card


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("small",), "repository small is no name on the hub: give OWNER/NAME"),
        (("me/small/er",), "repository me/small/er is no name on the hub"),
        (("me/small", "--base-model", "/tmp/model"), "--base-model /tmp/model is no name on the hub"),
        (("me/small", "--license", "Apache 2"), "--license Apache 2 is no licence of the hub"),
    ],
)
def test_what_the_hub_does_not_take_is_refused_before_anything_is_drawn(
    run: Run, compact: Path, arguments: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("flexigpt.report"), "card_pictures", lambda _: pytest.fail("drawn"))
    before = {path.name: path.read_bytes() for path in compact.iterdir()}
    code, printed, errors = run("card", compact, *arguments)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert reason in errors
    assert {path.name: path.read_bytes() for path in compact.iterdir()} == before


def test_only_a_checkpoint_of_ours_has_a_card(run: Run, tiny_source: Path, tmp_path: Path) -> None:
    plan = ("prune", tiny_source, tmp_path / "plan", "--blocks", 2, "--rank", 4, "--preset", "paper", "--plan-only")
    assert run(*plan)[0] == 0
    for folder, reason in ((tiny_source, "holds no record.json"), (tmp_path / "plan", "holds no model")):
        code, _, errors = run("card", folder, "me/small")
        assert (code, errors.count("\n")) == (2, 1)
        assert reason in errors


def test_an_export_has_no_card(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    given = ("--ratio", 0.3, "--calibration", text, "--windows", 2, "--window-length", 32)
    assert run("prune", tiny_source, tmp_path / "compact", *given)[0] == 0
    assert run("export", tmp_path / "compact", tmp_path / "stock", "--to", "stock")[0] == 0
    code, _, errors = run("card", tmp_path / "stock")
    assert (code, errors.count("\n")) == (2, 1)
    assert "holds an export, which has no card" in errors


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff\xfe", "cannot be read"), (b"---\nlicense: [\n---\nMine.\n", "are no YAML")]
)
def test_a_card_that_cannot_be_kept_is_not_overwritten(run: Run, compact: Path, content: bytes, reason: str) -> None:
    (compact / "README.md").write_bytes(content)
    code, _, errors = run("card", compact)
    assert (code, errors.count("\n")) == (2, 1)
    assert reason in errors
    assert (compact / "README.md").read_bytes() == content


def test_no_folder_of_a_mixture_stands_on_it(run: Run, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(text, tmp_path / "other.jsonl"))
    mixture = [f"--calibration={text}=0.5", "--calibration", other]
    given = ("--ratio", 0.3, *mixture, "--windows", 2, "--window-length", 32)
    assert run("prune", tiny_source, tmp_path / "compact", *given)[0] == 0
    card = (tmp_path / "compact" / "README.md").read_text()
    assert other.name in card
    assert not any(str(path.parent) in card for path in (text, other))


def test_a_source_in_the_hubs_cache_has_a_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "12fd25f"
    snapshot.mkdir(parents=True)
    assert hub_name(str(snapshot)) == "HuggingFaceTB/SmolLM2-135M"
    assert hub_name("someone/model") == "someone/model"
    assert hub_name(str(tmp_path)) is None
