"""Models of which only the blocks in use are in memory: sources, and what is made of their tensors."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flexigpt.model import all_tensors, empty_of_blocks, fill_model, layout_of
from flexigpt.runtime import Cache, InputError, Track, check_dtype, find_device, return_memory, silent
from flexigpt.weights.files import StoredTensor, WeightFiles, located, names_in_files, open_weights
from flexigpt.weights.open import check_numbers, generation_config, open_empty
from flexigpt.weights.shards import Piece, Values, values_of

# Names of parameters -> their values.
Read = Callable[[Sequence[str]], dict[str, torch.Tensor]]


class StreamedModel:
    """A source or compact model whose blocks are in memory while they are used.

    Args:
        model: in eval mode; what lies outside its blocks, and every buffer, is there.
        read: gives parameters of the blocks by their names in the model, on its device; None: they are there too.

    Attributes:
        model: as given; outside `block` its blocks' parameters may be on the meta device.
        layout: where it keeps its blocks.
        prefix: path of the list of blocks.
        blocks: the list.
    """

    def __init__(self, model: PreTrainedModel, read: Read | None = None) -> None:
        self.model, self._read = model, read
        self.layout = layout_of(model)
        self.prefix, self.blocks = self.layout.prefix, self.layout.blocks

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Of its parameters."""
        return cast(torch.Tensor, self.model.get_input_embeddings().weight).device

    def names(self, block: int) -> dict[str, str]:
        """Of a block's parameters: path within it -> name in the model."""
        return {path: f"{self.prefix}.{block}.{path}" for path, _ in self.blocks[block].named_parameters()}

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Parameters by their names in the model."""
        if self._read is None:
            return {name: self.model.get_parameter(name) for name in names}
        return self._read(names)

    def origin(self, name: str) -> StoredTensor | Values:
        """Where a tensor is to be copied from."""
        return self.tensors([name])[name]

    def parameter(self, block: int, path: str) -> torch.Tensor:
        """One parameter of a block, by its path within it."""
        name = f"{self.prefix}.{block}.{path}"
        return self.tensors([name])[name]

    def weight_matrix(self, block: int, path: str) -> torch.Tensor:
        """The weight of a block's linear as (outputs, inputs); GPT-2's `Conv1D` stores it transposed."""
        weight = self.parameter(block, f"{path}.weight")
        return weight.T if isinstance(self.blocks[block].get_submodule(path), Conv1D) else weight

    def check_unchanged(self) -> None:
        """Raises InputError where its files are no longer what they were when it was opened."""

    def expect(self, block: int) -> None:
        """Says which block comes next, so that its parameters may be fetched meanwhile."""

    def own(self, block: int, tensors: Mapping[str, Values]) -> None:
        """Gives a block tensors of its own, by their paths within it."""
        exchange_parameters(self.blocks[block], {path: values_of(values) for path, values in tensors.items()})

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Within it one block can run; a replica with what it borrows from its base."""
        with ExitStack() as filled:
            if self._read is not None:
                for number in {index, self.layout.bases.get(index, index)}:
                    filled.enter_context(self._filled(number))
            yield self.blocks[index]
        if self._read is not None:
            return_memory()

    @contextmanager
    def _filled(self, index: int) -> Iterator[None]:
        block, names = self.blocks[index], self.names(index)
        empty = dict(block.named_parameters())
        values = self.tensors(list(names.values()))
        exchange_parameters(block, {path: values[name] for path, name in names.items()})
        del values
        try:
            yield
        finally:
            exchange_parameters(block, empty)


def exchange_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a module these tensors for its parameters, by their paths within it, without a copy."""
    for path, values in tensors.items():
        parent, _, last = path.rpartition(".")
        parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values, values.is_floating_point())
        module.get_submodule(parent)._parameters[last] = parameter


class Source(StreamedModel):
    """A source model on disk, of which only the blocks in use are in memory.

    Args:
        name: folder or hub name.
        dtype: of the weights: auto (the source's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        empty: `open_empty` of that name and dtype, where it is there already.

    Attributes:
        files: of its weights.

    Raises:
        InputError: as `open_empty` and `open_weights`; an unknown dtype or device.
    """

    def __init__(
        self, name: str, dtype: str = "auto", device: str = "auto", empty: PreTrainedModel | None = None
    ) -> None:
        check_dtype(dtype)
        self._name = name = located(name)
        self._where = find_device(device)
        model = open_empty(name, dtype) if empty is None else empty
        self.files: WeightFiles = open_weights(name)
        self._names = names_in_files(self.files, model)
        self._dtype = model.dtype
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[list[str], Future[dict[str, torch.Tensor]]] | None = None
        super().__init__(model, self._read_blocks)
        fill_model(model, self._convert([name for name in self._names if not name.startswith(f"{self.prefix}.")]))
        for path, buffer in list(model.named_buffers()):
            parent, _, last = path.rpartition(".")
            model.get_submodule(parent)._buffers[last] = buffer.to(self._where)
        model.generation_config = generation_config(name) or model.generation_config

    def cache(self, folder: str | Path | None) -> Cache:
        """Keeps what is measured of it, in that folder or the default one."""
        kind = {"dtype": str(self._dtype), "device": self._where.type}
        return Cache(folder, source=self.files.fingerprint, **kind)

    def check_unchanged(self) -> None:
        """Raises InputError where its files are no longer what they were when it was opened."""
        if open_weights(self._name).fingerprint != self.files.fingerprint:
            raise InputError(f"the weights of {self._name} changed while they were read: start again")

    def origin(self, name: str) -> StoredTensor:
        """Where a tensor lies."""
        return self.files.tensors[self._names[name]]

    def expect(self, block: int) -> None:
        """Has the next block's parameters read, and where dtype or device differ converted, in the background."""
        if block >= len(self):
            return
        names = list(self.names(block).values())
        stored = [self.origin(name) for name in names]
        if self._where.type == "cpu" and all(tensor.dtype == self._dtype for tensor in stored):
            _advise(stored)
        else:
            self._ahead = names, self._pool.submit(self._convert, names)

    def _read_blocks(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Views of the files where neither dtype nor device differ."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._convert(names)
        if ahead[0] != list(names):
            self._ahead = ahead
            return self._convert(names)
        values = ahead[1].result()
        if self._where.type == "cuda":
            for tensor in values.values():
                tensor.record_stream(torch.cuda.current_stream(self._where))
        return values

    def _convert(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = self.files.read([self._names[name] for name in names])
        values = {name: found[self._names[name]] for name in names}
        with torch.no_grad():
            return {
                name: tensor.to(self._where, self._dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in values.items()
            }


def _advise(stored: Sequence[StoredTensor]) -> None:
    """Tells the system which parts of files are wanted soon."""
    if hasattr(os, "posix_fadvise"):
        for path in {tensor.file for tensor in stored}:
            with path.open("rb") as file:
                for tensor in stored:
                    if tensor.file == path:
                        os.posix_fadvise(file.fileno(), tensor.start, tensor.num_bytes, os.POSIX_FADV_WILLNEED)


class Assembly(StreamedModel):
    """A model made of another's tensors and of some of its own.

    Args:
        empty: the model, its parameters on the meta device.
        source: whose tensors it takes.
        taken: name in the model -> name in the source, buffers included; what is missing is its own.

    Attributes:
        tokenizer: the source's, where it has been opened.
    """

    def __init__(self, empty: PreTrainedModel, source: StreamedModel, taken: Mapping[str, str]) -> None:
        super().__init__(empty, self._gathered)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._source, self._taken = source, dict(taken)
        self._own: dict[str, Values] = {}
        there, block = all_tensors(source.model), f"{self.prefix}."
        buffers = {name for name, _ in empty.named_buffers()}
        outside = {n: there[o] for n, o in taken.items() if n in buffers or not n.startswith(block)}
        fill_model(empty, outside)
        empty.generation_config = source.model.generation_config

    def own(self, block: int, tensors: Mapping[str, Values]) -> None:
        """Gives a block tensors of its own, by their paths within it; what reads one is asked whenever it is in use."""
        self._own.update({f"{self.prefix}.{block}.{path}": values for path, values in tensors.items()})

    def origin(self, name: str) -> StoredTensor | Values:
        """Where a tensor is to be copied from."""
        return self._own[name] if name in self._own else self._source.origin(self._taken[name])

    def pieces(self) -> list[Piece]:
        """What a checkpoint of it stores, each tensor once.

        Raises:
            InputError: a source that is no longer what it was.
        """
        self._source.check_unchanged()
        seen: dict[int, Piece] = {}
        for name, values in self.model.state_dict(keep_vars=True).items():
            if id(values) not in seen:
                seen[id(values)] = Piece(name, values.dtype, tuple(values.shape), self.origin(name))
        return list(seen.values())

    def in_memory(self) -> PreTrainedModel:
        """The model with all of its blocks' parameters: views of files where they can be. It streams no more."""
        used: set[str] = set()
        for index in range(len(self)):
            names = self.names(index)
            values: dict[str, torch.Tensor] = dict(self.tensors(list(names.values())))
            for name in names.values():
                # What a repeated block keeps as its own (input norms, biases) must not share the first one's memory.
                origin = name if name in self._own else self._taken[name]
                values[name] = values[name].detach().clone() if origin in used else values[name].detach()
                used.add(origin)
            exchange_parameters(self.blocks[index], {path: values[name] for path, name in names.items()})
        self._read = None
        return self.model

    def _gathered(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        taken = {name: self._taken[name] for name in names if name not in self._own}
        values = self._source.tensors(list(dict.fromkeys(taken.values())))
        return {n: values[taken[n]] if n in taken else values_of(self._own[n]).to(self.device) for n in names}


@torch.no_grad()
def check_finite(source: StreamedModel, track: Track = silent) -> None:
    """Raises InputError where a source's weights hold NaN or infinity; the message names the block."""
    for name, parameter in source.model.named_parameters():
        if not name.startswith(f"{source.prefix}."):
            check_numbers(name, parameter, "outside the blocks")
    for index in track(range(len(source)), "checking weights", len(source)):
        source.expect(index + 1)
        for name, values in source.tensors(list(source.names(index).values())).items():
            check_numbers(name, values, f"in block {index}")


def without_blocks(source: StreamedModel, blocks: Sequence[int]) -> Assembly:
    """The source without these blocks: an ordinary, shorter model of its own family that shares its tensors.

    Args:
        source: a source model.
        blocks: blocks to remove, from 0.

    Raises:
        InputError: a block that does not exist, or none that would stay.
    """
    depth = len(source)
    strange = sorted(set(blocks) - set(range(depth)))
    if strange or len(set(blocks)) >= depth:
        raise InputError(f"cannot remove blocks {sorted(blocks)} of 0 to {depth - 1}: name some of them, not all")
    empty, taken = empty_of_blocks(source.model, [block for block in range(depth) if block not in blocks])
    return Assembly(empty, source, taken)
