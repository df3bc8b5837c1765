"""Loads the modules that draw where something is drawn."""

import importlib
from typing import Any


def drawing(module: str) -> Any:
    """A module of this package that imports matplotlib: `plan_picture` or `figures`.

    Not imported at the top: matplotlib takes 0.4 s, and the first time on a machine some seconds to list its fonts, for
    which no other command should wait.
    """
    return importlib.import_module(f"flexigpt.{module}")
