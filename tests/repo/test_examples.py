"""The examples in docstrings (lines that begin with >>>) give what they show."""

import doctest
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vla", "envs", "schemas", "benchmarks")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
WITH_EXAMPLES = [path for path in FILES if ">>>" in path.read_text(encoding="utf-8")]


def module_of(path: Path) -> ModuleType:
    """The module under its own name, or a script or benchmark loaded from its file."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if (path.parent / "__init__.py").exists():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dense_arithmetic_has_examples():
    assert ROOT / "vla" / "training" / "rollout_buffer.py" in WITH_EXAMPLES


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_give_what_they_show(path):
    result = doctest.testmod(module_of(path))
    assert result.attempted and not result.failed, f"{result.failed} of {result.attempted} examples fail"
