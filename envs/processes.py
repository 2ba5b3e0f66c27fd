"""Shared by all processes that simulate: environment variables, image memory, limits on time and losses."""

import mmap
import os
from pathlib import Path

import numpy as np

from envs.group import EnvSpec

MAX_LOSSES = 3  # of one worker or one row of a batch, without a successful step between them
START_SECONDS = 300.0  # a process may take at least this long to import the simulator, build envs, compile shaders


def image_arrays(buffer: bytearray | mmap.mmap, count: int, spec: EnvSpec) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 [count, H, W, 3] views of one buffer: observations and final observations."""
    both = np.frombuffer(buffer, np.uint8).reshape(2, count, *spec.image_shape)
    return both[0], both[1]


def worker_environment() -> dict[str, str]:
    """This process's environment variables, with this repository on PYTHONPATH and one thread per library."""
    folders = [str(Path(__file__).resolve().parent.parent)]
    if own := os.environ.get("PYTHONPATH"):
        folders.append(own)
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}  # LP: lavapipe
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | one_thread
