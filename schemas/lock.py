"""One writer per folder: a lock (flock) that the system releases when its process ends, in whatever way.

    held = lock_folder(Path("demos/mine"), "--output demos/mine")  # UserError if another holds it. Close it yourself
    hold_folder(Path("runs/mine"), "--run_dir runs/mine")          # until this process ends

Processes that a holder starts or forks do not get the lock. On a network file system with flock, the lock holds across
machines. Without flock a line says so, and the folder is used unlocked.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path

from schemas import UserError, check, parse_json
from schemas.runs import Holder

LOCK = "lock"  # the file's name, which holds the process as JSON
GRACE_SECONDS = 5.0  # time for a holder that is just being ended
POLL_SECONDS = 0.2
held: dict[Path, int] = {}  # folder -> descriptor, until this process ends


def open_lock(folder: Path, source: str) -> int:
    """A descriptor of the lock file. Raises UserError if it cannot be opened or is not a regular file."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{source} cannot be locked ({error.strerror}): check {folder / LOCK}") from error
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise UserError(f"{source} cannot be locked, since {folder / LOCK} is not a regular file: remove it")
    return lock


def take(lock: int, source: str) -> bool:
    """Try to take the lock. False if another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        print(f"{source} is on a file system without locks: let only one process write there", flush=True)
    return True


def lock_folder(folder: Path, source: str, wait: float = 0.0) -> int:
    """Take the folder for this process. Returns the descriptor that holds the lock.

    Args:
        source: what named the folder, such as a flag with its value. The sentence begins with it.
        wait: seconds that another process may take to end.

    Raises:
        UserError: the lock cannot be opened, or another process holds it. The sentence names its host, id and start.
    """
    deadline = time.monotonic() + wait
    lock = open_lock(folder, source)
    while not take(lock, source):
        if time.monotonic() >= deadline:
            holder = os.pread(lock, 1000, 0)
            os.close(lock)
            raise UserError(f"{source} is being written by {described(holder)}: wait for it, or name another folder")
        time.sleep(POLL_SECONDS)
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n"
    with contextlib.suppress(OSError):  # the disk is full, but the lock still holds
        os.ftruncate(lock, 0)
        os.pwrite(lock, content.encode(), 0)
    return lock


def described(content: bytes) -> str:
    """Who holds a lock, from the content of its file."""
    try:
        holder = check(Holder, parse_json(content, LOCK, ""), LOCK)
    except UserError:  # it is just being written
        return "another process"
    return f"process {holder.pid} on {holder.host}, started at {holder.started}"


def hold_folder(folder: Path, source: str) -> None:
    """lock_folder() until this process ends. A second call is no error. A holder that is just ending gets some time."""
    if folder.resolve() not in held:
        held[folder.resolve()] = lock_folder(folder, source, wait=GRACE_SECONDS)


def check_free(folder: Path, source: str) -> None:
    """Raise UserError if another process holds a folder, which need not exist. Nothing is written."""
    if folder.resolve() not in held and os.path.lexists(folder / LOCK):
        lock = open_lock(folder, source)
        holder = os.pread(lock, 1000, 0)
        free = take(lock, source)
        os.close(lock)
        if not free:
            raise UserError(f"{source} is being written by {described(holder)}: wait for it, or name another folder")


def forget_in_child() -> None:
    """A forked child would keep its parent's locks alive."""
    for lock in held.values():
        os.close(lock)
    held.clear()


os.register_at_fork(after_in_child=forget_in_child)
