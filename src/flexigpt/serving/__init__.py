"""Other programs' servers, taught what a compact model is.

Read `options`, `server`, then `parts` and `build`, and their two doors: `vllm_plugin` and `vllm_model`, which vLLM
loads by itself, and `sglang`, which SGLang loads when it is told to.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.serving.options import ServeOptions
    from flexigpt.serving.server import serve
else:
    lazy_door(__name__)
