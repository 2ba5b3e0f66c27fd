"""Start states of a batch of envs. The ordinary env settles each in a PhysX scene of its own, in other processes.

A batch on the GPU simulates all rows together. If bodies fell for 1.3 s there, every other row's episode would stop for
that time, again and again once episodes end at different times. Their rest poses would depend on what that scene
simulated before. So `envs.put_on_plate` lets them fall as it always does, and the rows get the result: an episode id
names the same start state on the CPU and on the GPU, to the last bit. At 500 Hz one start state takes 20 to 60 ms of
one core. Results are kept, and a start state that will be needed can be requested in advance.

The settling runs in other processes, because one process cannot hold PhysX's GPU and CPU simulation. (ManiSkill's own
tests run separately for that reason.) A settler is a fresh interpreter like the workers of `envs/workers.py`, and ends
with its parent.
"""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from envs.processes import worker_environment
from envs.variants import StartState

if TYPE_CHECKING:
    from envs.put_on_plate import PutOnPlateInScene

SETTLER_CODE = "import sys; from envs.gpu.start_states import settler_main; settler_main(int(sys.argv[1]))"
KEPT = 16_384  # results, of some hundred bytes each
AT_ONCE = 32  # requests sent to one process: more could fill both sockets, and both sides would wait for ever


@dataclass(frozen=True)
class Settled:
    """One start state, as the ordinary env has it when an episode begins."""

    # object, receptacle and perhaps a distractor: p, q (wxyz), linear and angular velocity
    bodies: np.ndarray  # float32 [2 or 3, 13]
    qpos: np.ndarray  # float32 [8], rad and m
    half_sizes: np.ndarray  # float64 [2, 3]: world-aligned half edges of object and receptacle (m)


def settled_state(env: PutOnPlateInScene, start: StartState) -> Settled:
    """Begin the episode in an ordinary env and read its first state."""
    env.start_episode(start)
    return Settled(env.body_states(), env._robot.qpos, np.stack([env._object_half, env._receptacle_half]))


class Settlers:
    """Processes that settle start states. `ask` requests one and returns at once, and `get` waits for it."""

    def __init__(self, env_id: str, count: int, **settings):
        """Start `count` processes. settings: obj_set, asset_pack, asset_dir, sim_freq and protocol of the envs."""
        self._kept: collections.OrderedDict[StartState, Settled] = collections.OrderedDict()
        self._asked: dict[StartState, int] = {}  # the process that settles it
        self._backlogs = [collections.deque() for _ in range(count)]  # of each process: requests that are not sent yet
        self._sent = [0] * count  # of each process: requests that are sent and not answered
        self._processes: list[subprocess.Popen] = []
        self._connections: list[Connection] = []
        try:
            for _ in range(count):
                self._spawn((env_id, settings))
        except BaseException:
            self.close()
            raise

    def _spawn(self, first_message: tuple[str, dict]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", SETTLER_CODE, str(theirs.fileno())]
            self._processes.append(
                subprocess.Popen(
                    command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=worker_environment()
                )
            )
        self._connections.append(Connection(ours.detach()))
        self._connections[-1].send(first_message)

    def ask(self, start: StartState) -> None:
        """Request a start state from the process with the fewest requests, unless it is kept or requested already."""
        if start in self._kept or start in self._asked:
            return
        num_waiting = collections.Counter(self._asked.values())  # of each process
        k = min(range(len(self._connections)), key=lambda k: num_waiting[k])
        self._asked[start] = k
        self._backlogs[k].append(start)
        self._send(k)

    def _send(self, k: int) -> None:
        """Send requests from the backlog of process k, as many as it may have."""
        while self._backlogs[k] and self._sent[k] < AT_ONCE:
            try:
                self._connections[k].send(self._backlogs[k][0])
            except OSError:
                self._receive(k)  # the process has ended: its last message may give the reason
                continue
            self._backlogs[k].popleft()
            self._sent[k] += 1

    def get(self, start: StartState) -> Settled:
        """The settled state. Raises RuntimeError with the process's message where it could not be computed."""
        self.ask(start)
        while start not in self._kept:
            self._receive(self._asked[start])
        self._kept.move_to_end(start)
        return self._kept[start]

    def _receive(self, k: int) -> None:
        """Take the next result of process k."""
        try:
            kind, start, value = self._connections[k].recv()
        except (EOFError, OSError):
            self._fail(k, "it ended without a message")
        if kind == "error":
            self._fail(k, value)
        del self._asked[start]
        self._sent[k] -= 1
        self._send(k)
        self._kept[start] = value
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _fail(self, k: int, reason: str) -> NoReturn:
        raise RuntimeError(f"the process that settles start states ({self._processes[k].pid}) failed: {reason}")

    def close(self) -> None:
        """End the processes. A second call does nothing."""
        for connection in self._connections:
            connection.close()  # which ends the process
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._connections, self._processes = [], []


def settler_main(connection_fd: int) -> None:
    """A settler's main loop: build an env without rendering, settle start states, end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the socket
    connection = Connection(connection_fd)
    try:
        from envs.gym_env import build

        env_id, settings = connection.recv()
        env = build(env_id, image_size=(16, 16), render_backend="none", **settings)
        while True:
            start = connection.recv()
            connection.send(("ok", start, settled_state(env, start)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the envs, or ended
    except Exception as error:  # the parent reports it, whatever it is
        has_clear_message = isinstance(error, ValueError | RuntimeError)
        message = str(error) if has_clear_message else traceback.format_exc()
        connection.send(("error", None, message))
    os._exit(0)
