"""The teacher: the source model beside its student, on the student's own tensors wherever both have the same."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexigpt.model import find_architecture, layout_of, replaced_forwards
from flexigpt.recovery.draft import entering
from flexigpt.recovery.head import Head
from flexigpt.runtime import InputError
from flexigpt.text import check_window_length
from flexigpt.weights import load_model, load_tokenizer, move, open_empty


def check_teacher(source: str, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Refuses a teacher before any weight is read; of the student, whose tokenizer is given, its configuration counts.

    Raises:
        InputError: a teacher that cannot be opened, is itself compact, has another tokenizer or vocabulary than the
            student, or too short a context.
    """
    empty = open_empty(source)
    find_architecture(empty.config)
    theirs, own = (model.config.get_text_config().vocab_size for model in (empty, student))
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        other = "another tokenizer than the model"
    elif theirs != own:
        other = f"a vocabulary of {theirs:,}, the model one of {own:,}"
    else:
        check_window_length(length, empty.config)
        return
    raise InputError(f"the teacher {source} has {other}: give the source model that it was made from")


class Teacher:
    """A source model whose logits a student learns from.

    Made in two steps around the student's own preparation: `Teacher(...)` finds out which tensors both have (the kept
    blocks', the embeddings', ...) while all lie on the CPU, and `settle` gives the teacher the student's where these
    stay as they are.

    Args:
        source: folder or hub name of the source model.
        student: as loaded, nothing prepared or moved; compact or ordinary.
        dtype: of the frozen weights.

    Attributes:
        shared_bytes: of the student's own tensors; all others are own_bytes.
        blocks_run_once: blocks, counted from the first, that run for teacher and student together.

    Raises:
        InputError: a source that cannot be opened.
    """

    def __init__(self, source: str, student: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = load_model(source, str(student.dtype).removeprefix("torch."), "cpu")
        self.dtype, self._head = dtype, Head(self.model)
        self._same = _same_tensors(self.model, student)
        self.shared_bytes = self.own_bytes = self.blocks_run_once = 0

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
        self._student_blocks, layout = layout_of(student).blocks, layout_of(self.model)
        self._blocks, self._returns_tuple = layout.blocks, layout.returns_tuple
        # The backward pass ends at the first block of which something is trained.
        is_trained = [any(p.requires_grad for p in block.parameters()) for block in self._student_blocks]
        first = min(is_trained.index(True), len(self._blocks) - 1)
        later = {id(parameter) for block in layout.blocks[first:] for parameter in block.parameters()}
        if all(name in taken or id(parameter) in later for name, parameter in self.model.named_parameters()):
            self.blocks_run_once = first

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens) ids -> (batch, tokens, hidden), of which `logits` makes logits, and what enters the
        first trained block.

        The latter, (batch, tokens, hidden), is None where teacher and student share no first blocks.
        """
        once = self.blocks_run_once > 0
        with entering(self._blocks[self.blocks_run_once]) if once else contextlib.nullcontext() as entered:
            hidden = self._head.instead(self.model, ids, lambda _: self._head.hidden(ids))
        return hidden, entered[0] if entered else None

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden), some of those that `hidden` gave, -> (tokens, vocabulary)."""
        return self._head.logits(hidden)

    @contextlib.contextmanager
    def entered(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """Within it the student's first blocks do not run: what the teacher's have put out stands in for them."""
        output = (hidden, None) if self._returns_tuple else hidden
        first = () if hidden is None else self._student_blocks[: self.blocks_run_once]
        with replaced_forwards(first, lambda *_: lambda *args, **kwargs: output):
            yield


def _same_tensors(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The teacher's parameters, by name, that the student has too: block for block and, outside the blocks, by name.

    Blocks are matched by what they hold, since pruning keeps their numbers, extension and plain removal do not; those
    that were changed by their number.
    """
    layout, theirs, own = layout_of(student), layout_of(teacher), dict(student.named_parameters())
    prefix = theirs.prefix
    outer = layout.prefix.removesuffix(prefix)
    outside = {name: p for name, p in teacher.named_parameters() if not name.startswith(f"{prefix}.")}
    same = {name: own[outer + name] for name, p in outside.items() if _equal(own.get(outer + name), p)}
    for index, block in enumerate(theirs.blocks):
        parameters = dict(block.named_parameters())
        # Where a block stands most often first: one comparison each instead of a search.
        for candidate in sorted(layout.kept, key=lambda kept: kept != index):
            its = dict(layout.blocks[candidate].named_parameters())
            if all(_equal(its.get(path), parameter) for path, parameter in parameters.items()):
                same |= {f"{prefix}.{index}.{path}": its[path] for path in parameters}
                break
        else:  # of a block that was changed, such as one with fewer hidden units, the matrices that stayed
            its = dict(layout.blocks[index].named_parameters()) if index in layout.kept else {}
            stayed = [path for path, p in parameters.items() if p.dim() > 1 and _equal(its.get(path), p)]
            same |= {f"{prefix}.{index}.{path}": its[path] for path in stayed}
    return same


def _equal(one: nn.Parameter | None, other: nn.Parameter) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)
