"""Demonstrations: a function of their recipe, readable by ManiSkill's own tools, and refused when they are broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import write_demos

import collect_demos
from envs import is_held_out, make_envs
from envs.demonstrations import (
    IMAGES,
    Demonstration,
    Demos,
    Recipe,
    action_statistics,
    attempts,
    idle_steps,
)
from envs.expert import Expert
from vla.distributed import UserError

ROOT = Path(__file__).resolve().parent.parent
ENV_ID = "PutOnPlateInScene25Single-v1"
FLAGS = [
    "--env_id", ENV_ID, "--image_size", "48", "32", "--sim_freq", "100", "--max_episode_steps", "40",
    "--action_noise", "0.004", "--max_translation", "0.05", "--max_rotation", "0.4", "--num_env_workers", "1",
]  # fmt: skip


def collect(output: Path, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "collect_demos.py", *FLAGS, "--output", str(output), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demos") / "set"
    run = collect(output, "--num_demos", "6")
    assert run.returncode == 0, run.stderr
    assert "6 demonstrations" in run.stdout and "6/6" in run.stderr  # the progress bar
    return output


def arrays(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(folder / "trajectory.h5") as file:
        file.visititems(lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.slow
def test_maniskill_replays_them(demos, tmp_path):
    """By its own command line, which imports nothing of ours by itself, every episode succeeds again."""
    command = [sys.executable, "-m", "mani_skill.trajectory.replay_trajectory", "--traj_path"]
    run = subprocess.run(
        [*command, str(demos / "trajectory.h5")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and "Replayed 6 episodes, 6/6=100.00%" in run.stdout, run.stdout + run.stderr
    with h5py.File(shutil.copytree(demos, tmp_path / "still") / "trajectory.h5", "r+") as file:
        for trajectory in file.values():
            trajectory["actions"][:, :6] = 0.0  # an arm that does not move must fail: replay obeys the actions
    run = subprocess.run(
        [*command, str(tmp_path / "still" / "trajectory.h5"), "--count", "1"], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert "0/1=0.00%" in run.stdout, run.stdout + run.stderr


@pytest.mark.slow
def test_maniskill_loads_them(demos):
    from mani_skill.trajectory.dataset import ManiSkillTrajectoryDataset

    dataset = ManiSkillTrajectoryDataset(str(demos / "trajectory.h5"), success_only=True)
    own = arrays(demos)
    assert len(dataset) == sum(len(value) for name, value in own.items() if name.endswith("/actions"))
    assert np.array_equal(dataset[0]["obs"]["sensor_data"]["3rd_view_camera"]["rgb"], own[f"traj_0/{IMAGES}"][0])
    assert dataset[0]["action"].shape == (7,)


@pytest.mark.slow
def test_labels_are_clean_and_actions_are_what_was_executed(demos):
    own, recipe = arrays(demos), json.loads((demos / "trajectory.json").read_text())["recipe"]
    noise = np.concatenate([own[f"traj_{i}/actions"][:, :3] - own[f"traj_{i}/expert_actions"][:, :3] for i in range(6)])
    assert 0.7 * recipe["action_noise"] < noise.std() < 1.3 * recipe["action_noise"]
    for i in range(6):
        wanted, executed = own[f"traj_{i}/expert_actions"], own[f"traj_{i}/actions"]
        assert np.array_equal(wanted[:, 3:6], executed[:, 3:6])
        assert set(np.unique(executed[:, 6])) == {-1.0, 1.0} and set(np.unique(wanted[:, 6])) == {0.0, 1.0}
        assert np.array_equal(wanted[:, 6] > 0.5, executed[:, 6] > 0)
        assert (np.linalg.norm(wanted[:, :3], axis=1) <= recipe["max_translation"] + 1e-6).all()
        assert own[f"traj_{i}/success"].tolist() == [False] * (len(wanted) - 1) + [True]


@pytest.mark.slow
def test_episodes_are_not_those_of_evaluation(demos):
    listed = json.loads((demos / "trajectory.json").read_text())["episodes"]
    ids = [entry["reset_kwargs"]["options"]["episode_id"] for entry in listed]
    assert len(set(ids)) == 6 and not any(map(is_held_out, ids))


@pytest.mark.slow
def test_a_killed_collection_goes_on_and_gives_the_same_set(demos, tmp_path):
    """Two parts that were in place, rubbish of a third, another number of workers: the same arrays in the end."""
    whole, output = arrays(demos), tmp_path / "set"
    assert collect(output, "--num_demos", "2").returncode == 0
    assert collect(output, "--num_demos", "4").returncode == 0  # adds to it
    (output / "trajectory.h5").rename(output / "part_000000.h5")
    (output / "part_000077.partial").write_bytes(b"killed while writing")
    (output / "trajectory.json").unlink()
    run = collect(output, "--num_demos", "6", "--num_env_workers", "0")
    assert run.returncode == 0, run.stderr
    again = arrays(output)
    assert again.keys() == whole.keys() and all(np.array_equal(again[name], whole[name]) for name in whole)
    assert (output / "dataset_statistics.json").read_text() == (demos / "dataset_statistics.json").read_text()
    run = collect(output, "--num_demos", "6")
    assert run.returncode == 0 and "holds 6 demonstrations already" in run.stdout
    run = collect(output, "--num_demos", "6", "--seed", "1")
    assert run.returncode == 2 and "was begun with seed=0, not 1" in run.stderr


@pytest.mark.slow
def test_no_success_is_one_sentence(tmp_path):
    run = collect(tmp_path / "none", "--num_demos", "2", "--max_episode_steps", "2")
    assert run.returncode == 2 and "tries succeeded" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "none" / "trajectory.h5").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(env_id="PickCube-v1"), "family alone, not 'PickCube-v1'"),
        (dict(num_demos=0), "--num_demos 0 must be at least 1"),
        (dict(action_noise=-1.0), "--action_noise must be at least 0"),
        (dict(output=str(ROOT / "README.md")), "README.md is a file"),
        (dict(output=str(ROOT / "vla")), "vla holds other files"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        collect_demos.main(collect_demos.Args(**dict(output=str(tmp_path / "set")) | flags))
    assert not (tmp_path / "set").exists()


# ------------------------------------------------------------------ by hand
def action(x=0.0, turn=0.0, gripper=1.0) -> np.ndarray:
    return np.array([x, 0, 0, 0, 0, turn, gripper], np.float32)


def test_idle_steps_by_hand():
    """At most 1 cm and at most 0.06 rad and the gripper as before; it is open before the first step."""
    steps = [action(), action(0.011), action(turn=-0.07), action(0.01, 0.06), action(gripper=0), action(gripper=0)]
    assert idle_steps(np.stack(steps)).tolist() == [True, False, False, True, False, True]


def test_statistics_by_hand():
    labels = [np.outer(np.arange(101), np.ones(7)).astype(np.float32)[:40], np.outer(np.arange(40, 101), np.ones(7))]
    statistics = action_statistics(labels)
    assert statistics["num_transitions"] == 101 and statistics["num_trajectories"] == 2
    assert statistics["action"]["q01"] == [1.0] * 7 and statistics["action"]["q99"] == [99.0] * 7
    assert statistics["action"]["mean"] == [50.0] * 7 and statistics["action"]["mask"] == [True] * 6 + [False]


def small_set(folder: Path, recipe: Recipe, lengths: list[int], filter_idle: bool) -> Demos:
    """x of a label is 0.1 * episode + 0.001 * step, every second step is idle; pictures count 10 * episode + step."""
    recipe.filter_idle = filter_idle
    actions = [[action(0.1 * n + 0.001 * t, turn=0.1 * (t % 2)) for t in range(T)] for n, T in enumerate(lengths)]
    images = [[np.full((4, 5, 3), 10 * n + t, np.uint8) for t in range(T + 1)] for n, T in enumerate(lengths)]
    write_demos(folder, recipe, actions, images)
    return Demos(folder)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(ENV_ID, "train", "builtin", "rl4vla", [5, 4], 100, 40, 0, 0.0, False, 0.05, 0.4)


@pytest.mark.parametrize("measured", [True, False])
def test_with_a_measured_pose_the_expert_acts_on_what_can_be_seen(measured):
    """What it believes it has asked for counts without, and nothing but the state with it."""
    one, other = (Expert(0.05, 0.4, close_steps=1, patience=1, slack=0.01, measured=measured) for _ in range(2))
    equal, success = [], 0.0
    with make_envs(ENV_ID, 1, image_size=(16, 16), sim_freq=100, max_episode_steps=40, auto_reset=False) as envs:
        envs.reset([700])
        while not success and envs.describe()[0]["elapsed_steps"] < 39:
            (state,) = envs.describe()
            action = one(state)
            equal.append(bool(np.array_equal(action, other(state))))
            other.drift(np.array([0.01, 0.0, 0.0]))
            infos = envs.step(action[None, None])[4]
            success = float(infos["episode"]["success_once"].sum())
    assert len(equal) > 10 and (success or not measured)
    assert all(equal) if measured else not all(equal)


def test_chunks_stay_inside_their_episode(tmp_path, recipe):
    demos = small_set(tmp_path / "set", recipe, [3, 2], filter_idle=False)
    labels, valid = demos.chunks([0, 2, 3], 3)
    assert valid.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert np.allclose(labels[0, :, 0], [0.0, 0.001, 0.002]) and np.allclose(labels[2, :2, 0], [0.1, 0.101])
    assert demos.images([2, 4])[:, 0, 0, 0].tolist() == [2, 11]
    assert [demos.instructions[i] for i in (2, 3)] == ["put 0", "put 1"]


def test_idle_steps_are_left_out_of_training_alone(tmp_path, recipe):
    """Of episode 0 (x < 1 cm) the turning steps 1 and 3 stay; all of episode 1 moves."""
    demos = small_set(tmp_path / "set", recipe, [4, 2], filter_idle=True)
    assert len(demos) == 4 and demos.images([0, 1])[:, 0, 0, 0].tolist() == [1, 3]
    assert np.allclose(demos.chunks([0], 2)[0][0, :, 0], [0.001, 0.003])
    assert len(arrays(tmp_path / "set")["traj_0/actions"]) == 4  # the whole episode is there, to be replayed


def test_broken_sets_are_one_sentence(tmp_path, recipe):
    small_set(tmp_path / "set", recipe, [3, 2], filter_idle=False)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "set", tmp_path / name))

    cut = broken("cut")
    whole = (cut / "trajectory.h5").read_bytes()
    (cut / "trajectory.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is cut short or no HDF5 file"):
        Demos(cut)
    fewer = broken("fewer")
    with h5py.File(fewer / "trajectory.h5", "r+") as file:
        del file["traj_1"]
    with pytest.raises(ValueError, match="cut short: traj_1 can not be read"):
        Demos(fewer)
    shorter = broken("shorter")
    with h5py.File(shorter / "trajectory.h5", "r+") as file:
        del file["traj_0/expert_actions"]
        file["traj_0/expert_actions"] = np.zeros((2, 7), np.float32)
    with pytest.raises(ValueError, match="traj_0 has 2 actions and 4 pictures"):
        Demos(shorter)
    wild = broken("wild")
    with h5py.File(wild / "trajectory.h5", "r+") as file:
        file["traj_1/expert_actions"][1, 2] = 25.0  # millimetres, perhaps
    with pytest.raises(ValueError, match="traj_1 has actions out of range"):
        Demos(wild)
    without = broken("without")
    (without / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match=r"has no dataset_statistics\.json"):
        Demos(without)
    world = dict(env_id=ENV_ID, asset_pack="builtin", protocol="rl4vla", image_size=(5, 4), sim_freq=100)
    with pytest.raises(ValueError, match=r"was made with sim_freq=100, this run has 500"):
        Demos(tmp_path / "set").check_world(**world | {"sim_freq": 500})
    with pytest.raises(ValueError, match="was made with env_id="):
        Demos(tmp_path / "set").check_world(**world | {"env_id": "PutOnPlateInScene25Main-v3"})


def test_tries_do_not_depend_on_how_many_envs_make_them(recipe):
    """Numbers 3, 4, 5 from one env and from two: the same pictures and actions, in order."""
    recipe.image_size, recipe.action_noise = [48, 32], 0.004

    def three(num_envs: int) -> list[Demonstration]:
        world = dict(image_size=(48, 32), sim_freq=100, max_episode_steps=6)
        with make_envs(ENV_ID, num_envs, **world) as envs:
            stream = attempts(envs, recipe, first=3)
            return [next(stream) for _ in range(3)]

    for one, two in zip(three(1), three(2)):
        assert one.attempt == two.attempt and one.episode_id == two.episode_id and len(one.images) == 7
        assert np.array_equal(np.stack(one.images), np.stack(two.images))
        assert np.array_equal(np.stack(one.actions), np.stack(two.actions))
