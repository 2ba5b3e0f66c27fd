"""Names in a LeRobot data set, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from schemas import UserError, is_taken
from schemas.demonstrations import PICTURES

VERSION = "v3.0"
INFO, STATISTICS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_PER_CHUNK = 1000
DATA_MIB, VIDEO_MIB = 100, 200  # a file that has reached this size is followed by the next
OWN = "meta/solovla"  # our files, which LeRobot does not look at
TASK_INDEX = "__index_level_0__"  # pandas' name of an index without one: the instructions

CAMERA_FLAG = "--demos_camera"
CAMERA = f"observation.images.{PICTURES.split('/')[2]}"
STATE = "observation.state"
ACTION_NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


class Column(NamedTuple):
    """A column of data/: the HDF5 dataset that it holds, its numpy dtype, and its width."""

    dataset: str
    dtype: str
    width: int


COLUMNS = {  # feature -> what it holds, in the order of the file
    "action": Column("actions", "float32", 7),
    "expert_actions": Column("expert_actions", "float32", 7),
    "keep": Column("keep", "bool", 1),
    "next.reward": Column("rewards", "float32", 1),
    "next.terminated": Column("terminated", "bool", 1),
    "next.truncated": Column("truncated", "bool", 1),
    "next.success": Column("success", "bool", 1),
}


def place(number: int) -> dict[str, int]:
    """Chunk and file of the file with this number: 1001 is the second file of the second chunk."""
    chunk, file = divmod(number, FILES_PER_CHUNK)
    return {"chunk_index": chunk, "file_index": file}


def write_json(path: Path, content: object) -> None:
    """Write a JSON file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def check_new(folder: Path) -> None:
    """Raise UserError where this folder holds something already, or is a file."""
    if folder.is_symlink() or is_taken(folder):
        raise UserError(f"{folder} exists already: name a new folder, or remove it")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end. An error or Ctrl-C removes it.

    Raises:
        UserError: the folder cannot be written.
    """
    check_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as partial:
            new = Path(partial) / "set"
            new.mkdir()
            yield new
            os.replace(new, folder)
    except (OSError, RuntimeError) as error:  # h5py raises RuntimeError when it closes a file on a full disk
        why = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise UserError(f"{folder} cannot be written ({why}): check the disk and the path") from error
