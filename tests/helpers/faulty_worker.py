"""A worker process that fails when a test writes how into the file SOLOVLA_TEST_FAULT. It draws no images.

`test_vector_env.py` starts it in the place of a real one: the same worker_main around the same env. A fault is one of
"raise", "hang", "nan", "crash" and "begin" (a crash when an episode begins), and perhaps the id of the episode.
"""

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from envs import group, put_on_plate, workers

execute, begin = group.EnvSlot.execute, group.EnvSlot.begin


def fault_of(episode_id: int) -> str:
    path = Path(os.environ["SOLOVLA_TEST_FAULT"])
    fault, _, chosen = (path.read_text() if path.exists() else "").partition(" ")
    return fault if chosen in ("", str(episode_id)) else ""


def execute_or_fail(slot, action):
    fault = fault_of(slot.episode_id)
    if fault == "raise":
        raise ArithmeticError("made to fail")
    if fault == "hang":
        time.sleep(1000)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    result = execute(slot, action)
    if fault == "nan":
        slot.env.privileged_state = lambda: np.full(45, np.nan, np.float32)
    return result


def begin_or_fail(slot, episode_id):
    if fault_of(episode_id) == "begin":
        os.kill(os.getpid(), signal.SIGSEGV)
    return begin(slot, episode_id)


def flat_picture(env) -> np.ndarray:
    return np.full((*env.image_size[::-1], 3), len(env.instruction), np.uint8)


def main(connection: Connection) -> None:
    group.EnvSlot.execute, group.EnvSlot.begin = execute_or_fail, begin_or_fail
    put_on_plate.PutOnPlateInScene.render_image = flat_picture
    workers.worker_main(connection)
