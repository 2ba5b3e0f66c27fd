"""The long tests of runs that are killed again and again, as `make test-all` runs them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from launching import python

from benchmarks.storm import left_in_shared_memory


@pytest.mark.slow
@pytest.mark.parametrize("rounds, hang", [(4, 0), pytest.param(200, 20, marks=pytest.mark.full)])
def test_a_storm_among_workers_and_settlers_leaves_nothing_behind(rounds, hang):
    run = python("benchmarks/storm.py", "--rounds", str(rounds), "--hang", str(hang), "--seed", "5", timeout=7200)
    assert run.returncode == 0 and "nothing was wrong" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("words", [["grid"], ["kills", "--rounds", "6"]], ids=" ".join)
def test_killed_runs_resume(tmp_path, words):
    run = python("benchmarks/soak.py", *words, "--folder", tmp_path, timeout=7200)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


NAMED_SEMAPHORE = """
import multiprocessing, time
lock = multiprocessing.get_context("spawn").Lock()
print("made", flush=True)
time.sleep(600)
"""


def test_what_other_programs_keep_in_shared_memory_is_not_left_over():
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", NAMED_SEMAPHORE]
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as ours, tempfile.NamedTemporaryFile(dir="/dev/shm") as theirs:
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE) as other:
            try:
                assert other.stdout.readline() == b"made\n"
                found = left_in_shared_memory(before)
                made = set(os.listdir("/dev/shm")) - before
            finally:
                other.terminate()
        assert Path(ours.name).name in found and Path(theirs.name).name not in found
        assert any(name.startswith("sem.mp-") for name in made) and not any(
            name.startswith("sem.mp-") for name in found
        )
