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

from envs import workers
from envs.put_on_plate import PutOnPlateInScene

advance, start_episode = PutOnPlateInScene.advance, PutOnPlateInScene.start_episode


def fault_of(episode_id: int) -> str:
    path = Path(os.environ["SOLOVLA_TEST_FAULT"])
    fault, _, chosen = (path.read_text() if path.exists() else "").partition(" ")
    return fault if chosen in ("", str(episode_id)) else ""


def advance_or_fail(env, action):
    fault = fault_of(env.start.episode_id)
    if fault == "raise":
        raise ArithmeticError("made to fail")
    if fault == "hang":
        time.sleep(1000)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    result = advance(env, action)
    if fault == "nan":
        env.privileged_state = lambda: np.full(45, np.nan, np.float32)
    return result


def start_or_fail(env, start):
    if fault_of(start.episode_id) == "begin":
        os.kill(os.getpid(), signal.SIGSEGV)
    return start_episode(env, start)


def flat_picture(env) -> np.ndarray:
    return np.full((*env.image_size[::-1], 3), len(env.instruction), np.uint8)


def main(connection: Connection) -> None:
    PutOnPlateInScene.advance, PutOnPlateInScene.start_episode = advance_or_fail, start_or_fail
    PutOnPlateInScene.render_image = flat_picture
    workers.worker_main(connection)
