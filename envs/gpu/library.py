"""PhysX's library for GPUs. The batch needs it, and SAPIEN's package does not contain it.

SAPIEN downloads it from GitHub when the first batch is made. It waits without a limit for a server that does not
answer, and writes straight into the file that other ranks may already be loading. So a batch is refused while the
library is missing, and `doctor.py --download` fetches it. GitHub publishes no checksum of this release. The length that
the server announces and the checksums inside the zip are compared.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from envs.assets.download import fetch_zip, unpack

PLACE = "https://github.com/sapien-sim/physx-precompiled/releases/download"
ELF = b"\x7fELF"  # the first bytes of every library of Linux


def library_path() -> Path:
    """Where SAPIEN looks for the library."""
    import sapien

    return Path.home() / ".sapien" / "physx" / sapien.physx.version() / "libPhysXGpu_64.so"


def library_url() -> str:
    """The zip from which SAPIEN would take it, some 80 MB."""
    arm = platform.machine() in ("aarch64", "arm64")
    return f"{PLACE}/{library_path().parent.name}/linux-{'aarch64-' * arm}so.zip"


def check_library() -> None:
    """Raise RuntimeError where the library is missing."""
    path = library_path()
    if not path.exists():
        raise RuntimeError(
            f"sim_backend='physx_cuda' needs PhysX's library for GPUs, and {path} is missing: run `python doctor.py "
            f"--download`, or unzip {library_url()} there, or use sim_backend='physx_cpu'."
        )


def fetch_library(mirror: str | None = None) -> str:
    """Download the library to its place. It appears there whole or not at all, however many processes fetch it.

    mirror: base url of a server with the same paths as github.com.

    Returns a phrase that says what was done.

    Raises:
        RuntimeError: the library could not be downloaded, or the zip holds none.
    """
    from mani_skill.utils.assets.data import DataSource

    path = library_path()
    if path.exists():
        return f"was there, in {path.parent}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, because only a move within one file system is atomic
    with tempfile.TemporaryDirectory(prefix="partial_", dir=path.parent) as folder:
        packed, url = fetch_zip(DataSource("library", url=library_url()), Path(folder), mirror)
        unpack(packed, Path(folder) / "unpacked", url)
        found = Path(folder) / "unpacked" / path.name
        if not found.is_file() or found.open("rb").read(len(ELF)) != ELF:
            raise RuntimeError(f"{url} holds no library {path.name}: try another mirror")
        os.replace(found, path)
    return f"fetched, in {path.parent}"
