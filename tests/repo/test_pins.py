"""dev/PINS.md against the code and the installed packages: private names, and comments that name a version."""

import ast
import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

TEXT = (ROOT / "dev" / "PINS.md").read_text()
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
FILES = [
    *ROOT.glob("*.py"),
    *(path for room in ("vla", "envs", "schemas", "benchmarks") for path in ROOT.glob(f"{room}/**/*.py")),
]
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
OF_OS = {"_exit"}  # documented


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading."""
    lines = [line for line in TEXT.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


NAMES, WORKAROUNDS = rows("Private names of other packages"), rows("Workarounds for pinned versions")


def private_names() -> dict[str, set[str]]:
    """{name: files} of attributes and modules with an underscore that no class or function of ours defines."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own, found = set(OF_NAMED_TUPLES | OF_OS), defaultdict(set)
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            for name in names:
                if name.startswith("_") and not name.startswith("__") and name not in own:
                    found[name].add(str(path.relative_to(ROOT)))
    return found


def test_every_private_name_is_listed():
    listed = {name for _, names, *_ in NAMES for name in quoted(names)}
    for name, files in private_names().items():
        assert name in listed, f"{name} in {sorted(files)} is not in dev/PINS.md"
        named = {file for where, names, *_ in NAMES if name in quoted(names) for file in quoted(where)}
        assert files <= named, f"dev/PINS.md lacks {sorted(files - named)} for {name}"


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row[1])
def test_a_private_name_is_still_there(row):
    files, names, package, (place,) = quoted(row[0]), quoted(row[1]), row[2].split(), quoted(row[3])
    assert PINS[package[0]] == package[1]
    for file in files:
        for name in names:
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} has no {name}"
    for name in names:
        assert has(place, name), f"{place} has no {name}"


def has(place: str, name: str) -> bool:
    """Whether a module defines a name, or mentions it in its source."""
    try:
        found = importlib.import_module(place)
    except ModuleNotFoundError:  # torch.ops.aten makes its members when they are asked for
        module, _, attribute = place.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
    if hasattr(found, name):
        return True
    return inspect.ismodule(found) and bool(re.search(rf"\b{name}\b", inspect.getsource(found)))


def test_every_version_in_a_comment_is_listed():
    """A version of a pinned package, or one with two numbers in front of its name, as in "torch 2.13"."""
    listed = {(file, version.split()[1]) for files, version, *_ in WORKAROUNDS for file in quoted(files)}
    versions = {version for version in PINS.values() if version.count(".") == 2}
    for path in [*FILES, *ROOT.glob("tests/helpers/*.py")]:
        text, file = path.read_text(), str(path.relative_to(ROOT))
        named = {version for version in versions if re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.]*\d)", text)}
        named |= set(re.findall(r"\btorch (2\.\d+)\b", text))
        assert {(file, version) for version in named} <= listed, f"dev/PINS.md lacks {sorted(named)} of {file}"


@pytest.mark.parametrize("row", WORKAROUNDS, ids=lambda row: f"{row[0]} {row[1]}")
def test_a_workaround_is_still_there(row):
    package, version = row[1].split()
    assert PINS[package].startswith(version) or (package, version) == ("torch", "2.11"), "pin renewed: look at this row"
    for file in quoted(row[0]):
        assert version in Path(ROOT / file).read_text(), f"{file} does not name {version}"
