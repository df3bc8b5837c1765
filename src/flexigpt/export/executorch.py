"""For ExecuTorch, on phones: one program with a cache of fixed length in it, its linears run by XNNPACK.

A program takes the ids of one text and their positions, as ExecuTorch's own runner for language models gives them. A
shared weight lies in the file once: XNNPACK's data are known by what they hold.
"""

# ruff: noqa: PLC0415 - executorch is an extra

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from flexigpt.export.onnx import cached_blocks, parts_of, quiet
from flexigpt.export.options import ExportOptions
from flexigpt.export.stock import write_tokenizer
from flexigpt.runtime import InputError, one_line
from flexigpt.weights import load_model

FILE = "model.pte"
# Of the cache, which is part of the program's memory: 2048 tokens, or the model's context where that is shorter.
_CONTEXT = 2048


def to_executorch(model: str, out: Path, options: ExportOptions) -> None:
    """Writes `model.pte`, the configuration of the source's architecture and the tokenizer.

    Raises:
        InputError: no ExecuTorch, or a model that it cannot take.
    """
    try:
        import executorch.exir  # noqa: F401 - whether it is there, and fits this torch
    except Exception as error:
        raise InputError(
            f"--to executorch needs executorch ({one_line(error)}): pip install 'flexigpt[executorch]', in the version "
            f"for torch {torch.__version__.partition('+')[0]}"
        ) from error
    compact: Any = load_model(model, "float32", "cpu")
    text_config = compact.config.text_config
    context = min(_CONTEXT, getattr(text_config, "max_position_embeddings", _CONTEXT))
    try:
        with quiet(), torch.no_grad():
            buffer = lowered(compact, context)
    except Exception as error:  # of many classes
        raise InputError(
            f"this {text_config.model_type} cannot be written for ExecuTorch: {one_line(error)}"
        ) from error
    (out / FILE).write_bytes(buffer)
    text_config.save_pretrained(out)
    compact.generation_config.save_pretrained(out)
    write_tokenizer(model, out)


class Step(nn.Module):
    """A model with its cache in buffers of its own, which is how a program keeps what it writes."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        self.model, self.context = model, context
        seen = DynamicCache()
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=seen, use_cache=True)
        self.blocks = cached_blocks(seen)
        names = [f"{part}_{block}" for block in self.blocks for part in ("key", "value")]
        for name, part in zip(names, parts_of(seen, self.blocks), strict=True):
            slots = torch.zeros(1, part.shape[1], context, part.shape[3])
            self.register_buffer(name, slots, persistent=False)

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        """(1, length) ids at (length) positions -> (1, length, vocabulary) logits."""
        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=self.context)
        for block in range(len(cache.layers)):
            # Not one for a sliding window, which forgets by counts of its own; masks ask those of gone attentions, too.
            layer = cache.layers[block] = StaticLayer(self.context)
            layer.cumulative_length, layer.is_initialized = cache_position[0].clone(), True
            if block in self.blocks:
                layer.keys, layer.values = self.get_buffer(f"key_{block}"), self.get_buffer(f"value_{block}")
                layer.device, layer.dtype = layer.keys.device, layer.keys.dtype
        given = {"input_ids": input_ids, "position_ids": cache_position[None], "past_key_values": cache}
        return self.model(**given, use_cache=True).logits


def lowered(compact: Any, context: int) -> bytes:
    """The program: ids (1, length) and positions (length) -> logits (1, length, vocabulary)."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    step = Step(compact.requires_grad_(False), context)
    length = torch.export.Dim("length", max=context - 1)
    given = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "cache_position": torch.arange(3)}
    sizes = {"input_ids": {1: length}, "cache_position": {0: length}}
    traced = torch.export.export(step.eval(), (), given, dynamic_shapes=sizes, strict=False)
    edge = to_edge_transform_and_lower(
        traced, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
    )
    return bytes(edge.to_executorch().buffer)
