"""The one direction of imports: scripts -> engine -> models, losses, datasets -> utils."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "utils": {"utils"},
    "models": {"models", "utils"},
    "losses": {"losses", "utils"},
    "datasets": {"datasets", "utils"},
    "engine": {"engine", "models", "losses", "datasets", "utils"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imported(path: Path) -> set[str]:
    """First parts of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        own = imported(path) & (set(MAY_IMPORT) | SCRIPTS)
        assert own <= MAY_IMPORT[package], f"{path.name} imports {own - MAY_IMPORT[package]}"
