"""Start scripts on tiny models and read what they logged.

`python`, `start_ranks` and `run_ranks` fork a process that has imported everything (`warm.py`).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import warm
from conftest import ROOT

PRESET = "tests/helpers/ppo_random_openvla.yaml"
SMALL = """--num_envs 4 --num_steps 16 --max_episode_steps 8 --num_minibatches 2 --micro_batch_size 8
--num_eval_episodes 2 --num_eval_envs 2 --video_episodes 0 --save_freq 1 --keep_checkpoints 0""".split()


def one_rank_environment() -> dict[str, str]:
    """For a script that is started without a launcher: what a test left in this process names no group to join."""
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in places}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def launcher_command(ranks: int, port: str | None = None) -> list[str]:
    """`deepspeed --num_gpus RANKS`, without .venv/bin on PATH."""
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    return [deepspeed, "--num_gpus", str(ranks), "--master_port", port or free_port()]


def python(*words: object, env: dict | None = None, timeout: float = 600.0, **options) -> subprocess.CompletedProcess:
    """`python WORDS` as one rank, in the repository, with its output as text."""
    command = [sys.executable, *map(str, words)]
    environment = one_rank_environment() | (env or {})
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return warm.run(command, env=environment, timeout=timeout, **options)


def start_ranks(ranks: int, *words: object, env: dict | None = None, **options) -> list[warm.Popen]:
    """The processes of `python WORDS` on so many ranks of one group, as a launcher starts them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    environment = one_rank_environment() | place | (env or {})
    command = [sys.executable, *map(str, words)]
    return [
        warm.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


def run_ranks(ranks: int, *words: object, env: dict | None = None, timeout: float = 900.0):
    """`python WORDS` on so many ranks, with the output of all of them. Like a launcher, it ends all when one fails."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        started = start_ranks(ranks, *words, env=env, stdout=stdout, stderr=stderr)
        deadline = time.monotonic() + timeout
        try:
            while any(rank.poll() is None for rank in started) and not any(rank.poll() for rank in started):
                assert time.monotonic() < deadline, f"ranks still run after {timeout:g} s"
                time.sleep(0.05)
            code = next((rank.returncode for rank in started if rank.returncode), 0)
        finally:
            for rank in started:
                rank.kill()
                rank.wait()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())


def train(
    *flags: str,
    ranks: int = 1,
    launcher: bool = False,
    check: bool = True,
    env: dict | None = None,
    script: str = "train_ppo.py",
    preset: str = PRESET,
    port: str | None = None,
) -> subprocess.CompletedProcess:
    """A training script with SMALL flags and these. launcher: by the command of the README, with fresh interpreters."""
    words = [script, "--config", preset, *SMALL, *flags]
    if launcher:
        run = subprocess.run(
            [*launcher_command(ranks, port), *words],
            cwd=ROOT,
            env=one_rank_environment() | (env or {}),
            capture_output=True,
            text=True,
            timeout=900,
        )
    else:
        run = run_ranks(ranks, *words, env=env) if ranks > 1 else python(*words, env=env)
    assert not check or run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(lines: list[dict]) -> list[dict]:
    """What no two runs share, the times and the memory, is left out."""
    return [{tag: value for tag, value in line.items() if not tag.startswith(("time/", "memory/"))} for line in lines]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 600.0) -> None:
    """Until the condition is true. The limit only ends a test that would hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds:g} s"
        time.sleep(0.05)
