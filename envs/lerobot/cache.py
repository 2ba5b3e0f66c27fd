"""Sets in LeRobot's format as training reads them: rewritten once, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from envs.lerobot.read import read_set
from schemas import UserError
from schemas.lock import lock_folder

WAIT_SECONDS = 6 * 3600.0  # while another rank or run writes the same set


def cache_folder() -> Path:
    """The folder for sets: solovla/demos in $XDG_CACHE_HOME, which is ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solovla" / "demos"


def fingerprint(folder: Path, camera: str | None) -> str:
    """A name for a set: it changes with its place, the camera, and the size or time of any file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder.resolve()), camera, facts)).encode()).hexdigest()[:16]


def cached(folder: Path, camera: str | None) -> Path:
    """The set in ManiSkill's format. The first process that asks writes it, and others on its machine wait.

    Raises:
        UserError: the set is damaged, or the cache cannot be written.
    """
    place = cache_folder() / f"{folder.resolve().name}-{fingerprint(folder, camera)}"
    rewritten = place / "set"
    if rewritten.exists():
        return rewritten
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
