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

import hashlib
import os
import time
from pathlib import Path

from envs.demonstrations import Demos
from envs.lerobot.layout import CAMERA_FLAG
from schemas import UserError
from schemas.lock import lock_folder

FORM = 1  # of rewritten sets: another number leaves the old ones alone
WAIT_SECONDS = 6 * 3600.0  # while another rank or run writes the same set


def is_lerobot(folder: Path) -> bool:
    """Whether a folder holds a data set in LeRobot's format."""
    return os.path.exists(folder / "meta" / "info.json")  # false where the folder cannot be read


def open_demos(folder: Path, camera: str | None = None) -> Demos:
    """Open a set for training, whichever of the two formats it has.

    Args:
        camera: feature of a LeRobot set that holds the images, such as observation.images.top. None takes its only
            one.

    Raises:
        UserError: it names what is missing, damaged or out of range.
    """
    if is_lerobot(folder):
        demos = Demos(cached(folder, camera))
        demos.folder = folder  # which errors then name
        return demos
    if camera is not None:
        raise UserError(f"{CAMERA_FLAG} {camera} is for a set in LeRobot's format, and {folder} is none: leave it out")
    return Demos(folder)


def cache_folder() -> Path:
    """The folder for sets: solovla/demos in $XDG_CACHE_HOME, which is ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solovla" / "demos"


def fingerprint(folder: Path, camera: str | None) -> str:
    """A name for a set: it changes with its place, the camera, and the size or time of any file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((FORM, str(folder.resolve()), camera, facts)).encode()).hexdigest()[:16]


def cached(folder: Path, camera: str | None) -> Path:
    """The set in ManiSkill's format. The first process that asks writes it, and others on its machine wait.

    Raises:
        UserError: the set is damaged, or the cache cannot be written.
    """
    try:
        place = cache_folder() / f"{folder.resolve().name}-{fingerprint(folder, camera)}"
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check {folder}") from error
    rewritten = place / "set"
    if rewritten.exists():
        return rewritten
    from envs.lerobot.read import read_set  # imports pyarrow, which most runs do without

    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place} cannot be made ({error.strerror}): set XDG_CACHE_HOME to another folder") from error
    lock = lock_folder(place, f"{place}", wait=WAIT_SECONDS)
    try:
        if not rewritten.exists():
            print(f"{folder} is rewritten for training in {rewritten}, once", flush=True)
            began = time.monotonic()
            count = read_set(folder, rewritten, camera)
            print(f"{folder}: {count} episodes in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        os.close(lock)
    return rewritten
