"""`doctor.py --download` against a local server that speaks as Hugging Face and GitHub do, and breaks where told to."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from envs import download

ROOT = Path(__file__).resolve().parent.parent
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
        served.url = f"http://127.0.0.1:{served.server_address[1]}"
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join(timeout=10)


def archives() -> tuple[download.Archive, ...]:
    """The real ones, with the checksum of this server's zip."""
    robot, bridge = download.ARCHIVES
    file = download.RemoteFile(bridge.file.url, sha256=hashlib.sha256(ZIPS[BRIDGE]).hexdigest())
    return robot, download.Archive(file, bridge.target, bridge.needed)


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
            source.url, source.target_path, source.checksum,
        )  # fmt: skip


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
    refused("widowx is there without wx250s.urdf: move it away", tmp_path / "b")
    assert (tmp_path / "b/robots/widowx/mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    refused("file", tmp_path / "file")
    server.cuts = {LARGE: [1] * 9}
    refused("can not be fetched .*run it again, it goes on", tmp_path / "c")


def test_doctor_downloads(server, tmp_path):
    """As a user types it; the zip of this server has another checksum than the published one, and that is said."""
    command = [sys.executable, "doctor.py", "--download", "--asset_dir", str(tmp_path / "x"), "--mirror", server.url]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and run.stdout.startswith("carrot: 4 files, 1 MB\ncarrot: 4 fetched")
    assert "robots/widowx: fetched" in run.stdout
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1 and "sha256" in run.stderr
    served = {name: data for name, data in WANTED.items() if not name.startswith("tasks")}
    assert content(tmp_path / "x") == served
    nobody = [*command[:-1], "http://127.0.0.1:9"]
    run = subprocess.run(nobody, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "127.0.0.1:9" in run.stderr and len(run.stderr.splitlines()) == 1
    run = subprocess.run([sys.executable, "doctor.py", "--mirror", "x"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "belong to --download" in run.stderr
