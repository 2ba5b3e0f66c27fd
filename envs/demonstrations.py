"""Demonstrations in ManiSkill's trajectory format: made by the scripted expert, written, read again for training.

    folder/trajectory.h5              traj_0, traj_1, ...: actions, terminated, truncated, success, rewards,
                                      obs/sensor_data/3rd_view_camera/rgb; and for training expert_actions, keep
    folder/trajectory.json            env_info, episodes: ManiSkill's keys, and `instruction` per episode
    folder/dataset_statistics.json    {env_id: {"action": {"q01": ...}}}: what turns tokens into metres and radians

T actions per episode, T + 1 pictures. `actions` float32 [T, 7] is what the controller executed (gripper 1 or -1), so
that `python -m mani_skill.trajectory.replay_trajectory` repeats the episode; `expert_actions` float32 [T, 7] is what
the expert wanted, without noise, in robot units (gripper 1 opens, 0 closes): the label. `keep` bool [T] leaves out
idle steps. The env is named `envs:<id>`, which makes gymnasium import this package first.

A set is a function of its recipe: tries are numbered, each has an episode id and noise of its own, and the first N
successful ones are kept in that order, whatever the number of workers. Parts of it are put in place whole, so a killed
run goes on after its last part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from envs import episodes, variants
from envs.expert import Expert
from envs.registration import CAMERA
from envs.vector import ACTION_LIMITS, VectorEnv

IMAGES = f"obs/sensor_data/{CAMERA}/rgb"
PART_SIZE = 50  # episodes
# a step is idle that moves less than this (m), turns less than this (rad) and leaves the gripper: RL4VLA's filter
IDLE_TRANSLATION, IDLE_ROTATION = 0.01, 0.06
MASK = [True] * 6 + [False]  # the gripper is used as it is


@dataclass
class Recipe:
    """Everything that decides which demonstrations come out."""

    env_id: str
    obj_set: str
    asset_pack: str
    protocol: str
    image_size: list[int]  # width, height
    sim_freq: int
    max_episode_steps: int
    seed: int
    action_noise: float  # m, standard deviation per axis
    filter_idle: bool
    max_translation: float  # m per step
    max_rotation: float  # rad per step
    measured_pose: bool = False  # the expert acts on where the arm is, as a picture shows it


@dataclass
class Demonstration:
    """One episode while it is recorded."""

    attempt: int
    episode_id: int
    instruction: str
    images: list[np.ndarray] = field(default_factory=list)  # T + 1 of uint8 [H, W, 3]
    expert_actions: list[np.ndarray] = field(default_factory=list)  # T of float32 [7], wanted
    actions: list[np.ndarray] = field(default_factory=list)  # T of float32 [7], executed
    rewards: list[float] = field(default_factory=list)
    success: bool = False


class Attempt:
    """One env's current episode: the expert, its noise and what is recorded."""

    def __init__(self, number: int, recipe: Recipe, total: int):
        episode_id = variants.train_episode_id(total, recipe.seed, 0, number)
        self.expert = Expert(
            recipe.max_translation, recipe.max_rotation, close_steps=1, patience=1, slack=2.5 * recipe.action_noise,
            measured=recipe.measured_pose,
        )  # fmt: skip
        self.noise, self.noise_std = np.random.default_rng((recipe.seed, number)), recipe.action_noise
        self.demo = Demonstration(number, episode_id, "")

    def act(self, state: dict) -> np.ndarray:
        """The next action to execute, float32 [7]; what the expert wanted is recorded beside it."""
        wanted = self.expert(state)
        executed = wanted.copy()
        if self.noise_std:
            offset = self.noise.normal(0.0, self.noise_std, 3).astype(np.float32)
            executed[:3] += offset
            self.expert.drift(offset)
        self.demo.expert_actions.append(wanted)
        self.demo.actions.append(executed)
        return executed


def attempts(envs: VectorEnv, recipe: Recipe, first: int) -> Iterator[Demonstration]:
    """Episodes of the expert, endless, in the order of their numbers, beginning with number `first`."""
    slots = [Attempt(first + i, recipe, envs.num_start_states) for i in range(envs.num_envs)]
    following, due = first + envs.num_envs, first
    done: dict[int, Demonstration] = {}  # finished before a lower number was
    obs = envs.reset([slot.demo.episode_id for slot in slots])
    for slot, image, text in zip(slots, obs["image"].numpy(), obs["task_description"]):
        slot.demo.images.append(image)
        slot.demo.instruction = text
    while True:
        actions = np.stack([slot.act(state) for slot, state in zip(slots, envs.describe())])[:, None]  # [N, 1, 7]
        obs, rewards, _, _, infos = envs.step(actions)
        for slot, image, reward in zip(slots, obs["image"].numpy(), rewards[:, 0].tolist()):
            slot.demo.images.append(image)
            slot.demo.rewards.append(reward)
        ended = infos["ended"].tolist()
        for env, success in zip(ended, infos["episode"]["success_once"].tolist()):
            slots[env].demo.success = success > 0
            done[slots[env].demo.attempt] = slots[env].demo
        restart = [*ended, *infos["dropped"].nonzero()[:, 0].tolist()]
        for env in restart:  # one lost with its worker is tried again, under the same number
            lost = env not in ended
            slots[env] = Attempt(slots[env].demo.attempt if lost else following, recipe, envs.num_start_states)
            following += not lost
        if restart:
            obs = envs.reset([slots[env].demo.episode_id for env in restart], restart)
            for env in restart:
                slots[env].demo.images.append(obs["image"][env].numpy())
                slots[env].demo.instruction = obs["task_description"][env]
        while due in done:
            yield done.pop(due)
            due += 1


def idle_steps(actions: np.ndarray) -> np.ndarray:
    """actions float [T, 7], robot units, gripper open before -> bool [T]: nearly nothing is asked for."""
    gripper = np.concatenate([[1.0], actions[:, 6]])
    still = np.linalg.norm(actions[:, :3], axis=1) <= IDLE_TRANSLATION
    still &= np.linalg.norm(actions[:, 3:6], axis=1) <= IDLE_ROTATION
    return still & (gripper[1:] == gripper[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# writing
# ---------------------------------------------------------------------------------------------------------------------


class DemoFolder:
    """A set that grows in whole parts, and is one file in the end."""

    def __init__(self, folder: Path, recipe: Recipe, env_kwargs: dict):
        """env_kwargs: what gymnasium.make needs besides the id to build the env again.

        Raises:
            ValueError: the folder holds something else, or demonstrations of another recipe.
        """
        self.folder, self.recipe, self.env_kwargs = folder, recipe, env_kwargs
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {folder} is a file: name a folder.")
        begun = folder / "recipe.json"
        if begun.is_file():
            before = json.loads(begun.read_text())
            for key, value in vars(recipe).items():
                if before.get(key) != value:
                    raise ValueError(
                        f"--output {folder} was begun with {key}={before.get(key)!r}, not {value!r}: give another "
                        "folder, or the same flags to go on."
                    )
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--output {folder} holds other files: name a new folder.")

    def begin(self) -> tuple[int, int]:
        """Make the folder. Returns how many episodes it holds, and the number of the first try that is not in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self.folder / "recipe.json", json.dumps(vars(self.recipe), indent=2))
        if (self.folder / "trajectory.h5").is_file():  # it was finished, and more are wanted
            os.replace(self.folder / "trajectory.h5", self.folder / "part_000000.h5")
        entries = [entry for part in self.parts() for entry in _entries(part)]
        return len(entries), entries[-1]["attempt"] + 1 if entries else 0

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part_*.h5"))

    def write_part(self, demos: list[Demonstration]) -> None:
        """Put one more part in place; all of it or nothing."""
        first = demos[0].attempt + 1  # above 0: part 0 is a set that was finished before
        path = self.folder / f"part_{first:06d}.h5"
        with h5py.File(path.with_suffix(".partial"), "w") as file:
            for demo in demos:
                self._write_episode(file.create_group(f"try_{demo.attempt:06d}", track_order=True), demo)
        os.replace(path.with_suffix(".partial"), path)

    def _write_episode(self, group: h5py.Group, demo: Demonstration) -> None:
        wanted, executed = np.stack(demo.expert_actions), np.stack(demo.actions)
        length = len(executed)
        executed[:, 6] = np.where(executed[:, 6] > 0.5, 1.0, -1.0)  # as the controller takes it
        last = np.arange(length) == length - 1
        images = np.stack(demo.images)
        # one picture per chunk: training reads them in any order
        group.create_dataset(IMAGES, data=images, chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1)
        group["actions"], group["rewards"] = executed, np.asarray(demo.rewards, np.float32)
        group["terminated"], group["truncated"], group["success"] = last, np.zeros(length, bool), last
        group["expert_actions"] = wanted
        group["keep"] = ~idle_steps(wanted) if self.recipe.filter_idle else np.ones(length, bool)
        options = {"episode_id": demo.episode_id, "obj_set": self.recipe.obj_set}
        entry = {
            "episode_seed": 0,
            "control_mode": self.env_kwargs["control_mode"],
            "elapsed_steps": length,
            "reset_kwargs": {"seed": 0, "options": options},
            "success": True,
            "instruction": demo.instruction,
            "attempt": demo.attempt,
        }
        group.attrs["entry"] = json.dumps(entry)

    def finish(self) -> dict:
        """Parts -> trajectory.h5, trajectory.json and dataset_statistics.json. Returns the statistics."""
        target, listed, labels = self.folder / "trajectory.partial", [], []
        with h5py.File(target, "w") as whole:
            for part in self.parts():
                with h5py.File(part) as file:
                    for name in sorted(file, key=lambda name: json.loads(file[name].attrs["entry"])["attempt"]):
                        file.copy(name, whole, f"traj_{len(listed)}")
                        labels.append(file[name]["expert_actions"][:][file[name]["keep"][:]])
                        listed.append({"episode_id": len(listed), **json.loads(file[name].attrs["entry"])})
        info = {
            "env_id": f"envs:{self.recipe.env_id}",
            "env_kwargs": self.env_kwargs,
            "max_episode_steps": self.recipe.max_episode_steps,
        }
        content = {"env_info": info, "episodes": listed, "source_type": "scripted", "recipe": vars(self.recipe)}
        statistics = {self.recipe.env_id: action_statistics(labels)}
        _write_whole(self.folder / "dataset_statistics.json", json.dumps(statistics, indent=2))
        _write_whole(self.folder / "trajectory.json", json.dumps(content, indent=2))
        os.replace(target, self.folder / "trajectory.h5")
        for part in self.parts():
            part.unlink()
        return statistics[self.recipe.env_id]


def action_statistics(labels: list[np.ndarray]) -> dict:
    """Labels of all episodes, [T, 7] each -> an entry of a published dataset_statistics.json."""
    actions = np.concatenate(labels).astype(np.float64)
    columns = {
        "mean": actions.mean(0), "std": actions.std(0), "max": actions.max(0), "min": actions.min(0),
        "q01": np.quantile(actions, 0.01, axis=0), "q99": np.quantile(actions, 0.99, axis=0),
    }  # fmt: skip
    action = {name: column.tolist() for name, column in columns.items()} | {"mask": MASK}
    return {"action": action, "num_transitions": len(actions), "num_trajectories": len(labels)}


def _entries(part: Path) -> list[dict]:
    with h5py.File(part) as file:
        return sorted((json.loads(file[name].attrs["entry"]) for name in file), key=lambda entry: entry["attempt"])


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial_json")
    partial.write_text(text + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


class Demos:
    """A finished set for training: M steps that are kept, in order. Pictures stay in the file until they are wanted.

    Attributes:
        recipe: dict, how it was made; statistics: dict, the content of dataset_statistics.json.
        labels: float32 [M, 7], robot units; instructions: M strings.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            ValueError: one sentence that names what is missing, cut short or out of range.
        """
        self.folder = folder
        for name in ("trajectory.json", "trajectory.h5", "dataset_statistics.json"):
            if not (folder / name).is_file():
                raise ValueError(f"--demos {folder} has no {name}: make a set with collect_demos.py --output {folder}.")
        content = json.loads((folder / "trajectory.json").read_text())
        self.recipe, listed = content["recipe"], content["episodes"]
        self.statistics = json.loads((folder / "dataset_statistics.json").read_text())
        try:
            self._file = h5py.File(folder / "trajectory.h5")
        except OSError as error:
            raise ValueError(
                f"{folder}/trajectory.h5 is cut short or no HDF5 file ({error}): make it again."
            ) from error
        self.num_episodes = len(listed)
        labels, self._images, self._rows, ends, self.instructions = [], [], [], [], []
        for entry in listed:
            actions, images = self._episode(entry)
            kept = np.flatnonzero(self._file[f"traj_{entry['episode_id']}"]["keep"][:])
            labels.append(actions[kept])
            self._rows += [(len(self._images), int(step)) for step in kept]
            self._images.append(images)
            ends += [len(self._rows)] * len(kept)
            self.instructions += [entry["instruction"]] * len(kept)
        self.labels, self._ends = np.concatenate(labels), np.array(ends)

    def _episode(self, entry: dict) -> tuple[np.ndarray, h5py.Dataset]:
        name = f"traj_{entry['episode_id']}"
        try:
            group = self._file[name]
            actions, images = group["expert_actions"][:], group[IMAGES]
            whole = len(actions) == entry["elapsed_steps"] and len(images) == len(actions) + 1
        except (KeyError, OSError) as error:
            raise ValueError(f"{self.folder}/trajectory.h5 is cut short: {name} can not be read ({error}).") from error
        if not whole:
            raise ValueError(
                f"{self.folder}/trajectory.h5 is cut short: {name} has {len(actions)} actions and {len(images)} "
                f"pictures where trajectory.json has {entry['elapsed_steps']} steps."
            )
        if not (np.isfinite(actions).all() and (np.abs(actions) <= ACTION_LIMITS).all()):
            raise ValueError(
                f"{self.folder}/trajectory.h5: {name} has actions out of range (1 m and pi/2 rad per step at most): "
                "check the units of expert_actions."
            )
        return actions, images

    def check_world(
        self, *, env_id: str, asset_pack: str, protocol: str, image_size: tuple[int, int], sim_freq: int
    ) -> None:
        """Raises ValueError where one of these settings is not the one that the set was made with."""
        given = dict(
            env_id=env_id, asset_pack=asset_pack, protocol=protocol, image_size=list(image_size), sim_freq=sim_freq
        )  # fmt: skip
        for key, value in given.items():
            made = self.recipe[key]
            if made != value:
                raise ValueError(
                    f"--demos {self.folder} was made with {key}={made!r}, this run has {value!r}: give the same "
                    f"--{key}, or collect demonstrations for it."
                )

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index) -> np.ndarray:
        """Steps [B] -> what the camera saw before them, uint8 [B, H, W, 3]."""
        return np.stack([self._images[episode][step] for episode, step in (self._rows[i] for i in index)])

    def chunks(self, index, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps [B] -> the labels of them and of the next kept steps, float32 [B, C, 7]; bool [B, C]: not past the
        episode's end."""
        steps = np.asarray(index)[:, None] + np.arange(chunk_size)  # [B, C]
        valid = steps < self._ends[np.asarray(index)][:, None]
        return self.labels[np.minimum(steps, len(self) - 1)], valid


def check_expert_knows(env_id: str) -> None:
    """The scripted expert reads poses that only the family's envs describe."""
    if not episodes.in_family(env_id):
        raise ValueError(
            f"the scripted expert knows the {episodes.FAMILY} family alone, not {env_id!r}: record its demonstrations "
            "with ManiSkill's own tools."
        )
