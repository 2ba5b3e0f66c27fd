"""One writer per folder: a lock (flock) that its process holds and that is gone with it, however it ends.

    held = lock_folder(Path("demos/mine"), "--output demos/mine")  # yours to close; a second process gets a UserError
    hold_folder(Path("runs/mine"), "--run_dir runs/mine")          # until this process ends

Processes that a holder starts or forks do not get the lock. Network file systems hand it on between machines where they
know flock; where they do not, a line says so and the folder is used as it is.
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

LOCK = "lock"  # the file's name; it says who holds it, as JSON
GRACE_SECONDS = 5.0  # a holder that is just being ended is waited for
POLL_SECONDS = 0.2
held: dict[Path, int] = {}  # of this process, for good: folder -> descriptor


def open_lock(folder: Path, source: str) -> int:
    """A descriptor of the lock's file. Raises UserError where it is none of ours."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{source} can not be locked ({error.strerror}): mend {folder / LOCK}") from error
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise UserError(f"{source} can not be locked: {folder / LOCK} is no regular file, remove it")
    return lock


def take(lock: int, source: str) -> bool:
    """Whether the lock is this process's now; it is not where another one has it, as the text behind it says."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        print(f"{source} lies on a file system without locks: write there with one process alone", flush=True)
    return True


def lock_folder(folder: Path, source: str, wait: float = 0.0) -> int:
    """Take the folder for this process. Returns the descriptor that holds the lock.

    Args:
        source: what named the folder, such as a flag with its value. It begins the sentence.
        wait: seconds that another process may take to end.

    Raises:
        UserError: another process holds it (the sentence names its host, process and start), or it can not be opened.
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
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(lock, 0)
        os.pwrite(lock, content.encode(), 0)
    return lock


def described(content: bytes) -> str:
    """Who holds a lock, from what stands in its file."""
    try:
        holder = check(Holder, parse_json(content, LOCK, ""), LOCK)
    except UserError:  # it is just being written
        return "another process"
    return f"process {holder.pid} on {holder.host}, begun at {holder.started}"


def hold_folder(folder: Path, source: str) -> None:
    """lock_folder() until this process ends; once more is no error. A holder that is just being ended is waited for."""
    if folder.resolve() not in held:
        held[folder.resolve()] = lock_folder(folder, source, wait=GRACE_SECONDS)


def check_free(folder: Path, source: str) -> None:
    """Raises UserError where another process holds a folder, which need not exist. Writes nothing."""
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
