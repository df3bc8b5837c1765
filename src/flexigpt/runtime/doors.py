"""Doors: a room's `__init__.py` names what others may import, and loads the file behind a name when it is asked for.

So `import flexigpt`, help and usage errors load neither torch nor transformers.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


class _Door(ModuleType):
    """A package whose names are loaded when they are first asked for (PEP 562, as a class, to see what is set)."""

    __files__: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name == "__version__" and self.__name__ == "flexigpt":
            from importlib.metadata import version  # noqa: PLC0415 - it takes longer than all else here

            self.__version__ = version(self.__name__)
            return self.__version__
        if name not in self.__files__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(self.__files__[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a file as an attribute of its package. A name of the door that the file is called by,
        # as `prune` in `pruning/prune.py`, must stay what the file defines.
        if not (isinstance(value, ModuleType) and name in self.__files__):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*self.__all__, "__all__", *(["__version__"] if self.__name__ == "flexigpt" else [])]


def lazy_door(name: str) -> None:
    """Makes a package a door to the names that its `if TYPE_CHECKING:` block imports.

    Args:
        name: of the package, which is being imported.
    """
    package = sys.modules[name]
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    imports = (node for block in tree.body if isinstance(block, ast.If) for node in block.body)
    files = {
        alias.name: node.module
        for node in imports
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    package.__dict__.update(__files__=files, __all__=sorted(files))
    package.__class__ = _Door
