"""Demonstrations in LeRobot's data set format, version 3.

    python -m envs.lerobot demos/tiny demos/tiny_lerobot   # ManiSkill's trajectory format -> LeRobot's
    python -m envs.lerobot some_lerobot_set demos/theirs   # LeRobot's -> ManiSkill's
    python train_sft.py --demos some_lerobot_set ...       # envs/demo_sets.py takes the second step

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

import os
from pathlib import Path


def is_lerobot(folder: Path) -> bool:
    """Whether a folder holds a data set in LeRobot's format."""
    return os.path.exists(folder / "meta" / "info.json")  # false where the folder cannot be read
