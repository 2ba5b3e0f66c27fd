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

import collections
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType

import h5py
import numpy as np

from envs import episodes, variants
from envs.expert import Expert
from envs.registration import CONTROL_MODE
from envs.vector import ACTION_LIMITS, VectorEnv
from schemas import UserError, check, parse_json, read_json, require_file
from schemas.demonstrations import (
    MAX_CHUNK_BYTES,
    MAX_STEPS,
    PICTURES,
    RECORDED,
    TRAINED_ON,
    Episode,
    Statistics,
    Trajectories,
    Try,
    arrays_of,
)
from schemas.lock import LOCK, lock_folder

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
            recipe.max_translation,
            recipe.max_rotation,
            close_steps=1,
            patience=1,
            slack=2.5 * recipe.action_noise,
            measured=recipe.measured_pose,
        )
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


def attempts(envs: VectorEnv, recipe: Recipe, first: int, asked_to_end: object = False) -> Iterator[Demonstration]:
    """Episodes of the expert in the order of their numbers, beginning with number `first`.

    asked_to_end: no further step is taken once this is true; it is looked at before each of them.
    """
    slots = [Attempt(first + i, recipe, envs.num_start_states) for i in range(envs.num_envs)]
    following, due = first + envs.num_envs, first
    done: dict[int, Demonstration] = {}  # finished before a lower number was
    obs = envs.reset([slot.demo.episode_id for slot in slots])
    for slot, image, text in zip(slots, obs["image"].numpy(), obs["task_description"]):
        slot.demo.images.append(image)
        slot.demo.instruction = text
    while not asked_to_end:
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
            UserError: the folder holds something else, demonstrations of another recipe, or another process writes it.
        """
        self.folder, self.recipe, self.env_kwargs = folder, recipe, env_kwargs
        self._remedy = f"give --output another folder than {folder}"
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"--output {folder} is a link to nothing: name a folder")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: name a folder")
        begun = folder / "recipe.json"
        if begun.exists():
            self._check_same_recipe(read_json(begun, dict, self._remedy))
        elif folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(f"--output {folder} holds other files: name a new folder")
        self._lock = lock_folder(folder, f"--output {folder}") if begun.exists() else None

    def _check_same_recipe(self, before: dict) -> None:
        for key, value in vars(self.recipe).items():
            if before.get(key) != value:
                raise UserError(
                    f"--output {self.folder} was begun with {key}={before.get(key)!r}, not {value!r}: give another "
                    "folder, or the same flags to go on"
                )

    def count(self) -> int:
        """How many episodes it holds. Raises UserError where they are damaged or not of this collection."""
        return len(self._tries())

    def is_finished(self) -> bool:
        """Everything it holds is in trajectory.h5, and the files beside it are there."""
        names = ("trajectory.h5", "trajectory.json", "dataset_statistics.json")
        return all((self.folder / name).exists() for name in names)

    def begin(self) -> tuple[int, int]:
        """Make the folder. Returns how many episodes it holds, and the number of the first try that is not in it.

        Raises:
            UserError: another process collects here, or `count` says so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = lock_folder(self.folder, f"--output {self.folder}")
        tries = self._tries()
        if self._finished.exists():  # what is left of parts is in it: the last run was killed as it removed them
            for part in self._parts():
                part.unlink()
        for partial in self.folder.glob("*.partial*"):
            partial.unlink()
        _write_whole(self.folder / "recipe.json", json.dumps(vars(self.recipe), indent=2))
        return len(tries), max(tries, default=-1) + 1

    @property
    def _finished(self) -> Path:
        return self.folder / "trajectory.h5"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part_*.h5"))

    def _sources(self) -> list[Path]:
        """Files that hold the episodes, each of them once."""
        return [self._finished] if self._finished.exists() else self._parts()

    def _tries(self) -> list[int]:
        """Numbers of the tries whose episodes are kept."""
        found = []
        for path in self._sources():
            with self._reader(path) as reader:
                found += [entry["attempt"] for entry in reader.tries().values()]
        return found

    def _reader(self, path: Path) -> EpisodeReader:
        return EpisodeReader(path, tuple(self.recipe.image_size), f"move it away, or {self._remedy}")

    def write_part(self, demos: list[Demonstration]) -> None:
        """Put one more part in place; all of it or nothing. A set that was finished becomes the first part."""
        if self._finished.exists():
            os.replace(self._finished, self.folder / "part_000000.h5")
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
        packed = dict(chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1)
        group.create_dataset(PICTURES, data=images, **packed)
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
            for path in self._sources():
                with self._reader(path) as reader:
                    for name, entry in sorted(reader.tries().items(), key=lambda item: item[1]["attempt"]):
                        actions, keep, _ = reader.read(name, entry["elapsed_steps"], TRAINED_ON | RECORDED)
                        reader.file.copy(name, whole, f"traj_{len(listed)}")
                        labels.append(actions[keep])
                        listed.append({"episode_id": len(listed), **entry})
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
        for part in self._parts():
            part.unlink()
        os.close(self._lock)
        self._lock = None
        return statistics[self.recipe.env_id]


def action_statistics(labels: list[np.ndarray]) -> dict:
    """Labels of all episodes, [T, 7] each -> an entry of a published dataset_statistics.json."""
    actions = np.concatenate(labels).astype(np.float64)
    columns = {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "max": actions.max(0),
        "min": actions.min(0),
        "q01": np.quantile(actions, 0.01, axis=0),
        "q99": np.quantile(actions, 0.99, axis=0),
    }
    action = {name: column.tolist() for name, column in columns.items()} | {"mask": MASK}
    return {"action": action, "num_transitions": len(actions), "num_trajectories": len(labels)}


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial_json")
    partial.write_text(text + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


def check_finished(folder: Path, remedy: str) -> None:
    """Raise UserError unless the three files of a finished set are in the folder, and nothing of an unfinished one."""
    try:
        others = sorted(path.name for path in folder.glob("*.h5"))
    except OSError as error:
        raise UserError(f"--demos {folder} can not be read ({error.strerror}): name the folder of a set") from error
    if any(name.startswith("part_") for name in others):
        raise UserError(f"--demos {folder} is not finished: run the collect_demos.py command that began it once more")
    for name in ("trajectory.json", "trajectory.h5", "dataset_statistics.json"):
        if not (folder / name).exists():
            there = f" but {', '.join(others[:3])}" if others and "trajectory.h5" not in others else ""
            raise UserError(f"--demos {folder} has no {name}{there}: {remedy}")


class EpisodeReader:
    """Checked access to a trajectory.h5 that anybody may have made: nothing outside the file is opened for it."""

    def __init__(self, path: Path, image_size: tuple[int, int], remedy: str):
        """image_size: width and height that pictures must have. Raises UserError where the file is no HDF5 file."""
        self.path, self.image_size, self.remedy = path, image_size, remedy
        require_file(path, remedy)
        try:
            self.file = h5py.File(path)
        except OSError as error:
            raise self._wrong(f"is cut short or no HDF5 file ({error})") from error

    def __enter__(self) -> EpisodeReader:
        return self

    def __exit__(self, *exc_info) -> None:
        self.file.close()

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.path} {what}: {self.remedy}")

    def check_episodes(self, episodes: list[Episode]) -> None:
        """Raise UserError unless these are the groups of the file, each named once, and memory holds their steps."""
        named = collections.Counter(f"traj_{entry.episode_id}" for entry in episodes)
        there = set(self.file)
        for names, what in (
            ([name for name, count in named.items() if count > 1], "is named twice in trajectory.json"),
            (sorted(named.keys() - there), "is missing, but trajectory.json names it"),
            (sorted(there - named.keys()), "is not named in trajectory.json"),
        ):
            if names:
                raise self._wrong(f"and trajectory.json do not agree: {names[0]} {what}")
        if other := next((entry for entry in episodes if entry.control_mode != CONTROL_MODE), None):
            raise self._wrong(
                f"has actions of control mode {other.control_mode!r} in traj_{other.episode_id}, they must be of "
                f"{CONTROL_MODE!r}"
            )
        steps = sum(entry.elapsed_steps for entry in episodes)
        if steps > MAX_STEPS:
            raise self._wrong(f"claims {steps} steps, more than {MAX_STEPS}")

    def tries(self) -> dict[str, dict]:
        """Group -> what is said of the episode in it, of a set that collect_demos.py has not finished or finished."""
        found = {}
        for name in self.file:
            try:
                said = self.file[name].attrs["entry"] if self._holds(self.file, name) else None
            except (KeyError, OSError, TypeError) as error:
                raise self._wrong(f"has no entry at {name}, as collect_demos.py writes it ({error})") from error
            if not isinstance(said, str):
                raise self._wrong(f"has no entry at {name}, as collect_demos.py writes it")
            found[name] = parse_json(said.encode(), f"{self.path} {name}", self.remedy)
            check(Try, found[name], f"{self.path} {name}", self.remedy)
        return found

    def read(
        self, name: str, steps: int, checked: Iterable[str] = TRAINED_ON
    ) -> tuple[np.ndarray, np.ndarray, h5py.Dataset]:
        """One episode: labels float32 [T, 7], keep bool [T], pictures uint8 [T + 1, H, W, 3] still in the file.

        Args:
            checked: names of the arrays to look at; what training does not read can be left alone.

        Raises:
            UserError: it lacks an array, or one has another form, lies outside the file or is out of range.
        """
        found = {key: self._dataset(name, key) for key in checked}
        found = {key: dataset for key, dataset in found.items() if dataset is not None}
        described = {key: {"dtype": dtype_name(each), "shape": list(each.shape)} for key, each in found.items()}
        check(arrays_of(steps, *self.image_size), described, f"{self.path} {name}", self.remedy)
        for key, dataset in found.items():
            self._check_storage(f"{name}/{key}", dataset)
        actions, keep = self.array(found["expert_actions"], ...), self.array(found["keep"], ...)
        if not np.isfinite(actions).all():
            raise self._wrong(f"has {name}/expert_actions that are no numbers (NaN or infinite)")
        if not (np.abs(actions) <= ACTION_LIMITS).all():
            raise UserError(
                f"{self.path}: {name} has actions out of range (1 m and pi/2 rad per step at most): "
                "check the units of expert_actions"
            )
        return actions, keep, found[PICTURES]

    def array(self, dataset: h5py.Dataset, index: int | EllipsisType) -> np.ndarray:
        """A part of a dataset. Raises UserError where the file is damaged there."""
        try:
            return dataset[index]
        except OSError as error:
            raise self._wrong(f"is damaged: {dataset.name} can not be read ({error})") from error

    def _dataset(self, name: str, key: str) -> h5py.Dataset | None:
        """The dataset at name/key, None where there is none. Links are looked at and never followed."""
        place, at = self.file, ""
        for part in (name, *key.split("/")):
            at = f"{at}/{part}".removeprefix("/")
            try:
                if not isinstance(place, h5py.Group) or not self._holds(place, part):
                    return None
                place = place[part]
            except (KeyError, OSError, RuntimeError, TypeError) as error:
                raise self._wrong(f"is damaged: {at} can not be read ({error})") from error
        if not isinstance(place, h5py.Dataset):
            raise self._wrong(f"has a group at {at}, it must be a dataset")
        return place

    def _holds(self, group: h5py.Group, name: str) -> bool:
        """Whether there is something of that name. Raises UserError where it is a soft or external link, unfollowed."""
        if not group.id.links.exists(name.encode()):
            return False
        if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise self._wrong(f"has a link at {group.name.strip('/')}/{name}, where the data itself must be")
        return True

    def _check_storage(self, at: str, dataset: h5py.Dataset) -> None:
        """Raise UserError where the numbers are not all in this file, or can not be unpacked in this memory."""
        if dataset.is_virtual or dataset.external:
            raise self._wrong(f"keeps {at} in another file, it must be in this one")
        if dataset.chunks is None:
            whole = dataset.id.get_storage_size() == dataset.nbytes
        else:
            if math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
                raise self._wrong(f"keeps {at} in chunks of {list(dataset.chunks)}, more than {MAX_CHUNK_BYTES} bytes")
            chunks = math.prod(-(-size // step) for size, step in zip(dataset.shape, dataset.chunks))
            whole = dataset.id.get_num_chunks() == chunks
        if not whole:
            raise self._wrong(f"lacks a part of {at}, which was never written")


def dtype_name(dataset: h5py.Dataset) -> str:
    """Its element type as numpy calls it; "unknown" where numpy has none."""
    try:
        return str(dataset.dtype)
    except TypeError:
        return "unknown"


class Demos:
    """A finished set for training: M steps that are kept, in order. Pictures stay in the file until they are wanted.

    Attributes:
        recipe: dict, how it was made; statistics: dict, the content of dataset_statistics.json.
        labels: float32 [M, 7], robot units; instructions: M strings.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: one sentence that names what is missing, cut short, of another form or out of range.
        """
        self.folder = folder
        remedy = f"make the set again with collect_demos.py --output {folder}"
        check_finished(folder, remedy)
        content = read_json(folder / "trajectory.json", Trajectories, remedy)
        self.recipe = content.recipe.model_dump(mode="json")
        statistics = read_json(folder / "dataset_statistics.json", Statistics, remedy)
        self.statistics = {key: entry.model_dump(mode="json") for key, entry in statistics.items()}
        self._reader = EpisodeReader(folder / "trajectory.h5", tuple(self.recipe["image_size"]), remedy)
        self._reader.check_episodes(content.episodes)
        self.num_episodes = len(content.episodes)
        labels, self._pictures, self._rows, ends, self.instructions = [], [], [], [], []
        for entry in content.episodes:
            actions, keep, pictures = self._reader.read(f"traj_{entry.episode_id}", entry.elapsed_steps)
            kept = np.flatnonzero(keep)
            labels.append(actions[kept])
            self._rows += [(len(self._pictures), int(step)) for step in kept]
            self._pictures.append(pictures)
            ends += [len(self._rows)] * len(kept)
            self.instructions += [entry.instruction] * len(kept)
        self.labels, self._ends = np.concatenate(labels), np.array(ends)
        if not len(self.labels):
            raise UserError(f"{folder}/trajectory.h5 keeps no step of any episode: {remedy}")

    def check_world(
        self, *, env_id: str, asset_pack: str, protocol: str, image_size: tuple[int, int], sim_freq: int
    ) -> None:
        """Raises UserError where one of these settings is not the one that the set was made with."""
        given = dict(
            env_id=env_id, asset_pack=asset_pack, protocol=protocol, image_size=list(image_size), sim_freq=sim_freq
        )
        for key, value in given.items():
            made = self.recipe[key]
            if made != value:
                raise UserError(
                    f"--demos {self.folder} was made with {key}={made!r}, this run has {value!r}: give the same "
                    f"--{key}, or collect demonstrations for it"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index) -> np.ndarray:
        """Steps [B] -> what the camera saw before them, uint8 [B, H, W, 3]."""
        wanted = [self._rows[i] for i in index]
        return np.stack([self._reader.array(self._pictures[episode], step) for episode, step in wanted])

    def chunks(self, index, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps [B] -> the labels of them and of the next kept steps, float32 [B, C, 7]; bool [B, C]: not past the
        episode's end."""
        steps = np.asarray(index)[:, None] + np.arange(chunk_size)  # [B, C]
        valid = steps < self._ends[np.asarray(index)][:, None]
        return self.labels[np.minimum(steps, len(self) - 1)], valid


def check_expert_knows(env_id: str) -> None:
    """The scripted expert reads poses that only the family's envs describe."""
    if not episodes.in_family(env_id):
        raise UserError(
            f"the scripted expert knows the {episodes.FAMILY} family alone, not {env_id!r}: record its demonstrations "
            "with ManiSkill's own tools"
        )
