"""The long tests of runs that are killed again and again, as `make test-all` runs them."""

import pytest
from launching import python

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.mark.parametrize("words", [["grid"], ["kills", "--rounds", "6"]], ids=" ".join)
def test_killed_runs_resume(tmp_path, words):
    run = python("benchmarks/soak.py", *words, "--folder", tmp_path, timeout=7200)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
