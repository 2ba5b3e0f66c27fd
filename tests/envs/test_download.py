"""`doctor.py --download` against a local server that speaks as Hugging Face and GitHub do, and breaks where told to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import zipfile
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from conftest import ROOT
from launching import python

from envs.assets import download
from schemas import UserError

ASSETS = ROOT.parent / "shared" / "assets" / "maniskill"
FILES = {
    "carrot/more_carrot/model_db.json": b'{"a": 1}',
    "carrot/more_carrot/010_toy bear_1/textured.glb": bytes(range(256)) * 4000,  # in LFS, a space in its path
    "carrot/more_plate/model_db.json": b"{}",
    "carrot/more_table/imgs/001.png": b"\x89PNG" + b"x" * 5000,
}
LARGE = "carrot/more_carrot/010_toy bear_1/textured.glb"
WIDOWX = "/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip"
BRIDGE = "/datasets/haosulab/ManiSkill_bridge_v2_real2sim/resolve/main/bridge_v2_real2sim_dataset.zip"


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


ZIPS = {
    WIDOWX: zipped({"ManiSkill-WidowX250S-0.2.0/wx250s.urdf": b"<robot/>", "ManiSkill-WidowX250S-0.2.0/m/a.stl": b"s"}),
    BRIDGE: zipped(
        {
            "bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb": b"glTF" * 99,
            "bridge_v2_real2sim_dataset/real_inpainting/bridge_real_eval_1.png": b"png",
        }
    ),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        server.requests.append((path, self.headers.get("Range")))
        if path in server.instead:
            server.instead[path](self)
            return
        prefix = "/datasets/RLinf/maniskill_assets/resolve/main/"
        if path == "/api/datasets/RLinf/maniskill_assets/tree/main/carrot":
            self.tree(parse_qs(url.query).get("cursor"))
        elif path.startswith(prefix) and path.removeprefix(prefix) in FILES:
            self.redirect(path) if not url.query else self.file(
                path.removeprefix(prefix), server.files[path[len(prefix) :]]
            )
        elif path in server.zips:
            self.file(path, server.zips[path], ranges=path == BRIDGE)
        else:
            self.send_error(404)

    def redirect(self, path):
        """Large files come from elsewhere, as Hugging Face's do."""
        self.send_response(302)
        self.send_header("Location", self.path + "?signed=1")
        self.end_headers()

    def tree(self, cursor):
        """Two pages."""
        entries = [{"type": "directory", "path": "carrot/more_carrot", "oid": "0", "size": 0}]
        for name, data in FILES.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}} if name == LARGE else {}
            entries.append({"type": "file", "path": name, "size": len(data), "oid": git} | lfs)
        body = json.dumps(entries[2:] if cursor else entries[:2]).encode()
        self.send_response(200)
        if not cursor:
            following = "https://huggingface.co" + self.path + "&cursor=2"
            self.send_header("Link", f'<{following}>; rel="next"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, name, data, ranges=True):
        asked, begin = self.headers.get("Range"), 0
        if asked and ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        cut = self.server.cuts.get(name, [])
        self.wfile.write(data[begin : cut.pop(0)] if cut else data[begin:])  # the connection closes after it


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.requests, served.cuts, served.files, served.zips = [], {}, dict(FILES), dict(ZIPS)
        served.instead = {}  # path -> what answers in the place of the above
        served.url = f"http://127.0.0.1:{served.server_address[1]}"
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join(timeout=10)


@functools.cache
def robot_tree() -> str:
    """What git itself says of the robot's files in this server's zip."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(ZIPS[WIDOWX])) as archive:
            archive.extractall(folder)
        (inner,) = Path(folder).iterdir()
        for words in (["init", "-q"], ["add", "-A"]):
            subprocess.run(["git", *words], cwd=inner, check=True)
        said = subprocess.run(["git", "write-tree"], cwd=inner, check=True, capture_output=True, text=True)
        return said.stdout.strip()


def archives() -> tuple[download.Archive, ...]:
    """The real ones, with the checksums of this server's zips."""
    robot, bridge = download.ARCHIVES
    file = dataclasses.replace(bridge.file, sha256=hashlib.sha256(ZIPS[BRIDGE]).hexdigest())
    return dataclasses.replace(robot, git_tree=robot_tree()), dataclasses.replace(bridge, file=file)


def fetch_all(server, folder) -> list[str]:
    said = []
    download.fetch_assets(folder, said.append, mirror=server.url, archives=archives())
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WANTED = FILES | {
    "robots/widowx/wx250s.urdf": b"<robot/>",
    "robots/widowx/m/a.stl": b"s",
    "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb": b"glTF" * 99,
    "tasks/bridge_v2_real2sim_dataset/real_inpainting/bridge_real_eval_1.png": b"png",
}


def test_urls_and_checksum_are_maniskills():
    from mani_skill.utils.assets.data import DATA_SOURCES

    for archive, uid in zip(download.ARCHIVES, ("widowx250s", "bridge_v2_real2sim")):
        source = DATA_SOURCES[uid]
        assert (archive.file.url, archive.target, archive.file.sha256) == (
            source.url,
            source.target_path,
            source.checksum,
        )


def test_the_default_folder_is_maniskills(monkeypatch):
    import mani_skill

    monkeypatch.delenv("MS_ASSET_DIR", raising=False)
    assert download.default_asset_dir() == Path.home() / ".maniskill" / "data"
    assert "MS_ASSET_DIR" in os.environ or download.default_asset_dir() == mani_skill.ASSET_DIR
    monkeypatch.setenv("MS_ASSET_DIR", "/data/ms")
    assert download.default_asset_dir() == Path("/data/ms/data")


def test_everything_arrives_and_is_not_fetched_twice(server, tmp_path):
    fetch_all(server, tmp_path)
    assert content(tmp_path) == WANTED  # nothing else: no parts, no zips
    server.requests.clear()
    (tmp_path / LARGE).write_bytes(b"damaged")
    said = fetch_all(server, tmp_path)
    fetched = {path for path, _ in server.requests if "/tree/" not in path}
    assert (
        fetched == {f"/datasets/RLinf/maniskill_assets/resolve/main/{LARGE}"} and "1 fetched, 3 were there" in said[1]
    )
    assert content(tmp_path) == WANTED


def test_broken_connections_are_continued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    bridge_cut = len(ZIPS[BRIDGE]) // 2
    server.cuts = {LARGE: [300_000, 700_001], BRIDGE: [bridge_cut], WIDOWX: [50]}
    fetch_all(server, tmp_path)
    assert content(tmp_path) == WANTED
    ranges = {name: [r for path, r in server.requests if path.endswith(name) and r] for name in (LARGE, BRIDGE)}
    assert set(ranges[LARGE]) == {"bytes=300000-", "bytes=700001-"} and ranges[BRIDGE] == [f"bytes={bridge_cut}-"]


def test_a_killed_download_goes_on_where_it_stopped(server, tmp_path):
    part = tmp_path / (LARGE + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES[LARGE][:123_456])
    (tmp_path / "carrot/more_plate").mkdir()
    (tmp_path / "carrot/more_plate/model_db.json.part").write_bytes(b"{} and much more than there is")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/bridge_v2_real2sim_dataset").mkdir()  # what ManiSkill's own download leaves when interrupted
    (tmp_path / "tasks/bridge_v2_real2sim_dataset.zip.part").write_bytes(ZIPS[BRIDGE])  # whole, not yet in place
    fetch_all(server, tmp_path)
    assert content(tmp_path) == WANTED
    assert (f"/datasets/RLinf/maniskill_assets/resolve/main/{LARGE}", "bytes=123456-") in server.requests


def test_what_can_not_be_had_is_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)

    def refused(words, folder=tmp_path / "a"):
        with pytest.raises(RuntimeError, match=words) as caught:
            fetch_all(server, folder)
        assert "\n" not in str(caught.value)

    server.files[LARGE] = FILES[LARGE][:-1] + b"!"
    refused("textured.glb arrived damaged .sha256")
    assert not (tmp_path / "a" / LARGE).exists() and not (tmp_path / "a" / (LARGE + ".part")).exists()
    server.files[LARGE] = FILES[LARGE]
    server.zips[BRIDGE] = ZIPS[BRIDGE][:-9] + b"?" * 9
    refused("bridge_v2_real2sim_dataset.zip arrived damaged .sha256")
    server.zips[BRIDGE] = ZIPS[BRIDGE]
    begin = ZIPS[WIDOWX].index(b"wx250s.urdf") + len("wx250s.urdf")  # its data; no checksum is known, but CRCs are
    server.zips[WIDOWX] = ZIPS[WIDOWX][:begin] + b"\0\0\0" + ZIPS[WIDOWX][begin + 3 :]
    refused("v0.2.0.zip arrived damaged", tmp_path / "b")
    assert not (tmp_path / "b" / "robots" / "widowx").exists()
    server.zips[WIDOWX] = zipped({"other/readme": b""})
    refused("holds no wx250s.urdf", tmp_path / "b")
    del server.zips[WIDOWX]
    refused("404", tmp_path / "b")
    server.zips = dict(ZIPS)
    (tmp_path / "b/robots/widowx").mkdir(parents=True)
    (tmp_path / "b/robots/widowx/mine.txt").write_text("mine")
    refused("widowx exists without wx250s.urdf: move it away", tmp_path / "b")
    assert (tmp_path / "b/robots/widowx/mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    refused("file", tmp_path / "file")
    server.cuts = {LARGE: [1] * 9}
    refused("cannot be fetched .*run the command again, it continues", tmp_path / "c")


# ------------------------------------------------------------------ servers that mean no good
TREE = "/api/datasets/RLinf/maniskill_assets/tree/main/carrot"


def answer(body: bytes, *, status: int = 200, length: bool = True, **headers: str):
    """A reply with these bytes; without its length the end of the connection is the end of the body."""

    def reply(handler: Handler) -> None:
        handler.send_response(status)
        if length:
            handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):  # the reader may have had enough
            handler.wfile.write(body)

    return reply


def listed(**change) -> bytes:
    """One page with one file, changed; a value of None leaves its key out."""
    entry = {"type": "file", "path": "carrot/a.png", "size": 4, "oid": "0" * 40} | change
    return json.dumps([{key: value for key, value in entry.items() if value is not None}]).encode()


def refusal(server, folder) -> str:
    with pytest.raises(RuntimeError) as caught:
        fetch_all(server, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "body, said",
    [
        (b"<html>busy</html>", "is not valid JSON"),
        (b"", "is empty"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"error": "gone"}', "it must be a list"),
        (b"[1]", "has 0 1, but it must be"),
        (listed(path=None), "has no 0.file.path"),
        (listed(path=7), "has 0.file.path 7, but it must be text"),
        (listed(size="4"), 'has 0.file.size "4", but it must be a whole number'),
        (listed(size=-1), "has 0.file.size -1, but it must be at least 0"),
        (listed(size=10**15), "0.file.size"),
        (listed(size=2**40), "lists 1 files of 1099512 MB"),
        (listed(oid=None), "has no 0.file.oid"),  # no checksum: not fetched
        (listed(oid="abc"), "has 0.file.oid"),
        (listed(lfs={"size": 4}), "has no 0.file.lfs.oid"),
        (b"[]", "has no files below carrot/"),
    ],
)
def test_a_list_of_another_shape_is_one_sentence(server, tmp_path, body, said):
    server.instead[TREE] = answer(body)
    assert said in refusal(server, tmp_path) and not content(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "carrot/../../a",
        "/etc/a",
        "carrot//a",
        "carrot/./a",
        "carrot/C:a",
        "carrot/..\\a",
        "carrot/NUL.txt",
        "carrot/a\n",
        "carrot/\x1b[31ma",
        "elsewhere/a",
        "carrot/" + "a" * 300,
        "carrot/com1",
    ],
)
def test_a_listed_name_that_leaves_its_folder_is_refused(server, tmp_path, path):
    server.instead[TREE] = answer(listed(path=path))
    assert f"lists {path!r}, which is not below carrot/: not fetched" in refusal(server, tmp_path / "here")
    assert not content(tmp_path)


def test_a_list_without_an_end_is_one_sentence(server, tmp_path, monkeypatch):
    def loop(handler: Handler) -> None:
        answer(listed(), Link=f'<{handler.path}>; rel="next"')(handler)

    def ever_further(handler: Handler) -> None:
        answer(listed(), Link=f'<{handler.path}1>; rel="next"')(handler)

    for reply in (loop, ever_further):
        server.instead[TREE] = reply
        assert "does not end after" in refusal(server, tmp_path)
    assert len(server.requests) <= 1 + download.MAX_PAGES
    monkeypatch.setattr(download, "MAX_PAGE_BYTES", 50)
    assert "answers with more than 50 bytes" in refusal(server, tmp_path)


def test_the_next_page_is_at_the_same_host():
    first = "https://huggingface.co/api/tree"
    assert download._following(first, "/api/tree?cursor=2", None) == first + "?cursor=2"
    for link in ("https://elsewhere.org/api", "http://huggingface.co/api", "file:///etc/passwd"):
        with pytest.raises(RuntimeError, match="another host"):
            download._following(first, link, None)


@pytest.mark.parametrize("length", [True, False])
def test_no_more_is_written_than_was_listed(server, tmp_path, monkeypatch, length):
    """A body of other length than listed, said so in its header or not; and an archive, of which no size is known."""
    name = "carrot/more_plate/model_db.json"
    server.instead[f"/datasets/RLinf/maniskill_assets/resolve/main/{name}"] = answer(b"x" * (1 << 22), length=length)
    assert f"{name} is longer than the 2 bytes" in refusal(server, tmp_path)
    assert not list(tmp_path.rglob("model_db.json*.part"))
    server.instead.clear()
    fetch_all(server, tmp_path / "all")
    shutil.rmtree(tmp_path / "all/robots")
    monkeypatch.setattr(download, "MAX_BYTES", 1 << 21)
    server.instead[WIDOWX] = answer(b"x" * (1 << 22), length=length)
    assert "v0.2.0.zip is longer than the 2097152 bytes" in refusal(server, tmp_path / "all")
    assert not list((tmp_path / "all/robots").iterdir())


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:,a", "//127.0.0.1:9/a"])
def test_redirects_stay_on_the_web(server, tmp_path, monkeypatch, target):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server.instead[WIDOWX] = answer(b"", status=302, Location=target)
    said = refusal(server, tmp_path)
    assert ("cannot be fetched" if target.startswith("//") else f"leads to {target!r}, which is not https") in said
    server.instead[WIDOWX] = answer(b"", status=301, Location=WIDOWX)
    assert "cannot be fetched (HTTP status 301)" in refusal(server, tmp_path)


def test_what_came_safely_is_not_led_to_http():
    request = download.urllib.request.Request("https://huggingface.co/a")
    with pytest.raises(RuntimeError, match="which is not https"):
        download._Redirect().http_error_302(request, None, 302, "Found", {"Location": "http://huggingface.co/a"})


def robot_zip(*more: tuple[str, int, bytes]) -> bytes:
    """This server's zip of the robot with further entries: name, Unix mode, content."""
    buffer = io.BytesIO(ZIPS[WIDOWX])
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, mode, data in more:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a", "x\\..\\a", "C:/a", "x/con", "x/\x1b]0;a"])
def test_a_zip_with_a_name_that_leaves_its_folder_is_refused(server, tmp_path, name):
    server.zips[WIDOWX] = robot_zip((name, 0, b"!"))
    assert "which is not a plain name: not unpacked" in refusal(server, tmp_path / "here")
    assert not list(tmp_path.rglob("robots/*"))


def test_links_of_a_zip_are_left_out(server, tmp_path):
    top = "ManiSkill-WidowX250S-0.2.0"
    server.zips[WIDOWX] = robot_zip((f"{top}/l", stat.S_IFLNK | 0o777, b"/etc"), (f"{top}/p", stat.S_IFIFO, b""))
    assert any("fetched, in" in line and "left out 2 links" in line for line in fetch_all(server, tmp_path))
    assert content(tmp_path) == WANTED


def test_a_zip_that_unpacks_to_too_much_is_refused(server, tmp_path, monkeypatch):
    """By its sizes, before anything is unpacked; and by the number of its files."""
    server.zips[WIDOWX] = robot_zip(("ManiSkill-WidowX250S-0.2.0/zeros", 0, bytes(1 << 24)))
    assert len(server.zips[WIDOWX]) < 1 << 15
    monkeypatch.setattr(download, "MAX_BYTES", 1 << 23)
    assert "unpacks to 3 files of 17 MB" in refusal(server, tmp_path)
    server.zips[WIDOWX] = robot_zip(*((f"x/{i}", 0, b"") for i in range(9)))
    monkeypatch.setattr(download, "MAX_FILES", 10)
    assert "unpacks to 11 files" in refusal(server, tmp_path)
    assert not list(tmp_path.rglob("robots/*"))


def test_an_archive_with_other_content_is_refused(server, tmp_path):
    """GitHub's zips have no lasting checksum, their content has one."""
    server.zips[WIDOWX] = robot_zip(("ManiSkill-WidowX250S-0.2.0/more", 0, b"!"))
    assert "holds other files than the published ones" in refusal(server, tmp_path)
    assert not list(tmp_path.rglob("robots/*"))


@pytest.mark.skipif(not ASSETS.exists(), reason=f"no published meshes at {ASSETS}")
def test_the_robots_checksum_is_that_of_the_published_files():
    assert download.git_tree(ASSETS / "robots/widowx").hex() == download.ARCHIVES[0].git_tree


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(server, tmp_path):
    part = tmp_path / (LARGE + ".part")
    part.parent.mkdir(parents=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("elsewhere")):
        make(part)
        assert f"{part} is not a regular file: remove it" in refusal(server, tmp_path)
        part.unlink()
    os.mkfifo(tmp_path / LARGE)  # what is in place and wrong is fetched anew
    fetch_all(server, tmp_path)
    assert content(tmp_path) == WANTED


@pytest.mark.parametrize("mirror", ["nonsense", "", "file:///etc", "ftp://a", "https://", "http://a:b", "http://a b/"])
def test_a_mirror_that_is_no_address_is_refused_before_anything_is_made(tmp_path, mirror):
    with pytest.raises(UserError, match=r"^--mirror .* is not a url: it must begin with https://"):
        download.fetch_assets(tmp_path / "x", print, mirror=mirror)
    assert not (tmp_path / "x").exists()


def test_doctor_downloads(server, tmp_path):
    """As a user types it; the zip of this server holds other files than the published one, and that is said."""
    command = ["doctor.py", "--download", "--asset_dir", tmp_path / "x", "--mirror", server.url]
    run = python(*command)
    assert run.returncode == 1 and run.stdout.startswith("carrot: 4 files, 1 MB\ncarrot: 4 fetched")
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1 and "other files than" in run.stderr
    assert content(tmp_path / "x") == FILES
    nobody = [*command[:-1], "http://127.0.0.1:9"]
    run = python(*nobody)
    assert run.returncode == 1 and "127.0.0.1:9" in run.stderr and len(run.stderr.splitlines()) == 1
    run = python(*command[:-1], "nonsense")
    assert run.returncode == 2 and run.stderr.startswith("error: --mirror 'nonsense' is not a url")
    run = python("doctor.py", "--mirror", "x")
    assert run.returncode == 2 and "--asset_dir and --mirror need --download" in run.stderr
