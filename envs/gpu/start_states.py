"""Start states of a batch of envs: settled by the ordinary env, each in a PhysX scene of its own, in other processes.

In a batch on the GPU all rows are simulated together, so bodies that fall for 1.3 s would stop every other row's
episode for as long, again and again once episodes end at different times. And what they come to rest as would depend
on what that scene simulated before. So `envs.put_on_plate` lets them fall as it always does, and rows are given the
result: an episode id names the same start state, to the bit, on the CPU and on the GPU. It takes 20 to 60 ms of one
core per start state at 500 Hz; a result is kept, and one that is known to be needed can be asked for beforehand.

In another process because one process can not hold PhysX's GPU and CPU simulation (ManiSkill's own tests run apart for
that reason). A settler is a fresh interpreter, as the workers of `envs/workers.py` are, and ends with its parent.
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

import numpy as np

from envs.processes import worker_environment
from envs.variants import StartState

SETTLER_CODE = "import sys; from envs.gpu.start_states import settler_main; settler_main(int(sys.argv[1]))"
KEPT = 16_384  # results; some hundred bytes each
AT_ONCE = 32  # requests that one process has been sent: more could fill both sockets, and both sides would wait


@dataclass(frozen=True)
class Settled:
    """One start state as the ordinary env has it when an episode begins."""

    bodies: np.ndarray  # float32 [2 or 3, 13]: object, receptacle, distractor; p, q (wxyz), linear, angular velocity
    qpos: np.ndarray  # float32 [8], rad and m
    half_sizes: np.ndarray  # float64 [2, 3]: world-aligned half edges of object and receptacle (m)


def settled_state(env, start: StartState) -> Settled:
    """Start the episode in an ordinary env (`PutOnPlateInScene`) and read what it begins with."""
    env.start_episode(start)
    return Settled(env.body_states(), env._robot.qpos, np.stack([env._object_half, env._receptacle_half]))


class Settlers:
    """Processes that settle start states. `ask` returns at once, `get` waits; both may be called for the same start."""

    def __init__(self, env_id: str, count: int, **settings):
        """settings: obj_set, asset_pack, asset_dir, sim_freq, protocol, as for the env itself."""
        self._kept: collections.OrderedDict[StartState, Settled] = collections.OrderedDict()
        self._asked: dict[StartState, int] = {}  # of which process
        self._backlogs = [collections.deque() for _ in range(count)]  # asked of each, but not sent yet
        self._sent = [0] * count  # and not answered
        self._processes: list[subprocess.Popen] = []
        self._connections: list[Connection] = []
        try:
            for _ in range(count):
                self._spawn((env_id, settings))
        except BaseException:
            self.close()
            raise

    def _spawn(self, what: tuple) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", SETTLER_CODE, str(theirs.fileno())]
            self._processes.append(
                subprocess.Popen(
                    command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=worker_environment()
                )
            )
        self._connections.append(Connection(ours.detach()))
        self._connections[-1].send(what)

    def ask(self, start: StartState) -> None:
        """Have it settled by whoever has the least to do, unless it is or is being settled."""
        if start in self._kept or start in self._asked:
            return
        waiting = collections.Counter(self._asked.values())
        k = min(range(len(self._connections)), key=lambda k: waiting[k])
        self._asked[start] = k
        self._backlogs[k].append(start)
        self._send(k)

    def _send(self, k: int) -> None:
        """As much of the backlog as is good for process k."""
        while self._backlogs[k] and self._sent[k] < AT_ONCE:
            try:
                self._connections[k].send(self._backlogs[k][0])
            except OSError:
                self._receive(k)  # it has ended, and perhaps said why
                continue
            self._backlogs[k].popleft()
            self._sent[k] += 1

    def get(self, start: StartState) -> Settled:
        """The settled state. Raises what the process said where it could not be computed."""
        self.ask(start)
        while start not in self._kept:
            self._receive(self._asked[start])
        self._kept.move_to_end(start)
        return self._kept[start]

    def _receive(self, k: int) -> None:
        try:
            kind, start, value = self._connections[k].recv()
        except (EOFError, OSError):
            self._fail(k, "it ended without a word")
        if kind == "error":
            self._fail(k, value)
        del self._asked[start]
        self._sent[k] -= 1
        self._send(k)
        self._kept[start] = value
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _fail(self, k: int, why: str) -> None:
        raise RuntimeError(f"the process that settles start states ({self._processes[k].pid}) failed: {why}")

    def close(self) -> None:
        """End the processes; safe to call twice."""
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()  # they notice
        processes, self._processes = self._processes, []
        for process in processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def settler_main(connection_fd: int) -> None:
    """A settler's life: build an env that renders nothing, settle what is asked for, end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the socket
    connection = Connection(connection_fd)
    try:
        from envs.put_on_plate import build

        env_id, settings = connection.recv()
        env = build(env_id, image_size=(16, 16), render_backend="none", **settings)
        while True:
            start = connection.recv()
            connection.send(("ok", start, settled_state(env, start)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the envs, or ended
    except Exception as error:  # whatever it is, the parent has to hear of it
        clear = isinstance(error, ValueError | RuntimeError)
        connection.send(("error", None, str(error) if clear else traceback.format_exc()))
    os._exit(0)
