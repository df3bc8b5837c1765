"""The rooms of the package: imports go down, and through doors."""

import ast
from pathlib import Path

import flexigpt

PACKAGE = Path(flexigpt.__file__).parent
# From the ground up; on one line: siblings, which do not talk.
ROOMS = (
    "runtime",
    "text model",
    "weights",
    "calibration",
    "replicas evaluation",
    "record",
    "pruning recovery quantization decoding serving report export",
    "cli",
)
FLOOR = {room: floor for floor, names in enumerate(ROOMS) for room in names.split()}
MOST_ARROWS = 70
# Loaded by a room's `__init__.py` before the door is there.
DOOR_ITSELF = "flexigpt.runtime.doors"


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imports(path: Path) -> list[str]:
    """The modules that a file imports from, of the package's own, inside functions too."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return [name for name in names if name.startswith("flexigpt.") and name != DOOR_ITSELF]


def arrows() -> set[tuple[str, str]]:
    """Which room imports which."""
    found = set()
    for path in PACKAGE.glob("*/**/*.py"):
        found |= {(room_of(path), name.split(".")[1]) for name in imports(path)}
    return {(room, there) for room, there in found if room != there}


def test_every_room_has_its_floor_and_nothing_else_lies_beside_them() -> None:
    beside = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    assert beside == set(FLOOR)


def test_imports_go_down_and_through_doors() -> None:
    for path in PACKAGE.glob("*/**/*.py"):
        for name in imports(path):
            there = name.split(".")[1]
            if there != room_of(path):
                assert FLOOR[there] < FLOOR[room_of(path)], f"{path} imports {there}, which is not below it"
                assert name.count(".") == 1, f"{path} goes past the door of {there}"


def test_rooms_know_few_others() -> None:
    assert len(arrows()) <= MOST_ARROWS


def test_own_modules_are_not_imported_behind_the_readers_back() -> None:
    for path in PACKAGE.glob("*/**/*.py"):
        if path.name not in ("doors.py", "registration.py", "mlx_model.py"):
            assert "import_module" not in path.read_text(encoding="utf-8"), path
