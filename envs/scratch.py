"""A folder below the system's temporary folder that belongs to this user only, so its content can be trusted."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def scratch_folder() -> Path:
    """The path of the folder. The first call makes it with mode 0700, and all processes of one user share it.

    Raises:
        RuntimeError: another user made it or can write into it, or it is a link.
    """
    place = Path(tempfile.gettempdir()) / f"solovla_{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or mode & 0o022:
        raise RuntimeError(
            f"{place} is not a folder of this user only: remove it, or set TMPDIR to a folder of your own."
        )
    if mode != 0o700:  # an earlier version made it, and nobody else could write into it
        place.chmod(0o700)
    return place
