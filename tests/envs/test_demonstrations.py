"""Demonstrations: a function of their recipe, readable by ManiSkill's own tools, and refused when they are broken."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT
from launching import python, start_ranks, wait_for
from made_up import write_demos

import collect_demos
from envs import is_held_out, make_envs
from envs.demonstrations import (
    PICTURES,
    DemoFolder,
    Demonstration,
    Demos,
    Recipe,
    action_statistics,
    attempts,
    idle_steps,
)
from envs.expert import Expert
from schemas import UserError
from vla.cli import parse_args

ENV_ID = "PutOnPlateInScene25Single-v1"
FLAGS = [
    "--env_id",
    ENV_ID,
    "--image_size",
    "48",
    "32",
    "--sim_freq",
    "100",
    "--max_episode_steps",
    "40",
    "--action_noise",
    "0.004",
    "--max_translation",
    "0.05",
    "--max_rotation",
    "0.4",
    "--num_env_workers",
    "0",
]


def collect(output: Path, *flags: str) -> subprocess.CompletedProcess:
    return python("collect_demos.py", *FLAGS, "--output", output, *flags)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demos") / "set"
    run = collect(output, "--num_demos", "6")
    assert run.returncode == 0, run.stderr
    assert "6 of 6 demonstrations, success 0.86\n" in run.stdout  # of seven tries
    assert "\r" not in run.stderr  # no bar without a terminal
    return output


def arrays(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(folder / "trajectory.h5") as file:
        file.visititems(lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.slow
def test_maniskill_replays_them(demos, tmp_path):
    """By its own command line, which imports nothing of ours by itself, every episode succeeds again."""
    command = ["-m", "mani_skill.trajectory.replay_trajectory", "--traj_path"]
    run = python(*command, demos / "trajectory.h5")
    assert run.returncode == 0 and "Replayed 6 episodes, 6/6=100.00%" in run.stdout, run.stdout + run.stderr
    with h5py.File(shutil.copytree(demos, tmp_path / "still") / "trajectory.h5", "r+") as file:
        for trajectory in file.values():
            trajectory["actions"][:, :6] = 0.0  # an arm that does not move must fail: replay obeys the actions
    run = python(*command, tmp_path / "still" / "trajectory.h5", "--count", "1")
    assert "0/1=0.00%" in run.stdout, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--use_env_states", "--save_video"], ["--use_first_env_state"]])
def test_maniskill_replays_their_states(demos, tmp_path, flags):
    folder = shutil.copytree(demos, tmp_path / "set")
    command = ["-m", "mani_skill.trajectory.replay_trajectory", "--traj_path"]
    run = python(*command, folder / "trajectory.h5", "--count", "2", *flags)
    assert "Replayed 2 episodes, 2/2=100.00%" in run.stdout, run.stdout + run.stderr
    assert len(list(folder.glob("*.mp4"))) == (2 if "--save_video" in flags else 0)


@pytest.mark.slow
def test_states_are_those_that_the_images_show(demos):
    """Each of the T + 1 states, set in an env of the same world, gives the image that was recorded with it."""
    import gymnasium
    from mani_skill.trajectory.utils import dict_to_list_of_dicts

    content = json.loads((demos / "trajectory.json").read_text())
    env = gymnasium.make(content["env_info"]["env_id"], **content["env_info"]["env_kwargs"]).unwrapped
    env.reset(**content["episodes"][1]["reset_kwargs"])
    with h5py.File(demos / "trajectory.h5") as file:
        images = file[f"traj_1/{PICTURES}"][:]
        states = dict_to_list_of_dicts(file["traj_1/env_states"])
    assert len(states) == len(images)
    for state, image in zip(states, images):
        env.set_state_dict(state)
        assert np.array_equal(env.render_image(), image)
    assert env.success and env.grasped_once
    env.close()


@pytest.mark.slow
def test_maniskill_loads_them(demos):
    from mani_skill.trajectory.dataset import ManiSkillTrajectoryDataset

    dataset = ManiSkillTrajectoryDataset(str(demos / "trajectory.h5"), success_only=True)
    own = arrays(demos)
    assert len(dataset) == sum(len(value) for name, value in own.items() if name.endswith("/actions"))
    assert np.array_equal(dataset[0]["obs"]["sensor_data"]["3rd_view_camera"]["rgb"], own[f"traj_0/{PICTURES}"][0])
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


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_collection_goes_on_and_gives_the_same_set(demos, tmp_path):
    """Two parts that were in place, rubbish of a third, another number of workers: the same arrays in the end."""
    whole, output = arrays(demos), tmp_path / "set"
    assert collect(output, "--num_demos", "2").returncode == 0
    assert collect(output, "--num_demos", "4").returncode == 0  # adds to it
    (output / "trajectory.h5").rename(output / "part_000000.h5")
    (output / "part_000077.partial").write_bytes(b"killed while writing")
    (output / "trajectory.json").unlink()
    run = collect(output, "--num_demos", "6", "--num_env_workers", "1")
    assert run.returncode == 0, run.stderr
    again = arrays(output)
    assert again.keys() == whole.keys() and all(np.array_equal(again[name], whole[name]) for name in whole)
    assert (output / "dataset_statistics.json").read_text() == (demos / "dataset_statistics.json").read_text()
    run = collect(output, "--num_demos", "6")
    assert run.returncode == 0 and "already holds 6 demonstrations" in run.stdout
    run = collect(output, "--num_demos", "6", "--seed", "1")
    assert run.returncode == 2 and "was begun with seed=0, not 1" in run.stderr


@pytest.mark.slow
def test_no_success_is_one_sentence(tmp_path):
    run = collect(tmp_path / "none", "--num_demos", "2", "--max_episode_steps", "2")
    assert run.returncode == 2 and "the expert failed in all of" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "none" / "trajectory.h5").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--env_id", "PickCube-v1"], "family, not 'PickCube-v1'"),
        (["--num_demos", "0"], "--num_demos 0 must be at least 1"),
        (["--action_noise", "nan"], "--action_noise nan must be a finite number"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--image_size", "1000000", "1000000"], "--image_size 1000000 1000000 must be at most 4096"),
        (["--output", str(ROOT / "README.md")], "README.md is a file"),
        (["--output", str(ROOT / "vla")], "vla holds other files"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        collect_demos.main(parse_args(collect_demos.Args, ["--output", str(tmp_path / "set"), *flags], ""))
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


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "set"
    small_set(
        folder, Recipe(ENV_ID, "train", "builtin", "rl4vla", [5, 4], 100, 40, 0, 0.0, False, 0.05, 0.4), [3, 2], False
    )
    return folder


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


def test_states_with_a_gap_are_left_out(tmp_path, recipe):
    """A worker that is lost between a step and its state leaves one. The episode is kept without states."""
    one = [{"task/steps": np.full(1, step, np.float32)} for step in (0, 1, 2)]
    other = [one[0], one[1], one[0]]
    folder = DemoFolder(tmp_path / "set", recipe, {"control_mode": "any"})
    folder.begin()
    demos = []
    for number, states in enumerate((one, other)):
        arrays_of_two = dict(images=[np.zeros((4, 5, 3), np.uint8)] * 3, expert_actions=[np.zeros(7, np.float32)] * 2)
        actions = [np.zeros(7, np.float32)] * 2
        demos.append(
            Demonstration(
                number, number, "put", actions=actions, rewards=[0.0, 1.0], env_states=states, **arrays_of_two
            )
        )
    folder.write_part(demos)
    with h5py.File(*(tmp_path / "set").glob("part_*.h5")) as file:
        assert file["try_000000/env_states/task/steps"][:, 0].tolist() == [0, 1, 2]
        assert "env_states" not in file["try_000001"]


# ------------------------------------------------------------------ sets that are not what they say
def in_h5(change):
    """A damage to trajectory.h5, done to the open file."""

    def spoil(folder: Path) -> None:
        with h5py.File(folder / "trajectory.h5", "r+") as file:
            change(file)

    return spoil


def in_json(change, name: str = "trajectory.json"):
    """A damage to a JSON file, done to what it holds."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def replaced(name: str, value: np.ndarray, **how):
    """The dataset of this name holds something else."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=value, **how)

    return in_h5(change)


def linked(name: str, link):
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return in_h5(change)


def set_to(name: str, index, value):
    return in_h5(lambda file: file[name].__setitem__(index, value))


def virtual(file: h5py.File) -> None:
    del file["traj_0/expert_actions"]
    layout = h5py.VirtualLayout((3, 7), np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "labels", (3, 7), np.float32)
    file.create_virtual_dataset("traj_0/expert_actions", layout)


def stored_elsewhere(file: h5py.File) -> None:
    del file["traj_0/keep"]
    file.create_dataset("traj_0/keep", (3,), bool, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def bomb(file: h5py.File) -> None:
    """A few bytes of file, half a terabyte of pictures."""
    del file[f"traj_0/{PICTURES}"]
    file.create_dataset(f"traj_0/{PICTURES}", (4, 400_000, 400_000, 3), np.uint8, chunks=(1, 64, 64, 3), fillvalue=7)


def large_chunk(file: h5py.File) -> None:
    """The right shape, yet one gibibyte is unpacked to read any of it."""
    del file["traj_0/keep"]
    file.create_dataset("traj_0/keep", (3,), bool, maxshape=(None,), chunks=(2**30,), compression="gzip")


def unwritten(file: h5py.File) -> None:
    """Zeros, as far as HDF5 is concerned."""
    del file[f"traj_1/{PICTURES}"]
    file.create_dataset(f"traj_1/{PICTURES}", (3, 4, 5, 3), np.uint8, chunks=(1, 4, 5, 3))[0] = 1


def cut(folder: Path) -> None:
    whole = (folder / "trajectory.h5").read_bytes()
    (folder / "trajectory.h5").write_bytes(whole[: len(whole) // 2])


def pipe(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def rubbish(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def several(folder: Path) -> None:
    shutil.copy(folder / "trajectory.h5", folder / "a.h5")
    (folder / "trajectory.h5").rename(folder / "b.h5")


def repeat_first(content: dict) -> None:
    content["episodes"][1]["episode_id"] = 0


@pytest.mark.parametrize(
    "spoil, said",
    [
        # files
        (cut, "trajectory.h5 is cut short or no HDF5 file"),
        (rubbish("trajectory.h5", b"not HDF5"), "trajectory.h5 is cut short or no HDF5 file"),
        (rubbish("trajectory.json", b'{"episodes": ['), "trajectory.json is not valid JSON"),
        (rubbish("dataset_statistics.json", b"[]"), "statistics.json holds [], but it must be an object with keys"),
        (pipe("trajectory.h5"), "trajectory.h5 is not a regular file"),
        (pipe("trajectory.json"), "trajectory.json is not a regular file"),
        (lambda folder: (folder / "dataset_statistics.json").unlink(), "has no dataset_statistics.json"),
        (several, "has no trajectory.h5 but a.h5, b.h5"),
        (lambda folder: shutil.copy(folder / "trajectory.h5", folder / "part_000001.h5"), "is not finished"),
        # the list of episodes
        (in_json(lambda content: content.pop("recipe")), "trajectory.json has no recipe"),
        (in_json(lambda content: content["recipe"].pop("sim_freq")), "trajectory.json has no recipe.sim_freq"),
        (in_json(lambda content: content["recipe"].update(image_size=[5])), "has no recipe.image_size.1"),
        (in_json(lambda content: content["recipe"].update(image_size=[5, 10**6])), "but it must be at most 4096"),
        (in_json(lambda content: content.update(episodes=[])), "has episodes [], but it must be at least 1 long"),
        (in_json(lambda content: content["episodes"].pop()), "traj_1 is not named in trajectory.json"),
        (in_json(lambda content: content["episodes"][1].update(episode_id=7)), "traj_7 is missing, but"),
        (in_json(repeat_first), "traj_0 is named twice"),
        (in_json(lambda content: content["episodes"][0].update(instruction=["a"])), '["a"], but it must be text'),
        (in_json(lambda content: content["episodes"][0].update(instruction=" ")), "must be text that is not empty"),
        (in_json(lambda content: content["episodes"][0].update(elapsed_steps=10**9)), "it must be at most 100000"),
        (in_json(lambda content: content["episodes"][1].update(control_mode="pd_joint_pos")), "mode 'pd_joint_pos'"),
        (in_json(lambda content: content[ENV_ID]["action"].pop("q01"), "dataset_statistics.json"), "has no PutOnPlate"),
        (
            in_json(lambda content: content[ENV_ID]["action"].update(q99=[-9.0] * 7), "dataset_statistics.json"),
            "it must be at least q01 in every dimension",
        ),
        # what HDF5 holds
        (in_h5(lambda file: file.pop("traj_1")), "traj_1 is missing, but trajectory.json names it"),
        (in_h5(lambda file: file["traj_0"].pop("keep")), "traj_0 has no keep"),
        (in_h5(lambda file: file.pop(f"traj_0/{PICTURES}")), f"traj_0 has no {PICTURES}"),
        (in_json(lambda content: content["episodes"][0].update(elapsed_steps=2)), "it must be float32 of shape [2, 7]"),
        (replaced("traj_0/expert_actions", np.zeros((2, 7), np.float32)), "it must be float32 of shape [3, 7]"),
        (replaced("traj_0/expert_actions", np.zeros((3, 7))), '"float64", "shape": [3, 7]}, but it must be float32'),
        (replaced("traj_0/expert_actions", np.array([["x"] * 7] * 3, object), dtype=h5py.string_dtype()), "float32"),
        (replaced("traj_1/keep", np.ones(3, bool)), "it must be bool of shape [2]"),
        (replaced(f"traj_1/{PICTURES}", np.zeros((3, 8, 8, 3), np.uint8)), "it must be uint8 of shape [3, 4, 5, 3]"),
        (in_json(lambda content: content["recipe"].update(image_size=[8, 8])), "must be uint8 of shape [4, 8, 8, 3]"),
        (in_h5(bomb), "it must be uint8 of shape [4, 4, 5, 3]"),
        (in_h5(large_chunk), "keeps traj_0/keep in chunks of [1073741824], more than"),
        (in_h5(unwritten), f"lacks a part of traj_1/{PICTURES}"),
        (linked("traj_0", h5py.ExternalLink("elsewhere.h5", "/traj_0")), "has a link at /traj_0"),
        (linked("traj_0/expert_actions", h5py.ExternalLink("elsewhere.h5", "/labels")), "link at traj_0/expert"),
        (linked("traj_0/keep", h5py.SoftLink("/traj_1/keep")), "has a link at traj_0/keep"),
        (in_h5(virtual), "keeps traj_0/expert_actions in another file"),
        (in_h5(stored_elsewhere), "keeps traj_0/keep in another file"),
        (set_to("traj_1/expert_actions", (1, 2), np.nan), "has traj_1/expert_actions that are not finite"),
        (set_to("traj_1/expert_actions", (1, 2), 25.0), "traj_1 has actions out of range"),
        (in_h5(lambda file: [file[f"traj_{n}/keep"].__setitem__(..., False) for n in (0, 1)]), "keeps no step"),
    ],
)
def test_a_broken_set_is_one_sentence(small, tmp_path, spoil, said):
    """Whatever lies outside the file is there, and would be read if it were followed."""
    folder = Path(shutil.copytree(small, tmp_path / "set"))
    with h5py.File(folder / "elsewhere.h5", "w") as file:
        file["labels"] = np.zeros((3, 7), np.float32)
        file.create_group("traj_0")
    spoil(folder)
    with pytest.raises(UserError) as caught:
        Demos(folder)
    sentence = str(caught.value)
    assert said in sentence and str(folder) in sentence and "\n" not in sentence


def test_a_picture_that_is_damaged_is_said_when_it_is_read(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "set"))
    with h5py.File(folder / "trajectory.h5") as file:
        at = file[f"traj_0/{PICTURES}"].id.get_chunk_info(1)
    content = bytearray((folder / "trajectory.h5").read_bytes())
    content[at.byte_offset : at.byte_offset + at.size] = b"?" * at.size
    (folder / "trajectory.h5").write_bytes(content)
    demos = Demos(folder)
    assert demos.images([0]).shape == (1, 4, 5, 3)
    with pytest.raises(UserError, match=r"trajectory.h5 is damaged: /traj_0/.* cannot be read"):
        demos.images([1])


def test_a_set_of_another_world_is_one_sentence(small):
    world = dict(env_id=ENV_ID, asset_pack="builtin", protocol="rl4vla", image_size=(5, 4), sim_freq=100)
    world |= {"hulls": "gpu"}  # which means nothing without meshes
    Demos(small).check_world(**world)
    for other, said in (({"sim_freq": 500}, "sim_freq=100, this run has 500"), ({"env_id": "Main"}, "env_id=")):
        with pytest.raises(UserError, match=f"was made with {said}"):
            Demos(small).check_world(**world | other)


# ------------------------------------------------------------------ the folder of a collection
def begun(folder: Path, recipe: Recipe) -> DemoFolder:
    return DemoFolder(folder, recipe, {"control_mode": "none"})


def test_a_folder_is_collected_into_by_one_process(tmp_path, recipe):
    """Another one is refused, as it begins or before that, and what the folder holds stays as it is."""
    first, late = begun(tmp_path / "set", recipe), begun(tmp_path / "set", recipe)
    assert first.begin() == (0, 0)
    for refused in (late.begin, lambda: begun(tmp_path / "set", recipe)):
        with pytest.raises(UserError, match=f"--output {tmp_path}/set is being written by process {os.getpid()} on"):
            refused()


def test_a_collection_that_was_killed_as_it_finished_holds_each_episode_once(tmp_path, recipe):
    """trajectory.h5 was in place, and the parts that are in it were not yet removed."""
    small_set(tmp_path / "set", recipe, [3, 2], filter_idle=False)
    shutil.copy(tmp_path / "set/trajectory.h5", tmp_path / "set/part_000001.h5")
    again = begun(tmp_path / "set", recipe)
    assert again.count() == 2 and again.begin() == (2, 2)
    assert not (tmp_path / "set/part_000001.h5").exists() and len(Demos(tmp_path / "set")) == 5


@pytest.mark.parametrize(
    "spoil, said",
    [
        (cut, "trajectory.h5 is cut short or no HDF5 file"),
        (in_h5(lambda file: file["traj_0"].attrs.__delitem__("entry")), "has no entry at traj_0"),
        (in_h5(lambda file: file["traj_0"].attrs.__setitem__("entry", "{}")), "traj_0 has no control_mode"),
        (linked("traj_0", h5py.ExternalLink("elsewhere.h5", "/traj_0")), "has a link at /traj_0"),
        (replaced("traj_1/actions", np.zeros((1, 7), np.float32)), "it must be float32 of shape [2, 7]"),
        (replaced("traj_0/rewards", np.zeros((3, 1), np.float32)), "it must be float32 of shape [3]"),
        (rubbish("recipe.json", b"{"), "recipe.json is not valid JSON"),
        (rubbish("recipe.json", b"[1]"), "recipe.json holds [1], but it must be an object with keys"),
        (pipe("recipe.json"), "recipe.json is not a regular file"),
        (lambda folder: (folder / "recipe.json").unlink(), "holds other files"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_as_it_is(small, tmp_path, recipe, spoil, said):
    folder = Path(shutil.copytree(small, tmp_path / "set"))
    spoil(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError) as caught:
        recipe.filter_idle = False
        found = begun(folder, recipe)
        found.begin()
        found.finish()
    assert said in str(caught.value) and "\n" not in str(caught.value)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "lock"}
    before.pop("lock", None)
    after.pop("trajectory.partial", None)
    assert after == before


@pytest.mark.slow
def test_a_collection_that_is_asked_to_end_keeps_what_it_has_and_goes_on(demos, tmp_path):
    """SIGTERM in the middle: exit code 75 and whole parts; the same command then gives the set of a run in one go."""
    output = tmp_path / "set"
    command = ["collect_demos.py", *FLAGS, "--output", output, "--num_demos", "600"]
    (run,) = start_ranks(1, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (output / "recipe.json").exists() or run.poll() is not None, "recipe.json")
    second = collect(output, "--num_demos", "600")  # the first one makes some tries meanwhile
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=600)
    assert second.returncode == 2 and f"is being written by process {run.pid} on" in second.stderr
    assert run.returncode == 75
    kept = int(re.search(rf"SIGTERM: {output} has (\d+) of 600 demonstrations\. Run the same command", said)[1])
    with pytest.raises(UserError, match=r"has no trajectory\.json|is not finished"):
        Demos(output)
    run = collect(output, "--num_demos", str(max(6, kept + 1)))
    assert run.returncode == 0, run.stderr
    whole, again = arrays(demos), arrays(output)
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


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
