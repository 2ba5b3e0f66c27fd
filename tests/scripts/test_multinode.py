"""Two nodes of two ranks each: network namespaces on this machine with a cable between them that can be cut."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import ROOT

from vla.training.checkpoint import damage, latest_checkpoint

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SMALL = {
    "num_envs": 4,
    "num_steps": 8,
    "max_episode_steps": 8,
    "num_minibatches": 2,
    "micro_batch_size": 8,
    "num_eval_episodes": 4,
    "num_eval_envs": 4,
    "video_episodes": 0,
    "save_freq": 1,
    "num_iterations": 50,
}
TIMEOUT_MINUTES = 1  # of a collective that a rank does not join; DeepSpeed knows whole minutes


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    """The names of two namespaces whose interfaces `cable` are connected."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2)")
    names = [f"solovla{uuid.uuid4().hex[:6]}" for _ in ADDRESSES]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"this machine lets nobody connect network namespaces: {refused.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def alive(run_dir: Path) -> list[str]:
    """Command lines of running processes that name the run folder."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if str(run_dir) in line and int(folder.name) != os.getpid():
            lines.append(line)
    return lines


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("placement", ["env,rollout,actor=all", "env=0 rollout=1 actor=2-3"])
def test_two_nodes_train_and_a_cut_cable_ends_all_ranks(nodes, tmp_path, placement):
    """Every rank does everything, or one node simulates and acts while the other trains."""
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "cable",
        "DEEPSPEED_TIMEOUT": str(TIMEOUT_MINUTES),
    }
    script = ["train_ppo.py", "--config", "tests/helpers/ppo_random_openvla.yaml", "--run_dir", str(run_dir)]
    script += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    script += ["--placement", *placement.split()]
    launchers, logs = [], [tmp_path / f"node{number}.log" for number in range(2)]
    for number, (name, log) in enumerate(zip(nodes, logs)):
        command = ["ip", "netns", "exec", name, str(Path(sys.executable).parent / "deepspeed"), "--hostfile"]
        command += [str(hostfile), "--no_ssh", "--node_rank", str(number), "--master_addr", ADDRESSES[0]]
        with log.open("w") as file:
            launchers.append(
                subprocess.Popen([*command, *script], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        checkpoint = run_dir / "checkpoints" / "iteration_000001"
        deadline = time.monotonic() + 900
        while not checkpoint.is_dir():
            assert time.monotonic() < deadline and all(node.poll() is None for node in launchers), [
                log.read_text()[-2000:] for log in logs
            ]
            time.sleep(0.2)
        ip("-n", nodes[1], "link", "set", "cable", "down")
        cut = time.monotonic()
        codes = [node.wait(timeout=60 * TIMEOUT_MINUTES + 600) for node in launchers]
        while alive(run_dir):
            assert time.monotonic() < cut + 60 * TIMEOUT_MINUTES + 600, alive(run_dir)
            time.sleep(0.2)
    finally:
        for node in launchers:
            node.kill()
    assert all(codes), (codes, logs[0].read_text()[-2000:])  # nobody takes it for a success
    description = json.loads((run_dir / "run_from_iteration_000000.json").read_text())
    assert description["num_ranks"] == 4
    (first, *_) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(first["train/loss"]) and first["global_step"] == 32
    assert damage(latest_checkpoint(run_dir)) is None
