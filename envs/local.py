"""A group of envs in this process, with a worker's interface: start(method, ...), then finish().

All groups of a process share one simulator, and one thread at a time uses it. A simulator that hangs here cannot be
replaced. The process writes all stacks to stderr and ends with exit code 1.
"""

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from envs.group import EnvGroup
from envs.processes import START_SECONDS
from envs.spec import EnvSpec
from envs.world import SceneWorld, World

_simulator = threading.RLock()  # the collection of garbage may close other groups in the middle of a call


@contextlib.contextmanager
def alone(seconds: float) -> Iterator[None]:
    """Use this process's simulator. If the block takes longer, the process ends with all stacks and exit code 1."""
    with _simulator:
        # this timer does not need the interpreter's lock, so it also works while the simulator holds it
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


class LocalGroup:
    """A group in this process, with a worker's interface. Its errors go straight to the caller."""

    num_restarts = 0

    def __init__(self, spec: EnvSpec, offset: int, count: int, timeout: float, num_settlers: int = 1):
        """timeout: seconds that a call may take.

        num_settlers: processes that settle start states. Only a batch on the GPU has them.
        """
        self._timeout = timeout
        with alone(max(timeout, START_SECONDS)):
            world = _open_world(spec, count, num_settlers)
            images = torch.zeros(2, count, *spec.image_shape, dtype=torch.uint8, device=world.device)
            self.images, self.final_images = images
            self._group = EnvGroup(spec, offset, world, images)

    def built(self) -> None:
        """Nothing to wait for: the envs are already made."""

    def start(self, method: str, *args) -> None:
        """Run the call. `finish` gives its result."""
        with alone(self._timeout):
            self._result = getattr(self._group, method)(*args)

    def finish(self) -> Any:
        return self._result

    def close(self) -> None:
        with alone(self._timeout):
            self._group.close()


def _open_world(spec: EnvSpec, count: int, num_settlers: int) -> World:
    if spec.sim_backend != "physx_cuda":
        return SceneWorld(spec, count)
    from envs.gpu.world import open_batch

    return open_batch(spec, count, num_settlers)
