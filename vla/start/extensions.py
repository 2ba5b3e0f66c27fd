"""Ops that DeepSpeed compiles at its start. They are kept in the environment, and no start waits for a dead compiler.

torch 2.13 guards a folder of compiled code with a file `lock`, which exists while a process compiles. A killed process
leaves the file, and every later process would wait for ever without a message. `keep_ops()` replaces torch's class with
`Lock`. A `Lock` makes the same file, so it works together with programs that use torch's class. In addition, it holds a
file lock of the operating system (flock), which ends with its process.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from schemas import UserError
from vla.start.launch import command_of, parent_of

POLL_SECONDS = 0.1
SECOND_LOOK_SECONDS = 1.0  # torch closes its lock shortly before it removes it, and meanwhile nobody seems to hold it
SAY_AGAIN_SECONDS = 60.0
UNCERTAIN_SECONDS = 600.0  # how long to wait for a holder that this machine cannot see
CLAIM = "lock.owner"  # the file under flock, with the host and process of its holder
COMPILERS = re.compile(r"ninja|cc|\+\+|clang|collect2|^ld|^as$|ptxas|fatbin|icpx")  # names of programs
# types of file systems that no other machine writes to
OF_THIS_MACHINE = "ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs ramfs overlay fuse.fuse-overlayfs".split()


# ---------------------------------------------------------------------- processes
def links_of(process: int, kind: str) -> Iterator[str]:
    """Targets of symbolic links in /proc. kind is "cwd", "exe" or "fd/*". Nothing for processes of other users."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{process}").glob(kind):
            with contextlib.suppress(OSError):
                yield os.readlink(link)


def processes() -> list[int]:
    """Ids of all processes except this one."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def compilers_in(folder: Path) -> list[int]:
    """Ids of compilers that work in a folder."""
    place = os.path.realpath(folder)
    here = [process for process in processes() if place in links_of(process, "cwd")]
    return [one for one in here if any(COMPILERS.search(Path(program).name) for program in links_of(one, "exe"))]


# ---------------------------------------------------------------------- the folder
def ops_folder() -> Path | None:
    """Folder of compiled ops: TORCH_EXTENSIONS_DIR, or a folder of the environment, or None if it is not writable.

    Compiled code contains the path of the environment, so an environment with two paths has two folders.
    """
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    path = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    folder = Path(sys.prefix) / "share" / "torch_extensions" / path
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def file_system_of(folder: Path) -> str:
    """Type of the file system of a folder, such as ext4 or nfs. Empty if it is unknown."""
    place, best, kind = os.path.realpath(folder), "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])
            if (place + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                best, kind = point, line.partition(" - ")[2].split()[0]
    return kind


def keep_ops() -> None:
    """Let DeepSpeed compile its ops into ops_folder(), under a Lock. Call this before DeepSpeed starts."""
    if folder := ops_folder():
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    else:
        os.environ.pop("TORCH_EXTENSIONS_DIR", None)  # torch then uses a folder in the home of the user
    import torch.utils.cpp_extension  # slow, since it imports setuptools

    torch.utils.cpp_extension.FileBaton = Lock


# ---------------------------------------------------------------------- who holds a lock
class Holder(NamedTuple):
    """Who compiles in a folder."""

    words: str  # such as "process 123 (ninja -v)"
    certain: bool = True  # this machine sees that it is alive
    sibling: bool = False  # another rank of this launch, which has printed what it does


def named(process: int) -> str:
    """A process in words: its id and the start of its command."""
    text = command_of(process).decode(errors="replace")
    command = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return f"process {process} ({command[:80]})" if command else f"process {process}"


def read_claim(folder: Path) -> tuple[str, int] | None:
    """Host and process of the last holder of a folder. None if it has ended normally or was another program."""
    try:
        host, process = (folder / CLAIM).read_text().split()
        return host, int(process)
    except (OSError, ValueError):
        return None


def holder_of(lock: Path) -> Holder | None:
    """Who holds torch's lock, or None. The caller must have the claim of the folder.

    torch keeps the file open while it compiles. The compiler of a killed process may still be running.
    """
    place = os.path.join(os.path.realpath(lock.parent), lock.name)
    for process in processes():
        if place in links_of(process, "fd/*"):
            return Holder(named(process))
    for process in compilers_in(lock.parent):
        return Holder(named(process))
    owner = lock.lstat().st_uid
    if os.getuid() not in (0, owner):  # this process cannot look up the files of other users
        return Holder(f"a process of user {owner}", certain=False)
    host, process = read_claim(lock.parent) or ("", 0)
    if file_system_of(lock.parent) in OF_THIS_MACHINE or host == socket.gethostname():
        return None
    return Holder(f"process {process} on {host}" if host else "a process of another machine", certain=False)


def remove_if_dead(lock: Path) -> Holder | bool:
    """Remove torch's lock if nobody holds it. The caller must have the claim of the folder.

    Returns:
        The holder of the lock, or True if the lock was removed, or False if there is none.
    """
    try:
        before = lock.lstat()
        for pause in (SECOND_LOOK_SECONDS, 0.0):
            if holder := holder_of(lock):
                return holder
            time.sleep(pause)
        if not os.path.samestat(before, lock.lstat()):
            return False  # another lock, which the caller will find
        lock.unlink()
    except FileNotFoundError:
        return False
    return True


# ---------------------------------------------------------------------- the lock
class Lock:
    """A replacement for torch's FileBaton, held by the one process that compiles in a folder.

    One process at a time has the claim of the folder, and only this process removes a lock that nobody holds. Every
    wait prints the process that it waits for. SIGTERM removes the lock and ends the compiler.
    """

    def __init__(self, lock_file_path: str | Path, wait_seconds: float = 0.1, warn_after_seconds: float | None = None):
        self.path = Path(lock_file_path)
        self.folder = self.path.parent
        self.claim: int | None = None  # file descriptors
        self.file: int | None = None
        self.on_sigterm: Callable | int | None = None

    def look(self) -> Holder | bool:
        """Take the claim of the folder, unless another process has it. Returns the same as remove_if_dead()."""
        if self.claim is None:
            self.claim = os.open(self.folder / CLAIM, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.leave()
                return self._claimant()
            except OSError:  # a file system without flock, where torch's lock must suffice
                pass
        return remove_if_dead(self.path)

    def _claimant(self) -> Holder:
        """Who has the claim. If that is another start that waits itself, the process that it waits for."""
        host, process = read_claim(self.folder) or ("", 0)
        if host == socket.gethostname() and command_of(process):
            return Holder(named(process), sibling=parent_of(process) == os.getppid())
        if host not in ("", socket.gethostname()):
            return Holder(f"process {process} on {host}")
        with contextlib.suppress(FileNotFoundError):
            return holder_of(self.path) or Holder("another start")
        return Holder("another start")

    def leave(self) -> None:
        """Release the claim."""
        if self.claim is not None:
            os.close(self.claim)
            self.claim = None

    def try_acquire(self) -> bool:
        """Wait until nobody else compiles here, and take the lock. Always True, while torch's own may return False.

        Raises:
            UserError: the folder cannot be written, or this machine cannot see the holder of a lock that stays.
        """
        try:
            self._acquire()
        except OSError as error:
            self.leave()
            raise UserError(
                f"DeepSpeed cannot keep compiled ops in {self.folder} ({error.strerror}): set TORCH_EXTENSIONS_DIR to "
                "a folder of yours"
            ) from error
        if threading.current_thread() is threading.main_thread():
            self.on_sigterm = signal.signal(signal.SIGTERM, self._end)
        os.ftruncate(self.claim, 0)
        os.pwrite(self.claim, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        if not any(self.folder.glob("*.so")):
            say(f"DeepSpeed compiles {self.folder.name} into {self.folder}, which takes a minute or two once")
        return True

    def release(self) -> None:
        os.ftruncate(self.claim, 0)
        os.close(self.file)
        self.path.unlink(missing_ok=True)
        self.file = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_sigterm or signal.SIG_DFL)
        self.leave()

    def _acquire(self) -> None:
        began = time.monotonic()
        say_again = began
        while True:
            found = self.look()
            if found is True:
                say(f"the lock {self.path} was removed, since no process held it")
            elif found:
                now = time.monotonic()
                if now >= say_again and not found.sibling and int(os.environ.get("LOCAL_RANK", "0")) == 0:
                    say(f"this start waits for {found.words}, which compiles in {self.folder}")
                    say_again = now + SAY_AGAIN_SECONDS
                if not found.certain and now - began > UNCERTAIN_SECONDS:
                    self.leave()
                    raise UserError(
                        f"{self.path} is still held by {found.words}: if nobody compiles there, run "
                        f"`rm {shlex.quote(str(self.path))}`"
                    )
                time.sleep(POLL_SECONDS)
                continue
            with contextlib.suppress(FileExistsError):  # a program with torch's own class was faster
                self.file = os.open(self.path, os.O_CREAT | os.O_EXCL)
                return

    def _end(self, number: int, frame: object) -> None:
        """On SIGTERM, end the compiler, remove the lock, and then end as without this handler."""
        for process in compilers_in(self.folder):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGTERM)
        self.path.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, self.on_sigterm or signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
