"""Models whose linears take 8 or 4 bits a weight.

In: a source or a compact model. Out: the same model with its linears quantised, and the record. Read `options`, then
`quantize`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.quantization.options import QuantizeOptions
    from flexigpt.quantization.quantize import quantize
else:
    lazy_door(__name__)
