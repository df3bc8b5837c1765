"""Doors: a room's names are there, are what its files define, and nothing else is."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import flexigpt
from forks import Forks

ROOMS = sorted(path.parent.name for path in Path(flexigpt.__file__).parent.glob("*/__init__.py"))
DOORS = ["flexigpt", *(f"flexigpt.{room}" for room in ROOMS)]


@pytest.mark.parametrize("door", DOORS)
def test_every_name_of_a_door_is_there_and_dir_names_no_other(door: str) -> None:
    package = importlib.import_module(door)
    assert package.__all__
    assert set(dir(package)) == {*package.__all__, "__all__", *(["__version__"] if door == "flexigpt" else [])}
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("door", DOORS)
def test_a_name_stays_what_its_file_defines_when_a_file_is_called_the_same(door: str) -> None:
    package = importlib.import_module(door)
    files = {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")}
    for name in files.intersection(package.__all__):
        importlib.import_module(f"{door}.{name}")
        assert not isinstance(getattr(package, name), ModuleType), name


def test_an_unknown_name_is_an_error_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match=r"module 'flexigpt\.model' has no attribute 'nonsense'"):
        _ = importlib.import_module("flexigpt.model").nonsense
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from flexigpt import nonsense", {})


# What Windows does not have. Its other libraries may have something else there: only ours are loaded without.
WITHOUT_POSIX = """
import ast, importlib, os, pathlib, pkgutil, signal, sys, importlib.util
root = pathlib.Path(importlib.util.find_spec("flexigpt").origin).parent
guests = ("mlx_model", "vllm_model", "vllm_plugin", "sglang_model")  # run in programs that need not be there
for path in root.rglob("*.py"):
    if path.stem in guests:
        continue
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]:
            if not node.__dict__.get("level") and name and name.split(".")[0] not in ("flexigpt", "fcntl"):
                importlib.import_module(name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "wait4", "killpg", "geteuid", "posix_fadvise", "posix_fallocate", "copy_file_range"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
for found in pkgutil.walk_packages([str(root)], "flexigpt."):
    if not found.name.endswith(guests):
        importlib.import_module(found.name)
"""


def test_every_module_can_be_imported_without_what_only_posix_has(early_forks: Forks) -> None:
    ran = early_forks.run("-c", WITHOUT_POSIX)
    assert ran.returncode == 0, ran.stderr
