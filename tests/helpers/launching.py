"""Start a training script on a tiny model as users do, and read what it logged."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, one_rank_environment

PRESET = "tests/helpers/ppo_random_openvla.yaml"
SMALL = """--num_envs 4 --num_steps 16 --max_episode_steps 8 --num_minibatches 2 --micro_batch_size 8
--num_eval_episodes 2 --num_eval_envs 2 --save_freq 1 --keep_checkpoints 0""".split()


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def train(
    *flags: str,
    ranks: int = 0,
    check: bool = True,
    env: dict | None = None,
    script: str = "train_ppo.py",
    preset: str = PRESET,
    port: str | None = None,
) -> subprocess.CompletedProcess:
    """`deepspeed train_ppo.py --config PRESET ...` as README has it, without .venv/bin on PATH.

    ranks=0: `python train_ppo.py ...`, one rank without the launcher, which starts 8 seconds sooner.
    """
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    command = [launcher, "--num_gpus", str(ranks), "--master_port", port or free_port()] if ranks else [sys.executable]
    command += [script, "--config", preset]
    environment = one_rank_environment() | (env or {})
    run = subprocess.run(
        [*command, *SMALL, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert not check or run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(lines: list[dict]) -> list[dict]:
    return [{tag: value for tag, value in line.items() if not tag.startswith(("time/", "memory/"))} for line in lines]
