"""Start Python programs from a process that has imported everything, which saves each of them 8 seconds of CPU time.

`run` and `Popen` have subprocess's interface. The first call starts a server, a fresh interpreter that imports the
scripts and the simulator. For each `[sys.executable, ...]` the server forks: the child gets the arguments, environment,
working directory and open files of the call, and then runs the program as `python` would. The server has one thread,
no process group and no rendering device, so a fork is as good as a fresh interpreter.

Two things differ. All forks of one server share a hash seed. A fork ends once its exit functions have run and its
streams are flushed: to take down all that was imported would cost each of them half a second. A call gets a fresh
interpreter where its environment changes what an interpreter or a library reads only when it starts.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = """train_ppo train_grpo train_sft evaluate collect_demos doctor deepspeed transformers peft h5py
deepspeed.runtime.zero.muon.muon_optimizer torch.utils.cpp_extension torch.utils.tensorboard safetensors.torch
mani_skill.envs envs.gym_env envs.maniskill_task envs.assets.builtin imageio.v3 imageio.plugins.ffmpeg
matplotlib.pyplot matplotlib.backends.backend_agg plotly.graph_objects vla.reports.run_charts
tyro._backends._argparse_formatter""".split()
# variables that are read when a module is imported
EARLY = ("PYTHON", "OMP_", "DS_", "TORCH_", "CUDA_", "MS_", "HF_", "MPL", "LC_", "LANG", "LD_PRELOAD")
# a fork extends its own sys.path, torch reads its folder when it compiles, and PYTHON is for slurm/run.sh alone
LATER = ("PYTHONPATH", "TORCH_EXTENSIONS_DIR", "PYTHON")
ENVIRONMENT = dict(os.environ)  # before any test has changed it
LONGEST_COMMAND = 4000  # what /proc shows of a fork's command line, in bytes
FIRST_FREE_FD = 200  # where received files wait until each has its own number
REQUEST = struct.Struct("!I")


def early(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that must be the server's."""
    return {name: value for name, value in environment.items() if name.startswith(EARLY) and name not in LATER}


# ---------------------------------------------------------------------- the side of the tests
class _Server:
    """The connection to a server of this process. environment: of the server."""

    def __init__(self, environment: dict[str, str]):
        self.early = early(environment)
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno()), "." * LONGEST_COMMAND]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, words: list[str], cwd: str, env: dict[str, str], session: bool, fds: dict[int, int]):
        """Fork and run `python WORDS` with fds {number in the child: number here}. Returns its id and a socket that
        tells how it ended."""
        ours, theirs = socket.socketpair()
        blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))  # a child inherits these
        request = {"words": words, "cwd": cwd, "env": env, "session": session, "fds": [*fds], "blocked": blocked}
        content = json.dumps(request).encode()
        with theirs, self._lock:
            socket.send_fds(self._control, [REQUEST.pack(len(content))], [theirs.fileno(), *fds.values()])
            self._control.sendall(content)
        answer = ours.recv(4)
        if not answer:
            raise RuntimeError("the warm server has ended: see its error above")
        return REQUEST.unpack(answer)[0], ours

    def close(self) -> None:
        """End the server and all of its forks."""
        self._control.close()
        self._process.wait()


_server: _Server | None = None
_others: list[_Server] = []


@contextlib.contextmanager
def also(variables: dict[str, str]):
    """Meanwhile, programs with these variables of EARLY are forks, too: of a second server, which has them."""
    server = _Server(ENVIRONMENT | variables)
    _others.append(server)
    try:
        yield
    finally:
        _others.remove(server)
        server.close()


class Popen(subprocess.Popen):
    """subprocess.Popen whose Python programs are forks of the warm server wherever that makes no difference."""

    _end: socket.socket | None = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        environment = dict(os.environ if env is None else env)
        global _server
        if isinstance(args, (list, tuple)) and args[0] == sys.executable and preexec_fn is None and executable is None:
            _server = _server or _Server(ENVIRONMENT)
            for server in (_server, *_others):
                if early(environment) == server.early:
                    words = [os.fspath(word) for word in args[1:]]
                    return self._fork(server, words, pass_fds, cwd, environment, *rest)
        return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)

    def _fork(self, server, words, pass_fds, cwd, environment, *rest):
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        streams = {number: own if own != -1 else number for number, own in enumerate((p2cread, c2pwrite, errwrite))}
        fds = streams | {number: number for number in pass_fds}
        session = rest[-2]  # start_new_session
        self.pid, self._end = server.start(words, os.fspath(cwd or os.getcwd()), environment, session, fds)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags):
        if self._end is None:
            return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self._end], [], [], 0)[0]:
            return 0, 0
        answer = self._end.recv(4)
        assert answer, "the warm server has ended before its fork"
        self._end.close()
        return self.pid, REQUEST.unpack(answer)[0]

    def _internal_poll(self, _deadstate=None, **kwargs):
        if self._end is None:
            return super()._internal_poll(_deadstate, **kwargs)
        with self._waitpid_lock:
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
        return self.returncode


def run(command, timeout: float | None = None, check: bool = False, capture_output: bool = False, **options):
    """subprocess.run with Popen from above."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stdout, stderr)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


AS_SUBPROCESS = types.SimpleNamespace(**vars(subprocess) | {"Popen": Popen, "run": run})


# ---------------------------------------------------------------------- the side of the server
def serve(control: socket.socket) -> dict | None:
    """Answer requests until the tests have ended. In a child: returns its request."""
    ends: dict[int, tuple[int, socket.socket]] = {}  # by the file that shows that a child has ended
    while True:
        for ready in select.select([control, *ends], [], [])[0]:
            if ready is control:
                head, fds, *_ = socket.recv_fds(control, REQUEST.size, 64)
                if not head:  # whoever started them has ended
                    for child, _ in ends.values():
                        os.kill(child, signal.SIGKILL)
                    return None
                content = b""
                while len(content) < REQUEST.unpack(head)[0]:
                    content += control.recv(REQUEST.unpack(head)[0] - len(content))
                assert len(os.listdir("/proc/self/task")) == 1, "threads of the server would be lost in a fork"
                reply, *fds = fds
                child = os.fork()
                if not child:
                    for fd in (*ends, *(end.fileno() for _, end in ends.values()), control.fileno(), reply):
                        os.close(fd)
                    control.detach()
                    return json.loads(content) | {"received": fds}
                end = socket.socket(fileno=reply)
                end.sendall(REQUEST.pack(child))
                ends[os.pidfd_open(child)] = child, end
                for fd in fds:
                    os.close(fd)
            else:
                child, end = ends.pop(ready)
                os.close(ready)
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(OSError), end:  # nobody may wait for it any more
                    end.sendall(REQUEST.pack(status))


def become(request: dict) -> None:
    """Take on the files, the environment and the arguments of a request."""
    waiting = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_FREE_FD) for fd in request["received"]]
    for fd in request["received"]:
        os.close(fd)
    for number, fd in zip(request["fds"], waiting):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    words = request["words"] = [word for number, word in enumerate(request["words"]) if number or word != "-u"]
    sys.argv = ["-c", *words[2:]] if words[0] == "-c" else words
    sys.path[0] = "" if words[0] == "-c" else str(Path(words[0]).resolve().parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    show_command([sys.executable, *request["words"]])


def show_command(words: list[str]) -> None:
    """Write a command line over the server's, where /proc reads it."""
    first, last = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    content = b"".join(os.fsencode(word) + b"\0" for word in words)[: last - first - 1]
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(first)
        memory.write(content.ljust(last - first, b"\0"))


def execute(words: list[str]) -> None:
    """As `python WORDS` does."""
    if words[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


def exit_code(words: list[str]) -> int:
    """Of the program, whose error is printed as the interpreter does it."""
    try:
        execute(words)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        raise  # it ends an interpreter by the signal itself
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(code: int) -> None:
    """As an interpreter ends, without taking down its modules."""
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:0] = [str(ROOT)]
    for module in MODULES:
        importlib.import_module(module)
    paint = sys.modules["envs.assets.paint"]
    for table in range(len(paint.TABLES)):
        paint.table_image(table)  # kept, and the same for every process
    gc.collect()
    gc.freeze()  # a collection in a child would copy the memory of all that was imported
    request = serve(control)
    if request is not None:
        become(request)
        end(exit_code(request["words"]))


if __name__ == "__main__":
    main()
