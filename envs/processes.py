"""What every process that simulates needs: environment variables, image memory, limits on time and losses."""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from envs.group import EnvSpec

MAX_LOSSES = 3  # of one worker, without a successful step between
START_SECONDS = 300.0  # to import the simulator, build the envs and compile shaders, at least


def image_arrays(buffer, count: int, spec: EnvSpec) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 [count, H, W, 3] views of one buffer: observations and final observations."""
    both = np.frombuffer(buffer, np.uint8).reshape(2, count, *spec.image_shape)
    return both[0], both[1]


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """All stacks and exit code 1 if the block takes longer. faulthandler's timer needs no lock of the interpreter, so a
    simulator that holds it is found too."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def worker_environment() -> dict[str, str]:
    """This environment, with the repository importable, one thread per library and no GPU memory taken by torch."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
