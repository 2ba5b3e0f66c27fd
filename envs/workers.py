"""A group of envs in a worker process, with the interface of `envs/local.py`: start(method, ...), then finish().

A worker is a fresh interpreter that never sees the parent's `__main__` (which imports DeepSpeed), talks over a socket
pair and writes images into an unlinked memory file: it ends when the parent ends, however that happens, and nothing
stays in /dev/shm. It runs `EnvGroup`, the same code that runs in this process with num_env_workers=0.

A worker that dies, raises or hangs is replaced. Its episodes are given up (the next step reports them as dropped);
three losses without a successful step between them end the run with what the last one said.
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

import numpy as np
import torch

from envs.group import EnvGroup, EnvSpec, Position, empty_result
from envs.processes import MAX_LOSSES, START_SECONDS, image_arrays, worker_environment

STACK_SECONDS = 2.0  # to write where it hangs
STACK_BYTES = 1 << 16
WORKER_CODE = "import sys; from envs.workers import worker_main; worker_main(*map(int, sys.argv[1:]))"


class WorkerLost(Exception):
    """This worker can not answer any more; the message says why. `refusal`: what building its envs raised, if that."""

    def __init__(self, message: str, refusal: Exception | None = None):
        super().__init__(message)
        self.refusal = refusal


class WorkerGroup:
    """An EnvGroup in a process of its own."""

    def __init__(self, spec: EnvSpec, offset: int, count: int, timeout: float):
        """Starts the process; `built()` waits for it. timeout: seconds after which no answer counts as a death."""
        self.offset, self.count, self.num_restarts = offset, count, 0
        self._spec, self._timeout, self._losses = spec, timeout, 0
        self._positions = [Position(0, None, False, False)] * count  # as of the last answer
        self._dropped: np.ndarray | None = None  # bool [count]: episodes lost since the last step
        size = 2 * count * int(np.prod(spec.image_shape))
        self._connection = self._process = None
        # memory files are unlinked from birth: gone when their last holder is
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
        """Wait until the envs are made for the first time. Nothing is tried again here: bad input stays bad."""
        try:
            self._receive(starting=True)
        except WorkerLost as loss:
            if loss.refusal is not None:
                raise loss.refusal from loss
            raise RuntimeError(str(loss)) from None

    def start(self, method: str, *args) -> None:
        """Begin a call; `finish` gives its result."""
        self._pending = (method, args)
        if method != "step" or self._dropped is None:
            self._send(method, args)

    def finish(self):
        """The result of the call that `start` began, from this worker or from its successor."""
        method, args = self._pending
        if method == "step" and self._dropped is not None:
            return self._nothing_executed()  # the actions were meant for episodes that are gone
        # calls after which no env is in an episode that began before
        anew = method == "load_state_dict" or (method == "reset" and len(args[1]) == self.count)
        while True:
            try:
                value = self._receive()
                break
            except WorkerLost as loss:
                self._replace(loss, begin=not anew)
            if method == "step":
                return self._nothing_executed()
            self._send(method, args)
        if method == "step":
            self._losses = 0
        elif anew:
            self._dropped = None
        elif method == "reset" and self._dropped is not None:
            self._dropped[args[1]] = True  # the next step leaves out the whole group, these too
        return value

    # ----------------------------------------------------------------------------------------------------- losses

    def _replace(self, loss: WorkerLost, begin: bool) -> None:
        """A new process in the place of the lost one, its envs at the start of an episode (`EnvGroup.take_over`)."""
        before = self._positions
        while True:
            self._stop(patience=0.0)
            self._losses += 1
            if self._losses == MAX_LOSSES:
                raise RuntimeError(f"{MAX_LOSSES} losses in a row: {loss}") from None
            running = np.array([position.running for position in before]) & begin
            warnings.warn(
                f"{loss}\nIt is started anew; {running.sum()} episodes are dropped.", RuntimeWarning, stacklevel=2
            )
            self.num_restarts += 1
            try:
                self._spawn()
                self._receive(starting=True)
                self._send("take_over", (before, begin))
                self._seen = self._receive(starting=True)
            except WorkerLost as again:
                loss = again
                continue
            self._dropped = running if self._dropped is None else self._dropped | running
            return

    def _nothing_executed(self) -> dict:
        """A step's result for episodes that were lost before or in it."""
        dropped, self._dropped = self._dropped, None
        chunk_size = self._pending[1][0].shape[1]
        result = empty_result(self.count, chunk_size) | self._seen | {"dropped": dropped}
        if self._spec.privileged:
            result["states"] = np.repeat(self._seen["state"][:, None], chunk_size, axis=1)
        return result

    # ----------------------------------------------------------------------------------------------------- messages

    def _send(self, *message) -> None:
        with contextlib.suppress(OSError):  # it is dead: whoever receives will find that out
            self._connection.send(message)

    def _receive(self, starting: bool = False):
        seconds = max(self._timeout, START_SECONDS) if starting else self._timeout
        try:
            if not self._connection.poll(seconds):
                raise WorkerLost(self._hang_notice(seconds))
            kind, value, details = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerLost(self._death_notice()) from None
        # details: where each env stands, or what made it impossible to build them
        if kind == "error":
            raise WorkerLost(f"{self._name()} failed:\n{value}", refusal=details)
        if details is not None:
            self._positions = details
        return value

    def _name(self) -> str:
        """Which envs it holds, and which episodes they were in when it last answered."""
        ids = [position.episode_id for position in self._positions if position.episode_id is not None]
        shown = f"episode{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:8]))}{', ...' * (len(ids) > 8)}"
        where = f"{self._spec.env_id}, {shown if ids else 'before its first episode'}, process {self._process.pid}"
        return f"the worker of envs {self.offset} to {self.offset + self.count - 1} ({where})"

    def _stacks(self) -> str:
        return os.pread(self._stacks_fd, STACK_BYTES, 0).decode(errors="replace").rstrip()

    def _hang_notice(self, seconds: float) -> str:
        self._process.send_signal(signal.SIGUSR1)  # faulthandler writes all stacks, whoever holds the interpreter
        deadline = time.monotonic() + STACK_SECONDS
        while not (stacks := self._stacks()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.05)  # the rest of it
        where = f"it hung here:\n{self._stacks()}" if stacks else "it did not even answer a signal."
        return f"{self._name()} gave no answer for {seconds:g} s; {where}"

    def _death_notice(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return f"{self._name()} closed its connection and lives on."
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        notice = f"{self._name()} {how} without a Python traceback"
        if stacks := self._stacks():
            return f"{notice}; its stacks:\n{stacks}"
        return f"{notice}: memory probably ran out, so use fewer envs." if code == -signal.SIGKILL else f"{notice}."

    # ----------------------------------------------------------------------------------------------------- the end

    def _stop(self, patience: float) -> None:
        """End the process; it notices that its socket is closed."""
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
    """The same sentence in an exception that every process can unpickle; None for what is no clear sentence."""
    for kind in (ValueError, RuntimeError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return None


def worker_main(connection_fd: int, memory_fd: int, stacks_fd: int) -> None:
    """A worker's life: build the envs, answer calls, end when the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle; it closes the socket
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
    except Exception as error:  # whatever it is, the parent has to hear of it
        connection.send(("error", traceback.format_exc(), None if group else _plain(error)))
    os._exit(0)  # the driver's own clean-up is slow and of no use to anybody
