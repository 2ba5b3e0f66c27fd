"""Demonstrations in LeRobot's data set format, version 3.

    python -m envs.lerobot demos/tiny demos/tiny_lerobot   # ManiSkill's trajectory format -> LeRobot's
    python -m envs.lerobot some_lerobot_set demos/theirs   # LeRobot's -> ManiSkill's
    python train_sft.py --demos some_lerobot_set ...       # the second step is taken in a cache

    meta/info.json                                   version, rate, features
    meta/stats.json, meta/tasks.parquet              statistics of each feature, instructions
    meta/episodes/chunk-000/file-000.parquet         length, files and statistics of each episode
    data/chunk-000/file-000.parquet                  one row per step, without videos
    videos/<camera>/chunk-000/file-000.mp4           images, unless they are PNG files in the rows
    meta/solovla/                                    what LeRobot has no place for, so that nothing is lost

A row has `action`, the image before it, the instruction's number, and where the set has them the labels
`expert_actions` and `keep`, `observation.state`, and `next.reward`, `next.done`, `next.success` and their like.
"""

from __future__ import annotations

from pathlib import Path

from envs.demonstrations import Demos
from envs.lerobot.layout import CAMERA_FLAG
from schemas import UserError


def is_lerobot(folder: Path) -> bool:
    """Whether a folder holds a data set in LeRobot's format."""
    return (folder / "meta" / "info.json").exists()


def open_demos(folder: Path, camera: str | None = None) -> Demos:
    """Open a set for training, whichever of the two formats it has.

    Args:
        camera: feature of a LeRobot set that holds the images, such as observation.images.top. None takes its only
            one.

    Raises:
        UserError: it names what is missing, damaged or out of range.
    """
    if is_lerobot(folder):
        from envs.lerobot.cache import cached  # imports pyarrow, which most runs do without

        demos = Demos(cached(folder, camera))
        demos.folder = folder  # which errors then name
        return demos
    if camera is not None:
        raise UserError(f"{CAMERA_FLAG} {camera} is for a set in LeRobot's format, and {folder} is none: leave it out")
    return Demos(folder)
