"""The floors of the house: who may import whom; the step's few files; the docs' names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each floor may import those below it, and its own room. Rooms of one floor do not know each other.
FLOORS = (
    {"scripts"},
    {"engine.studies", "engine.preflight"},
    {"engine.training", "engine.pictures"},
    {"engine.evaluation"},
    {"engine.build"},
    {"models", "losses", "datasets"},
    {"utils"},
)
ROOMS = sorted(room for floor in FLOORS for room in floor)
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def room_of(module: str) -> str | None:
    """The room of a dotted module; None for what is not the project's."""
    parts = module.split(".")
    if parts[0] in SCRIPTS:
        return "scripts"
    name = ".".join(parts[:2]) if parts[0] == "engine" else parts[0]
    return name if name in ROOMS else None


def files_of(room: str) -> list[Path]:
    if room == "scripts":
        return sorted(ROOT.glob("*.py"))
    place = ROOT / room.replace(".", "/")
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions; "a.b" for `from a import b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_room():
    folders = ("engine", "models", "losses", "datasets", "utils")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    files -= {ROOT / "engine/__init__.py"}
    assert files <= {path for room in ROOMS for path in files_of(room)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_floors_below(room):
    (number,) = [number for number, floor in enumerate(FLOORS) if room in floor]
    allowed = {room, None}.union(*FLOORS[number + 1 :])
    if room == "scripts":
        allowed.remove("scripts")
    files = files_of(room)
    assert files
    for path in files:
        rooms = {name: room_of(name) for name in imported(path)}
        wrong = [name for name, other in rooms.items() if other not in allowed]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


# docs/step.md


STEP = (ROOT / "docs/step.md").read_text()
NAMED = re.findall(r"`((?:\w+/)*\w+\.py)(?:::([\w.]+))?`", STEP)


def walked() -> list[str]:
    """The files of the walk from main_cmd.py to a loss: the first column of the page's table."""
    return re.findall(r"^\| `([\w/.]+\.py)` \|", STEP, re.M)


def test_the_walk_through_a_step_is_short():
    files = walked()
    assert files[0] == "main_cmd.py"
    assert any(name.startswith("losses/") for name in files)
    assert len(files) == len(set(files)) <= 8
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= 1200


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_what_the_walk_names_is_there(file, name):
    tree = ast.parse((ROOT / file).read_text())
    for part in filter(None, name.split(".")):
        found = [node for node in tree.body if getattr(node, "name", None) == part]
        assert found, f"{file} has no {name}"
        tree = found[0]
