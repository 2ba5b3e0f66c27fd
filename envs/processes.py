"""The processes that simulate: workers and settlers are made, watched and buried here.

    rank
     └─ server        a fresh interpreter that has imported the simulator. It has one thread and uses no GPU
         ├─ worker    a fork of it
         └─ settler

A fork begins after some milliseconds instead of 4 s of imports, and shares the memory of what was imported. It never
sees the rank's `__main__`, which imports DeepSpeed. The server begins with the first of these processes and ends with
the last one.

Every process ends with its rank, however that happens. Its connection closes, and the server ends. The kernel then
kills the forks, also those that hang. Signals that a cluster sends to all processes of a job do nothing here, because
the rank handles them. Nothing has a name, so nothing stays in /dev/shm.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

START_SECONDS = 300.0  # a process may take at least this long to import the simulator, build envs, compile shaders
STACK_SECONDS = 2.0  # a hanging process has this long to write its stacks
STACK_BYTES = 1 << 16
BURY_SECONDS = 10.0  # a killed process has this long to end. One that is stuck in a driver is left behind
SERVER_SECONDS = 30.0  # the server answers within milliseconds once it has started, unless it is stopped
TICK = 0.01  # seconds between two questions whether a process has ended

# terminals and clusters send these to every process of a job
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STACK_SIGNAL = signal.SIGRTMIN + 2  # asks a process for its stacks. Nobody else sends it
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
GPUS = ("/dev/nvidia", "/dev/dri/", "/dev/kfd")

SERVER_TITLE = "solovla server"
SERVER_CODE = "import sys; from envs.processes import serve; serve(int(sys.argv[1]))"
FRESH_CODE = "import sys; from envs.processes import run; run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
IMPORTED = ("envs.workers", "envs.gpu.start_states", "envs.gym_env", "envs.maniskill_task")  # by the server


def environment() -> dict[str, str]:
    """This process's environment variables, with this repository on PYTHONPATH and one thread per library."""
    folders = [str(Path(__file__).resolve().parent.parent)]
    if own := os.environ.get("PYTHONPATH"):
        folders.append(own)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    one_thread["LP_NUM_THREADS"] = "0"  # lavapipe's name for it
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | one_thread


def send_fds(connection: Connection, fds: Sequence[int]) -> None:
    """Send open files after a message that announces them. Raises OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        socket.send_fds(channel, [b"\0"], fds)


def receive_fds(connection: Connection, count: int) -> list[int]:
    """Receive the open files that `send_fds` sent. Raises EOFError, OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        data, fds, _, _ = socket.recv_fds(channel, 1, count)
    if not data:
        raise EOFError
    return fds


class ProcessLost(RuntimeError):
    """A process cannot answer any more. The message says why."""


def plain(error: Exception) -> Exception | None:
    """The same message in an exception that every process can unpickle. None for any other kind of error."""
    for kind in (ValueError, RuntimeError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return None


# ---------------------------------------------------------------------- the rank's side
@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back the ignored signals, also in a process that starts meanwhile and does not ignore them yet."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


class Server:
    """This process's server, as a process that talks over a socket pair."""

    def __init__(self, key: tuple):
        """key: what forks of this server share, see `server_now`."""
        self.key = key
        self.alive = True
        self.forks = 0  # that are not buried
        self._lock = threading.Lock()
        self._asked = 0  # requests so far
        self._answered = False  # whether it has imported the simulator, and answers at once
        ours, theirs = socket.socketpair()
        with theirs, signals_held():
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", SERVER_CODE, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=environment(),
                )
            except BaseException:
                ours.close()
                raise
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *request: Any, fds: Sequence[int] = ()) -> Any:
        """The server's answer to a request, see `serve`. The first one may take START_SECONDS, others SERVER_SECONDS.

        Raises:
            ProcessLost: the server is lost, or cannot do what was asked.
        """
        with self._lock:
            limit = SERVER_SECONDS if self._answered else START_SECONDS
            self._asked += 1
            number = 0  # of the answer
            try:
                self._connection.send((self._asked, *request))
                if fds:
                    send_fds(self._connection, fds)
                while number < self._asked:  # an earlier answer is of a request that an interrupt cut short
                    if not self._connection.poll(limit):
                        raise TimeoutError(f"gave no answer for {limit:g} s")
                    number, failure, answer = self._connection.recv()
                    self._answered = True
            except (EOFError, OSError) as error:
                self.end()
                what = error if isinstance(error, TimeoutError) else "has ended"
                raise ProcessLost(f"the process that starts workers ({self.pid}) {what}.") from None
        if failure is not None:
            raise ProcessLost(f"the process that starts workers ({self.pid}) failed: {failure}.")
        return answer

    def end(self) -> None:
        """End the server. The kernel then kills what is left of its forks. A second call does nothing."""
        self.alive = False
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
            return
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=BURY_SECONDS)


_server: Server | None = None


def server_now() -> Server:
    """The server of this process, in its present working directory and with its present environment variables."""
    global _server
    key = (os.getpid(), os.readlink("/proc/self/cwd"), environment())
    if _server is None or not _server.alive or _server.key != key:
        _server = Server(key)
    return _server


class Process:
    """A fork of the server and the connection to it. Messages are tuples, and ("error", text) is the last one."""

    def __init__(self, main: str, title: str):
        """Start the process.

        Args:
            main: "module:function", which is called with the connection.
            title: what tools such as top show, at most 15 characters.

        Raises:
            ProcessLost: it cannot be started.
        """
        self._exit_code: int | None = None
        self._buried = False
        self._server = server_now()
        self._server.forks += 1
        self._stacks_fd = os.memfd_create("solovla_stacks")  # it has no name: it is gone when its last holder is
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with theirs:
            try:
                fds = (theirs.fileno(), self._stacks_fd)
                self.pid = self._server.ask("fork", main, title, fds=fds)
            except BaseException:
                self._release()
                raise

    def send(self, *message: Any, fds: Sequence[int] = ()) -> None:
        """Send a message, and open files after it. A dead process is noticed by `receive`."""
        with contextlib.suppress(OSError):
            self.connection.send(message)
            if fds:
                send_fds(self.connection, fds)

    def receive(self, seconds: float, name: Callable[[], str]) -> tuple:
        """The next message. name: what the process is called in messages for people.

        Raises:
            ProcessLost: it died, raised an error or sent nothing for so many seconds.
        """
        try:
            if not self.connection.poll(seconds):
                raise ProcessLost(f"{name()} gave no answer for {seconds:g} s, {self._where_it_hangs()}")
            message = self.connection.recv()
        except (EOFError, OSError):
            raise ProcessLost(f"{name()} {self._cause_of_death()}") from None
        if message[0] == "error":
            raise ProcessLost(f"{name()} failed:\n{message[1]}")
        return message

    def exit_code(self) -> int | None:
        """The exit code, minus the signal that killed it, or None while it is running. Raises ProcessLost."""
        if self._exit_code is None:
            self._exit_code = self._server.ask("poll", self.pid)
        return self._exit_code

    def _wait(self, seconds: float) -> int | None:
        """The exit code, or None where it is still running after so many seconds. Raises ProcessLost."""
        deadline = time.monotonic() + seconds
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(TICK)
        return self._exit_code

    def _signal(self, number: int) -> None:
        """Send a signal, unless the process has ended. Raises ProcessLost."""
        if self.exit_code() is None:  # its number cannot be another process's, since the server has not buried it
            self._server.ask("signal", self.pid, number)

    def _stacks(self) -> str:
        return os.pread(self._stacks_fd, STACK_BYTES, 0).decode(errors="replace").rstrip()

    def _where_it_hangs(self) -> str:
        os.ftruncate(self._stacks_fd, 0)
        os.lseek(self._stacks_fd, 0, os.SEEK_SET)  # the process shares this position
        try:
            self._signal(STACK_SIGNAL)  # faulthandler then writes all stacks, whoever holds the interpreter
        except ProcessLost as loss:
            return str(loss)
        deadline = time.monotonic() + STACK_SECONDS
        while not self._stacks() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.05)  # for the rest of the stacks
        stacks = self._stacks()
        return f"it hung here:\n{stacks}" if stacks else "it did not even answer a signal."

    def _cause_of_death(self) -> str:
        try:
            code = self._wait(BURY_SECONDS)
        except ProcessLost as loss:
            return f"was killed, since {loss}"
        if code is None:
            return "closed its connection but is still running."
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        notice = f"{cause} without a Python traceback"
        if stacks := self._stacks():
            return f"{notice}. Its stacks:\n{stacks}"
        if code == -signal.SIGKILL:
            return f"{notice}: memory probably ran out, so use fewer envs."
        return f"{notice}."

    def bury(self, patience: float = 0.0) -> None:
        """End the process: close the connection, and kill it after `patience` seconds. A second call does nothing.

        A process that not even SIGKILL ends hangs in the kernel. It is left behind, so that the run can go on.
        """
        if self._buried:
            return
        self.connection.close()
        with contextlib.suppress(ProcessLost):  # the kernel has killed it with the server
            if self._wait(patience) is None:
                self._signal(signal.SIGKILL)
                self._wait(BURY_SECONDS)
        self._release()

    def _release(self) -> None:
        """Give back the open files. The last process of a server ends it."""
        self._buried = True
        self.connection.close()
        os.close(self._stacks_fd)
        self._server.forks -= 1
        if not self._server.forks:
            self._server.end()


# ---------------------------------------------------------------------- the side of the server and its forks
def name_this_process(title: str) -> None:
    """Give this process a name that tools such as top show."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, title.encode(), 0, 0, 0)


def ignore_signals() -> None:
    """Ignore what the rank handles, also what was sent while `signals_held` held it back."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)


def serve(control_fd: int) -> NoReturn:
    """The server's main loop: import the simulator, answer requests, end with the rank.

    Requests are ("fork", main, title) and two open files, ("poll", pid) and ("signal", pid, number), each after its own
    number. An answer is this number, a failure or None, and a process id, an exit code or None, and None.
    """
    ignore_signals()
    name_this_process(SERVER_TITLE)
    control = Connection(control_fd)
    with contextlib.suppress(Exception):  # a fork imports it again, and reports the error
        for module in IMPORTED:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would write to every object, and end the sharing of memory
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, kind, *details = control.recv()
            if kind == "fork":
                control.send((number, *_fork(control, *details)))
            elif kind == "poll":
                pid, status = os.waitpid(details[0], os.WNOHANG)
                control.send((number, None, os.waitstatus_to_exitcode(status) if pid else None))
            else:
                os.kill(*details)
                control.send((number, None, None))
    os._exit(0)


def _fork(control: Connection, main: str, title: str) -> tuple[str | None, int | None]:
    """Start a process. Returns a failure or None, and the process id."""
    fds = receive_fds(control, 2)
    server = os.getpid()
    forkable = num_threads() == 1 and not open_devices()
    pid, failure = None, None
    try:
        pid = os.fork()
    except OSError as error:
        failure = f"it cannot start another process ({error.strerror})"
    if pid == 0:
        try:
            control.close()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == server:  # else the server has ended before this line
                name_this_process(title)
                _begin(main, *fds, forkable)
        finally:
            os._exit(1)
    for fd in fds:
        os.close(fd)
    return failure, pid


def num_threads() -> int:
    """Threads of this process. A fork would inherit the locks of the others, which nobody then unlocks."""
    return len(os.listdir("/proc/self/task"))


def open_devices() -> list[str]:
    """GPUs that this process uses. A fork could not go on with them."""
    files = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the list itself was a file
            files.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [file for file in files if file.startswith(GPUS)]


def _begin(main: str, connection_fd: int, stacks_fd: int, forkable: bool) -> None:
    """Run the fork, or a fresh interpreter in its place where the server is not fit to be forked."""
    if forkable:
        run(main, connection_fd, stacks_fd)
    for fd in (connection_fd, stacks_fd):
        os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, "-c", FRESH_CODE, main, str(connection_fd), str(stacks_fd)])


def run(main: str, connection_fd: int, stacks_fd: int) -> NoReturn:
    """Call `main` with the connection, and end with the rank or with an error for it."""
    import torch

    ignore_signals()
    faulthandler.enable(file=stacks_fd, all_threads=True)  # a crash in the simulator leaves its stack
    faulthandler.register(STACK_SIGNAL, file=stacks_fd, all_threads=True)
    torch.set_num_threads(1)
    connection = Connection(connection_fd)
    module, _, function = main.partition(":")
    try:
        getattr(importlib.import_module(module), function)(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the rank closed the connection, or ended
    except BaseException:  # the rank reports it, whatever it is
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc()))
    os._exit(0)  # the graphics driver's own clean-up is slow and nobody needs it
