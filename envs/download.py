"""Fetch the published assets of the `bridge` pack. Standard library only; `python doctor.py --download` calls this.

    fetch_assets(default_asset_dir(), say=print)

What arrives where, under the asset folder (ManiSkill's own, if none is given):
    carrot/                            25 objects, 17 receptacles, 21 tables   data set RLinf/maniskill_assets
    robots/widowx/                     WidowX-250s                             ManiSkill's asset widowx250s
    tasks/bridge_v2_real2sim_dataset/  stage mesh, first table photograph      ManiSkill's asset bridge_v2_real2sim

A file is written beside its place and moved there when it is whole and its checksum right, so what is in place is good.
What an interruption left is continued (HTTP Range). What is already there is checked and not fetched again.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

HUGGING_FACE, GITHUB = "https://huggingface.co", "https://github.com"
DATA_SET, FOLDER = "RLinf/maniskill_assets", "carrot"
TIMEOUT = 60  # s without a byte
ATTEMPTS = 5
BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch; None where a size or checksum is not known."""

    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of git's blob: what Hugging Face lists for files outside LFS


@dataclass(frozen=True)
class Archive:
    """A zip that becomes the folder `target`; it is complete when `needed` files are in it."""

    file: RemoteFile
    target: str
    needed: tuple[str, ...]


# urls and checksum as in mani_skill 3.0.1, utils/assets/data.py; GitHub's archives have no lasting checksum
ARCHIVES = (
    Archive(
        RemoteFile(f"{GITHUB}/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip"),
        "robots/widowx",
        ("wx250s.urdf",),
    ),
    Archive(
        RemoteFile(
            f"{HUGGING_FACE}/datasets/haosulab/ManiSkill_bridge_v2_real2sim/resolve/main/bridge_v2_real2sim_dataset.zip",
            sha256="618512a205b4528cafecdad14b1788ed1130879f3064deb406516ed5b9c5ba92",
        ),
        "tasks/bridge_v2_real2sim_dataset",
        ("stages/bridge_table_1_v1.glb", "real_inpainting/bridge_real_eval_1.png"),
    ),
)


def default_asset_dir() -> Path:
    """Where ManiSkill keeps its assets: $MS_ASSET_DIR/data, else ~/.maniskill/data."""
    return Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill") / "data"


def fetch_assets(
    asset_dir: str | os.PathLike,
    say: Callable[[str], None],
    *,
    mirror: str | None = None,
    archives: tuple[Archive, ...] = ARCHIVES,
) -> None:
    """Everything the `bridge` pack reads, under `asset_dir`; says one line per thing.

    mirror: a base url with the same paths, in the place of huggingface.co and github.com.
    Raises RuntimeError with one sentence where something can not be had; run again, it goes on from there.
    """
    root = Path(asset_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        listed = list_folder(DATA_SET, FOLDER, mirror)
        say(f"{FOLDER}: {len(listed)} files, {sum(file.size or 0 for file in listed.values()) / 1e6:.0f} MB")
        fetched = sum(fetch(file, root / path) for path, file in listed.items())
        say(f"{FOLDER}: {fetched} fetched, {len(listed) - fetched} were there, in {root / FOLDER}")
        for archive in archives:
            say(f"{archive.target}: {install(archive, root, mirror)}")
    except PermissionError as error:
        raise RuntimeError(f"no permission to write {error.filename}: choose another --asset_dir.") from error
    except OSError as error:
        raise RuntimeError(
            f"{error.filename or root}: {error.strerror or error}; mend that and run it again."
        ) from error


def list_folder(data_set: str, folder: str, mirror: str | None = None) -> dict[str, RemoteFile]:
    """Path within the data set -> file, for all files below `folder`, from Hugging Face's tree API (pages of 1000)."""
    base = mirror.rstrip("/") if mirror else HUGGING_FACE
    url: str | None = f"{base}/api/datasets/{data_set}/tree/main/{folder}?recursive=true"
    files: dict[str, RemoteFile] = {}
    while url:
        entries, following = _patiently(url, lambda url=url: _page(url))
        url = _mirrored(following, mirror) if following else None
        for entry in entries:
            path = entry["path"]
            if entry["type"] != "file":
                continue
            if not path.startswith(f"{folder}/") or ".." in path.split("/"):
                raise RuntimeError(
                    f"the data set {data_set} lists {path!r}, which is not below {folder}/: not fetched."
                )
            lfs = entry.get("lfs")
            files[path] = RemoteFile(
                f"{base}/datasets/{data_set}/resolve/main/{quote(path)}",
                entry["size"],
                sha256=lfs["oid"] if lfs else None,
                git_sha1=None if lfs else entry["oid"],
            )
    if not files:
        raise RuntimeError(
            f"the data set {data_set} has no files below {folder}/: it has changed, or the mirror lacks it."
        )
    return files


def _page(url: str) -> tuple[list[dict], str | None]:
    """One page of the tree API, and the url of the next."""
    with _open(url) as response:
        link = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
        try:
            return json.load(response), link.group(1) if link else None
        except ValueError as error:
            raise RuntimeError(f"{url} did not answer with a list of files ({error}): try again later.") from error


def fetch(file: RemoteFile, target: Path) -> bool:
    """Bring `file` to `target`. Returns False if it was there. Connections that break are taken up again."""
    if target.exists() and wrong_with(target, file) is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    _patiently(file.url, lambda: _continue(file, part))
    if problem := wrong_with(part, file):
        part.unlink()
        raise RuntimeError(f"{file.url} arrived damaged ({problem}): run it again.")
    os.replace(part, target)
    return True


def _patiently(url: str, request: Callable):
    """The request's result; what a network does now and then is tried again, what a server means is not."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise RuntimeError(
                    f"{url} can not be fetched ({error}): it has moved, or the mirror lacks it."
                ) from None
            problem = error
        except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            problem = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(min(0.2 * 2**attempt, 5.0))
    raise RuntimeError(f"{url} can not be fetched ({problem}): run it again, it goes on where it stopped.")


def _continue(file: RemoteFile, part: Path) -> None:
    """Append what `part` still lacks; starts over where the server can not continue."""
    have = part.stat().st_size if part.exists() else 0
    if file.size is not None and have > file.size:
        part.unlink()
        have = 0
    if have and have == file.size:
        return
    try:
        response = _open(file.url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # nothing follows, yet the size is not known to be right: all of it anew
        response, have = _open(file.url), 0
    with response:
        begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or begin is None or int(begin.group(1)) != have:
            have = 0
        length = response.headers.get("Content-Length")
        with open(part, "ab" if have else "wb") as out:
            shutil.copyfileobj(response, out, BLOCK)
    missing = have + int(length) - part.stat().st_size if length else 0
    if missing:
        raise ConnectionError(f"the connection broke {missing} bytes before the end")


def _open(url: str, headers: dict[str, str] | None = None):
    request = urllib.request.Request(url, headers={"User-Agent": "SoloVLA"} | (headers or {}))
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _mirrored(url: str, mirror: str | None) -> str:
    """The same path at the mirror."""
    if mirror is None:
        return url
    parts = urlsplit(url)
    return mirror.rstrip("/") + parts.path + (f"?{parts.query}" if parts.query else "")


def wrong_with(path: Path, file: RemoteFile) -> str | None:
    """What tells `path` from `file`, None if nothing that is known does."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes, not {file.size}"
    sums = {"sha256": (file.sha256, hashlib.sha256())}
    sums["git sha1"] = (file.git_sha1, hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False))
    for name, (wanted, digest) in sums.items():
        if wanted is not None:
            with open(path, "rb") as data:
                while block := data.read(BLOCK):
                    digest.update(block)
            if digest.hexdigest() != wanted:
                return f"{name} is {digest.hexdigest()[:12]}..., not {wanted[:12]}..."
    return None


def install(archive: Archive, root: Path, mirror: str | None = None) -> str:
    """The archive's content at its place; the folder appears there whole or not at all. Returns what was done."""
    target = root / archive.target
    missing = [name for name in archive.needed if not (target / name).exists()]
    if not missing:
        return f"was there, in {target}"
    if target.is_dir() and any(target.iterdir()):
        raise RuntimeError(f"{target} is there without {missing[0]}: move it away and run it again.")
    packed, unpacked = target.with_name(target.name + ".zip"), target.with_name(target.name + ".unpacked")
    file = archive.file
    if mirror:
        file = RemoteFile(_mirrored(file.url, mirror), file.size, file.sha256, file.git_sha1)
    fetch(file, packed)
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(packed) as content:
            content.extractall(unpacked)  # checks every file's CRC
        top = list(unpacked.iterdir())
        inner = top[0] if len(top) == 1 and top[0].is_dir() else unpacked
        for name in archive.needed:
            if not (inner / name).exists():
                raise RuntimeError(f"{file.url} holds no {name}: the archive has changed.")
        os.replace(inner, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RuntimeError(f"{file.url} arrived damaged ({error}): run it again.") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
        packed.unlink()
    return f"fetched, in {target}"
