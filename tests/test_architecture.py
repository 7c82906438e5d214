"""The import rule: a module imports only from lower levels, never from another module of its own level.

Rooms are the folders and modules at the top of pom_ext, floors their levels.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pom_ext"
FLOORS = (
    {"_io", "_random"},
    {"ops", "engine"},
    {"layers", "forward_mode"},
    {"models", "diffusion"},
    {"streaming"},
    {"sampling", "training", "data", "media", "convert", "export"},
    {"demo", "play"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path):
    """Names below pom_ext that a file imports from, wherever in the file."""
    folders = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parents = folders[: len(folders) - node.level + 1] if node.level else ()
            module = (*parents, *(node.module.split(".") if node.module else ()))
            modules = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from (module[1] for module in modules if module[0] == "pom_ext" and len(module) > 1)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_room_and_lower_floors(path):
    own = room_of(path)
    for room in set(imported_rooms(path)) - {own, "__version__", "_C", "_engine"}:
        if own == "engine":  # streams without torch
            assert room == "_io", f"{path} imports {room}"
        else:
            assert FLOOR[room] < FLOOR[own], f"{path} imports {room}, which is on floor {FLOOR[room]}"


def test_every_module_and_folder_is_on_a_floor():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(FLOOR)
    modules = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(modules) <= 6 and len(folders) <= 15


def test_nothing_takes_the_reference_in_place_of_an_operation():
    for path in FILES:
        assert "reference" not in {
            name.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }, f"{path} imports the reference"
