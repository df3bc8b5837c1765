"""Arguments in, one flow called, its result printed."""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.cli.main import app, main
else:
    lazy_door(__name__)
