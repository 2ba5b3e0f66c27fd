"""One PPO iteration stays short to read, and the count names what it runs."""

import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import reading


def test_an_iteration_reads_in_a_thousand_lines():
    counted = {(file, name): reading.definitions(ROOT / file)[name] for file, name in reading.path()}
    assert len({file for file, _ in counted}) <= 14
    assert sum(with_docstrings for _, with_docstrings in counted.values()) <= 1000


def test_an_entry_covers_itself_its_class_its_file_and_its_folder():
    entries = ["a.py f", "b.py C", "c.py", "d/e"]
    for called in (("a.py", "f"), ("b.py", "C.g"), ("c.py", "h"), ("d/e/i.py", "j")):
        assert reading.listed_in(called, entries)
    for called in (("a.py", "g"), ("a.py", "ff"), ("b.py", "CC.g"), ("d/eg.py", "j"), ("d.py", "j")):
        assert not reading.listed_in(called, entries)


@pytest.mark.slow
@pytest.mark.full
def test_the_count_names_what_an_iteration_calls():
    command = [sys.executable, "benchmarks/reading.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "PATH lacks: none. Not called: none" in run.stdout
