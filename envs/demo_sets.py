"""Open demonstrations for training, whichever format they have. Two of three formats are rewritten once, in a cache.

--demos demos/tiny          what collect_demos.py wrote: read as it is
--demos demos/pushcube      what ManiSkill's RecordEpisode wrote: rewritten by `envs/recorded.py`
--demos demos/some.h5       one such file by its name, such as one of replay_trajectory
--demos my_lerobot_set      LeRobot's format: rewritten by `envs/lerobot/read.py`
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from envs.demonstrations import Demos
from envs.lerobot import is_lerobot
from envs.lerobot.layout import CAMERA_FLAG
from envs.recorded import recorded_file, rewrite
from schemas import UserError
from schemas.lock import lock_folder

FORM = 1  # of rewritten sets: another number leaves the old ones alone
WAIT_SECONDS = 6 * 3600.0  # while another rank or run writes the same set


def open_demos(
    folder: Path, camera: str | None = None, env_id: str | None = None, instruction: str | None = None
) -> Demos:
    """Open a set for training.

    Args:
        folder: the set, or a .h5 file that ManiSkill wrote.
        camera: feature of a LeRobot set that holds the images, such as observation.images.top. None takes its only
            one.
        env_id, instruction: those of the run, which a set that ManiSkill wrote needs.

    Raises:
        UserError: it names what is missing, damaged or out of range.
        ValueError, RuntimeError: a set that ManiSkill wrote is of an env that cannot be made here.
    """
    if is_lerobot(folder):
        demos = Demos(cached(folder, camera))
        demos.folder = folder  # which errors then name
        return demos
    if camera is not None:
        raise UserError(f"{CAMERA_FLAG} {camera} is for a set in LeRobot's format, and {folder} is none: leave it out")
    file = recorded_file(folder)
    if file is None:
        return Demos(folder)
    if env_id is None or not instruction:
        raise UserError(f"--demos {folder} was written by ManiSkill: give its --env_id and an --instruction")
    demos = Demos(cached(file, env_id, instruction))
    demos.folder = folder
    return demos


def cache_folder() -> Path:
    """The folder for sets: solovla/demos in $XDG_CACHE_HOME, which is ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solovla" / "demos"


def image_file(demos: Demos, *settings: str) -> Path:
    """Where a set's images are kept as training reads them. settings: all that decides their bits."""
    return cache_folder() / f"{demos.folder.resolve().name}-{fingerprint(demos.folder, *settings)}.images"


def fingerprint(source: Path, *settings: str | None) -> str:
    """A name for a set: it changes with its place, the settings, and the size or time of any file."""
    beside = [source, source.with_suffix(".json")] if source.suffix == ".h5" else source.rglob("*")
    files = sorted(path for path in beside if path.is_file())
    facts = [(path.name, str(path.parent), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((FORM, str(source.resolve()), settings, facts)).encode()).hexdigest()[:16]


def rewriter(source: Path, *settings: str | None) -> Callable[[Path], int]:
    """The function that writes a set for training into a new folder. It returns the number of episodes."""
    if source.suffix == ".h5":
        return partial(rewrite, source, env_id=settings[0], instruction=settings[1])
    from envs.lerobot.read import read_set  # imports pyarrow, which most runs do without

    return partial(read_set, source, camera=settings[0])


def cached(source: Path, *settings: str | None) -> Path:
    """The set as training reads it. The first process that asks writes it, and others on its machine wait.

    Args:
        source: a set in LeRobot's format, or a .h5 file that ManiSkill wrote.
        settings: the camera of the first, or the env id and the instruction of the second.

    Raises:
        UserError: the set is damaged, or the cache cannot be written.
        ValueError, RuntimeError: as `envs.recorded.rewrite` does.
    """
    try:
        place = cache_folder() / f"{source.resolve().name}-{fingerprint(source, *settings)}"
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check {source}") from error
    rewritten = place / "set"
    if rewritten.exists():
        return rewritten
    write = rewriter(source, *settings)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place} cannot be made ({error.strerror}): set XDG_CACHE_HOME to another folder") from error
    lock = lock_folder(place, f"{place}", wait=WAIT_SECONDS)
    try:
        if not rewritten.exists():
            print(f"{source} is rewritten for training in {rewritten}, once", flush=True)
            began = time.monotonic()
            count = write(rewritten)
            print(f"{source}: {count} episodes in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        os.close(lock)
    return rewritten
