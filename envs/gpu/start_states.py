"""Start states of a batch of envs. The ordinary env settles each in a PhysX scene of its own, in other processes.

A batch on the GPU simulates all rows together. If bodies fell for 1.3 s there, every other row's episode would stop for
that time, again and again once episodes end at different times. Their rest poses would depend on what that scene
simulated before. So `envs.put_on_plate` lets them fall as it always does, on a CPU but with the hulls of the batch
(`envs/assets/hulls.py`), and the rows get the result. At 500 Hz one start state takes 20 to 60 ms of one core. Results
are kept, and a start state that will be needed can be requested in advance.

The settling runs in other processes, so that it does not stop the rank. (PhysX's GPU simulation must also be the first
one of its process.) A settler is a process of `envs/processes.py`, and one that is lost is replaced.
"""

from __future__ import annotations

import collections
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.processes import START_SECONDS, Process, ProcessLost, plain
from envs.spec import MAX_LOSSES
from envs.variants import StartState

if TYPE_CHECKING:
    from envs.put_on_plate import PutOnPlateInScene

SETTLER = "envs.gpu.start_states:settler_main"
SECONDS = 60.0  # a settler has so long for a start state, which takes it less than 0.1
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


class Settler:
    """A process that settles start states one after the other, and its successors."""

    def __init__(self, build: tuple[str, dict[str, Any]]):
        """build: env id and settings of the env. Raises ProcessLost where the process cannot be started."""
        self._build = build
        self.backlog: collections.deque[StartState] = collections.deque()  # requests that are not sent yet
        self._sent: collections.deque[StartState] = collections.deque()  # requests that are not answered yet
        self._blamed: tuple[StartState | None, int] = (None, 0)  # what was settled when it was lost, and how often
        self._spawn()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def num_waiting(self) -> int:
        return len(self.backlog) + len(self._sent)

    def _spawn(self) -> None:
        self._process = Process(SETTLER, "solovla settler")
        self._process.send(self._build)
        self._seconds = START_SECONDS  # until the first answer

    def ask(self, start: StartState) -> None:
        self.backlog.append(start)
        self._send()

    def _send(self) -> None:
        """Send requests from the backlog, as many as the process may have."""
        while self.backlog and len(self._sent) < AT_ONCE:
            self._sent.append(self.backlog.popleft())
            self._process.send(self._sent[-1])

    def receive(self) -> tuple[StartState, Settled]:
        """The next result. A lost process is replaced.

        Raises:
            RuntimeError: the env cannot be built, or one start state has lost MAX_LOSSES processes.
        """
        while True:
            try:
                kind, *answer = self._process.receive(self._seconds, self._name)
                break
            except ProcessLost as loss:
                self._replace(loss)
        if kind == "refused":
            text, error = answer
            raise RuntimeError(f"{self._name()} failed: {error or text}")
        self._seconds = SECONDS
        self._sent.popleft()  # answers come in the order of requests
        self._send()
        start, settled = answer
        return start, settled

    def _replace(self, loss: ProcessLost) -> None:
        """Start a successor, which gets all requests that were not answered."""
        while True:
            blamed, times = self._blamed
            times = times + 1 if blamed == self._sent[0] else 1
            self._blamed = (self._sent[0], times)
            if times == MAX_LOSSES:
                raise RuntimeError(
                    f"start state {self._sent[0].episode_id} has lost {MAX_LOSSES} processes: {loss}"
                ) from None
            warnings.warn(f"{loss}\nThe process is restarted, and nothing is lost.", RuntimeWarning, stacklevel=2)
            self._process.bury()
            try:
                self._spawn()
                break
            except ProcessLost as next_loss:
                loss = next_loss
        self.backlog.extendleft(reversed(self._sent))
        self._sent.clear()
        self._send()

    def _name(self) -> str:
        return f"the process that settles start states ({self.pid})"

    def close(self) -> None:
        self._process.bury(patience=5.0)


class Settlers:
    """Processes that settle start states. `ask` requests one and returns at once, and `get` waits for it."""

    def __init__(self, env_id: str, count: int, **settings):
        """Start `count` processes. settings: obj_set, asset_pack, asset_dir, sim_freq, protocol, hulls."""
        self._kept: collections.OrderedDict[StartState, Settled] = collections.OrderedDict()
        self._asked: dict[StartState, Settler] = {}  # the process that settles it
        self._settlers: list[Settler] = []
        try:
            for _ in range(count):
                self._settlers.append(Settler((env_id, settings)))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [settler.pid for settler in self._settlers]

    def ask(self, start: StartState) -> None:
        """Request a start state from the process with the fewest requests, unless it is kept or requested already."""
        if start in self._kept or start in self._asked:
            return
        self._asked[start] = min(self._settlers, key=lambda settler: settler.num_waiting)
        self._asked[start].ask(start)

    def get(self, start: StartState) -> Settled:
        """The settled state. Raises RuntimeError where it cannot be computed."""
        self.ask(start)
        while start not in self._kept:
            answered, settled = self._asked[start].receive()
            del self._asked[answered]
            self._kept[answered] = settled
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(start)
        return self._kept[start]

    def close(self) -> None:
        """End the processes. A second call does nothing."""
        settlers, self._settlers = self._settlers, []
        for settler in settlers:
            settler.close()


def settler_main(connection: Connection) -> None:
    """A settler's main loop: build an env without rendering, and settle start states."""
    from envs.gym_env import build

    ((env_id, settings),) = connection.recv()
    try:
        env = build(env_id, image_size=(16, 16), render_backend="none", **settings)
    except Exception as error:  # the rank reports it
        connection.send(("refused", traceback.format_exc(), plain(error)))
        return
    while True:
        (start,) = connection.recv()
        connection.send(("ok", start, settled_state(env, start)))
