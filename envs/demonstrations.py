"""Demonstrations in ManiSkill's trajectory format: recorded from the scripted expert, and read again for training.

    folder/trajectory.h5              traj_0, traj_1, ...: actions, terminated, truncated, success, rewards,
                                      obs/sensor_data/3rd_view_camera/rgb, env_states, and for training
                                      expert_actions, keep
    folder/trajectory.json            env_info, episodes: ManiSkill's keys, and `instruction` per episode
    folder/dataset_statistics.json    {env_id: {"action": {"q01": ...}}}: what turns tokens into metres and radians

An episode has T actions and T + 1 images. `actions` float32 [T, 7] is what the controller executed (gripper 1 or -1),
so `python -m mani_skill.trajectory.replay_trajectory` repeats the episode. `env_states` has the T + 1 states that
`envs/gym_env.py` describes, float32 [T + 1, n] each. Sets of before version 0.4.0 lack them. `expert_actions` float32
[T, 7] is the label: what the expert wanted, without noise, in robot units (gripper 1 opens, 0 closes). `keep` bool [T]
is False at idle steps. The env is named `envs:<id>`, which makes gymnasium import this package first.

A set is a function of its recipe. Tries are numbered, and each has its own episode id and its own noise. The first N
successful tries are kept in that order, whatever the number of workers. Parts of the set are put in place whole, so a
collection that was killed continues after its last part.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType

import h5py
import numpy as np

from envs import control_mode, episodes, variants
from envs.expert import Expert
from envs.registration import CONTROL_MODE
from envs.vector import ACTION_LIMITS, VectorEnv
from schemas import UserError, check, parse_json, read_json, require_file
from schemas.demonstrations import (
    ENV_STATES,
    MAX_CHUNK_BYTES,
    MAX_STEPS,
    PICTURES,
    RECORDED,
    STATE_ARRAYS,
    TRAINED_ON,
    Episode,
    Statistics,
    Trajectories,
    Try,
    arrays_of,
)
from schemas.flags import edition_before, edition_now, hulls_before
from schemas.lock import LOCK, lock_folder

PART_SIZE = 50  # episodes
# RL4VLA's filter: an idle step moves less than this (m), turns less than this (rad) and leaves the gripper as it is
IDLE_TRANSLATION, IDLE_ROTATION = 0.01, 0.06
MASK = [True] * 6 + [False]  # which action dimensions are normalised: all but the gripper


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
    measured_pose: bool = False  # the expert acts on the measured pose of the arm, which is what an image shows
    hulls: str | None = None  # None where the asset pack has no meshes
    edition: int | None = field(init=False)  # of the builtin pack, None in another one

    def __post_init__(self) -> None:
        self.edition = edition_now(vars(self))


@dataclass
class Demonstration:
    """One recorded episode of T steps."""

    attempt: int
    episode_id: int
    instruction: str
    images: list[np.ndarray] = field(default_factory=list)  # T + 1 of uint8 [H, W, 3]
    expert_actions: list[np.ndarray] = field(default_factory=list)  # T of float32 [7], wanted
    actions: list[np.ndarray] = field(default_factory=list)  # T of float32 [7], executed
    rewards: list[float] = field(default_factory=list)
    env_states: list[dict[str, np.ndarray]] = field(default_factory=list)  # T + 1, by path: float32 [n] each
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
        self.noise = np.random.default_rng((recipe.seed, number))
        self.noise_std = recipe.action_noise
        self.demo = Demonstration(number, episode_id, "")

    def act(self, state: dict) -> np.ndarray:
        """The next action to execute, float32 [7]. It is recorded together with what the expert wanted."""
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
    """Record episodes of the expert. They come in the order of their numbers, beginning with number `first`.

    asked_to_end: no further step is taken once this object is true.
    """
    numbers = itertools.count(first)
    slots = [Attempt(next(numbers), recipe, envs.num_start_states) for _ in range(envs.num_envs)]  # one per env
    finished: dict[int, Demonstration] = {}  # by number, until all lower numbers are finished as well
    due = first  # the next number to yield
    obs = envs.reset([slot.demo.episode_id for slot in slots])
    record_start(slots, obs, range(envs.num_envs))
    while not asked_to_end:
        infos = record_step(envs, slots)
        ended = infos["ended"].tolist()
        dropped = infos["dropped"].nonzero()[:, 0].tolist()  # envs whose episode was lost with a worker
        for env, success in zip(ended, infos["episode"]["success_once"].tolist()):
            demo = slots[env].demo
            demo.success = success > 0
            finished[demo.attempt] = demo
            slots[env] = Attempt(next(numbers), recipe, envs.num_start_states)
        for env in dropped:  # the same attempt again
            slots[env] = Attempt(slots[env].demo.attempt, recipe, envs.num_start_states)
        if restarted := ended + dropped:
            obs = envs.reset([slots[env].demo.episode_id for env in restarted], restarted)
            record_start(slots, obs, restarted)
        while due in finished:
            yield finished.pop(due)
            due += 1


def record_start(slots: list[Attempt], obs: dict, envs: Iterable[int]) -> None:
    """Record the first image and the instruction of the attempts that have just begun in these envs."""
    for env in envs:
        slots[env].demo.images.append(obs["image"][env].numpy().copy())  # a view would keep the images of all envs
        slots[env].demo.instruction = obs["task_description"][env]


def record_step(envs: VectorEnv, slots: list[Attempt]) -> dict:
    """Execute and record one step of every expert. Returns the step's infos."""
    states = envs.describe()
    for slot, env_state in zip(slots, envs.env_states()):
        slot.demo.env_states.append(env_state)
    actions = np.stack([slot.act(state) for slot, state in zip(slots, states)])[:, None]  # [N, 1, 7]
    obs, rewards, _, _, infos = envs.step(actions)
    for slot, image, reward in zip(slots, obs["image"].numpy(), rewards[:, 0].tolist()):
        slot.demo.images.append(image.copy())
        slot.demo.rewards.append(reward)
    if len(infos["ended"]):
        last_states = envs.env_states()
        for env in infos["ended"].tolist():
            slots[env].demo.env_states.append(last_states[env])
    return infos


def idle_steps(actions: np.ndarray) -> np.ndarray:
    """Steps that ask for nearly nothing, bool [T], of actions float [T, 7] in robot units.

    The gripper is open before the first action.
    """
    moves_little = np.linalg.norm(actions[:, :3], axis=1) <= IDLE_TRANSLATION
    turns_little = np.linalg.norm(actions[:, 3:6], axis=1) <= IDLE_ROTATION
    gripper = np.concatenate([[1.0], actions[:, 6]])  # [T + 1]
    keeps_gripper = gripper[1:] == gripper[:-1]
    return moves_little & turns_little & keeps_gripper


# ---------------------------------------------------------------------------------------------------------------------
# writing
# ---------------------------------------------------------------------------------------------------------------------


class DemoFolder:
    """A set of demonstrations that grows in whole parts and becomes one file in the end."""

    def __init__(self, folder: Path, recipe: Recipe, env_kwargs: dict):
        """env_kwargs: what gymnasium.make needs besides the id to build the env again.

        Raises:
            UserError: the folder holds something else or demonstrations of another recipe, or another process writes
                into it.
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
        before |= hulls_before(before) | edition_before(before)
        for key, value in vars(self.recipe).items():
            if before.get(key) != value:
                raise UserError(
                    f"--output {self.folder} was begun with {key}={before.get(key)!r}, not {value!r}: give another "
                    "folder, or the same flags to continue"
                )

    def count(self) -> int:
        """The number of episodes in the folder. Raises UserError where they are damaged or of another collection."""
        return len(self._tries())

    def is_finished(self) -> bool:
        """Whether trajectory.h5 and the two files that belong to it exist."""
        names = ("trajectory.h5", "trajectory.json", "dataset_statistics.json")
        return all((self.folder / name).exists() for name in names)

    def begin(self) -> tuple[int, int]:
        """Make the folder. Returns the number of its episodes, and the number of the next try.

        Raises:
            UserError: another process collects here, or the episodes are damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = lock_folder(self.folder, f"--output {self.folder}")
        tries = self._tries()
        if self._finished.exists():  # the last run was killed while it removed parts whose content is in this file
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
        """The files that together hold every episode once."""
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
        """Add a part to the folder, whole or not at all. A set that was finished becomes the first part."""
        if self._finished.exists():
            os.replace(self._finished, self.folder / "part_000000.h5")
        first = demos[0].attempt + 1  # never 0: part 0 is a set that was finished before
        path = self.folder / f"part_{first:06d}.h5"
        with h5py.File(path.with_suffix(".partial"), "w") as file:
            for demo in demos:
                self._write_episode(file.create_group(f"try_{demo.attempt:06d}", track_order=True), demo)
        os.replace(path.with_suffix(".partial"), path)

    def _write_episode(self, group: h5py.Group, demo: Demonstration) -> None:
        wanted, executed = np.stack(demo.expert_actions), np.stack(demo.actions)
        length = len(executed)
        executed[:, 6] = np.where(executed[:, 6] > 0.5, 1.0, -1.0)  # the controller's units
        last = np.arange(length) == length - 1
        images = np.stack(demo.images)
        # one image per HDF5 chunk, because training reads images in any order
        packed = dict(chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1)
        group.create_dataset(PICTURES, data=images, **packed)
        group["actions"] = executed
        group["rewards"] = np.asarray(demo.rewards, np.float32)
        group["terminated"] = last
        group["truncated"] = np.zeros(length, bool)
        group["success"] = last
        group["expert_actions"] = wanted
        steps = [int(state["task/steps"][0]) for state in demo.env_states]
        if steps == list(range(length + 1)):  # a worker that was lost between step and state leaves a gap
            for name in demo.env_states[0]:
                group[f"{ENV_STATES}/{name}"] = np.stack([state[name] for state in demo.env_states])
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
        """Join all parts into trajectory.h5, trajectory.json and dataset_statistics.json.

        Returns the statistics of the actions.
        """
        target = self.folder / "trajectory.partial"
        listed: list[dict] = []  # entries of trajectory.json
        labels: list[np.ndarray] = []  # float32 [T, 7] of each episode
        with h5py.File(target, "w") as whole:
            for path in self._sources():
                with self._reader(path) as reader:
                    self._copy_episodes(reader, whole, listed, labels)
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

    @staticmethod
    def _copy_episodes(reader: EpisodeReader, whole: h5py.File, listed: list[dict], labels: list[np.ndarray]) -> None:
        """Check all episodes of a part, copy them into `whole`, and add their entries and labels to the lists."""
        for name, entry in sorted(reader.tries().items(), key=lambda item: item[1]["attempt"]):
            actions, keep, _ = reader.read(name, entry["elapsed_steps"], TRAINED_ON | RECORDED | STATE_ARRAYS)
            reader.file.copy(name, whole, f"traj_{len(listed)}")
            labels.append(actions[keep])
            listed.append({"episode_id": len(listed), **entry})


def action_statistics(labels: list[np.ndarray]) -> dict:
    """An entry of dataset_statistics.json in the published form, from the labels [T, 7] of all episodes."""
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
    """Write a file that appears under its name whole or not at all."""
    partial = path.with_suffix(".partial_json")
    partial.write_text(text + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


def check_finished(folder: Path, remedy: str) -> None:
    """Raise UserError unless the folder holds the three files of a finished set, and no parts."""
    try:
        others = sorted(path.name for path in folder.glob("*.h5"))
    except OSError as error:
        raise UserError(f"--demos {folder} cannot be read ({error.strerror}): name the folder of a set") from error
    if any(name.startswith("part_") for name in others):
        raise UserError(f"--demos {folder} is not finished: run the same collect_demos.py command again")
    for name in ("trajectory.json", "trajectory.h5", "dataset_statistics.json"):
        if not (folder / name).exists():
            found = f" but {', '.join(others[:3])}" if others and "trajectory.h5" not in others else ""
            raise UserError(f"--demos {folder} has no {name}{found}: {remedy}")


class EpisodeReader:
    """Checked access to a trajectory.h5 from any source. Nothing outside the file is opened for it."""

    def __init__(self, path: Path, image_size: tuple[int, int], remedy: str):
        """image_size: width and height that the images must have. Raises UserError where this is no HDF5 file."""
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

    def check_episodes(self, episodes: list[Episode], mode: str = CONTROL_MODE) -> None:
        """Raise UserError unless `episodes` names every group of the file once and their steps fit into memory.

        mode: the control mode that the actions must be of.
        """
        named = collections.Counter(f"traj_{entry.episode_id}" for entry in episodes)
        groups = set(self.file)
        twice = [name for name, count in named.items() if count > 1]
        for names, problem in (
            (twice, "is named twice in trajectory.json"),
            (sorted(named.keys() - groups), "is missing, but trajectory.json names it"),
            (sorted(groups - named.keys()), "is not named in trajectory.json"),
        ):
            if names:
                raise self._wrong(f"and trajectory.json do not agree: {names[0]} {problem}")
        for entry in episodes:
            if entry.control_mode != mode:
                raise self._wrong(
                    f"has actions of control mode {entry.control_mode!r} in traj_{entry.episode_id}, they must be of "
                    f"{mode!r}"
                )
        steps = sum(entry.elapsed_steps for entry in episodes)
        if steps > MAX_STEPS:
            raise self._wrong(f"claims {steps} steps, more than {MAX_STEPS}")

    def tries(self) -> dict[str, dict]:
        """The entry of every episode by the name of its group, as collect_demos.py writes it.

        Raises:
            UserError: an entry is missing or damaged.
        """
        return {name: self._entry(name) for name in self.file}

    def _entry(self, name: str) -> dict:
        try:
            text = self.file[name].attrs["entry"] if self._holds(self.file, name) else None
        except (KeyError, OSError, TypeError) as error:
            raise self._wrong(f"has no entry at {name}, as collect_demos.py writes it ({error})") from error
        if not isinstance(text, str):
            raise self._wrong(f"has no entry at {name}, as collect_demos.py writes it")
        entry = parse_json(text.encode(), f"{self.path} {name}", self.remedy)
        check(Try, entry, f"{self.path} {name}", self.remedy)
        return entry

    def read(
        self, name: str, steps: int, checked: Iterable[str] = TRAINED_ON
    ) -> tuple[np.ndarray, np.ndarray, h5py.Dataset]:
        """One episode: labels float32 [T, 7], keep bool [T], and images uint8 [T + 1, H, W, 3] still in the file.

        Args:
            checked: names of the arrays to check. The default is what training reads.

        Raises:
            UserError: an array is missing, has another form, is stored outside the file or is out of range.
        """
        found: dict[str, h5py.Dataset] = {}
        for key in checked:
            dataset = self.dataset(name, key)
            if dataset is not None:
                found[key] = dataset
        described = {key: {"dtype": dtype_name(each), "shape": list(each.shape)} for key, each in found.items()}
        check(arrays_of(steps, *self.image_size), described, f"{self.path} {name}", self.remedy)
        for key, dataset in found.items():
            self.check_storage(f"{name}/{key}", dataset)
        actions, keep = self.array(found["expert_actions"], ...), self.array(found["keep"], ...)
        if not np.isfinite(actions).all():
            raise self._wrong(f"has {name}/expert_actions that are not finite (NaN or infinite)")
        if not (np.abs(actions) <= ACTION_LIMITS).all():
            raise UserError(
                f"{self.path}: {name} has actions out of range (1 m and pi/2 rad per step at most): "
                "check the units of expert_actions"
            )
        return actions, keep, found[PICTURES]

    def array(self, dataset: h5py.Dataset, index: int | EllipsisType) -> np.ndarray:
        """Part of a dataset. Raises UserError where the file is damaged there."""
        try:
            return dataset[index]
        except OSError as error:
            raise self._wrong(f"is damaged: {dataset.name} cannot be read ({error})") from error

    def dataset(self, name: str, key: str) -> h5py.Dataset | None:
        """The dataset at name/key, or None where there is none. Links are never followed.

        Raises:
            UserError: the file is damaged there, or has a link or a group.
        """
        node, path = self.file, ""
        for part in (name, *key.split("/")):
            path = f"{path}/{part}".removeprefix("/")
            try:
                if not isinstance(node, h5py.Group) or not self._holds(node, part):
                    return None
                node = node[part]
            except (KeyError, OSError, RuntimeError, TypeError) as error:
                raise self._wrong(f"is damaged: {path} cannot be read ({error})") from error
        if not isinstance(node, h5py.Dataset):
            raise self._wrong(f"has a group at {path}, it must be a dataset")
        return node

    def datasets(self, name: str) -> Iterator[tuple[str, h5py.Dataset]]:
        """All datasets of an episode with their paths below it. Links are left out.

        Raises:
            UserError: one of them is not all in this file.
        """
        found: list[tuple[str, h5py.Dataset]] = []

        def note(path: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                found.append((path, item))

        self.file[name].visititems(note)
        for path, dataset in found:
            self.check_storage(f"{name}/{path}", dataset)
            yield path, dataset

    def _holds(self, group: h5py.Group, name: str) -> bool:
        """Whether the group has a member of this name. Raises UserError where it is a soft or external link."""
        if not group.id.links.exists(name.encode()):
            return False
        if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise self._wrong(f"has a link at {group.name.strip('/')}/{name}, where the data itself must be")
        return True

    def check_storage(self, at: str, dataset: h5py.Dataset) -> None:
        """Raise UserError where the numbers are not all in this file, or one chunk does not fit into memory."""
        if dataset.is_virtual or dataset.external:
            raise self._wrong(f"keeps {at} in another file, it must be in this one")
        chunk_shape = dataset.chunks
        if chunk_shape is None:
            is_whole = dataset.id.get_storage_size() == dataset.nbytes
        else:
            if math.prod(chunk_shape) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
                raise self._wrong(f"keeps {at} in chunks of {list(chunk_shape)}, more than {MAX_CHUNK_BYTES} bytes")
            num_chunks = math.prod(math.ceil(size / step) for size, step in zip(dataset.shape, chunk_shape))
            is_whole = dataset.id.get_num_chunks() == num_chunks
        if not is_whole:
            raise self._wrong(f"lacks a part of {at}, which was never written")


def dtype_name(dataset: h5py.Dataset) -> str:
    """numpy's name of the element type, "unknown" where numpy has none."""
    try:
        return str(dataset.dtype)
    except TypeError:
        return "unknown"


class Demos:
    """A finished set for training: M kept steps in order. Images stay in the file until they are needed.

    Attributes:
        recipe: dict, the settings that the set was made with. A set that was made elsewhere has None for most.
        reader: its trajectory.h5. episodes: the entries of trajectory.json.
        statistics: dict, the content of dataset_statistics.json.
        labels: float32 [M, 7], robot units.
        instructions: M strings.
    """

    def __init__(self, folder: Path):
        """Open and check the set.

        Raises:
            UserError: it names what is missing, cut short, of another form or out of range.
        """
        self.folder = folder
        remedy = f"make the set again with collect_demos.py --output {folder}"
        check_finished(folder, remedy)
        content = read_json(folder / "trajectory.json", Trajectories, remedy)
        self.recipe = content.recipe.model_dump(mode="json")
        statistics = read_json(folder / "dataset_statistics.json", Statistics, remedy)
        self.statistics = {key: entry.model_dump(mode="json") for key, entry in statistics.items()}
        self.reader = EpisodeReader(folder / "trajectory.h5", tuple(self.recipe["image_size"]), remedy)
        made_in = self.recipe["env_id"]
        self.reader.check_episodes(content.episodes, CONTROL_MODE if made_in is None else control_mode(made_in))
        self.episodes = content.episodes
        self.num_episodes = len(content.episodes)
        self.instructions: list[str] = []
        self._images: list[h5py.Dataset] = []  # of each episode, uint8 [T + 1, H, W, 3]
        self._rows: list[tuple[int, int]] = []  # episode and step of each kept step
        labels: list[np.ndarray] = []
        ends: list[int] = []  # of each kept step: the index after the last kept step of its episode
        for entry in content.episodes:
            actions, keep, images = self.reader.read(f"traj_{entry.episode_id}", entry.elapsed_steps)
            kept = np.flatnonzero(keep)
            labels.append(actions[kept])
            self._rows += [(len(self._images), int(step)) for step in kept]
            self._images.append(images)
            ends += [len(self._rows)] * len(kept)
            self.instructions += [entry.instruction] * len(kept)
        self.labels = np.concatenate(labels)
        self._ends = np.array(ends)
        if not len(self.labels):
            raise UserError(f"{folder}/trajectory.h5 keeps no step of any episode: {remedy}")

    def check_world(
        self, *, env_id: str, asset_pack: str, protocol: str, hulls: str, image_size: tuple[int, int], sim_freq: int
    ) -> None:
        """Raise UserError where one of these settings differs from the set's own. Another edition is a warning."""
        given = dict(env_id=env_id, asset_pack=asset_pack, protocol=protocol, hulls=hulls)
        given |= dict(image_size=list(image_size), sim_freq=sim_freq)
        for key, value in given.items():
            made = self.recipe[key]
            if made is not None and made != value:
                raise UserError(
                    f"--demos {self.folder} was made with {key}={made!r}, this run has {value!r}: give the same "
                    f"--{key}, or collect demonstrations for it"
                )
        if self.recipe["edition"] not in (None, edition_now(given)):
            warnings.warn(
                f"--demos {self.folder} shows edition {self.recipe['edition']} of the builtin pack, and envs have "
                f"edition {edition_now(given)}, so collect demonstrations again for a policy that acts there.",
                RuntimeWarning,
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """The camera's images before the steps `index` [B], uint8 [B, H, W, 3]."""
        wanted = [self._rows[i] for i in index]
        return np.stack([self.reader.array(self._images[episode], step) for episode, step in wanted])

    def chunks(self, index: Sequence[int] | np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the steps `index` [B] and of the kept steps after each.

        Returns:
            labels float32 [B, C, 7].
            valid bool [B, C]: False past the episode's end.
        """
        index = np.asarray(index)
        steps = index[:, None] + np.arange(chunk_size)  # [B, C]
        valid = steps < self._ends[index][:, None]
        return self.labels[np.minimum(steps, len(self) - 1)], valid


def check_expert_knows(env_id: str) -> None:
    """Raise UserError for an env whose `describe()` lacks the poses that the scripted expert reads."""
    if not episodes.in_family(env_id):
        raise UserError(
            f"the scripted expert only knows the {episodes.FAMILY} family, not {env_id!r}: record demonstrations of it "
            "with ManiSkill's own tools"
        )
