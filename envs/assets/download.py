"""Downloads the published assets of the `bridge` pack, for `python doctor.py --download`.

    fetch_assets(default_asset_dir(), say=print)

What arrives where, under the asset folder (ManiSkill's own, if none is given):
    carrot/                            25 objects, 17 receptacles, 21 tables   data set RLinf/maniskill_assets
    robots/widowx/                     WidowX-250s                             ManiSkill's asset widowx250s
    tasks/bridge_v2_real2sim_dataset/  stage mesh, first table photograph      ManiSkill's asset bridge_v2_real2sim

A file is written next to its place and moved there once it is whole and its checksum is right. So every file in place
is good. An interrupted download continues where it stopped (HTTP Range). Files that are already there are checked and
not fetched again.

Nothing that a server sends is trusted. There are limits on the number of pages, on bytes (no file is longer than
listed) and on the unpacked size of archives. No name may leave the asset folder, and a redirect may not leave https.
Every file has a checksum.
"""

from __future__ import annotations

import functools
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from schemas import UserError, check, parse_json
from schemas.assets import ListedFile, Page

HUGGING_FACE, GITHUB = "https://huggingface.co", "https://github.com"
DATA_SET, FOLDER = "RLinf/maniskill_assets", "carrot"
TIMEOUT = 60  # s without a byte
ATTEMPTS = 5
BLOCK = 1 << 20  # bytes read at once
# limits far above the published assets (0.1 GB in some 200 files)
MAX_PAGES, MAX_PAGE_BYTES = 100, 16 << 20
MAX_FILES, MAX_BYTES = 20_000, 20 << 30  # of a data set, and of an archive, packed and unpacked
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows allows no such file names


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch. A size or checksum that is not known is None."""

    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of git's blob, which Hugging Face lists for files outside LFS


@dataclass(frozen=True)
class Archive:
    """A zip that becomes the folder `target`. The folder is complete when the `needed` files are in it.

    git_tree: git's id of the content as a tree of ordinary files, or None where the zip itself has a checksum.
    """

    file: RemoteFile
    target: str
    needed: tuple[str, ...]
    git_tree: str | None = None


# URLs and checksum are those of mani_skill 3.0.1, utils/assets/data.py. GitHub may pack the same archive differently,
# so its zip has no lasting checksum. Its content has one: `git rev-parse v0.2.0^{tree}` in a clone.
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
    """Download everything that the `bridge` pack reads into `asset_dir`.

    Args:
        say: gets one line per folder.
        mirror: base url of a server with the same paths as huggingface.co and github.com.

    Raises:
        UserError: the mirror is not a url.
        RuntimeError: something could not be downloaded. A second call continues from there.
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
                f"the data set {DATA_SET} lists {len(listed)} files of {size / 1e6:.0f} MB: the limits are {MAX_FILES} "
                f"files, {MAX_BYTES / 1e6:.0f} MB and the {free / 1e6:.0f} MB that are free in {root}."
            )
        fetched = sum(fetch(file, root / path) for path, file in listed.items())
        say(f"{FOLDER}: {fetched} fetched, {len(listed) - fetched} were there, in {root / FOLDER}")
        for archive in archives:
            say(f"{archive.target}: {install(archive, root, mirror)}")
    except PermissionError as error:
        raise RuntimeError(f"no permission to write {error.filename}: choose another --asset_dir.") from error
    except OSError as error:
        raise RuntimeError(
            f"{error.filename or root}: {error.strerror or error}: fix that and run the command again."
        ) from error


def check_mirror(mirror: str | None) -> None:
    """Raise UserError unless this is None or a base url such as https://hf-mirror.com."""
    if mirror is None:
        return
    try:
        parts = urlsplit(mirror)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number, brackets that do not close
        good = False
    if not good or not mirror.isprintable() or " " in mirror:
        raise UserError(f"--mirror {mirror!r} is not a url: it must begin with https:// or http:// and name a host")


def leaves_folder(path: str) -> bool:
    """Whether a listed name is anything but a plain path downwards, on any operating system."""
    return not all(_is_plain_name(part) for part in path.split("/"))


def _is_plain_name(name: str) -> bool:
    if name in ("", ".", "..") or len(name) > 200 or not name.isprintable():
        return False
    return "\\" not in name and ":" not in name and DEVICE.fullmatch(name) is None


def list_folder(data_set: str, folder: str, mirror: str | None = None) -> dict[str, RemoteFile]:
    """All files below `folder` of a Hugging Face data set, by their path in it. The tree API gives pages of 1000.

    Raises:
        RuntimeError: the list does not end, names a file outside the folder, or is empty.
    """
    base = mirror.rstrip("/") if mirror else HUGGING_FACE
    files: dict[str, RemoteFile] = {}
    for entry in _listed_files(data_set, f"{base}/api/datasets/{data_set}/tree/main/{folder}?recursive=true", mirror):
        path = entry.path
        if not path.startswith(f"{folder}/") or leaves_folder(path):
            raise RuntimeError(f"the data set {data_set} lists {path!r}, which is not below {folder}/: not fetched.")
        url = f"{base}/datasets/{data_set}/resolve/main/{quote(path)}"
        if entry.lfs:
            files[path] = RemoteFile(url, entry.size, sha256=entry.lfs.oid)
        else:
            files[path] = RemoteFile(url, entry.size, git_sha1=entry.oid)
    if not files:
        raise RuntimeError(
            f"the data set {data_set} has no files below {folder}/: it has changed, or the mirror lacks it."
        )
    return files


def _listed_files(data_set: str, first_url: str, mirror: str | None) -> Iterator[ListedFile]:
    """The files of all pages of a list. Raises RuntimeError where the pages do not end."""
    url: str | None = first_url
    visited: set[str] = set()
    while url:
        if url in visited or len(visited) == MAX_PAGES:
            raise RuntimeError(f"the list of {data_set} does not end after {len(visited)} pages: try another mirror.")
        visited.add(url)
        entries, link = _patiently(url, functools.partial(_page, url))
        yield from (entry for entry in entries if isinstance(entry, ListedFile))
        url = _following(url, link, mirror) if link else None


def _following(url: str, link: str, mirror: str | None) -> str:
    """The url of the next page, at the same host or at the mirror. Raises RuntimeError for another host."""
    following = _mirrored(urljoin(url, link), mirror)
    if urlsplit(following)[:2] != urlsplit(url)[:2]:
        raise RuntimeError(f"{url} names {following!r} as its next page, which is another host: not fetched.")
    return following


def _page(url: str) -> tuple[list, str | None]:
    """The entries of one page of the tree API, and the link to the next page."""
    with _open(url) as response:
        link = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
        content = response.read(MAX_PAGE_BYTES + 1)
    if len(content) > MAX_PAGE_BYTES:
        raise RuntimeError(f"{url} answers with more than {MAX_PAGE_BYTES} bytes: that is not a list of files.")
    try:
        remedy = "try again later, or another mirror"
        entries = check(Page, parse_json(content, url, remedy), url, remedy)
    except UserError as error:
        raise RuntimeError(f"{error}.") from error
    return entries, link.group(1) if link else None


def fetch(file: RemoteFile, target: Path) -> bool:
    """Download `file` to `target`, over several connections if they break. Returns False if it was already there.

    Raises:
        RuntimeError: the file could not be downloaded, or arrived damaged.
    """
    if target.exists() and wrong_with(target, file) is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise RuntimeError(f"{part} is not a regular file: remove it and run the command again.")
    _patiently(file.url, lambda: _continue(file, part))
    if problem := wrong_with(part, file):
        part.unlink()
        raise RuntimeError(f"{file.url} arrived damaged ({problem}): run the command again.")
    os.replace(part, target)
    return True


def _patiently(url: str, request: Callable[[], Any]) -> Any:
    """The result of `request`, with up to ATTEMPTS tries. A clear refusal of the server is not tried again."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise RuntimeError(
                    f"{url} cannot be fetched (HTTP status {error.code}): it has moved, or the mirror lacks it."
                ) from None
            problem = f"HTTP status {error.code}"
        except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            problem = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(min(0.2 * 2**attempt, 5.0))
    raise RuntimeError(f"{url} cannot be fetched ({problem}): run the command again, it continues where it stopped.")


def _continue(file: RemoteFile, part: Path) -> None:
    """Append to `part` what it lacks. Start over where the server cannot continue.

    Raises:
        RuntimeError: the file is longer than it may be.
        ConnectionError: the connection broke.
    """
    have = part.stat().st_size if part.exists() else 0
    if file.size is not None and have > file.size:
        part.unlink()
        have = 0
    if have and have == file.size:
        return
    response, have = _open_at(file.url, part, have)
    with response:
        limit = MAX_BYTES if file.size is None else file.size
        length = response.length  # bytes that the server announces, None if it does not
        if (length or 0) > limit - have:
            raise _too_long(file, part)
        with open(part, "ab" if have else "wb") as out:
            if not _copy(response, out, limit - have):
                raise _too_long(file, part)
    missing = have + length - part.stat().st_size if length is not None else 0
    if missing > 0:
        raise ConnectionError(f"the connection broke {missing} bytes before the end")


def _open_at(url: str, part: Path, have: int) -> tuple[http.client.HTTPResponse, int]:
    """Ask for all bytes from `have` on. Returns the answer and the position of its first byte, `have` or 0."""
    try:
        response = _open(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # nothing follows these bytes, but we do not know that they are the whole file: fetch it all again
        part.unlink()
        return _open(url), 0
    begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    continues = response.status == 206 and begin is not None and int(begin.group(1)) == have
    return response, have if continues else 0


def _copy(response: http.client.HTTPResponse, out: BinaryIO, limit: int) -> bool:
    """Copy the answer to a file. Returns False as soon as it is longer than `limit` bytes."""
    while block := response.read(min(BLOCK, limit + 1)):
        limit -= len(block)
        if limit < 0:
            return False
        out.write(block)
    return True


def _too_long(file: RemoteFile, part: Path) -> RuntimeError:
    part.unlink(missing_ok=True)
    return RuntimeError(f"{file.url} is longer than the {file.size or MAX_BYTES} bytes that are allowed: not fetched.")


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http. So a safe request stays safe, and no local file is read."""

    max_redirections = 5

    def http_error_302(self, request, response, code, message, headers):
        target = urljoin(request.full_url, headers.get("Location", ""))
        if urlsplit(target).scheme not in ("https", urlsplit(request.full_url).scheme):
            raise RuntimeError(f"{request.full_url} leads to {target!r}, which is not https: not fetched.")
        return super().http_error_302(request, response, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """Send a request, by http or https only. urllib's own opener would also take file:, ftp: and data:."""
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
    """How `path` differs from `file`, or None where size and known checksums agree."""
    if not path.is_file():
        return "no regular file"
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes, not {file.size}"
    git_header = f"blob {size}\0".encode()  # git's checksum of a blob covers it
    for name, wanted, digest in (
        ("sha256", file.sha256, hashlib.sha256()),
        ("git sha1", file.git_sha1, hashlib.sha1(git_header, usedforsecurity=False)),
    ):
        if wanted is None:
            continue
        found = _checksum(path, digest)
        if found != wanted:
            return f"{name} is {found[:12]}..., not {wanted[:12]}..."
    return None


def _checksum(path: Path, digest: hashlib._Hash) -> str:
    with open(path, "rb") as data:
        while block := data.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def install(archive: Archive, root: Path, mirror: str | None = None) -> str:
    """Put the archive's content in its place below `root`. The folder appears there whole or not at all.

    Returns a phrase that says what was done.

    Raises:
        RuntimeError: the archive could not be downloaded, or its content is not the published one.
    """
    target = root / archive.target
    missing = _missing(archive, target)
    if not missing:
        return f"was there, in {target}"
    if target.is_dir() and any(target.iterdir()):
        raise RuntimeError(f"{target} exists without {missing[0]}: move it away and run the command again.")
    packed, unpacked = target.with_name(target.name + ".zip"), target.with_name(target.name + ".unpacked")
    file = archive.file
    if mirror:
        file = RemoteFile(_mirrored(file.url, mirror), file.size, file.sha256, file.git_sha1)
    fetch(file, packed)
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        num_left_out = _unpack(packed, unpacked, file.url)
        content = _content_folder(archive, unpacked, file.url)
        os.replace(content, target)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise RuntimeError(f"{file.url} arrived damaged ({error}): run the command again.") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
        packed.unlink()
    return f"fetched, in {target}" + (f" (left out {num_left_out} links)" if num_left_out else "")


def _missing(archive: Archive, folder: Path) -> list[str]:
    """The needed files that are not in the folder."""
    return [name for name in archive.needed if not (folder / name).exists()]


def _content_folder(archive: Archive, unpacked: Path, url: str) -> Path:
    """The unpacked folder that holds the content: often the only one in the zip. Raises RuntimeError if it is wrong."""
    top = list(unpacked.iterdir())
    folder = top[0] if len(top) == 1 and top[0].is_dir() else unpacked
    if missing := _missing(archive, folder):
        raise RuntimeError(f"{url} holds no {missing[0]}: the archive has changed.")
    if archive.git_tree and git_tree(folder).hex() != archive.git_tree:
        raise RuntimeError(f"{url} holds other files than the published ones: try another mirror.")
    return folder


def _unpack(packed: Path, unpacked: Path, url: str) -> int:
    """Unpack all ordinary files of a zip. Returns the number of links and devices, which are left out.

    Raises:
        RuntimeError: a name leaves the folder, the zip is encrypted, or it is larger than any published archive.
    """
    with zipfile.ZipFile(packed) as content:
        entries = content.infolist()
        size = sum(entry.file_size for entry in entries)  # zipfile reads no more of an entry than this
        if len(entries) > MAX_FILES or size > min(MAX_BYTES, shutil.disk_usage(packed.parent).free):
            raise RuntimeError(
                f"{url} unpacks to {len(entries)} files of {size / 1e6:.0f} MB: no asset is that large, or the disk is "
                "too full."
            )
        for entry in entries:
            if leaves_folder(entry.filename.removesuffix("/")) or entry.orig_filename != entry.filename:
                raise RuntimeError(f"{url} holds {entry.orig_filename!r}, which is not a plain name: not unpacked.")
            if entry.flag_bits & 1:
                raise RuntimeError(f"{url} is encrypted: that is not a published asset.")
        kinds = {0, stat.S_IFREG, stat.S_IFDIR}
        plain = [entry for entry in entries if stat.S_IFMT(entry.external_attr >> 16) in kinds]
        content.extractall(unpacked, plain)  # checks every file's CRC
    return len(entries) - len(plain)


def git_tree(folder: Path) -> bytes:
    """git's id of a folder of ordinary files, 20 bytes. `git write-tree` gives the same."""

    def name_in_git_order(path: Path) -> bytes:
        return os.fsencode(path.name) + (b"/" if path.is_dir() else b"")

    content = b""
    for path in sorted(folder.iterdir(), key=name_in_git_order):
        if path.is_dir():
            mode, digest = b"40000", git_tree(path)
        else:
            mode, digest = b"100644", _git_object(b"blob", path.read_bytes())
        content += mode + b" " + os.fsencode(path.name) + b"\0" + digest
    return _git_object(b"tree", content)


def _git_object(kind: bytes, data: bytes) -> bytes:
    """git's id of a blob or tree, 20 bytes."""
    return hashlib.sha1(b"%s %d\0" % (kind, len(data)) + data, usedforsecurity=False).digest()
