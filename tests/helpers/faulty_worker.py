"""A worker process that fails when a test writes how into the file SOLOVLA_TEST_FAULT. It draws no images.

`test_vector_env.py` starts it in the place of a real one: the same worker_main around the same env. A fault is one of
"raise", "hang" and "crash", and perhaps the id of the episode in which it happens.
"""

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from envs import group, put_on_plate, workers

execute = group.EnvSlot.execute


def execute_or_fail(slot, action):
    path = Path(os.environ["SOLOVLA_TEST_FAULT"])
    fault, _, episode_id = (path.read_text() if path.exists() else "").partition(" ")
    if episode_id in ("", str(slot.episode_id)):
        if fault == "raise":
            raise ArithmeticError("made to fail")
        if fault == "hang":
            time.sleep(1000)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
    return execute(slot, action)


def flat_picture(env) -> np.ndarray:
    return np.full((*env.image_size[::-1], 3), len(env.instruction), np.uint8)


def main(connection: Connection) -> None:
    group.EnvSlot.execute = execute_or_fail
    put_on_plate.PutOnPlateInScene.render_image = flat_picture
    workers.worker_main(connection)
