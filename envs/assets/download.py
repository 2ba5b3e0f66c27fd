"""Fetch the published assets of the `bridge` pack. Standard library only; `python doctor.py --download` calls this.

    fetch_assets(default_asset_dir(), say=print)

What arrives where, under the asset folder (ManiSkill's own, if none is given):
    carrot/                            25 objects, 17 receptacles, 21 tables   data set RLinf/maniskill_assets
    robots/widowx/                     WidowX-250s                             ManiSkill's asset widowx250s
    tasks/bridge_v2_real2sim_dataset/  stage mesh, first table photograph      ManiSkill's asset bridge_v2_real2sim

A file is written beside its place and moved there when it is whole and its checksum right, so what is in place is good.
What an interruption left is continued (HTTP Range). What is already there is checked and not fetched again.

What a server says is bounded and checked: pages, bytes (no file is longer than listed), the unpacked size of archives,
names (none leaves the asset folder) and where a redirect leads. Every file has a checksum.
"""

from __future__ import annotations

import hashlib
import http.client
import lzma
import os
import re
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from schemas import UserError, check, parse_json
from schemas.assets import ListedFile, Page

HUGGING_FACE, GITHUB = "https://huggingface.co", "https://github.com"
DATA_SET, FOLDER = "RLinf/maniskill_assets", "carrot"
TIMEOUT = 60  # s without a byte
ATTEMPTS = 5
BLOCK = 1 << 20
# far above what is published (0.1 GB in some 200 files)
MAX_PAGES, MAX_PAGE_BYTES = 100, 16 << 20
MAX_FILES, MAX_BYTES = 20_000, 20 << 30  # of a data set, and of an archive before and after it is unpacked
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no file can have such a name on Windows


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch; None where a size or checksum is not known."""

    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of git's blob: what Hugging Face lists for files outside LFS


@dataclass(frozen=True)
class Archive:
    """A zip that becomes the folder `target`; it is complete when `needed` files are in it.

    git_tree: git's id of the content as a tree of ordinary files, None where the zip itself has a checksum.
    """

    file: RemoteFile
    target: str
    needed: tuple[str, ...]
    git_tree: str | None = None


# urls and checksum as in mani_skill 3.0.1, utils/assets/data.py; GitHub makes its archives anew, so that they have no
# lasting checksum, but what is in them has one: `git rev-parse v0.2.0^{tree}` in a clone
ARCHIVES = (
    Archive(
        RemoteFile(f"{GITHUB}/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip"),
        "robots/widowx",
        ("wx250s.urdf",),
        git_tree="af6fd63e85b4d654403c67c18f010352719a6204",
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
    Raises:
        UserError: the mirror is no url.
        RuntimeError: one sentence where something can not be had. Run again, it goes on from there.
    """
    check_mirror(mirror)
    root = Path(asset_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        listed = list_folder(DATA_SET, FOLDER, mirror)
        size, free = sum(file.size or 0 for file in listed.values()), shutil.disk_usage(root).free
        say(f"{FOLDER}: {len(listed)} files, {size / 1e6:.0f} MB")
        if len(listed) > MAX_FILES or size > min(MAX_BYTES, free):
            raise RuntimeError(
                f"the data set {DATA_SET} lists {len(listed)} files of {size / 1e6:.0f} MB: more than {MAX_FILES} "
                f"files, {MAX_BYTES / 1e6:.0f} MB or the {free / 1e6:.0f} MB that are free in {root} are not fetched."
            )
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


def check_mirror(mirror: str | None) -> None:
    """Raise UserError unless this is None or a base url such as https://hf-mirror.com."""
    if mirror is None:
        return
    try:
        parts = urlsplit(mirror)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is none, brackets that do not close
        good = False
    if not good or not mirror.isprintable() or " " in mirror:
        raise UserError(f"--mirror {mirror!r} is no address: it must begin with https:// or http:// and name a host")


def leaves_folder(path: str) -> bool:
    """Whether a listed name is anything but a plain path downwards, on any system."""
    return any(
        part in ("", ".", "..")
        or not part.isprintable()
        or len(part) > 200
        or set(part) & set("\\:")
        or DEVICE.fullmatch(part) is not None
        for part in path.split("/")
    )


def list_folder(data_set: str, folder: str, mirror: str | None = None) -> dict[str, RemoteFile]:
    """Path within the data set -> file, for all files below `folder`, from Hugging Face's tree API (pages of 1000)."""
    base = mirror.rstrip("/") if mirror else HUGGING_FACE
    url: str | None = f"{base}/api/datasets/{data_set}/tree/main/{folder}?recursive=true"
    files: dict[str, RemoteFile] = {}
    seen: set[str] = set()
    while url:
        if url in seen or len(seen) == MAX_PAGES:
            raise RuntimeError(f"the list of {data_set} does not end after {len(seen)} pages: try another mirror.")
        seen.add(url)
        entries, following = _patiently(url, lambda url=url: _page(url))
        for entry in entries:
            if not isinstance(entry, ListedFile):
                continue
            path = entry.path
            if not path.startswith(f"{folder}/") or leaves_folder(path):
                raise RuntimeError(
                    f"the data set {data_set} lists {path!r}, which is not below {folder}/: not fetched."
                )
            files[path] = RemoteFile(
                f"{base}/datasets/{data_set}/resolve/main/{quote(path)}",
                entry.size,
                sha256=entry.lfs.oid if entry.lfs else None,
                git_sha1=None if entry.lfs else entry.oid,
            )
        url = _following(url, following, mirror) if following else None
    if not files:
        raise RuntimeError(
            f"the data set {data_set} has no files below {folder}/: it has changed, or the mirror lacks it."
        )
    return files


def _following(url: str, link: str, mirror: str | None) -> str:
    """Where the next page is: at the same host, or at the mirror."""
    following = _mirrored(urljoin(url, link), mirror)
    if urlsplit(following)[:2] != urlsplit(url)[:2]:
        raise RuntimeError(f"{url} names {following!r} as its next page, which is another host: not fetched.")
    return following


def _page(url: str) -> tuple[list, str | None]:
    """One page of the tree API, and the url of the next."""
    with _open(url) as response:
        link = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
        content = response.read(MAX_PAGE_BYTES + 1)
    if len(content) > MAX_PAGE_BYTES:
        raise RuntimeError(f"{url} answers with more than {MAX_PAGE_BYTES} bytes: that is no list of files.")
    try:
        remedy = "try again later, or another mirror"
        entries = check(Page, parse_json(content, url, remedy), url, remedy)
    except UserError as error:
        raise RuntimeError(f"{error}.") from error
    return entries, link.group(1) if link else None


def fetch(file: RemoteFile, target: Path) -> bool:
    """Bring `file` to `target`. Returns False if it was there. Connections that break are taken up again."""
    if target.exists() and wrong_with(target, file) is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise RuntimeError(f"{part} is no regular file: remove it and run it again.")
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
                    f"{url} can not be fetched (HTTP status {error.code}): it has moved, or the mirror lacks it."
                ) from None
            problem = f"HTTP status {error.code}"
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
        length, room = response.length, (MAX_BYTES if file.size is None else file.size) - have
        if (length or 0) > room:
            raise _too_long(file, part)
        with open(part, "ab" if have else "wb") as out:
            while block := response.read(min(BLOCK, room + 1)):
                room -= len(block)
                if room < 0:
                    raise _too_long(file, part)
                out.write(block)
    missing = have + length - part.stat().st_size if length is not None else 0
    if missing > 0:
        raise ConnectionError(f"the connection broke {missing} bytes before the end")


def _too_long(file: RemoteFile, part: Path) -> RuntimeError:
    part.unlink(missing_ok=True)
    return RuntimeError(f"{file.url} is longer than the {file.size or MAX_BYTES} bytes that it may have: not fetched.")


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows to https alone, or from http to http: what was asked for safely comes safely, and from no local file."""

    max_redirections = 5

    def http_error_302(self, request, response, code, message, headers):
        target = urljoin(request.full_url, headers.get("Location", ""))
        if urlsplit(target).scheme not in ("https", urlsplit(request.full_url).scheme):
            raise RuntimeError(f"{request.full_url} leads to {target!r}, which is not https: not fetched.")
        return super().http_error_302(request, response, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, headers: dict[str, str] | None = None):
    """The answer to a request, by http and https alone: urllib's own opener also knows file:, ftp: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirect,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "SoloVLA"} | (headers or {}))
    return opener.open(request, timeout=TIMEOUT)


def _mirrored(url: str, mirror: str | None) -> str:
    """The same path at the mirror."""
    if mirror is None:
        return url
    parts = urlsplit(url)
    return mirror.rstrip("/") + parts.path + (f"?{parts.query}" if parts.query else "")


def wrong_with(path: Path, file: RemoteFile) -> str | None:
    """What tells `path` from `file`, None if nothing that is known does."""
    if not path.is_file():
        return "no regular file"
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
        left_out = _unpack(packed, unpacked, file.url)
        top = list(unpacked.iterdir())
        inner = top[0] if len(top) == 1 and top[0].is_dir() else unpacked
        for name in archive.needed:
            if not (inner / name).exists():
                raise RuntimeError(f"{file.url} holds no {name}: the archive has changed.")
        if archive.git_tree and git_tree(inner).hex() != archive.git_tree:
            raise RuntimeError(f"{file.url} holds other files than the published ones: try another mirror.")
        os.replace(inner, target)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise RuntimeError(f"{file.url} arrived damaged ({error}): run it again.") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
        packed.unlink()
    return f"fetched, in {target}{f' (left out {left_out} links)' if left_out else ''}"


def _unpack(packed: Path, unpacked: Path, url: str) -> int:
    """All ordinary files of a zip. Returns how many links and devices it named, which are left out.

    Raises:
        RuntimeError: a name that leaves the folder, or more than any published archive holds.
    """
    with zipfile.ZipFile(packed) as content:
        entries = content.infolist()
        size = sum(entry.file_size for entry in entries)  # zipfile reads no more of an entry than this
        if len(entries) > MAX_FILES or size > min(MAX_BYTES, shutil.disk_usage(packed.parent).free):
            raise RuntimeError(
                f"{url} unpacks to {len(entries)} files of {size / 1e6:.0f} MB: that is more than any asset has, or "
                "than there is room for."
            )
        for entry in entries:
            if leaves_folder(entry.filename.removesuffix("/")) or entry.orig_filename != entry.filename:
                raise RuntimeError(f"{url} holds {entry.orig_filename!r}, which is no plain name: not unpacked.")
            if entry.flag_bits & 1:
                raise RuntimeError(f"{url} is encrypted: that is no published asset.")
        kinds = {0, stat.S_IFREG, stat.S_IFDIR}
        plain = [entry for entry in entries if stat.S_IFMT(entry.external_attr >> 16) in kinds]
        content.extractall(unpacked, plain)  # checks every file's CRC
    return len(entries) - len(plain)


def git_tree(folder: Path) -> bytes:
    """git's id of a folder of ordinary files, 20 bytes: what `git write-tree` gives for it."""
    content = b""
    for path in sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name) + b"/" * path.is_dir()):
        if path.is_dir():
            mode, digest = b"40000", git_tree(path)
        else:
            data = path.read_bytes()
            mode, digest = b"100644", hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()
        content += mode + b" " + os.fsencode(path.name) + b"\0" + digest
    return hashlib.sha1(b"tree %d\0" % len(content) + content, usedforsecurity=False).digest()
