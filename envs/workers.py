"""A group of envs in a worker process. Like `envs/local.py`, it has start(method, ...) and then finish().

A worker is a fresh interpreter, so it never imports the parent's `__main__` (which imports DeepSpeed). It talks over a
socket pair and writes images into an unlinked memory file. It ends when the parent ends, however that happens, and
nothing stays in /dev/shm. It runs `EnvGroup`, the same code that runs in this process with num_env_workers=0.

A worker that dies, raises or hangs is replaced by a successor, which takes over its place in the streams of episodes:

    call                     worker alive                         worker lost
    step                     its result, losses are forgotten     skipped: the step reports lost episodes as dropped
    reset of all envs,       its result, nothing is dropped       sent again to the successor, nothing is dropped
      load_state_dict
    reset of some envs,      its result                           sent again to the successor, and the next step is
      describe, state_dict                                        skipped: it reports lost episodes as dropped

The run ends with the last error message after three losses (MAX_LOSSES) without a successful step between them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from envs.group import EnvGroup, EnvSpec, Position, empty_result
from envs.processes import MAX_LOSSES, START_SECONDS, image_arrays, worker_environment

STACK_SECONDS = 2.0  # a hanging worker has this long to write its stacks
STACK_BYTES = 1 << 16
WORKER_CODE = "import sys; from envs.workers import worker_main; worker_main(*map(int, sys.argv[1:]))"


class WorkerLost(Exception):
    """A worker cannot answer any more. The message says why. `refusal` is the error of building its envs, or None."""

    def __init__(self, message: str, refusal: Exception | None = None):
        super().__init__(message)
        self.refusal = refusal


class WorkerGroup:
    """An EnvGroup in a process of its own."""

    def __init__(self, spec: EnvSpec, offset: int, count: int, timeout: float):
        """Start the process. `built()` waits until its envs are made.

        timeout: seconds after which a worker without an answer counts as lost.
        """
        self.offset, self.count = offset, count
        self.num_restarts = 0
        self._spec, self._timeout = spec, timeout
        self._losses = 0  # since the last step that a worker executed
        self._positions = [Position(0, None, False, False)] * count  # as of the last answer
        self._skip_next_step = False  # a worker was lost since the last step
        self._dropped = np.zeros(count, bool)  # episodes lost since the last step
        self._latest_seen: dict = {}  # what a skipped step shows: `seen()` of the successor
        size = 2 * count * int(np.prod(spec.image_shape))
        self._connection: Connection | None = None
        self._process: subprocess.Popen | None = None
        # the memory files have no name: they are gone when their last holder is
        self._memory_fd = os.memfd_create("solovla_images")
        self._stacks_fd = os.memfd_create("solovla_stacks")
        try:
            os.ftruncate(self._memory_fd, size)
            self.images, self.final_images = image_arrays(mmap.mmap(self._memory_fd, size), count, spec)
            self._spawn()
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> None:
        os.ftruncate(self._stacks_fd, 0)
        os.lseek(self._stacks_fd, 0, os.SEEK_SET)
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._memory_fd, self._stacks_fd)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER_CODE, *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env=worker_environment(),
            )
        finally:
            theirs.close()
            self._connection = Connection(ours.detach())
        self._send(asdict(self._spec), self.offset, self.count)

    def built(self) -> None:
        """Wait until the envs are made for the first time. A failure is final here: a second try would fail as well.

        Raises:
            ValueError, RuntimeError, OSError: what building the envs raised, or why the worker was lost.
        """
        try:
            self._receive(starting=True)
        except WorkerLost as loss:
            if loss.refusal is not None:
                raise loss.refusal from loss
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
        except WorkerLost as loss:
            self._replace(loss, begin_episodes=True)
            return self._skipped_step(chunk_size)
        self._losses = 0
        return result

    def _finish_reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        all_envs = len(chosen) == self.count
        seen = self._answer(begin_episodes=not all_envs)
        if all_envs:
            self._forget_dropped()
        elif self._skip_next_step:
            self._dropped[chosen] = True  # the next step is skipped for the whole group, these envs included
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
            except WorkerLost as loss:
                self._replace(loss, begin_episodes)
            self._send(*self._pending)

    # ----------------------------------------------------------------------------------------------------- losses

    def _replace(self, loss: WorkerLost, begin_episodes: bool) -> None:
        """Put a successor in the place of the lost worker.

        begin_episodes: its envs begin an episode, and the episodes that were running count as dropped. False where the
            pending call begins all episodes itself.
        """
        positions = self._positions  # of the lost worker: an answer of the successor replaces the attribute
        running = np.array([position.running for position in positions])
        dropped = running if begin_episodes else np.zeros(self.count, bool)
        while True:
            self._stop(patience=0.0)
            self._losses += 1
            if self._losses == MAX_LOSSES:
                raise RuntimeError(f"{MAX_LOSSES} losses in a row: {loss}") from None
            warnings.warn(
                f"{loss}\nThe worker is restarted and {dropped.sum()} episodes are dropped.",
                RuntimeWarning,
                stacklevel=2,
            )
            self.num_restarts += 1
            try:
                self._start_successor(positions, begin_episodes)
                break
            except WorkerLost as next_loss:
                loss = next_loss
        self._skip_next_step = True
        self._dropped |= dropped

    def _start_successor(self, positions: list[Position], begin_episodes: bool) -> None:
        """Raises WorkerLost where the successor is lost as well."""
        self._spawn()
        self._receive(starting=True)
        self._send("take_over", (positions, begin_episodes))
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
        return result

    # ----------------------------------------------------------------------------------------------------- messages

    def _send(self, *message) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed by `_receive`
            self._connection.send(message)

    def _receive(self, starting: bool = False) -> Any:
        """The worker's next answer. Raises WorkerLost where there is none."""
        seconds = max(self._timeout, START_SECONDS) if starting else self._timeout
        try:
            if not self._connection.poll(seconds):
                raise WorkerLost(self._hang_notice(seconds))
            kind, value, details = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerLost(self._death_notice()) from None
        if kind == "error":  # details: the exception that building the envs raised, or None
            raise WorkerLost(f"{self._name()} failed:\n{value}", refusal=details)
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
        return f"the worker of {envs} ({self._spec.env_id}, {progress}, process {self._process.pid})"

    def _stacks(self) -> str:
        return os.pread(self._stacks_fd, STACK_BYTES, 0).decode(errors="replace").rstrip()

    def _hang_notice(self, seconds: float) -> str:
        self._process.send_signal(signal.SIGUSR1)  # faulthandler then writes all stacks, whoever holds the interpreter
        deadline = time.monotonic() + STACK_SECONDS
        while not self._stacks() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.05)  # for the rest of the stacks
        stacks = self._stacks()
        where = f"it hung here:\n{stacks}" if stacks else "it did not even answer a signal."
        return f"{self._name()} gave no answer for {seconds:g} s, {where}"

    def _death_notice(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return f"{self._name()} closed its connection but is still running."
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        notice = f"{self._name()} {cause} without a Python traceback"
        if stacks := self._stacks():
            return f"{notice}. Its stacks:\n{stacks}"
        if code == -signal.SIGKILL:
            return f"{notice}: memory probably ran out, so use fewer envs."
        return f"{notice}."

    # ----------------------------------------------------------------------------------------------------- the end

    def _stop(self, patience: float) -> None:
        """Close the connection, which ends the worker. It is killed after `patience` seconds."""
        if self._connection is not None:
            self._connection.close()
        if self._process is None:
            return
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        self._stop(patience=5.0)
        for fd in (self._memory_fd, self._stacks_fd):
            os.close(fd)


def _plain(error: Exception) -> Exception | None:
    """The same message in an exception that every process can unpickle. None for any other kind of error."""
    for kind in (ValueError, RuntimeError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return None


def worker_main(connection_fd: int, memory_fd: int, stacks_fd: int) -> None:
    """The worker's main loop: build the envs, answer calls, end when the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles these and closes the socket
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable(file=stacks_fd, all_threads=True)  # a crash in the simulator leaves its stack
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)
    torch.set_num_threads(1)
    connection = Connection(connection_fd)
    group = None
    try:
        fields, offset, count = connection.recv()
        spec = EnvSpec(**fields)
        memory = mmap.mmap(memory_fd, 2 * count * int(np.prod(spec.image_shape)))
        os.close(memory_fd)
        group = EnvGroup(spec, offset, *image_arrays(memory, count, spec))
        connection.send(("ok", None, None))
        while True:
            method, args = connection.recv()
            value = getattr(group, method)(*args)
            connection.send(("ok", value, group.positions()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the envs, or ended
    except Exception as error:  # the parent reports it, whatever it is
        connection.send(("error", traceback.format_exc(), None if group else _plain(error)))
    os._exit(0)  # the graphics driver's own clean-up is slow and nobody needs it
