"""One writer per folder: a lock (flock) that its process holds and that is gone with it, however it ends.

held = lock_folder(Path("runs/mine"), "--run_dir runs/mine")     # keep it; a second process raises UserError
"""

import contextlib
import fcntl
import os
import socket
import stat
import time
from pathlib import Path

from schemas import UserError

LOCK = "lock"  # the file's name


def lock_folder(folder: Path, source: str) -> int:
    """Take the folder for this process. Returns the descriptor that holds the lock; child processes do not get it.

    A file system without locks is used as it is, since nothing is known of others there.

    Args:
        source: what named the folder, such as a flag with its value. It begins the sentence.

    Raises:
        UserError: another process holds it (the sentence names its host, process and start), or it can not be opened.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{source} can not be locked ({error.strerror}): mend {folder / LOCK}") from error
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise UserError(f"{source} can not be locked: {folder / LOCK} is no regular file, remove it")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise UserError(f"{source} is being written by {holder}: wait for it, or name another folder") from None
    except OSError:  # this file system has no locks
        return lock
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(lock, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}, begun at {started}\n".encode(), 0)
    return lock
