"""Runs that are killed, stopped or preempted, under the launcher and on a stand-in for a Slurm cluster."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import fake_slurm
import pytest
from conftest import ROOT
from launching import PRESET, launcher_command, metrics, python, run_ranks, start_ranks, wait_for, without_time

from vla.distributed import REQUEUE
from vla.evaluation.montage import read_clips
from vla.training.checkpoint import damage, latest_checkpoint

SHORT = {
    "num_envs": 4,
    "num_steps": 16,
    "max_episode_steps": 8,
    "num_minibatches": 2,
    "micro_batch_size": 8,
    "num_eval_episodes": 2,
    "num_eval_envs": 2,
    "video_episodes": 0,
    "save_freq": 1,
    "keep_checkpoints": 0,
    "num_iterations": 3,
}


def flags(preset: str = PRESET, **changes: int) -> list[str]:
    """Of a run that takes seconds."""
    return [
        "--config",
        preset,
        *(word for name, value in (SHORT | changes).items() for word in (f"--{name}", str(value))),
    ]


def deepspeed(ranks: int, *more: str, stderr=None, start_new_session: bool = False, **changes: int) -> subprocess.Popen:
    """`deepspeed --num_gpus RANKS train_ppo.py ...`, started."""
    command = [*launcher_command(ranks), "train_ppo.py", *flags(**changes), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=stderr, start_new_session=start_new_session)


def logged(run_dir: Path) -> list[dict]:
    return without_time(metrics(run_dir))


def processes_with(text: str) -> list[int]:
    """Running processes that have this in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """sbatch, srun and scontrol on PATH; yields where they keep their state."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fake_slurm.install(folder).items():
            patch.setenv(name, value)
        yield folder


def sbatch(file: str, nodes: int, tasks: int, run_dir: Path, *more: str, **changes: int) -> subprocess.Popen:
    size = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
    command = ["sbatch", *size, f"slurm/{file}", "train_ppo.py", *flags(**changes), "--run_dir", str(run_dir), *more]
    return subprocess.Popen(command, cwd=ROOT)


@pytest.fixture(scope="module")
def unbroken(cluster) -> list[dict]:
    """Three iterations on two ranks under ZeRO-3 that nothing disturbs."""
    run_dir = cluster / "unbroken"
    assert run_ranks(2, "train_ppo.py", *flags(), "--run_dir", run_dir).returncode == 0
    return logged(run_dir)


@pytest.mark.slow
@pytest.mark.full  # a minute; what each part of it does is tested beside it and in test_preemption.py
@pytest.mark.parametrize("nodes, placement", [(1, None), (2, None), (2, "hybrid")])
def test_a_slurm_job_is_preempted_requeued_and_goes_on_as_if_nothing_had_happened(unbroken, cluster, nodes, placement):
    """Two ranks, on one node or two. Both sbatch files start them by slurm/run.sh. Hybrid, one node simulates."""
    run_dir = cluster / f"run_{nodes}_{placement}"
    file = "train.sbatch" if nodes == 1 else "train_multinode.sbatch"
    more = ["--config", f"yaml/placement_{placement}.yaml"] if placement else []
    job = sbatch(file, nodes, 2 // nodes, run_dir, *more, save_freq=0)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file(), "first iteration")
    for rank in (cluster / "pids").read_text().split():  # ahead of the time limit
        os.kill(int(rank), signal.SIGUSR1)
    assert job.wait(timeout=600) == 0
    assert logged(run_dir) == unbroken
    assert "is complete. Continue with --resume" in (cluster / f"{run_dir.name}.logs" / "rank_0.log").read_text()
    assert len(list(run_dir.glob("run_from_iteration_*.json"))) == 2
    assert not (run_dir / "stop").exists() and not list(run_dir.glob("checkpoints/*.partial"))
    assert not processes_with(str(run_dir))


@pytest.mark.slow
def test_a_slurm_job_needs_a_run_dir(cluster):
    job = subprocess.run(["sbatch", "slurm/train.sbatch", "train_ppo.py"], cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 2 and "--run_dir is missing" in job.stderr


@pytest.mark.slow
@pytest.mark.full
def test_a_rank_killed_hard_leaves_the_last_checkpoint_which_goes_on_on_one_rank_under_zero2(unbroken, tmp_path):
    run_dir = tmp_path / "run"
    launcher = deepspeed(2, "--run_dir", str(run_dir))
    wait_for((run_dir / "checkpoints" / "iteration_000001").is_dir, "first checkpoint")
    victims = [number for number in processes_with(str(run_dir)) if parent_command(number).count("launcher.launch")]
    os.kill(max(victims), signal.SIGKILL)
    assert launcher.wait(timeout=600) != 0
    wait_for(lambda: not processes_with(str(run_dir)), "end of all processes")
    assert not (run_dir / "checkpoints" / "iteration_000003").exists()
    resume = ["--resume", run_dir, "--deepspeed_config", "ds_configs/zero2.json"]
    assert python("train_ppo.py", *flags(), *resume).returncode == 0
    for ours, theirs in zip(logged(run_dir), unbroken):
        assert ours.keys() == theirs.keys()
        for tag in ("train/loss", "train/actor/grad_norm", "rollout/rewards", "env/num_episodes"):
            assert ours[tag] == pytest.approx(theirs[tag], rel=1e-4, abs=1e-5), tag


APART = ["--placement", "env=0", "rollout=1", "actor=2-3", "--pipeline_stages", "2"]


@pytest.mark.slow
@pytest.mark.full
def test_roles_apart_stop_together_and_the_run_goes_on_in_other_placements(unbroken, tmp_path):
    run_dir = tmp_path / "run"
    ranks = start_ranks(4, "train_ppo.py", *flags(save_freq=0), "--run_dir", run_dir, *APART)
    wait_for((run_dir / "metrics.jsonl").is_file, "first iteration")
    (run_dir / "stop").touch()
    assert [rank.wait(timeout=600) for rank in ranks] == [REQUEUE] * 4
    assert damage(latest_checkpoint(run_dir)) is None and not (run_dir / "stop").exists()
    hybrid = ["--placement", "env=0", "rollout=1", "actor=0-1", "--num_iterations", "2"]
    assert run_ranks(2, "train_ppo.py", "--resume", run_dir, *hybrid).returncode == 0
    together = ["--placement", "env,rollout,actor=all", "--pipeline_stages", "1", "--num_iterations", "3"]
    assert run_ranks(2, "train_ppo.py", "--resume", run_dir, *together).returncode == 0
    ours, theirs = (
        [{tag: value for tag, value in line.items() if not tag.startswith("eval/")} for line in lines]
        for lines in (logged(run_dir), unbroken)
    )
    assert ours == theirs


OWN_UPDATE = ["--placement", "env,rollout=0", "actor=1"]


@pytest.mark.slow
@pytest.mark.full
def test_a_run_with_one_rollout_ahead_resumes_as_if_nothing_had_happened(tmp_path):
    """Five iterations in one go, of which 2 and 4 began with old weights. The other run is killed in the fifth."""
    ahead = [*flags(save_freq=2, num_iterations=5), *OWN_UPDATE, "--rollout_ahead", "1"]
    assert run_ranks(2, "train_ppo.py", *ahead, "--run_dir", tmp_path / "whole").returncode == 0
    whole = logged(tmp_path / "whole")
    assert [line["rollout/staleness"] for line in whole] == [0, 1, 0, 1, 0]
    killed = tmp_path / "killed"
    ranks = start_ranks(2, "train_ppo.py", *ahead, "--num_iterations", "50", "--run_dir", killed)
    wait_for((killed / "checkpoints" / "iteration_000002").is_dir, "first checkpoint")
    for rank in ranks:
        rank.kill()
        rank.wait()
    for newer in killed.glob("checkpoints/iteration_00000[4-9]"):  # the machine was fast
        shutil.rmtree(newer)
    assert run_ranks(2, "train_ppo.py", "--resume", killed, "--num_iterations", "5").returncode == 0
    assert [line["iteration"] for line in logged(killed)] == [1, 2, 3, 4, 5]
    assert logged(killed) == whole


@pytest.mark.slow
@pytest.mark.full
def test_a_signal_to_the_launcher_ends_roles_apart_with_a_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    launcher = deepspeed(4, "--run_dir", str(run_dir), *APART, save_freq=0, num_iterations=50)
    wait_for((run_dir / "metrics.jsonl").is_file, "first iteration")
    launcher.terminate()
    assert launcher.wait(timeout=600) != 0
    wait_for(lambda: not processes_with(str(run_dir)), "end of all processes")
    assert damage(latest_checkpoint(run_dir)) is None and not (run_dir / "stop").exists()


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("victim", range(4))
def test_a_role_killed_hard_ends_all_others_and_leaves_the_last_checkpoint(tmp_path, victim):
    run_dir = tmp_path / "run"
    launcher = deepspeed(4, "--run_dir", str(run_dir), *APART, num_iterations=50)
    wait_for((run_dir / "checkpoints" / "iteration_000001").is_dir, "first checkpoint")
    ranks = [number for number in processes_with(f"--local_rank={victim}") if number in processes_with(str(run_dir))]
    os.kill(ranks[0], signal.SIGKILL)
    assert launcher.wait(timeout=600) != 0
    wait_for(lambda: not processes_with(str(run_dir)), "end of all processes")
    assert damage(latest_checkpoint(run_dir)) is None


def parent_command(process: int) -> str:
    try:
        parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
        return Path(f"/proc/{parent}/cmdline").read_text()
    except OSError:
        return ""


STOPPED_AT_DECISION_3 = """
import sys
import train_ppo
from vla.cli import parse_args
from vla.distributed import run_main
from vla.training.preemption import Preemption

def stopping(self, items, until_requested=Preemption.until_requested):
    for t in until_requested(self, items):
        if t == 3:
            self.stop_file.touch()
        yield t

Preemption.until_requested = stopping
run_main(train_ppo.main, lambda: parse_args(train_ppo.Args, sys.argv[1:], ""))
"""


@pytest.mark.full
@pytest.mark.slow
def test_without_auto_reset_a_run_stopped_in_its_first_iteration_goes_on_with_the_same_episodes(tmp_path):
    unbroken, broken = (str(tmp_path / name) for name in ("unbroken", "broken"))
    new = [*flags(num_iterations=2), "--no-auto_reset", "--deepspeed_config", "ds_configs/zero2.json", "--run_dir"]
    assert python("train_ppo.py", *new, unbroken).returncode == 0
    assert python("-c", STOPPED_AT_DECISION_3, *new, broken).returncode == REQUEUE
    assert not (tmp_path / "broken" / "metrics.jsonl").exists()
    assert python("train_ppo.py", "--resume", broken).returncode == 0
    assert logged(tmp_path / "broken") == logged(tmp_path / "unbroken")


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_terminated(tmp_path):
    """`deepspeed` itself dies at once and would leave its ranks running: they notice, save and end."""
    run_dir = tmp_path / "run"
    launcher = deepspeed(1, "--run_dir", str(run_dir), num_iterations=50, save_freq=0)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file(), "first iteration")
    launcher.terminate()
    assert launcher.wait(timeout=600) == -signal.SIGTERM or launcher.returncode == 128 + signal.SIGTERM
    wait_for(lambda: not processes_with(str(run_dir)), "end of all processes")
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert damage(checkpoint) is None and not (run_dir / "stop").exists()


@pytest.mark.slow
def test_ctrl_c_saves_the_run(tmp_path):
    """As a terminal sends it: to launcher, helper and ranks at once."""
    run_dir, said = tmp_path / "run", tmp_path / "said"
    with said.open("w") as file:
        launcher = deepspeed(
            1, "--run_dir", str(run_dir), num_iterations=50, save_freq=0, stderr=file, start_new_session=True
        )
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file(), "first iteration")
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(timeout=600)
    wait_for(lambda: not processes_with(str(run_dir)), "end of all processes")
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert damage(checkpoint) is None and not (run_dir / "stop").exists()
    assert "Ctrl-C: the run saves itself" in said.read_text() and "[rank0]" not in said.read_text()


@pytest.mark.slow
def test_a_stop_file_ends_a_run_with_code_75(tmp_path):
    run_dir = tmp_path / "run"
    short = flags("yaml/quickstart_grpo_openvla.yaml", num_iterations=50, save_freq=0, group_size=2)
    (run,) = start_ranks(1, "train_grpo.py", *short, "--run_dir", run_dir)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() or run.poll() is not None, "first iteration")
    assert run.poll() is None
    (run_dir / "stop").touch()
    assert run.wait(timeout=600) == REQUEUE
    assert not (run_dir / "stop").exists() and damage(latest_checkpoint(run_dir)) is None


@pytest.mark.full
@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_records_resumes_with_all_videos(tmp_path):
    run_dir = tmp_path / "run"
    more = flags(num_iterations=1, num_eval_episodes=8, num_steps=40, max_episode_steps=40, video_episodes=8)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    (process,) = start_ranks(1, "train_ppo.py", *more, "--run_dir", run_dir, **streams)
    place = run_dir / "videos" / "eval_000000"
    wait_for(lambda: process.poll() is not None or any(run_dir.glob("videos/eval_000000*/*.mp4")), "a video")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == REQUEUE and "warning: not all videos" not in said, said
    assert not list(run_dir.rglob("*partial*"))
    run_ranks(1, "train_ppo.py", "--resume", run_dir)
    for iteration in (0, 1):
        assert len(read_clips(run_dir, iteration)) == 8
    assert (place / "clips.json").exists() and (run_dir / "videos" / "before_after.mp4").exists()
    assert len(metrics(run_dir)) == 1
