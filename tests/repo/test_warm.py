"""Forks of the warm process are like fresh interpreters to the tests that start them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from launching import one_rank_environment, python

ASKED = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("MINE"), "deepspeed" in sys.modules, __name__, os.getppid()]))
print(sys.stdin.read(), file=sys.stderr)
sys.exit(7)
"""


def test_a_fork_gets_its_words_and_files_and_gives_its_exit_code(tmp_path):
    command = [sys.executable, "-c", ASKED, "a word", "--flag"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = one_rank_environment() | {"MINE": "yes"}
    with warm.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        printed, errors = process.communicate("what was asked")
    words, place, mine, imported, name, parent = json.loads(printed)
    assert words == ["-c", "a word", "--flag"] and place == str(tmp_path) and mine == "yes"
    assert imported and name == "__main__" and parent == warm._server._process.pid
    assert errors == "what was asked\n" and process.returncode == 7


def test_a_fork_is_killed_as_any_process_and_fails_with_its_trace():
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
    with warm.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n" and process.poll() is None
        assert b"time.sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.terminate()
        assert process.wait(timeout=600) == -signal.SIGTERM
    run = python("-c", "1 / 0")
    assert run.returncode == 1 and run.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_fork_inherits_the_signals_that_are_blocked_here_and_not_those_of_its_server():
    code = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))"
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        blocked = python("-c", code).stdout
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    assert blocked == f"[{int(signal.SIGUSR2)}]\n" and python("-c", code).stdout == "[]\n"


def test_what_is_read_at_the_start_gets_a_fresh_interpreter():
    code = "import sys; print('deepspeed' in sys.modules)"
    assert python("-c", code).stdout == "True\n"
    assert python("-c", code, env={"OMP_NUM_THREADS": "2"}).stdout == "False\n"


@pytest.mark.full  # a second server imports everything again. The recipes of the Hub use one in `make test`
def test_meanwhile_other_early_variables_have_forks_too():
    code = "import os, sys; print('deepspeed' in sys.modules, os.getppid(), os.environ['HF_HOME'])"
    with warm.also({"HF_HOME": "/elsewhere"}):
        (other,) = warm._others
        assert python("-c", code, env={"HF_HOME": "/elsewhere"}).stdout == f"True {other._process.pid} /elsewhere\n"
    assert other._process.returncode == 0
    assert python("-c", code, env={"HF_HOME": "/elsewhere"}).stdout.startswith("False ")
