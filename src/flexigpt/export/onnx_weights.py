"""What an ONNX graph stores its weights in: the checkpoint's dtype, or 8 or 4 bits."""

# ruff: noqa: PLC0415 - onnx is an extra

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx_ir as ir

# Weights that share a scale and a zero point.
BLOCK_SIZE = 32


def quantize(graph: "ir.Graph", bits: int) -> None:
    """Rounds the weights of linears with onnxruntime's own quantiser, and has its own operators use them.

    Adapters stay as they are: they are small. A table of tokens that is the head's weight, too, is read from the
    head's.
    """
    import onnx_ir as ir
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, bits=bits))
    settings = {"bits": bits, "block_size": BLOCK_SIZE}
    graph.opset_imports["com.microsoft"] = 1
    for name, weight in list(graph.initializers.items()):
        products = list(_products(weight))
        if not products or "adapter_" in name:
            continue
        values = _values(weight)
        values = values if products[0].inputs[1] is weight else np.ascontiguousarray(values.T)
        inner, outer = values.shape
        parts = zip(("rounded", "scales", "zeros"), quantizer.qbits_block_quant(values), strict=True)
        made = [_initializer(graph, f"{name}_{part}", ir.tensor(stored)) for part, stored in parts]
        for node in products:
            bias = [None, node.inputs[2]] if len(node.inputs) > 2 else []
            _exchange(graph, node, "MatMulNBits", [node.inputs[0], *made, *bias], settings | {"K": inner, "N": outer})
        for node in _lookups(weight):
            shape = _initializer(graph, f"{name}_shape", ir.tensor(np.array([outer, -1])))
            rows = ir.node("Reshape", [made[0], shape])
            graph.insert_before(node, rows)
            axes = {"gather_axis": 0, "quantize_axis": 1}
            given = [rows.outputs[0], node.inputs[1], *made[1:]]
            _exchange(graph, node, "GatherBlockQuantized", given, settings | axes)


def narrow(graph: "ir.Graph", dtype: torch.dtype) -> None:
    """Stores each matrix in the dtype that the checkpoint has it in, where that loses nothing, and casts it for use."""
    import onnx_ir as ir

    for name, wide in list(graph.initializers.items()):
        if wide.dtype != ir.DataType.FLOAT or wide.const_value is None or len(wide.const_value.shape) < 2:
            continue
        values = torch.from_numpy(_values(wide))
        if dtype == torch.float32 or not torch.equal(values.to(dtype).float(), values):
            continue
        del graph.initializers[name]
        stored = _initializer(graph, name, ir.tensor(values.to(dtype)))
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        lookups = list(_lookups(wide))
        wide.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)
        for node in lookups:  # of a few rows: the table itself need not be cast
            found = node.outputs[0]
            widened = ir.node("Cast", [found], {"to": ir.DataType.FLOAT})
            found.replace_all_uses_with(widened.outputs[0])
            widened.replace_input_with(0, found)
            node.replace_input_with(0, stored)
            found.dtype = stored.dtype
            graph.insert_after(node, widened)


def _products(weight: "ir.Value") -> "Iterator[ir.Node]":
    """The nodes that multiply by this weight, as it is or transposed."""
    for node, place in weight.uses():
        if node.op_type in ("MatMul", "Gemm") and place == 1:
            yield node
        elif node.op_type == "Transpose":
            yield from _products(node.outputs[0])


def _lookups(weight: "ir.Value") -> "list[ir.Node]":
    """The nodes that read rows of this weight."""
    return [node for node, place in weight.uses() if node.op_type == "Gather" and place == 0]


def _values(weight: "ir.Value") -> np.ndarray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def _initializer(graph: "ir.Graph", name: str, values: Any) -> "ir.Value":
    """A new constant of the graph."""
    import onnx_ir as ir

    made = ir.val(name, const_value=values)
    graph.register_initializer(made)
    return made


def _exchange(graph: "ir.Graph", old: "ir.Node", kind: str, inputs: list[Any], settings: dict[str, int]) -> None:
    """Puts one of onnxruntime's own operators in the place of a node."""
    import onnx_ir as ir

    new = ir.node(kind, inputs, settings, domain="com.microsoft", name=old.name)
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)
