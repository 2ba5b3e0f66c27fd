"""Demonstrations that ManiSkill wrote itself, rewritten as training reads them.

RecordEpisode, ManiSkill's motion planners and `replay_trajectory` write a file of any name with a .json beside it:

    <name>.h5      traj_0, ...: actions float32 [T, 7], obs/sensor_data/<camera>/rgb uint8 [T + 1, H, W, 3], ...
    <name>.json    env_info, episodes. Failed episodes are left out here, because a demonstration shows a success

The actions are in the controller's units, mostly -1 to 1. `ManiSkillTask.robot_units` turns them into metres and
radians. The instruction is the run's, since these files hold none.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from envs.demonstrations import EpisodeReader, action_statistics, dtype_name
from envs.lerobot.layout import whole_folder, write_json
from schemas import UserError, read_json
from schemas.demonstrations import PICTURES, Recorded, RecordedEpisode

CONVERT = (
    "convert it with `python -m mani_skill.trajectory.replay_trajectory --traj_path {} -c pd_ee_delta_pose -o rgb "
    "-b physx_cpu --save_traj`, and give the new file to --demos"
)


def recorded_file(path: Path) -> Path | None:
    """The .h5 file that ManiSkill wrote, given itself or by its folder. None where there is none."""
    if path.suffix == ".h5":
        return path
    try:
        content = json.loads((path / "trajectory.json").read_bytes())
    except (OSError, ValueError):  # missing or damaged, which Demos says
        return None
    is_recorded = isinstance(content, dict) and "env_info" in content and "recipe" not in content
    return path / "trajectory.h5" if is_recorded else None


def rewrite(source: Path, target: Path, env_id: str, instruction: str) -> int:
    """Rewrite ManiSkill's file for training, whole or not at all. Returns the number of episodes.

    Args:
        env_id: the id of the run, which names the module of a task of your own.

    Raises:
        UserError: the file is of another env, has other actions than training takes, or is damaged.
        ValueError, RuntimeError: the env cannot be made here.
    """
    remedy = CONVERT.format(source)
    content = read_json(source.with_suffix(".json"), Recorded, f"record {source} again")
    name = env_id.rpartition(":")[2]
    if content.env_info.env_id.rpartition(":")[2] != name:
        raise UserError(f"--demos {source} is of {content.env_info.env_id}, and --env_id is {env_id}: change one")
    successes = [entry for entry in content.episodes if entry.success is not False]
    if not successes:
        raise UserError(f"--demos {source} holds no success: record {source} again")
    for entry in successes:
        if entry.control_mode != "pd_ee_delta_pose":
            raise UserError(f"--demos {source} has actions of control mode {entry.control_mode!r}: {remedy}")

    from envs.maniskill_task import ManiSkillTask  # loads the simulator

    task = ManiSkillTask(env_id, instruction, (8, 8))  # an image of this env is never drawn
    labels: list[np.ndarray] = []  # float32 [T, 7] of each episode
    with EpisodeReader(source, (0, 0), remedy) as reader, whole_folder(target) as folder:
        with h5py.File(folder / "trajectory.h5", "w") as file:
            for number, entry in enumerate(successes):
                images, actions = read_episode(reader, entry, f"obs/sensor_data/{task.camera_name}/rgb")
                labels.append(task.robot_units(actions))
                group = file.create_group(f"traj_{number}")
                group["expert_actions"] = labels[-1]
                group["keep"] = np.ones(len(actions), bool)
                # one image per HDF5 chunk, because training reads images in any order
                packed = dict(chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1)
                group.create_dataset(PICTURES, data=images, **packed)
        height, width = images.shape[1:3]
        unknown = dict.fromkeys(("obj_set", "asset_pack", "protocol", "sim_freq", "max_episode_steps"))
        episodes = [
            {
                "episode_id": number,
                "control_mode": entry.control_mode,
                "elapsed_steps": entry.elapsed_steps,
                "instruction": instruction,
            }
            for number, entry in enumerate(successes)
        ]
        recipe = unknown | {"env_id": env_id, "image_size": [width, height]}
        write_json(folder / "trajectory.json", {"episodes": episodes, "source_type": "maniskill", "recipe": recipe})
        write_json(folder / "dataset_statistics.json", {env_id: action_statistics(labels)})
    task.close()
    return len(successes)


def read_episode(reader: EpisodeReader, entry: RecordedEpisode, camera: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [T + 1, H, W, 3] and actions float32 [T, 7] of one episode. Raises UserError for other forms."""
    name, steps = f"traj_{entry.episode_id}", entry.elapsed_steps
    found = []
    for key, dtype, shape in ((camera, "uint8", (steps + 1, None, None, 3)), ("actions", "float32", (steps, 7))):
        dataset = reader.dataset(name, key)
        if dataset is None:
            raise UserError(f"{reader.path} has no {name}/{key}: {reader.remedy}")
        form = tuple(size if wanted is not None else None for size, wanted in zip(dataset.shape, shape))
        if (dtype_name(dataset), dataset.ndim, form) != (dtype, len(shape), shape):
            raise UserError(
                f"{reader.path} has {name}/{key} as {dtype_name(dataset)} of shape {list(dataset.shape)}, it must be "
                f"{dtype} of shape {['any' if size is None else size for size in shape]}: {reader.remedy}"
            )
        reader.check_storage(f"{name}/{key}", dataset)
        found.append(reader.array(dataset, ...))
    images, actions = found
    if not np.isfinite(actions).all():
        raise UserError(f"{reader.path} has {name}/actions that are not finite (NaN or infinite): {reader.remedy}")
    return images, actions
