"""Recovery of a model without replicas whose blocks lost hidden units and attentions: trained, merged, resumed."""

import json
from pathlib import Path

import pytest
import torch
from test_recover import assert_same, quick, signal_after
from test_trainable import disturb, logits
from transformers import PreTrainedModel

import textbook
from conftest import Run
from families import FAMILIES, compact_of, tiny_model
from flexigpt import FlexiGPTForCausalLM, InputError, Plan, PruneOptions, prune, recover, write_checkpoint
from flexigpt.model import SublayerReplica, materialize, sublayer_paths
from flexigpt.recovery.trainable import lora_rank_for, merge_lora, prepare_training, trained_parameters
from flexigpt.replicas import readers_of_units
from flexigpt.weights import StreamedModel, load_model, open_empty

NARROW = (
    SublayerReplica(block=0, sublayer="mlp", form="units", units=7),
    SublayerReplica(block=2, sublayer="mlp", form="none"),
    SublayerReplica(block=2, sublayer="attention", form="none"),
    SublayerReplica(block=3, sublayer="attention", form="none"),
    SublayerReplica(block=4, sublayer="mlp", form="units", units=20),
)


@pytest.fixture(scope="module")
def narrow(tiny_source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact model whose blocks differ: narrower MLPs, a block with nothing left, one without attention."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "plan.json").write_text(json.dumps(Plan(num_blocks=6, sublayers=NARROW).to_dict()))
    options = PruneOptions(plan=folder / "plan.json", calibration=str(text), windows=4, window_length=64)
    model, _, record = prune(str(tiny_source), options)
    write_checkpoint(folder / "small", model, record, source=str(tiny_source))
    return folder / "small"


@pytest.mark.parametrize("with_teacher", [False, True])
def test_all_that_is_left_is_trained_and_merged(
    narrow: Path, tiny_source: Path, text: Path, single: Path, tmp_path: Path, with_teacher: bool
) -> None:
    teacher = str(tiny_source) if with_teacher else None
    options = quick(text, teacher=teacher, perplexity=str(single), lr=2e-2)
    record = recover(str(narrow), tmp_path / "out", options)
    assert record is not None
    before, after = textbook.weights(narrow), textbook.weights(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    linears = {name for name in before if "_proj." in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == linears
    assert len(linears) == 7 + 7 + 0 + 3 + 7 + 7
    perplexity = record["perplexity"]
    assert perplexity["after"]["perplexity"] < perplexity["before"]["perplexity"]
    assert load_model(str(tmp_path / "out")).num_parameters() == open_empty(str(narrow)).num_parameters()
    if with_teacher:  # on the student's embeddings, head and norm, its whole blocks, and what refitting left of others
        source, taken = textbook.weights(tiny_source), record["recovery"]["teacher"]
        small = {name.removeprefix("language_model."): tensor for name, tensor in before.items()}
        same = {name for name, tensor in source.items() if name in small and torch.equal(tensor, small[name])}
        assert any("layers.0.self_attn.q_proj" in name for name in same)
        shared = sum(source[name].nbytes for name in same if "layers" not in name or source[name].dim() > 1)
        assert shared <= taken["shared_bytes"] <= sum(source[name].nbytes for name in same)
        assert taken["shared_bytes"] + taken["own_bytes"] == sum(tensor.nbytes for tensor in source.values())


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(narrow: Path, text: Path, tmp_path: Path, often: None) -> None:
    recover(str(narrow), tmp_path / "whole", quick(text))
    with pytest.raises(InputError, match="interrupted after step 7 of 20"):
        recover(str(narrow), tmp_path / "out", quick(text), log=signal_after(7))
    assert not (tmp_path / "out").exists()
    recover(str(narrow), tmp_path / "out", quick(text), resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_narrow_linear_takes_a_lower_rank_and_leaves_the_others_theirs(
    run: Run, narrow: Path, text: Path, tmp_path: Path
) -> None:
    """An MLP of 7 units has linears of 32 x 7, and gets a LoRA of rank 7; 20 units hold the 16 asked for."""
    options = ("--data", text, "--tokens", 64, "--window-length", 16, "--batch-tokens", 64)
    code, _, errors = run("recover", narrow, tmp_path / "out", *options, "--lora-rank", 33)
    assert code == 2
    assert errors.endswith("a LoRA of rank 33 does not fit the linears: give --lora-rank 1 to 32\n")
    assert run("recover", narrow, tmp_path / "out", *options, "--lora-rank", 16)[0] == 0
    model = load_model(str(narrow))
    prepare_training(model, "replicas+kept", 16, seed=0)
    ends = ".lora_A.default.weight"
    ranks = {n.removesuffix(ends): len(p) for n, p in trained_parameters(model).items() if n.endswith(ends)}
    assert {name for name, rank in ranks.items() if rank == 7} == {n for n in ranks if ".layers.0.mlp." in n}
    assert {rank for name, rank in ranks.items() if ".layers.0.mlp." not in name} == {16}
    scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert scales == [1.0] * len(ranks)


def test_where_there_are_no_replicas_it_is_said_what_to_do(run: Run, narrow: Path, text: Path, tmp_path: Path) -> None:
    code, _, errors = run("generate", narrow, "--prompt", "He", "--max-new-tokens", 4, "--speculative")
    assert code == 2
    assert errors.splitlines()[-1].endswith("faster than its source as it is, decode it without --speculative")
    code, _, errors = run("recover", narrow, tmp_path / "out", "--data", text, "--train", "replicas")
    assert code == 2
    assert "the model has no replicas: leave it out" in errors
    with pytest.raises(InputError, match="no replicas, so there is nothing to materialise: use it as it is"):
        materialize(load_model(str(narrow)))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_at_the_narrow_models_own_logits_and_merges_into_it(family: str) -> None:
    model = shrunk(tiny_model(family))
    before, names = logits(model), set(model.state_dict())
    prepare_training(model, "replicas+kept", lora_rank_for(model, None), seed=0)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    disturb(model)
    changed = logits(model)
    assert (changed - before).abs().max() > 0.01
    merge_lora(model)
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names


def shrunk(source: PreTrainedModel) -> FlexiGPTForCausalLM:
    """The compact model of that plan, its MLPs with the source's first units."""
    model, paths = compact_of(source, Plan(num_blocks=6, sublayers=NARROW)), sublayer_paths(source)["mlp"]
    for row in NARROW:
        if row.units is not None:
            readers = readers_of_units(StreamedModel(source), row.block, paths, torch.arange(row.units))
            StreamedModel(model).own(row.block, readers)
    return model.eval()
