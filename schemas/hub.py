"""Folders that flags name, on this machine or on the Hugging Face Hub.

    small_folder("gen-robot/openvla-7b-rlvla-warmup")  # what a check needs: configuration, statistics, tokenizer
    whole_folder("RLinf/my-model@v1.0")                # the weights too, of the revision v1.0
    whole_folder("checkpoints/mine")                   # a folder here, which always wins: Path("checkpoints/mine")

huggingface_hub fetches. So its cache ($HF_HOME), its resumed connections, $HF_ENDPOINT, $HF_HUB_OFFLINE and your token
work as you know them. Checksums are compared here, because the library compares only sizes.

All ranks call these functions. Those of one machine take turns at a lock in the cache. The first one fetches. The
others wait without a collective, so nothing can time out, and get its result or its error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from schemas import CommonError, Schema, UserError

NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
SMALL = ("*.json", "tokenizer.model", "README.md")  # files of a model that are not weights
WEIGHTS = ("*.safetensors",)
BELOW = ("*/*",)  # folders in the repository of a model, which hold other models or the state of their training
ATTEMPTS = 5  # connections that break are resumed within one attempt
POLL_SECONDS, WAIT_SECONDS = 0.2, 5.0  # between two tries to get the lock, and before a line says that we wait
LINE_SECONDS = 60.0  # between two lines about a download, where there is no terminal


class Repo(NamedTuple):
    """A repository on the Hub."""

    id: str
    revision: str | None  # branch, tag or commit. None is the main branch
    kind: str  # "model" or "dataset"

    def __str__(self) -> str:
        return self.id + (f"@{self.revision}" if self.revision else "")


class Outcome(Schema):
    """What became of one download, for the processes that waited for it."""

    pid: int
    finished: float  # seconds since 1970
    result: str | None = None
    error: str | None = None


folders: dict[Repo, Path] = {}  # what this process knows already


# ---------------------------------------------------------------------- names
def repo_of(name: str, kind: str = "model") -> Repo | None:
    """The repository that a name means, or None for a folder here and for anything that cannot be one on the Hub.

    >>> repo_of("RLinf/maniskill_assets@v1", "dataset")
    Repo(id='RLinf/maniskill_assets', revision='v1', kind='dataset')
    >>> repo_of("./mine/model"), repo_of("three/part/name"), repo_of("openvla-tiny")
    (None, None, None)
    """
    match = NAME.fullmatch(name)
    if match is None or os.path.lexists(name):
        return None
    return Repo(match["id"], match["revision"], kind)


def name_of(folder: Path) -> tuple[str, str] | None:
    """(id, commit) of the model that a folder of the cache holds, or None for any other folder."""
    commit, snapshots, owner = folder.name, folder.parent.name, folder.parent.parent.name
    parts = owner.split("--")
    if snapshots != "snapshots" or parts[0] != "models" or len(parts) != 3 or not re.fullmatch("[0-9a-f]{40}", commit):
        return None
    return f"{parts[1]}/{parts[2]}", commit


# ---------------------------------------------------------------------- what callers use
def small_folder(name: str, source: str = "", *, offline: bool = False) -> Path:
    """The folder of a model, with its small files. Weights may be missing.

    Args:
        name: a folder, or `id` or `id@revision` of a model on the Hub.
        source: the flag that the name was given to, such as --model_path.
        offline: whether only the cache is looked at. What is missing there gives Path(name).

    Raises:
        UserError: the Hub has no such model or cannot be reached, or the files cannot be written.
    """
    repo = repo_of(name)
    if repo is None:
        return Path(name)
    if repo not in folders:
        if offline:
            return cached(repo, SMALL, BELOW) or Path(name)
        folders[repo] = fetch(repo, SMALL, BELOW, source)
    return folders[repo]


def whole_folder(name: str, source: str = "") -> Path:
    """The folder of a model, with its weights. Raises as small_folder()."""
    repo = repo_of(name)
    if repo is None:
        return Path(name)
    folder = small_folder(name, source)
    pinned = repo._replace(revision=folder.name)
    if pinned not in folders:
        there = cached(pinned, WEIGHTS, BELOW)
        is_whole = there is not None and any(there.glob(WEIGHTS[0]))
        folders[pinned] = there if is_whole else fetch(pinned, WEIGHTS, BELOW, source, said=str(repo))
    return folders[pinned]


def data_folder(name: str, patterns: tuple[str, ...], source: str) -> Path:
    """The folder of a data set, with the files that the patterns name. Raises as small_folder()."""
    repo = repo_of(name, "dataset")
    if repo is None:
        return Path(name)
    if repo not in folders:
        folders[repo] = fetch(repo, patterns, (), source)
    return folders[repo]


def top_files(name: str) -> list[str]:
    """Names of all files at the top of a model on the Hub, fetched or not. Empty for a folder here."""
    repo = repo_of(name)
    if repo is None or repo not in folders:
        return []
    return [file for file in listed(repo._replace(revision=folders[repo].name)) if "/" not in file]


# ---------------------------------------------------------------------- one process per machine
def started() -> float:
    """When this process started, in seconds since 1970."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def once(key: str, work: Callable[[], str]) -> str:
    """The result of `work`, which one process does for all that ask on this machine at the same time.

    A process waits for another one that is at work. If that one finished after this process started, its result or
    error is taken over. The lock is released when its holder ends in any way, and then the next one works.

    Args:
        key: names the work. Processes with the same key do the same.

    Raises:
        CommonError: a UserError of the work, here or in the process that did it.
    """
    with turn(key) as lock:
        last = outcome_in(lock)
        if last is not None and last.pid != os.getpid() and last.finished >= started():
            if last.error is not None:
                raise CommonError(last.error)
            return last.result
        try:
            result = work()
        except UserError as error:
            write_outcome(lock, error=str(error))
            raise CommonError(str(error)) from error
        write_outcome(lock, result=result)
        return result


@contextlib.contextmanager
def turn(key: str) -> Iterator[int | None]:
    """Wait for the lock of a key, in the cache's folder. Yields its descriptor, or None if the cache has no locks."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE, ".locks", f"solovla-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:  # a cache that may only be read
        yield None
        return
    try:
        wait_for(lock, key)
        yield lock
    finally:
        os.close(lock)


def wait_for(lock: int, key: str) -> None:
    """Take a lock, and say once if that takes long. Without locks on this file system nothing is waited for."""
    begin, said = time.monotonic(), os.environ.get("LOCAL_RANK", "0") != "0"
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError:
            return
        if not said and time.monotonic() - begin > WAIT_SECONDS:
            print(f"another process fetches {key.split()[0]}, this one waits for it", flush=True)
            said = True
        time.sleep(POLL_SECONDS)


def outcome_in(lock: int | None) -> Outcome | None:
    """What the last process wrote, or None."""
    if lock is None:
        return None
    with contextlib.suppress(ValueError, OSError):  # a process that was killed while it wrote
        return Outcome.model_validate_json(os.pread(lock, 2**20, 0))
    return None


def write_outcome(lock: int | None, result: str | None = None, error: str | None = None) -> None:
    """Tell those who wait. A full disk lets them do the work again."""
    if lock is not None:
        text = Outcome(pid=os.getpid(), finished=time.time(), result=result, error=error).model_dump_json()
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, text.encode(), 0)


# ---------------------------------------------------------------------- fetching
def cached(repo: Repo, patterns: tuple[str, ...], ignored: tuple[str, ...]) -> Path | None:
    """The folder in the cache, or None if one of its files is missing. The Hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        place = snapshot_download(
            repo.id,
            repo_type=repo.kind,
            revision=repo.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(place)


def fetch(repo: Repo, patterns: tuple[str, ...], ignored: tuple[str, ...], source: str, said: str = "") -> Path:
    """The folder in the cache with the files that the patterns name, fetched by one process of this machine.

    Args:
        said: the name that the user wrote, if `repo` has a commit instead.
    """
    from huggingface_hub import constants, get_token

    said = said or str(repo)
    access = hashlib.sha256(f"{constants.ENDPOINT} {constants.HF_HUB_OFFLINE} {get_token()}".encode()).hexdigest()
    key = f"{said} {repo.revision} {repo.kind} {' '.join(patterns)} {constants.HF_HUB_CACHE} {access}"

    def work() -> str:
        try:
            return fetch_now(repo, patterns, ignored, said)
        except UserError:
            raise
        except Exception as error:  # the library raises errors of a dozen kinds
            raise UserError(why_not(error, repo, said, source)) from error

    return Path(once(key, work))


def fetch_now(repo: Repo, patterns: tuple[str, ...], ignored: tuple[str, ...], said: str) -> str:
    """The folder in the cache, after a look at the Hub. If that is down, what is whole in the cache still serves."""
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    if is_offline_mode():
        there = cached(repo, patterns, ignored)
        if there is None:
            raise LocalEntryNotFoundError("offline")
        return str(there)
    api = HfApi(library_name="solovla")
    revision = api.resolve_revision(repo.id, repo_type=repo.kind, revision=repo.revision)
    pinned = repo._replace(revision=revision.resolved)
    sizes, there = listed(pinned), cached(pinned, patterns, ignored)
    if sizes and there is not None:
        return str(there)
    if patterns == SMALL:
        return patiently(lambda: download(pinned, patterns, ignored))
    sizes = matching(sizes or files_on_hub(api, pinned), patterns, ignored)
    place = snapshot_place(pinned)
    missing = [size for name, size in sizes.items() if not (place / name).exists()]
    check_room(sum(missing), said)
    files = f"{len(missing)} file{'s' * (len(missing) != 1)}, {amount(sum(missing))}"
    print(f"fetch   {said} from {constants.ENDPOINT}: {files}, to {constants.HF_HUB_CACHE}", flush=True)
    begin = time.monotonic()
    folder = patiently(lambda: download(pinned, patterns, ignored))
    check_content(api, pinned, Path(folder))
    print(f"fetch   {said} is there, after {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    return folder


def listed(repo: Repo) -> dict[str, int]:
    """{name: bytes} of all files of a repository, from the cache. Empty if the cache has no list."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(repo.id, repo_type=repo.kind, revision=repo.revision)
    except CachedRepoTreeNotFoundError:
        return {}
    return {file.path: file.size for file in files}


def files_on_hub(api, repo: Repo) -> dict[str, int]:
    """{name: bytes} of all files of a repository, from the Hub."""
    from huggingface_hub import RepoFile

    entries = api.list_repo_tree(repo.id, repo_type=repo.kind, revision=repo.revision, recursive=True)
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def matching(files: dict[str, int], patterns: tuple[str, ...], ignored: tuple[str, ...]) -> dict[str, int]:
    """The files that snapshot_download() would take."""
    from huggingface_hub.utils import filter_repo_objects

    names = filter_repo_objects(files, allow_patterns=list(patterns), ignore_patterns=list(ignored))
    return {name: files[name] for name in names}


def snapshot_place(repo: Repo) -> Path:
    """Where the cache keeps a commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo.id, repo_type=repo.kind)
    return Path(constants.HF_HUB_CACHE).resolve() / folder / "snapshots" / repo.revision


def download(repo: Repo, patterns: tuple[str, ...], ignored: tuple[str, ...]) -> str:
    """snapshot_download() of a commit, with bars in a terminal and lines elsewhere."""
    from huggingface_hub import snapshot_download

    return snapshot_download(
        repo.id,
        repo_type=repo.kind,
        revision=repo.revision,
        allow_patterns=list(patterns),
        ignore_patterns=list(ignored),
        library_name="solovla",
        tqdm_class=progress_class(),
    )


def patiently(work: Callable[[], str]) -> str:
    """The result of work. It is repeated after an error of the network, and then fetches only what is missing."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except Exception as error:
            if not may_pass(error) or attempt + 1 == ATTEMPTS:
                raise
            print(f"fetch   {one_line(error)}: trying again", flush=True)
            time.sleep(min(2.0**attempt, 30.0))
    raise AssertionError("unreachable")


def may_pass(error: Exception) -> bool:
    """Whether an error can be gone a moment later: the network's, and that of a busy server."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return type(error).__module__.startswith("httpx") or "Consistency check failed" in str(error)


def check_room(size: int, said: str) -> None:
    """Raise UserError if so many bytes do not fit on the cache's disk."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    disk = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if size > free:
        raise UserError(
            f"{said} has {amount(size)} to fetch, but only {amount(free)} are free in {cache}: make room, or set "
            "HF_HOME to a folder on a larger disk"
        )


def check_content(api, repo: Repo, folder: Path) -> None:
    """Compare the checksums of a folder in the cache. Damaged files are removed, so that the next start fetches them.

    Raises:
        UserError: a file is damaged.
    """
    found = api.verify_repo_checksums(repo.id, repo_type=repo.kind, revision=repo.revision)
    for wrong in found.mismatches:
        place = folder / wrong["path"]
        place.resolve().unlink(missing_ok=True)
        place.unlink(missing_ok=True)
    if found.mismatches:
        wrong = found.mismatches[0]
        raise UserError(
            f"{wrong['path']} of {repo.id} arrived damaged ({wrong['algorithm']} is {wrong['actual'][:12]} instead of "
            f"{wrong['expected'][:12]}): start again, which fetches only this file"
        )


def progress_class() -> type | None:
    """For a terminal the bars of huggingface_hub, for a log a line from time to time."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return None

    class Lines(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            kwargs.pop("name", None)
            self.counts_bytes = kwargs.get("unit") == "B" and "Reconstruct" in kwargs.get("desc", "")
            self.last = time.monotonic()
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.counts_bytes and time.monotonic() - self.last > LINE_SECONDS:
                self.last = time.monotonic()
                print(f"fetch   {amount(self.n)} of {amount(self.total or 0)}", flush=True)
            return shown

    return Lines


# ---------------------------------------------------------------------- what went wrong
def why_not(error: Exception, repo: Repo, said: str, source: str) -> str:
    """One sentence for an error of huggingface_hub: what was looked for, here and there, and the remedy."""
    from huggingface_hub import constants, errors, is_offline_mode

    there = {"model": "model", "dataset": "data set"}[repo.kind]
    name, hub = f"{source} {said}".strip(), constants.ENDPOINT
    page = f"{hub}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.id}"
    if is_offline_mode():
        command = f"hf download {repo.id}" + (" --repo-type dataset" if repo.kind == "dataset" else "")
        return (
            f"{name} is not a folder here, and HF_HUB_OFFLINE is set while the cache {constants.HF_HUB_CACHE} lacks it "
            f"or a part of it: unset the variable, or run `{command}` where there is a network"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is a {there} with conditions: accept them at {page}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: {page} has no revision {repo.revision or 'main'}, give a branch, a tag or a commit after the @"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        remedy = "correct the name, or run `hf auth login` if it is private"
        return f"{name} is neither a folder here nor a {there} that {hub} shows you{near(said)}: {remedy}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{name} is not a folder here, and {hub} answered with HTTP status {status}: try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        remedy = "make room, or set HF_HOME to another folder"
        return f"{name} cannot be written to {constants.HF_HUB_CACHE} ({error.strerror}): {remedy}"
    reason = one_line(error.__cause__ or error)
    return (
        f"{name} is not a folder here{near(said)}, and it could not be fetched from {hub} ({reason}): check the "
        "network, or set HF_ENDPOINT to a mirror, and start again, which keeps the files that are whole"
    )


def near(said: str) -> str:
    """ ", did you mean checkpoints/mine?" for a name that is almost that of a folder here, else nothing."""
    import difflib

    parent = Path(said).parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(said).name, names, n=1)
    return f" (did you mean {parent / close[0]}?)" if close else ""


def amount(size: float) -> str:
    """A number of bytes for people.

    >>> amount(15.1e9), amount(2_300_000)
    ('15.1 GB', '2.3 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def one_line(error: BaseException) -> str:
    """The kind and the beginning of an error's text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
