"""The teacher: the source model beside its student, on the student's own tensors wherever both have the same."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexigpt.model import find_architecture, layout_of, replaced_forwards
from flexigpt.recovery.trainable import first_trained_block
from flexigpt.runtime import InputError
from flexigpt.text import check_window_length
from flexigpt.weights import load_model, load_tokenizer, move, open_empty


def check_teacher(source: str, tokenizer: PreTrainedTokenizerBase, window_length: int) -> None:
    """Refuses a teacher before any weight is read.

    Raises:
        InputError: a teacher that cannot be opened, is itself compact, has another tokenizer than the model, or too
            short a context.
    """
    empty = open_empty(source)
    find_architecture(empty.config)
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"the teacher {source} has another tokenizer than the model: give the source model that it was made from"
        )
    check_window_length(window_length, empty.config)


class Teacher:
    """A source model whose logits a student learns from.

    Made in two steps around the student's own preparation: `Teacher(...)` finds out which tensors both have (the kept
    blocks', the embeddings', ...) while all lie on the CPU, and `settle` gives the teacher the student's where these
    stay as they are.

    Args:
        source: folder or hub name of the source model.
        student: as loaded, nothing prepared or moved; compact or ordinary.
        dtype: of the frozen weights.

    Raises:
        InputError: a source that cannot be opened, or of another vocabulary than the student's.
    """

    def __init__(self, source: str, student: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = load_model(source, str(student.dtype).removeprefix("torch."), "cpu")
        self.dtype = dtype
        sizes = [m.config.get_text_config().vocab_size for m in (self.model, student)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the teacher {source} has a vocabulary of {sizes[0]:,}, the model one of {sizes[1]:,}: "
                "give the source model that it was made from"
            )
        self._same = _same_tensors(self.model, student)
        self.shared_bytes = 0
        self.own_bytes = 0
        self._entry = 0

    def settle(self, student: PreTrainedModel, device: torch.device, share: bool = True) -> None:
        """Moves the teacher to the device, on the student's tensors where those are frozen.

        Args:
            student: prepared for training and on the device.
            device: where both compute.
            share: False where the student's tensors are about to be sharded.
        """
        self.model.requires_grad_(False)
        taken = set[str]()
        for name, parameter in self.model.named_parameters():
            same = self._same.get(name)
            if share and same is not None and not same.requires_grad:
                parameter.data = same.data
                taken.add(name)
                self.shared_bytes += parameter.nbytes
            else:
                parameter.data = parameter.data.to(device=device, dtype=self.dtype)
                self.own_bytes += parameter.nbytes
        move(self.model, device)
        first = first_trained_block(student)
        if self._names_before(first) <= taken:
            self._entry = first
        self._student_blocks, layout = layout_of(student).blocks, layout_of(self.model)
        self._blocks, self._returns_tuple = layout.blocks, layout.returns_tuple

    def _names_before(self, block: int) -> set[str]:
        """The teacher's parameters outside its blocks and in those before this one."""
        prefix = f"{layout_of(self.model).prefix}."
        names = [name for name, _ in self.model.named_parameters()]
        return {n for n in names if not n.startswith(prefix) or int(n.removeprefix(prefix).split(".")[0]) < block}

    @property
    def shared_blocks(self) -> int:
        """Blocks, counted from the first, that run once for teacher and student."""
        return self._entry

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens) ids -> (batch, tokens, vocabulary) logits, and what enters the first trained block.

        The latter, (batch, tokens, hidden), is None where teacher and student share no first blocks.
        """
        entering: list[torch.Tensor] = []

        def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(args[0] if args else kwargs["hidden_states"])

        with contextlib.ExitStack() as undo:
            if self._entry:
                handle = self._blocks[self._entry].register_forward_pre_hook(catch, with_kwargs=True)
                undo.callback(handle.remove)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits, entering[0] if entering else None

    @contextlib.contextmanager
    def entered(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """Within it the student's first blocks do not run: what the teacher's have put out stands in for them."""
        output = (hidden, None) if self._returns_tuple else hidden
        first = () if hidden is None else self._student_blocks[: self._entry]
        with replaced_forwards(first, lambda *_: lambda *args, **kwargs: output):
            yield


def _same_tensors(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The teacher's parameters, by name, that the student has too: block for block and, outside the blocks, by name.

    Blocks are matched by what they hold, since pruning keeps their numbers, extension and plain removal do not.
    """
    layout, theirs = layout_of(student), layout_of(teacher)
    prefix = theirs.prefix
    own = dict(student.named_parameters())
    outer = layout.prefix.removesuffix(prefix)
    same = {}
    for name, parameter in teacher.named_parameters():
        if not name.startswith(f"{prefix}.") and _equal(own.get(outer + name), parameter):
            same[name] = own[outer + name]
    for index, block in enumerate(theirs.blocks):
        parameters = dict(block.named_parameters())
        # Where a block stands most often first: one comparison each instead of a search.
        candidates = sorted(layout.kept, key=lambda kept: kept != index)
        for candidate in candidates:
            its = dict(layout.blocks[candidate].named_parameters())
            if all(_equal(its.get(path), parameter) for path, parameter in parameters.items()):
                same |= {f"{prefix}.{index}.{path}": its[path] for path in parameters}
                break
    return same


def _equal(one: nn.Parameter | None, other: nn.Parameter) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)
