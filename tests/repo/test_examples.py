"""The examples in docstrings (lines that begin with >>>) give what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vla", "envs", "schemas", "benchmarks")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
WITH_EXAMPLES = [path for path in FILES if ">>>" in path.read_text(encoding="utf-8")]


def test_dense_arithmetic_has_examples():
    assert ROOT / "vla" / "training" / "rollout_buffer.py" in WITH_EXAMPLES


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_give_what_they_show(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    result = doctest.testmod(module)
    assert result.attempted and not result.failed, f"{result.failed} of {result.attempted} examples fail"
