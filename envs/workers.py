"""A group of envs in a worker process. Like `envs/local.py`, it has start(method, ...) and then finish().

A worker is a process of `envs/processes.py`. It writes images into memory that it shares with the rank, and runs
`EnvGroup`, the same code that runs in the rank's process with num_env_workers=0. One worker can hold several groups:
those of training and those of evaluation take turns in it.

A worker that dies, raises or hangs is replaced by a successor. Each group begins anew in it when it is called next, and
takes over its place in the streams of episodes:

    call                     worker alive                         worker lost
    step                     its result, losses are forgotten     skipped: the step reports lost episodes as dropped
    reset of all envs,       its result, nothing is dropped       sent again to the successor, nothing is dropped
      load_state_dict
    reset of some envs,      its result                           sent again to the successor, and the next step is
      describe, state_dict                                        skipped: it reports lost episodes as dropped

A dropped episode whose id the caller had given begins again. An episode that loses its worker three times (MAX_LOSSES)
is given up: the next step reports it as ended, lost and failed. The worker says which env it simulates, so the other
episodes in it are not blamed. The run ends with the last error message after three losses in a row that no single
episode explains, or after three episodes in a row that were given up.
"""

from __future__ import annotations

import mmap
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from envs.group import EnvGroup, Position, empty_result
from envs.processes import START_SECONDS, Process, ProcessLost, plain, receive_fds
from envs.spec import EPISODE_METRICS, MAX_LOSSES, EnvSpec
from envs.world import SceneWorld

WORKER = "envs.workers:worker_main"
WORKER_TITLE = "solovla worker"


class GroupRefused(ProcessLost):
    """The envs of a group cannot be built. `error` is what building them raised, or None where it was of another kind
    than a caller can handle."""

    def __init__(self, message: str, error: Exception | None):
        super().__init__(message)
        self.error = error


class Worker:
    """A worker process, the groups in it, and its successors."""

    def __init__(self) -> None:
        """Raises ProcessLost where the process cannot be started."""
        self.generation = 0  # the number of its successors so far
        self.process = Process(WORKER, WORKER_TITLE)
        self._members: set[int] = set()  # keys of the groups
        self._next_key = 0
        self._answers: dict[int, tuple] = {}  # of groups that have not asked for theirs yet

    def join(self) -> int:
        """The key of a new group."""
        self._next_key += 1
        self._members.add(self._next_key)
        return self._next_key

    def leave(self, key: int) -> None:
        """End a group. The last one ends the process."""
        self._members.discard(key)
        self._answers.pop(key, None)
        if self._members:
            self.process.send(key, "close", ())
        else:
            self.process.bury(patience=5.0)

    def renew(self, generation: int) -> None:
        """Put a successor in the place of this generation, unless another group has done so.

        Raises:
            ProcessLost: the successor cannot be started.
        """
        if generation == self.generation:
            self.process.bury()
            self._answers.clear()
            self.process = Process(WORKER, WORKER_TITLE)
            self.generation += 1

    def receive(self, key: int, seconds: float, name: Callable[[], str]) -> tuple:
        """The next answer of a group: (kind, key, value, details). Raises ProcessLost."""
        while key not in self._answers:
            answer = self.process.receive(seconds, name)
            if answer[1] in self._members:
                self._answers[answer[1]] = answer
        return self._answers.pop(key)


class WorkerGroup:
    """An EnvGroup in a worker."""

    def __init__(self, spec: EnvSpec, offset: int, count: int, timeout: float, worker: Worker | None = None):
        """Begin to build the envs. `built()` waits until they are made.

        Args:
            timeout: seconds after which a worker without an answer counts as lost.
            worker: where the envs live. None starts a worker of their own.

        Raises:
            ProcessLost: a worker cannot be started.
        """
        self.offset, self.count = offset, count
        self.num_restarts = 0
        self._spec, self._timeout = spec, timeout
        self._losses = 0  # since the last step that a worker executed
        self._given_up = 0  # episodes, since an action was executed
        self._blamed: dict[int, tuple[int, int]] = {}  # env -> the episode that lost its worker, how often
        self._lost = np.zeros(count, bool)  # episodes that were given up, until a step reports them
        self._positions = [Position(0, None, False, False)] * count  # as of the last answer
        self._skip_next_step = False  # a worker was lost since the last step
        self._dropped = np.zeros(count, bool)  # episodes lost since the last step
        self._latest_seen: dict = {}  # what a skipped step shows: `seen()` of the successor
        images = 2 * count * int(np.prod(spec.image_shape))
        self.worker = worker or Worker()
        self._key = self.worker.join()
        self._memory_fd = os.memfd_create("solovla_images")  # it has no name: it is gone when its last holder is
        try:
            os.ftruncate(self._memory_fd, images + 4)
            memory = mmap.mmap(self._memory_fd, images + 4)
            self.images, self.final_images = shared_images(memory, count, spec)
            self._busy = busy_env(memory)
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.worker.process.pid

    def _open(self) -> None:
        """Begin to build the envs in the present worker."""
        self._generation = self.worker.generation
        self._busy[0] = 0
        opening = (asdict(self._spec), self.offset, self.count)
        self.worker.process.send(self._key, "open", opening, fds=(self._memory_fd,))

    def built(self) -> None:
        """Wait until the envs are made for the first time. A failure is final here: a second try would fail as well.

        Raises:
            ValueError, RuntimeError, OSError: what building the envs raised, or why the worker was lost.
        """
        try:
            self._receive(starting=True)
        except GroupRefused as refusal:
            if refusal.error is not None:
                raise refusal.error from refusal
            raise RuntimeError(str(refusal)) from None
        except ProcessLost as loss:
            raise RuntimeError(str(loss)) from None

    def start(self, method: str, *args) -> None:
        """Begin a call. `finish` gives its result."""
        self._pending = (method, args)
        if method == "step" and self._skip_next_step:
            return  # the actions were meant for episodes that are lost
        self._send(method, args)

    def finish(self) -> Any:
        """The result of the call that `start` began (see the table at the head of this file)."""
        method, args = self._pending
        if method == "step":
            return self._finish_step(*args)
        if method == "reset":
            return self._finish_reset(*args)
        if method == "load_state_dict":
            return self._finish_load_state_dict()
        return self._answer(begin_episodes=True)

    def _finish_step(self, actions: np.ndarray) -> dict:
        """actions float32 [count, C, 7]."""
        chunk_size = actions.shape[1]
        if self._skip_next_step:
            return self._skipped_step(chunk_size)
        try:
            result = self._receive()
        except ProcessLost as loss:
            self._replace(loss, begin_episodes=True)
            return self._skipped_step(chunk_size)
        self._losses = 0
        if result["valid"].any():
            self._given_up = 0
        for i, *_ in result["ended"]:
            self._blamed.pop(i, None)
        return self._with_lost(result)

    def _finish_reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        self._lost[chosen] = False  # nobody waits for the episodes before
        all_envs = len(chosen) == self.count
        seen = self._answer(begin_episodes=not all_envs)
        if all_envs:
            self._forget_dropped()
        elif self._skip_next_step:
            self._dropped[chosen] = ~self._lost[chosen]  # the next step is skipped for all envs, these included
            self._latest_seen = seen
        return seen

    def _finish_load_state_dict(self) -> dict:
        seen = self._answer(begin_episodes=False)
        self._forget_dropped()
        return seen

    def _answer(self, begin_episodes: bool) -> Any:
        """The answer to the pending call, from this worker or from the first successor that gives one."""
        while True:
            try:
                return self._receive()
            except ProcessLost as loss:
                self._replace(loss, begin_episodes)
            method, args = self._pending
            if method == "reset":  # an episode that was given up is not begun again
                kept = [(one, i) for one, i in zip(*args) if not self._lost[i]]
                args = [one for one, _ in kept], [i for _, i in kept]
            self._send(method, args)

    # ----------------------------------------------------------------------------------------------------- losses

    def _replace(self, loss: ProcessLost, begin_episodes: bool) -> None:
        """Begin anew in a successor of the lost worker.

        begin_episodes: its envs begin an episode, and the episodes that were running count as dropped. False where the
            pending call begins all episodes itself.
        """
        positions = self._positions  # in the lost worker: an answer of the successor replaces the attribute
        running = np.array([position.running for position in positions])
        while True:
            remark = self._blame(loss)
            self.num_restarts += 1
            dropped = running & ~self._lost if begin_episodes else np.zeros(self.count, bool)
            warnings.warn(
                f"{loss}\n{remark}The worker is restarted and {dropped.sum()} episodes are dropped.",
                RuntimeWarning,
                stacklevel=2,
            )
            try:
                self.worker.renew(self._generation)
                self._take_over(positions, begin_episodes)
                break
            except ProcessLost as next_loss:
                loss = next_loss
        self._skip_next_step = True
        self._dropped = (self._dropped | dropped) & ~self._lost

    def _blame(self, loss: ProcessLost) -> str:
        """Count a loss, and give up the episode that has lost its worker for the last time.

        Returns:
            a line about the episode that was simulated, or "".

        Raises:
            RuntimeError: too many losses in a row.
        """
        self._losses += 1
        env, episode_id = self._simulated()
        remark, gave_up = "", False
        if episode_id is not None:
            before, times = self._blamed.get(env, (episode_id, 0))
            times = times + 1 if before == episode_id else 1
            self._blamed[env] = (episode_id, times)
            gave_up = times == MAX_LOSSES
            remark = f"It simulated episode {episode_id}, which has lost {times} of {MAX_LOSSES} workers. "
        if gave_up:
            self._lost[env] = True
            self._given_up += 1
            self._losses = 0
            remark = f"Episode {episode_id} has lost its worker {MAX_LOSSES} times: it ends here as lost and failed.\n"
        if self._losses >= MAX_LOSSES or self._given_up >= MAX_LOSSES:
            what = "losses in a row" if self._losses else "episodes in a row were given up"
            raise RuntimeError(f"{MAX_LOSSES} {what}: {loss}\n{remark}".rstrip()) from None
        return remark

    def _simulated(self) -> tuple[int, int | None]:
        """The env that was simulated when the worker was lost, and its episode if the caller had given the id.

        The id is None where no env was simulated, or where its next episode is another one anyway.
        """
        env = int(self._busy[0]) - 1
        if env < 0 or self._lost[env]:
            return env, None
        method, args = self._pending
        if method == "reset" and env in args[1]:
            return env, args[0][args[1].index(env)]
        position = self._positions[env]
        return env, position.episode_id if position.explicit and method != "load_state_dict" else None

    def _take_over(self, positions: list[Position], begin_episodes: bool) -> None:
        """Build the envs in the present worker and continue. Raises ProcessLost where it is lost as well."""
        self._open()
        self._receive(starting=True)
        self._send("take_over", (positions, begin_episodes, np.flatnonzero(self._lost).tolist()))
        self._latest_seen = self._receive(starting=True)

    def _forget_dropped(self) -> None:
        """Every env has just begun an episode, so no earlier loss matters any more."""
        self._skip_next_step = False
        self._dropped = np.zeros(self.count, bool)

    def _skipped_step(self, chunk_size: int) -> dict:
        """The result of a step that executed nothing, because a worker was lost before it or in it."""
        result = empty_result(self.count, chunk_size) | self._latest_seen | {"dropped": self._dropped}
        if self._spec.privileged:
            result["states"] = np.repeat(self._latest_seen["state"][:, None], chunk_size, axis=1)
        self._forget_dropped()
        return self._with_lost(result)

    def _with_lost(self, result: dict) -> dict:
        """Add the episodes that were given up to a step's result, as ended, failed and without any action."""
        for i in np.flatnonzero(self._lost).tolist():
            state = result["state"][i] if self._spec.privileged else None
            result["ended"].append((i, (0.0,) * len(EPISODE_METRICS), result["instructions"][i], state))
            result["truncations"][i] = result["lost"][i] = True
            self.final_images[i] = self.images[i]
            self._blamed.pop(i, None)
        self._lost[:] = False
        return result

    # ----------------------------------------------------------------------------------------------------- messages

    def _send(self, method: str, arguments: tuple) -> None:
        if self._generation == self.worker.generation:  # else `_receive` notices the loss
            self.worker.process.send(self._key, method, arguments)

    def _receive(self, starting: bool = False) -> Any:
        """The next answer to this group. Raises ProcessLost where there is none."""
        if self._generation != self.worker.generation:
            raise ProcessLost(f"{self._name()} was lost while it simulated other envs.")
        seconds = max(self._timeout, START_SECONDS) if starting else self._timeout
        kind, _, value, details = self.worker.receive(self._key, seconds, self._name)
        if kind == "refused":  # details: the exception that building the envs raised, or None
            raise GroupRefused(f"{self._name()} failed:\n{value}", details)
        if details is not None:  # details: the positions of all envs
            self._positions = details
        return value

    def _name(self) -> str:
        """Which envs the worker holds, and which episodes they were in when it last answered."""
        ids = [str(position.episode_id) for position in self._positions if position.episode_id is not None]
        listed = ", ".join(ids[:8])
        if not ids:
            progress = "before its first episode"
        elif len(ids) == 1:
            progress = f"episode {listed}"
        else:
            progress = f"episodes {listed}, ..." if len(ids) > 8 else f"episodes {listed}"
        envs = f"envs {self.offset} to {self.offset + self.count - 1}"
        return f"the worker of {envs} ({self._spec.env_id}, {progress}, process {self.pid})"

    def close(self) -> None:
        """End the envs, and the worker with its last ones."""
        self.worker.leave(self._key)
        os.close(self._memory_fd)


def shared_images(memory: mmap.mmap, count: int, spec: EnvSpec) -> torch.Tensor:
    """uint8 [2, count, h, w, 3], the first bytes of a group's memory: latest images and last ones of episodes."""
    shape = 2, count, *spec.image_shape
    return torch.frombuffer(memory, dtype=torch.uint8, count=int(np.prod(shape))).view(shape)


def busy_env(memory: mmap.mmap) -> np.ndarray:
    """int32 [1], the last bytes of a group's memory: 1 + the env that is being simulated, or 0."""
    return np.frombuffer(memory, np.uint8)[-4:].view(np.int32)


def worker_main(connection: Connection) -> None:
    """The worker's main loop: build groups of envs and answer their calls.

    A message is (group, method, arguments). The methods "open" and "close" begin and end a group, "open" with the file
    of its memory. An answer is (kind, group, value, details).
    """
    groups: dict[int, EnvGroup] = {}
    while True:
        key, method, args = connection.recv()
        if method == "open":
            (memory_fd,) = receive_fds(connection, 1)
            try:
                groups[key] = _open_group(memory_fd, *args)
            except Exception as error:  # the rank reports it. The other groups go on
                connection.send(("refused", key, traceback.format_exc(), plain(error)))
                continue
            connection.send(("ok", key, None, None))
        elif method == "close":
            if key in groups:
                groups.pop(key).close()
        else:
            group = groups[key]
            value = getattr(group, method)(*args)
            group.world.busy[0] = 0
            connection.send(("ok", key, value, group.positions()))


def _open_group(memory_fd: int, fields: dict, offset: int, count: int) -> EnvGroup:
    spec = EnvSpec(**fields)
    memory = mmap.mmap(memory_fd, 0)
    os.close(memory_fd)
    world = SceneWorld(spec, count, busy_env(memory))
    return EnvGroup(spec, offset, world, shared_images(memory, count, spec))
