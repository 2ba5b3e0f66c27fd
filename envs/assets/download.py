"""Fetches the published assets of the `bridge` pack: for `doctor.py --download`, and for an --asset_dir on the Hub.

    fetch_assets(default_asset_dir(), say=print)
    assets_at("RLinf/maniskill_assets")  # the folder in the Hub's cache

What arrives where, under the asset folder (ManiSkill's own, if none is given):
    carrot/                            25 objects, 17 receptacles, 21 tables   data set RLinf/maniskill_assets
    robots/widowx/                     WidowX-250s                             ManiSkill's asset widowx250s
    tasks/bridge_v2_real2sim_dataset/  stage mesh, first table photograph      ManiSkill's asset bridge_v2_real2sim

huggingface_hub fetches the data set: it resumes connections, and its files are compared with the Hub's checksums.
ManiSkill's downloader fetches the two archives, and never asks on standard input. They are unpacked here: no name may
leave the folder, the size has a limit, and the content must be the published one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import lzma
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from schemas import UserError
from schemas.hub import amount, data_folder, once, one_line, patiently, progress_class, repo_of

if TYPE_CHECKING:
    from mani_skill.utils.assets.data import DataSource

HUGGING_FACE = "https://huggingface.co"
DATA_SET, FOLDER = "RLinf/maniskill_assets", "carrot"
PATTERNS = (f"{FOLDER}/*", "robots/*", "tasks/*")  # of a data set with assets
TIMEOUT = 60.0  # s without a byte
ATTEMPTS = 5
# limits far above the published assets (0.1 GB in some 200 files)
MAX_FILES, MAX_BYTES = 20_000, 20 << 30  # of an unpacked archive
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows allows no such file names


@dataclass(frozen=True)
class Archive:
    """A zip that ManiSkill knows, which becomes the folder `target`. It is complete when `needed` files are in it.

    git_tree: git's id of the content as a tree of ordinary files, or None where ManiSkill knows the zip's checksum.
    """

    uid: str
    target: str
    needed: tuple[str, ...]
    git_tree: str | None = None


# GitHub may pack the same archive differently, so its zip has no lasting checksum. Its content has one:
# `git rev-parse v0.2.0^{tree}` in a clone
ARCHIVES = (
    Archive("widowx250s", "robots/widowx", ("wx250s.urdf",), git_tree="af6fd63e85b4d654403c67c18f010352719a6204"),
    Archive(
        "bridge_v2_real2sim",
        "tasks/bridge_v2_real2sim_dataset",
        ("stages/bridge_table_1_v1.glb", "real_inpainting/bridge_real_eval_1.png"),
    ),
)


# ---------------------------------------------------------------------- places
def default_asset_dir() -> Path:
    """Where ManiSkill keeps its assets: $MS_ASSET_DIR/data, else ~/.maniskill/data."""
    return Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill") / "data"


def search_folders(asset_dir: str | os.PathLike | None) -> list[Path]:
    """The folders that may hold the three parts, in the order of the search."""
    own = default_asset_dir().parent
    roots = [own] if asset_dir is None else [Path(asset_dir).expanduser(), own]
    return [folder for root in roots for folder in (root, root / "data")]


def command_for(part: str, folder: Path | str) -> str:
    """A command of others that fetches a part: carrot, or the target of an archive."""
    for archive in ARCHIVES:
        if archive.target == part:
            return f"python -m mani_skill.utils.download_asset {archive.uid} -y"
    return f"hf download {DATA_SET} --repo-type dataset --include '{FOLDER}/*' --local-dir {folder}"


# ---------------------------------------------------------------------- what callers use
def assets_at(asset_dir: str) -> str:
    """A folder as it is. For a data set on the Hub: a folder with its files, fetched by one process of this machine.

    ManiSkill's two archives are fetched into ManiSkill's own folder if they are missing everywhere.

    Raises:
        UserError: something cannot be fetched.
    """
    from huggingface_hub import is_offline_mode

    if repo_of(asset_dir, "dataset") is None:
        return asset_dir
    folder, own = data_folder(asset_dir, PATTERNS, "--asset_dir"), default_asset_dir()
    for archive in ARCHIVES if not is_offline_mode() else ():  # the pack lists what is missing

        def work(archive: Archive = archive) -> str:
            try:
                done = install(archive, own)
            except (RuntimeError, OSError) as error:
                command = command_for(archive.target, own)
                raise UserError(f"--asset_dir {asset_dir}: {error}, or run `{command}`") from error
            print(f"fetch   {archive.uid}: {done}", flush=True)
            return done

        if all(lacking(archive, place / archive.target) for place in search_folders(folder)):
            once(f"{archive.uid} {own}", work)
    return str(without_links(folder))


def without_links(folder: Path) -> Path:
    """A folder with the files of a folder in the Hub's cache, where each file is a link.

    SAPIEN (3.0.3) looks for the images of a mesh beside the file to which a link leads, and there they have other
    names. So this folder has hard links, or copies if a file system has none. It lies in the cache, or in ManiSkill's
    folder if the cache cannot be written.

    Raises:
        UserError: neither can be written.
    """
    places = [folder.parents[1] / "plain" / folder.name, default_asset_dir().parent / "hub" / folder.name]
    failure: OSError | None = None
    for place in places:
        if place.is_dir():
            return place
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
                made = shutil.copytree(folder, Path(temporary, "made"), copy_function=link_or_copy)
                os.rename(made, place)
        except OSError as error:
            if not place.is_dir():  # else another process was faster
                failure = failure or error
                continue
        return place
    raise UserError(f"{failure.filename}: {failure.strerror}: set HF_HOME or MS_ASSET_DIR to a folder of yours")


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def fetch_assets(asset_dir: str | os.PathLike, say: Callable[[str], None], *, mirror: str | None = None) -> None:
    """Download everything that the `bridge` pack reads into `asset_dir`.

    Args:
        say: gets one line per part.
        mirror: base url of a server with the same paths as huggingface.co and github.com.

    Raises:
        UserError: the mirror is not a url.
        RuntimeError: something could not be downloaded. The others were. A second call fetches what is missing.
    """
    check_mirror(mirror)
    root, missing = Path(asset_dir).expanduser(), []
    parts: dict[str, Callable[[], str]] = {FOLDER: lambda: fetch_data_set(root, mirror)}
    parts |= {archive.target: lambda archive=archive: install(archive, root, mirror) for archive in ARCHIVES}
    for part, work in parts.items():
        try:
            root.mkdir(parents=True, exist_ok=True)
            say(f"{part}: {work()}")
        except (RuntimeError, OSError) as error:
            said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            say(f"{part}: not fetched, because {said}")
            missing.append(part)
    if missing:
        commands = " and ".join(f"`{command_for(part, root)}`" for part in missing)
        raise RuntimeError(
            f"{len(missing)} of {len(parts)} parts are missing in {root} ({', '.join(missing)}): run this command "
            f"again, which keeps what is there, or {commands}"
        )


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


# ---------------------------------------------------------------------- the data set
def fetch_data_set(root: Path, mirror: str | None) -> str:
    """Download the data set's folder into `root`. Returns a phrase that says what was done.

    Raises:
        RuntimeError: the data set could not be downloaded, or a file arrived damaged twice.
    """
    from huggingface_hub import HfApi, RepoFile, snapshot_download

    api = HfApi(endpoint=mirror, library_name="solovla")

    def fetch() -> str:
        return snapshot_download(
            DATA_SET,
            repo_type="dataset",
            local_dir=root,
            allow_patterns=[f"{FOLDER}/*"],
            endpoint=mirror,
            tqdm_class=progress_class(),
        )

    try:
        entries = api.list_repo_tree(DATA_SET, FOLDER, repo_type="dataset", recursive=True)
        sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        size, free = sum(sizes.values()), shutil.disk_usage(root).free
        if size > free:
            raise RuntimeError(f"it has {amount(size)} and only {amount(free)} are free in {root}")
        patiently(fetch)
        if wrong := damaged(api, root):
            for name in wrong:
                (root / name).unlink()
            patiently(fetch)
            if wrong := damaged(api, root):
                raise RuntimeError(f"{wrong[0]} arrived damaged, twice")
    except RuntimeError:
        raise
    except Exception as error:  # the library raises errors of a dozen kinds
        raise RuntimeError(f"{DATA_SET} cannot be had from {api.endpoint} ({one_line(error)})") from error
    return f"{len(sizes)} files, {amount(size)}, in {root / FOLDER}"


def damaged(api, root: Path) -> list[str]:
    """Files of the data set whose checksums are not the Hub's."""
    return [one["path"] for one in api.verify_repo_checksums(DATA_SET, repo_type="dataset", local_dir=root).mismatches]


# ---------------------------------------------------------------------- archives
def install(archive: Archive, root: Path, mirror: str | None = None) -> str:
    """Put the archive's content in its place below `root`. The folder appears there whole or not at all.

    Returns a phrase that says what was done.

    Raises:
        RuntimeError: the archive could not be downloaded, or its content is not the published one.
    """
    from mani_skill.utils.assets.data import DATA_SOURCES

    target = root / archive.target
    missing = lacking(archive, target)
    if not missing:
        return f"was there, in {target}"
    if target.is_dir() and any(target.iterdir()):
        raise RuntimeError(f"{target} exists without {missing[0]}: move it away and run the command again")
    own = target.with_name(f"{target.name}.partial")
    shutil.rmtree(own, ignore_errors=True)
    try:
        packed, url = fetch_zip(DATA_SOURCES[archive.uid], own, mirror)
        num_left_out = unpack(packed, own / "unpacked", url)
        content = _content_folder(archive, own / "unpacked", url)
        os.replace(content, target)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return f"fetched, in {target}" + (f" (left out {num_left_out} links)" if num_left_out else "")


def fetch_zip(source: DataSource, folder: Path, mirror: str | None) -> tuple[Path, str]:
    """A zip, which ManiSkill's downloader puts into `folder` and compares with its checksum, and its url.

    Raises:
        RuntimeError: it could not be downloaded.
    """
    from mani_skill.utils import download_asset

    url = mirrored(source.url, mirror)
    # ManiSkill unpacks a url that ends in .zip. The empty fragment prevents that, because names are checked first
    own = dataclasses.replace(source, url=f"{url}#", filename="packed.zip", target_path="packed", output_dir=folder)
    for attempt in range(ATTEMPTS):
        try:
            with patient_sockets(), contextlib.redirect_stdout(io.StringIO()):
                download_asset.download(own, verbose=False, non_interactive=True)
            return folder / "packed" / "packed.zip", url
        except urllib.error.HTTPError as error:
            problem = f"HTTP status {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except OSError as error:  # no network, a connection that breaks, a wrong checksum
            problem = one_line(error)
        finally:
            urllib.request.urlcleanup()  # what urlretrieve() left
        time.sleep(min(0.2 * 2**attempt, 5.0))
    raise RuntimeError(f"{url} cannot be fetched ({problem}): run the command again")


@contextlib.contextmanager
def patient_sockets() -> Iterator[None]:
    """Connections break after TIMEOUT seconds without a byte. ManiSkill's downloader would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def mirrored(url: str, mirror: str | None) -> str:
    """The same path at the mirror. Without one, $HF_ENDPOINT replaces huggingface.co."""
    parts = urlsplit(url)
    if mirror is None and url.startswith(HUGGING_FACE):
        mirror = os.environ.get("HF_ENDPOINT")
    return f"{mirror.rstrip('/')}{parts.path}" if mirror else url


def lacking(archive: Archive, folder: Path) -> list[str]:
    """The needed files that are not in the folder."""
    return [name for name in archive.needed if not (folder / name).exists()]


def _content_folder(archive: Archive, unpacked: Path, url: str) -> Path:
    """The unpacked folder that holds the content: often the only one in the zip. Raises RuntimeError if it is wrong."""
    top = list(unpacked.iterdir())
    folder = top[0] if len(top) == 1 and top[0].is_dir() else unpacked
    if missing := lacking(archive, folder):
        raise RuntimeError(f"{url} holds no {missing[0]}: the archive has changed")
    if archive.git_tree and git_tree(folder).hex() != archive.git_tree:
        raise RuntimeError(f"{url} holds other files than the published ones: try another mirror")
    return folder


def unpack(packed: Path, unpacked: Path, url: str) -> int:
    """Unpack all ordinary files of a zip. Returns the number of links and devices, which are left out.

    Raises:
        RuntimeError: the zip is damaged or encrypted, a name leaves the folder, or it is larger than any published
            archive.
    """
    try:
        return _unpack(packed, unpacked, url)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise RuntimeError(f"{url} arrived damaged ({error}): run the command again") from error


def _unpack(packed: Path, unpacked: Path, url: str) -> int:
    with zipfile.ZipFile(packed) as content:
        entries = content.infolist()
        size = sum(entry.file_size for entry in entries)  # zipfile reads no more of an entry than this
        if len(entries) > MAX_FILES or size > min(MAX_BYTES, shutil.disk_usage(packed.parent).free):
            raise RuntimeError(
                f"{url} unpacks to {len(entries)} files of {size / 1e6:.0f} MB: no asset is that large, or the disk is "
                "too full"
            )
        for entry in entries:
            if leaves_folder(entry.filename.removesuffix("/")) or entry.orig_filename != entry.filename:
                raise RuntimeError(f"{url} holds {entry.orig_filename!r}, which is not a plain name: not unpacked")
            if entry.flag_bits & 1:
                raise RuntimeError(f"{url} is encrypted: that is not a published asset")
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
