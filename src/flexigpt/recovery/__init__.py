"""Trains a model back: on one CPU, one GPU, or many.

Read `options`, `recover` (the flow), `training` (one step), `sweep` (its rate), `trainable`, `head` (logits of some
tokens at a time), `teacher`, `draft`, `estimate`, `checkpoints`, `measuring`, `tracking`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.recovery.options import RecoverOptions
    from flexigpt.recovery.recover import recover
else:
    lazy_door(__name__)
