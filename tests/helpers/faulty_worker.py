"""A worker process that fails when a test writes how into the file SOLOVLA_TEST_FAULT; it draws no pictures.

`test_vector_env.py` starts it in the place of a real one: the same worker_main around the same env.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from envs import group, put_on_plate, workers

FAULT = Path(os.environ["SOLOVLA_TEST_FAULT"])
execute = group.EnvSlot.execute


def execute_or_fail(slot, action):
    fault = FAULT.read_text() if FAULT.exists() else ""
    if fault == "raise":
        raise ArithmeticError("made to fail")
    if fault == "hang":
        time.sleep(1000)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return execute(slot, action)


def flat_picture(env) -> np.ndarray:
    return np.full((*env.image_size[::-1], 3), len(env.instruction), np.uint8)


if __name__ == "__main__":
    group.EnvSlot.execute = execute_or_fail
    put_on_plate.PutOnPlateInScene.render_image = flat_picture
    workers.worker_main(*map(int, sys.argv[1:]))
