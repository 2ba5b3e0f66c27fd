"""What ManiSkill's RecordEpisode wrote: the example that records it, and training that reads it."""

import argparse
import gc
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from launching import metrics, python

import train_ppo
import train_sft
from envs import make_envs, maniskill_task
from envs.demo_sets import open_demos
from envs.maniskill_task import ManiSkillTask
from envs.recorded import recorded_file
from examples import record_demos
from schemas import UserError
from vla.cli import parse_args

ENV_ID, TEXT, CAMERA = "PushCube-v1", "push the cube onto the target", "obs/sensor_data/base_camera/rgb"
SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Two demonstrations of the expert, as one process of the example records them."""
    folder = tmp_path_factory.mktemp("recorded")
    args = argparse.Namespace(output=str(folder), num_demos=2, image_size=SIZE, max_episode_steps=50, noise=0.01)
    record_demos.record(0, 1, args)
    return folder / "part_0.h5"


def opened(path: Path, env_id: str = ENV_ID, text: str | None = TEXT):
    return open_demos(path, env_id=env_id, instruction=text)


def changed(recorded: Path, folder: Path, **of_first_episode) -> Path:
    """A copy whose .json says something else about its first episode."""
    copy = Path(shutil.copy(recorded, folder / "other.h5"))
    content = json.loads(recorded.with_suffix(".json").read_text())
    content["episodes"][0] |= of_first_episode
    copy.with_suffix(".json").write_text(json.dumps(content))
    return copy


def test_training_reads_metres_and_the_images_of_the_policy(recorded):
    """The labels, played in our env from the recorded seed, show the recorded images and solve the task."""
    demos = opened(recorded)
    episodes = json.loads(recorded.with_suffix(".json").read_text())["episodes"]
    assert len(demos) == sum(entry["elapsed_steps"] for entry in episodes) and set(demos.instructions) == {TEXT}
    assert list(demos.statistics) == [ENV_ID] and demos.recipe["image_size"] == [SIZE, SIZE]
    steps, seed = episodes[0]["elapsed_steps"], episodes[0]["episode_seed"]
    with h5py.File(recorded) as file:
        commands = file["traj_0/actions"][:]
    assert np.allclose(demos.labels[:steps, :3], commands[:, :3] * 0.1, atol=1e-6)
    assert not demos.labels[:, 3:].any()  # no rotation, and a closed gripper
    with make_envs(ENV_ID, 1, instruction=TEXT, image_size=(SIZE, SIZE), max_episode_steps=50) as envs:
        shown = [envs.reset([seed])["image"][0].numpy()]
        rewards = []
        for action in demos.labels[:steps]:
            obs, reward, *_ = envs.step(action[None, None])
            shown.append(obs["image"][0].numpy())
            rewards.append(reward.item())
        assert rewards == [0.0] * (steps - 1) + [1.0]
        assert np.array_equal(shown[:steps], demos.images(range(steps)))
        task = envs._groups[0]._group.world.envs[0]
        turning = torch.tensor([[0.02, -0.03, 0.04, 0.05, -0.06, 0.01, 1.0]])
        assert np.allclose(task.robot_units(task._command(turning).numpy()), turning, atol=1e-6)


def test_the_file_and_its_folder_are_the_same_set(recorded, tmp_path):
    for suffix in (".h5", ".json"):
        shutil.copy(recorded.with_suffix(suffix), tmp_path / f"trajectory{suffix}")
    assert recorded_file(tmp_path) == tmp_path / "trajectory.h5" and recorded_file(recorded) == recorded
    assert recorded_file(ROOT) is None


class NoSimulator:
    """A task that is never simulated."""

    camera_name = "base_camera"

    def __init__(self, *args):
        pass

    def robot_units(self, commands: np.ndarray) -> np.ndarray:
        return commands

    def close(self) -> None:
        pass


def test_failures_are_left_out(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(maniskill_task, "ManiSkillTask", NoSimulator)
    assert opened(changed(recorded, tmp_path, success=False)).num_episodes == 1
    assert opened(changed(recorded, tmp_path, success=None)).num_episodes == 2


def test_a_task_of_your_own_has_its_module_in_front(recorded, monkeypatch):
    monkeypatch.setattr(maniskill_task, "ManiSkillTask", NoSimulator)
    assert list(opened(recorded, "my_tasks:PushCube-v1").statistics) == ["my_tasks:PushCube-v1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_id": "PickCube-v1"}, "is of PushCube-v1, and --env_id is PickCube-v1: change one"),
        ({"text": None}, "was written by ManiSkill: give its --env_id and an --instruction"),
    ],
)
def test_another_task_is_refused(recorded, settings, message):
    with pytest.raises(UserError, match=message):
        opened(recorded, **settings)


def test_another_control_mode_is_refused(recorded, tmp_path):
    with pytest.raises(UserError, match="control mode 'pd_joint_pos': convert it with `python -m mani_skill"):
        opened(changed(recorded, tmp_path, control_mode="pd_joint_pos"))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (CAMERA, None, "has no traj_0/obs/sensor_data/base_camera/rgb: convert it with"),
        ("actions", np.zeros((3, 8), np.float32), r"actions as float32 of shape \[3, 8\], it must be float32 of shape"),
        (CAMERA, np.zeros((3, 4, 4, 3), np.float32), "rgb as float32 of shape"),
        ("actions", np.nan, "actions that are not finite"),
    ],
)
def test_other_arrays_are_refused(recorded, tmp_path, monkeypatch, name, values, message):
    monkeypatch.setattr(maniskill_task, "ManiSkillTask", NoSimulator)
    copy = changed(recorded, tmp_path)
    with h5py.File(copy, "r+") as file:
        shape = file["traj_0"][name].shape
        del file["traj_0"][name]
        if values is not None:
            file["traj_0"][name] = values if np.ndim(values) else np.full(shape, values, np.float32)
    with pytest.raises(UserError, match=message):
        opened(copy)


def test_a_start_does_not_search_all_memory_for_garbage(monkeypatch):
    """ManiSkill calls gc.collect() for every scene, which would look at every object of the process."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    older = [[]]
    assert any(found is older for found in gc.get_objects())
    monkeypatch.setattr(maniskill_task, "_make", lambda *args: None)
    monkeypatch.setattr(ManiSkillTask, "_check", lambda self: None)
    ManiSkillTask(ENV_ID, TEXT, (8, 8))
    assert not any(found is older for found in gc.get_objects())


def test_an_expert_that_never_succeeds_ends_the_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(record_demos, "HOPELESS", 2)
    monkeypatch.setattr(record_demos, "expert", lambda env: np.zeros(3))
    args = argparse.Namespace(output=str(tmp_path), num_demos=2, image_size=SIZE, max_episode_steps=2, noise=0.0)
    with pytest.raises(RuntimeError, match="failed in all of 2 tries in PushCube-v1"):
        record_demos.record(0, 1, args)


def test_the_example_is_short():
    assert len((ROOT / "examples/record_demos.py").read_text().splitlines()) <= 120


@pytest.mark.full
@pytest.mark.slow
def test_the_command_records_what_maniskill_replays(tmp_path):
    words = ["--output", tmp_path / "set", "--num_demos", "3", "--image_size", str(SIZE), "--num_processes", "2"]
    run = python("-m", "examples.record_demos", *words)
    assert run.returncode == 0 and "trajectory.h5: 3 demonstrations" in run.stdout, run.stdout + run.stderr
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["trajectory.h5", "trajectory.json"]
    run = python("-m", "mani_skill.trajectory.replay_trajectory", "--traj_path", tmp_path / "set" / "trajectory.h5")
    assert "Replayed 3 episodes, 3/3=100.00%" in run.stdout, run.stdout + run.stderr
    run = python("-m", "examples.record_demos", *words)
    assert run.returncode == 2 and "holds demonstrations already: name another folder" in run.stderr


def test_the_presets_agree_with_each_other():
    sft = parse_args(train_sft.Args, ["--config", str(ROOT / "yaml/sft_pushcube.yaml")], "")
    ppo = parse_args(train_ppo.Args, ["--config", str(ROOT / "yaml/ppo_pushcube.yaml")], "")
    for name in ("env_id", "instruction", "image_size", "max_episode_steps", "eval_temperature", "dtype"):
        assert getattr(sft, name) == getattr(ppo, name), name
    assert sft.env_id == sft.unnorm_key == ENV_ID == record_demos.ENV_ID and sft.instruction == TEXT


@pytest.mark.full
@pytest.mark.slow
def test_from_demonstrations_to_ppo(recorded, tmp_path):
    """The commands of docs/environments.md, smaller: every step starts from what the one before wrote."""
    small = ["--image_size", str(SIZE), str(SIZE), "--num_eval_episodes", "2", "--num_eval_envs", "2"]
    small += ["--max_episode_steps", "8", "--video_episodes", "0", "--micro_batch_size", "8"]
    words = ["--batch_size", "8", "--num_updates", "2", "--updates_per_iteration", "1", "--run_dir", tmp_path / "sft"]
    run = python("train_sft.py", "--config", "yaml/sft_pushcube.yaml", *small, *words, "--demos", recorded)
    assert run.returncode == 0, run.stderr[-3000:]
    small += ["--num_envs", "2", "--num_steps", "16", "--num_minibatches", "1", "--critic_warmup_iterations", "0"]
    words = ["--num_iterations", "1", "--run_dir", tmp_path / "ppo", "--model_path", tmp_path / "sft" / "export"]
    run = python("train_ppo.py", "--config", "yaml/ppo_pushcube.yaml", *small, *words)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(metrics(tmp_path / "sft")) == 2 and len(metrics(tmp_path / "ppo")) == 1
