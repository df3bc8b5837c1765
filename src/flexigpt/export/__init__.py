"""A compact model in the forms that other programs read.

In: a compact model on disk. Out: a folder that transformers, llama.cpp, MLX, onnxruntime or ExecuTorch opens without
flexigpt. Read `options`, `export`, `stock`, then the form that you want.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.export.export import export, export_rows
    from flexigpt.export.options import ExportOptions
else:
    lazy_door(__name__)
