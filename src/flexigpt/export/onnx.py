"""ONNX with the key/value cache as inputs and outputs; each weight once, in the dtype or the bits that it is stored in.

The graph computes in float32, which every device can: a weight stored in fewer bytes is cast where it is used, and
onnxruntime does that once, when it opens the file.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from flexigpt.export.options import ExportOptions
from flexigpt.export.stock import write_tokenizer
from flexigpt.runtime import InputError, one_line
from flexigpt.weights import load_model, open_empty

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
# A trace takes sizes of 0 and 1 for constants: any others will do.
_BATCH, _LENGTH, _PAST = 2, 3, 5


def to_onnx(model: str, out: Path, options: ExportOptions) -> None:
    """Writes `model.onnx`, its weights beside it, the configuration of the source's architecture and the tokenizer.

    Raises:
        InputError: a library that is missing, or a model that cannot be traced.
    """
    for library in ("onnx", "onnxscript", *(["onnxruntime"] if options.bits else [])):
        if find_spec(library) is None:
            raise InputError(f"--to onnx needs {library}: pip install 'flexigpt[export]'")
    import onnx_ir as ir  # noqa: PLC0415
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # noqa: PLC0415

    from flexigpt.export.onnx_weights import narrow, quantize  # noqa: PLC0415 - as onnx_ir

    compact: Any = load_model(model, "float32", "cpu")
    program = traced(compact)
    if options.bits is not None:
        quantize(program.graph, options.bits)
    narrow(program.graph, open_empty(model).dtype)
    RemoveUnusedNodesPass()(program)
    ir.save(program, out / FILE, external_data=f"{FILE}.data")
    compact.config.text_config.save_pretrained(out)
    compact.generation_config.save_pretrained(out)
    write_tokenizer(model, out)


class Step(nn.Module):
    """A model with its cache as plain tensors: a key and a value for each block that has an attention."""

    def __init__(self, model: PreTrainedModel, blocks: list[int]) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(batch, length) ids after (batch, heads, past, width) keys and values -> logits, and those with the new."""
        # Not of the configuration's kind: those for a sliding window forget, by the window's own counts.
        cache = DynamicCache()
        for block, key, value in zip(self.blocks, past[::2], past[1::2], strict=True):
            cache.update(key, value, block)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}
        logits = self.model(input_ids=input_ids, use_cache=True, **given).logits
        return logits, parts_of(cache, self.blocks)


def parts_of(cache: DynamicCache, blocks: list[int]) -> list[torch.Tensor]:
    """Keys and values of these blocks, in turn."""
    layers: Any = cache.layers  # some kinds of layer have neither
    return [part for block in blocks for part in (layers[block].keys, layers[block].values)]


def cached_blocks(cache: DynamicCache) -> list[int]:
    """The blocks that have an attention: of the others nothing is in a cache that was used."""
    layers: Any = cache.layers
    return [number for number, layer in enumerate(layers) if layer.is_initialized]


def traced(model: Any) -> "ir.Model":
    """The model as a graph with inputs and outputs by the names that other programs know them by.

    Raises:
        InputError: what the model computes depends on values in a way that no graph can hold.
    """
    from onnxscript.optimizer import optimize_ir  # noqa: PLC0415

    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=torch.zeros(_BATCH, _PAST, dtype=torch.long), past_key_values=cache, use_cache=True)
    blocks = cached_blocks(cache)
    past = parts_of(cache, blocks)
    positions = torch.arange(_PAST, _PAST + _LENGTH).expand(_BATCH, -1).contiguous()
    ids, mask = torch.zeros_like(positions), torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.long)
    text = {0: "batch", 1: "length"}
    sizes = (text, {0: "batch", 1: "total"}, text, [{0: "batch", 2: "past"} for _ in past])
    names = [f"{block}.{part}" for block in blocks for part in ("key", "value")]
    try:
        with quiet():
            program = torch.onnx.export(
                Step(model, blocks).eval(),
                (ids, mask, positions, past),
                dynamo=True,
                optimize=False,
                verbose=False,
                dynamic_shapes=sizes,
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
                output_names=["logits", *(f"present.{name}" for name in names)],
            )
            assert program is not None
            # Transposed once more is stored once more.
            optimize_ir(program.model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    except Exception as error:  # of many classes, private ones among them
        kind = model.config.text_config.model_type
        raise InputError(f"this {kind} cannot be written as ONNX: {one_line(error)}") from error
    for node in program.model.graph:
        node.metadata_props.clear()  # where in the source it came from: a tenth of a small file
    return program.model


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say to those who write exporters."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        exporter.setLevel(level)
