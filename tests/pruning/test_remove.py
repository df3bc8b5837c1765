"""Plain removal: what is written is an ordinary, shorter model, and its blocks are those that pruning would choose."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Run
from families import FAMILIES, NUM_BLOCKS, block_list, tiny_model, token_ids
from flexigpt import EvalOptions, InputError, PruneOptions, assemble_removed, evaluate, prune, remove, write_checkpoint
from flexigpt.model import find_architecture, stored_bytes
from flexigpt.pruning.scores import STATISTICS
from workspaces import announced

REMOVED = [1, 4]


@pytest.fixture(scope="module")
def calibrated(text: Path) -> dict[str, object]:
    return {"calibration": str(text), "window_length": 64, "windows": 8}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def skip_blocks(model: PreTrainedModel) -> None:
    """The blocks of REMOVED hand on their input: the whole stock model otherwise, its masks and lists as they were."""
    returns_tuple = find_architecture(model.config).block_returns_tuple
    for block in REMOVED:
        block_list(model)[block].forward = lambda x, *a, **k: (x, None) if returns_tuple else x


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_the_stock_model_without_those_blocks(family: str, tmp_path: Path) -> None:
    """Longer than the sliding windows, so that a per-block list that did not follow would show."""
    tiny_model(family).save_pretrained(tmp_path / "source")
    model, blocks, record = remove(str(tmp_path / "source"), PruneOptions.paper(blocks=REMOVED))
    write_checkpoint(tmp_path / "out", model, record)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(shorter) is type(source)
    assert len(block_list(shorter)) == shorter.config.num_hidden_layers == NUM_BLOCKS - len(REMOVED)
    assert list(blocks) == record["removed"]["blocks"] == REMOVED
    assert not list((tmp_path / "out").glob("*.py"))
    settings = (tmp_path / "out" / "config.json").read_text()
    assert not [word for word in ("auto_map", "flexigpt", str(tmp_path)) if word in settings]
    ids = token_ids(tokens=40)
    measured = logits(shorter, ids)
    skip_blocks(source)
    torch.testing.assert_close(measured, logits(source, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_generates_with_its_cache(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "source")
    model, _, record = remove(str(tmp_path / "source"), PruneOptions.paper(blocks=REMOVED))
    write_checkpoint(tmp_path / "out", model, record)
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = token_ids(batch=1, tokens=20)
    generated = shorter.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    for _ in range(8):
        ids = torch.cat((ids, logits(shorter, ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("score", STATISTICS)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_blocks_are_those_that_prune_would_prune(
    tiny_source: Path, calibrated: dict[str, object], score: str, seed: int
) -> None:
    settings = {"ratio": 0.5, "block_score": score, "seed": seed} | calibrated
    _, plan, pruned = prune(str(tiny_source), PruneOptions.paper(rank=4, **settings))
    _, blocks, record = remove(str(tiny_source), PruneOptions.paper(**settings))
    assert list(blocks) == plan.pruned
    assert (record["scores"], record["calibration"]) == (pruned["scores"], pruned["calibration"])
    asked = pruned["options"] | {"remove": True}
    del asked["rank"]  # of which there is none
    assert record["options"] == asked


@pytest.mark.parametrize("target", ["0.29M", "1.16MB"])
def test_target_size_is_kept_by_the_fewest_blocks(
    tiny_source: Path, calibrated: dict[str, object], target: str
) -> None:
    options = PruneOptions.paper(target_size=target, **calibrated)
    model, blocks, record = remove(str(tiny_source), options)
    stock = AutoModelForCausalLM.from_pretrained(tiny_source)
    one_block = sum(parameter.numel() for parameter in stock.model.layers[0].parameters())
    assert model.num_parameters() == stock.num_parameters() - len(blocks) * one_block
    assert model.num_parameters() <= 290_000 < model.num_parameters() + one_block
    size = {name: record["shorter"][name] for name in ("parameters", "bytes")}
    assert size == {"parameters": model.num_parameters(), "bytes": 4 * model.num_parameters()}
    assert sum(record["shorter"]["parts"].values()) == model.num_parameters()
    assert announced(assemble_removed, tiny_source, options).written == stored_bytes(model)


@pytest.mark.parametrize("family", ["llama-biases-tied", "opt-norm-before", "gpt2"])
def test_the_size_is_known_before_the_work(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "source")
    options = PruneOptions.paper(blocks=REMOVED, dtype="bfloat16")
    model, _, _ = remove(str(tmp_path / "source"), options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert announced(assemble_removed, tmp_path / "source", options).written == stored_bytes(model)


def test_what_was_fitted_is_to_be_written_before_it_is_let_go(
    tiny_source: Path, calibrated: dict[str, object], tmp_path: Path
) -> None:
    with assemble_removed(str(tiny_source), PruneOptions(ratio=0.4, **calibrated)) as (assembly, _, record):
        pass
    with pytest.raises(InputError, match="write it before its `with` block ends"):
        write_checkpoint(tmp_path / "out", assembly, record)
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_what_went_and_what_it_cost(tiny_source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    flags = ["--remove", "--preset", "paper", "--ratio", 0.4, "--windows", 4, "--window-length", 64]
    code, printed, _ = run("prune", tiny_source, out, *flags, "--calibration", text, "--perplexity", text)
    assert code == 0
    record, card = json.loads((out / "record.json").read_text()), (out / "README.md").read_text()
    gone = record["removed"]["blocks"]
    scores = record["scores"]
    assert gone == sorted(sorted(range(6), key=scores.__getitem__)[:2])
    assert record["command"].startswith("flexigpt prune ")
    removed = f"emoved: {gone[0]}, {gone[1]} of the 6 blocks of source"
    for name, where in (("source", tiny_source), ("shorter", out)):
        measured = evaluate(str(where), EvalOptions(perplexity=str(text), window_length=64))["models"][0]["perplexity"]
        assert record["perplexity"][name] == {key: value for key, value in measured.items() if key != "text"}
        for shown in (removed, f"{record[name]['parameters']:,}", f"{measured['perplexity']:.2f}", "of source"):
            assert shown in printed
            assert shown in card
    assert re.findall(r"(\d) .*\bremoved\b", printed.split("stored")[0]) == list(map(str, gone))
    assert re.findall(r"^\| (\d) \| .* removed \|$", card, re.MULTILINE) == list(map(str, gone))
    assert "before any recovery training" in card
    assert f"checkpoint written to {out}" in printed


def test_the_card_of_an_ordinary_model_asks_for_no_trust(tiny_source: Path, tmp_path: Path) -> None:
    model, _, record = remove(str(tiny_source), PruneOptions.paper(blocks=[2]))
    write_checkpoint(tmp_path / "out", model, record, source=str(tiny_source))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "replica" not in card
    assert "# source, shorter" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    names: dict[str, object] = {}
    exec(snippet[1].replace('"."', repr(str(tmp_path / "out"))), names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratio": 0.1}, "prunes nothing"),
        ({"ratio": 1.0}, "--ratio 1.0 is out of range"),
        ({"blocks": [2, 2]}, "each once"),
        ({"blocks": list(range(6))}, "leaves none"),
        ({"target_size": "9B"}, "meets the target"),
        ({"target_size": "huge"}, "cannot be read"),
        ({"ratio": 0.4, "window_length": 4000}, "give 2 to 128"),
        ({"blocks": [2], "perplexity": "nowhere.txt"}, "nowhere.txt is not there"),
    ],
)
def test_what_the_source_rules_out_is_refused(tiny_source: Path, options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        remove(str(tiny_source), PruneOptions.paper(**options))
