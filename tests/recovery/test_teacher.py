"""Distillation against two separate stock models side by side; what they share, and what runs once for both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainable import PLAN
from test_training import CPU, SETTINGS, WINDOW, WINDOWS, options
from torch import nn

import textbook
from families import FAMILIES, NUM_BLOCKS, block_list, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import PruneOptions, recover, remove
from flexigpt.pruning import ExtendOptions
from flexigpt.pruning.extend import extend
from flexigpt.record import write_checkpoint
from flexigpt.recovery.teacher import Teacher
from flexigpt.recovery.trainable import TRAIN, prepare_training, trained_parameters
from flexigpt.recovery.training import Training
from flexigpt.runtime import ALONE

pytestmark = pytest.mark.usefixtures("few_logits")

WEIGHT = 0.3
DISTILLING = replace(SETTINGS, distill_weight=WEIGHT)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of each family's tiny source, made when asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def saved(family: str) -> str:
        if not (folder / family).exists():
            tiny_model(family).save_pretrained(folder / family)
        return str(folder / family)

    return saved


def compact_model(family: str) -> Any:
    source = tiny_model(family)
    model = compact_of(source, PLAN)
    initialize_replicas(model, source, PLAN, adapter_init="svd", norm_init=0.5, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # or no two models could be compared
    return model.eval()


def distilling(student: Any, source: str, train: str) -> Training:
    teacher = Teacher(source, student, torch.float32)
    prepare_training(student, train, 4, seed=0)
    return Training(student, DISTILLING, ALONE, CPU, teacher)


def gradients_of_a_step(training: Training, windows: torch.Tensor) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What a step measured, and the gradients that it gave the optimizer, before any clipping."""
    caught: dict[str, torch.Tensor] = {}
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: caught.__setitem__(name, p.grad.clone()))
        for name, parameter in trained_parameters(training.model).items()
    ]
    values = training.step(0, windows)
    for handle in handles:
        handle.remove()
    return values, caught


@pytest.mark.parametrize(
    ("family", "train"),
    [*((family, "replicas") for family in FAMILIES), ("gpt2", "replicas+kept"), ("llama-gqa", "all")],
)
def test_loss_and_gradients_are_those_of_two_separate_models(sources: Any, family: str, train: str) -> None:
    windows = token_ids(4, WINDOW + 1)
    values, found = gradients_of_a_step(distilling(compact_model(family), sources(family), train), windows)
    student = compact_model(family)
    prepare_training(student, train, 4, seed=0)
    loss = textbook.batch_loss(student, windows, tiny_model(family), WEIGHT)
    loss.backward()
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["divergence"] > 0
    expected = {name: parameter.grad for name, parameter in trained_parameters(student).items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def storages(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


# train -> blocks whose tensors the teacher has from its student; blocks 2, 3 and 4 are pruned
SHARED = {"replicas": {0, 1, 5}, "replicas+kept": {0, 1, 5}, "all": set()}


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "llama-biases-tied"])
def test_the_teacher_stands_on_its_students_tensors(sources: Any, family: str, train: str) -> None:
    training = distilling(compact_model(family), sources(family), train)
    teacher = training.teacher
    assert teacher is not None
    own = storages(training.model)
    blocks = block_list(teacher.model)
    assert {i for i, block in enumerate(blocks) if storages(block) <= own} == SHARED[train]
    assert all(not storages(block) & own for i, block in enumerate(blocks) if i not in SHARED[train])
    outside = {name: p for name, p in teacher.model.named_parameters() if not any(p is q for q in blocks.parameters())}
    assert all((p.untyped_storage().data_ptr() in own) == (train != "all") for p in outside.values())
    shared = sum(p.nbytes for p in teacher.model.parameters() if p.untyped_storage().data_ptr() in own)
    assert teacher.shared_bytes == shared
    assert teacher.own_bytes == sum(p.nbytes for p in tiny_model(family).parameters()) - shared


@pytest.mark.parametrize(("train", "once"), [("replicas", 2), ("replicas+kept", 0), ("all", 0)])
def test_blocks_before_the_first_replica_run_once_for_both(sources: Any, train: str, once: int) -> None:
    training = distilling(compact_model("llama-gqa"), sources("llama-gqa"), train)
    assert training.teacher is not None
    assert training.teacher.blocks_run_once == once
    runs = [0] * NUM_BLOCKS
    for blocks in (training.model.block_list, block_list(training.teacher.model)):
        for number, block in enumerate(blocks):

            def count(*_: Any, number: int = number) -> None:
                runs[number] += 1

            block.mlp.register_forward_pre_hook(count)
    training.step(0, token_ids(2, WINDOW + 1))
    assert runs == [1] * once + [2] * (NUM_BLOCKS - once)


def naive_losses(model: Path, teacher: Path, text: Path) -> float:
    (batch,) = textbook.batches_of(textbook.text_ids(text, model), WINDOWS, WINDOW, 1)
    return textbook.batch_loss(textbook.opened(model), batch, textbook.opened(teacher), WEIGHT).item()


def write(folder: Path, made: Any, source: Path) -> Path:
    model, _, record = made
    write_checkpoint(folder, model, record, source=str(source))
    return folder


@pytest.mark.parametrize("kind", ["recovered", "shorter", "extended"])
def test_students_of_every_kind_learn_from_the_right_logits(
    tiny_source: Path, tiny_compact: Path, single: Path, tmp_path: Path, kind: str
) -> None:
    """Of a recovered student no kept block is the source's any more; the others have other numbers of blocks."""
    student = tmp_path / "student"
    if kind == "recovered":
        recover(str(tiny_compact), student, options(single, lr=5e-2))
    elif kind == "shorter":
        write(student, remove(str(tiny_source), PruneOptions.paper(blocks=(1, 4))), tiny_source)
    else:
        write(student, extend(str(tiny_source), ExtendOptions(blocks="2:4", rank=2)), tiny_source)
    given = options(single, teacher=str(tiny_source), distill_weight=WEIGHT)
    record = recover(str(student), tmp_path / "out", given)
    assert record is not None
    recovery = record["recovery"]
    assert recovery["history"][0]["loss"] == pytest.approx(naive_losses(student, tiny_source, single), rel=1e-5)
    stored = sum(tensor.nbytes for tensor in textbook.weights(tiny_source).values())
    weights = textbook.weights(tiny_source)
    block = sum(tensor.nbytes for name, tensor in weights.items() if name.startswith("model.layers.0."))
    own = {"recovered": 6, "shorter": 2, "extended": 0}[kind] * block
    assert recovery["teacher"] == {"shared_bytes": stored - own, "own_bytes": own, "blocks_run_once": 0}


@pytest.mark.parametrize(("blocks", "once"), [("2:4", 3), ("5:6", 5)])
def test_an_extended_student_shares_its_first_blocks(
    tiny_source: Path, single: Path, tmp_path: Path, blocks: str, once: int
) -> None:
    """A repetition of the last block stands behind all blocks of the teacher."""
    student = write(tmp_path / "student", extend(str(tiny_source), ExtendOptions(blocks=blocks, rank=2)), tiny_source)
    given = options(single, train="replicas", teacher=str(tiny_source), distill_weight=WEIGHT)
    record = recover(str(student), tmp_path / "out", given)
    assert record is not None
    assert record["recovery"]["teacher"]["blocks_run_once"] == once
    assert record["recovery"]["history"][0]["loss"] == pytest.approx(
        naive_losses(student, tiny_source, single), rel=1e-5
    )
