"""`doctor.py --download` against a local server that speaks as Hugging Face and GitHub do, and breaks where told to."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHARED
from hub_server import Hub, serving
from launching import python

from envs.assets import download
from schemas import UserError

ASSETS = SHARED / "assets" / "maniskill"
FILES = {
    "carrot/more_carrot/model_db.json": b'{"a": 1}',
    "carrot/more_carrot/010_toy bear_1/textured.glb": bytes(range(256)) * 4000,  # in LFS, a space in its path
    "carrot/more_plate/model_db.json": b"{}",
    "carrot/more_table/imgs/001.png": b"\x89PNG" + b"x" * 5000,
}
LARGE = "carrot/more_carrot/010_toy bear_1/textured.glb"
WIDOWX = "/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip"
BRIDGE = "haosulab/ManiSkill_bridge_v2_real2sim"
TOP = "ManiSkill-WidowX250S-0.2.0"


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


ROBOT_ZIP = zipped({f"{TOP}/wx250s.urdf": b"<robot/>", f"{TOP}/m/a.stl": b"s"})
BRIDGE_ZIP = zipped(
    {
        "bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb": b"glTF" * 99,
        "bridge_v2_real2sim_dataset/real_inpainting/bridge_real_eval_1.png": b"png",
        "bridge_v2_real2sim_dataset/more": os.urandom(2000),
    }
)
WANTED = FILES | {
    "robots/widowx/wx250s.urdf": b"<robot/>",
    "robots/widowx/m/a.stl": b"s",
    "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb": b"glTF" * 99,
    "tasks/bridge_v2_real2sim_dataset/real_inpainting/bridge_real_eval_1.png": b"png",
}


def serve_all(hub: Hub) -> None:
    hub.add("RLinf/maniskill_assets", FILES | {"README.md": b"#"}, "dataset")
    hub.add(BRIDGE, {"bridge_v2_real2sim_dataset.zip": BRIDGE_ZIP}, "dataset")
    hub.pages[WIDOWX] = ROBOT_ZIP


@pytest.fixture
def server(monkeypatch, tmp_path_factory, robot_tree):
    """Everything, with the checksums of this server's zips in the place of the published ones."""
    from huggingface_hub import constants
    from mani_skill.utils.assets.data import DATA_SOURCES

    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    robot, bridge = download.ARCHIVES
    monkeypatch.setattr(download, "ARCHIVES", (dataclasses.replace(robot, git_tree=robot_tree), bridge))
    source = dataclasses.replace(DATA_SOURCES[bridge.uid], checksum=hashlib.sha256(BRIDGE_ZIP).hexdigest())
    monkeypatch.setitem(DATA_SOURCES, bridge.uid, source)
    with serving() as hub:
        serve_all(hub)
        yield hub


@pytest.fixture(scope="module")
def robot_tree(tmp_path_factory) -> str:
    """What git itself says of the robot's files in this server's zip."""
    folder = tmp_path_factory.mktemp("robot")
    with zipfile.ZipFile(io.BytesIO(ROBOT_ZIP)) as archive:
        archive.extractall(folder)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=folder / TOP, check=True)
    said = subprocess.run(["git", "write-tree"], cwd=folder / TOP, check=True, capture_output=True, text=True)
    return said.stdout.strip()


def fetch_all(server: Hub, folder: Path) -> list[str]:
    said = []
    download.fetch_assets(folder, said.append, mirror=server.url)
    return said


def content(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cache/")}


def refusal(server: Hub, folder: Path) -> str:
    """The lines of parts that could not be fetched, and the last sentence."""
    said = []
    with pytest.raises(RuntimeError) as caught:
        download.fetch_assets(folder, said.append, mirror=server.url)
    assert "\n" not in str(caught.value)
    return "\n".join([*(line for line in said if "not fetched" in line), str(caught.value)])


# ---------------------------------------------------------------------- ManiSkill's places
def test_places_are_maniskills():
    from mani_skill.utils.assets.data import DATA_SOURCES

    robot, bridge = (DATA_SOURCES[archive.uid] for archive in download.ARCHIVES)
    assert [archive.target for archive in download.ARCHIVES] == [robot.target_path, bridge.target_path]
    assert robot.checksum is None and bridge.checksum and robot.url == download.mirrored(robot.url, None)


def test_the_default_folder_is_maniskills(monkeypatch):
    import mani_skill

    monkeypatch.delenv("MS_ASSET_DIR", raising=False)
    assert download.default_asset_dir() == Path.home() / ".maniskill" / "data"
    assert "MS_ASSET_DIR" in os.environ or download.default_asset_dir() == mani_skill.ASSET_DIR
    monkeypatch.setenv("MS_ASSET_DIR", "/data/ms")
    assert download.default_asset_dir() == Path("/data/ms/data")


def test_a_mirror_of_the_hub_has_its_archives(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com/")
    assert download.mirrored("https://huggingface.co/datasets/a/b", None) == "https://hf-mirror.com/datasets/a/b"
    assert download.mirrored("https://github.com/a/b", None) == "https://github.com/a/b"
    assert download.mirrored("https://github.com/a/b", "http://m") == "http://m/a/b"


# ---------------------------------------------------------------------- fetching
def test_everything_arrives_and_is_not_fetched_twice(server, tmp_path):
    server.cuts[hashlib.sha256(FILES[LARGE]).hexdigest()] = [300_000]  # the connection breaks once
    said = fetch_all(server, tmp_path)
    found = content(tmp_path)
    assert found.pop("tasks/bridge_v2_real2sim_dataset/more") and found == WANTED  # no parts, no zips, no README
    assert said[0].startswith("carrot: 4 files, 1.0 MB, in ")
    server.requests.clear()
    (tmp_path / LARGE).write_bytes(b"!" + FILES[LARGE][1:])  # damaged on this disk
    fetch_all(server, tmp_path)
    assert content(tmp_path) | WANTED == content(tmp_path)
    assert [path for path in server.bodies() if path.startswith("/lfs/")] == [
        f"/lfs/{hashlib.sha256(FILES[LARGE]).hexdigest()}"
    ]


def test_what_is_missing_is_listed_at_once_with_commands(server, tmp_path):
    del server.pages[WIDOWX]
    server.answers["/api/datasets/RLinf"] = 404
    said = refusal(server, tmp_path)
    assert "carrot: not fetched, because RLinf/maniskill_assets cannot be had from http" in said
    assert "robots/widowx: not fetched, because http" in said and "(HTTP status 404)" in said
    assert said.splitlines()[-1] == (
        f"2 of 3 parts are missing in {tmp_path} (carrot, robots/widowx): run this command again, which keeps what is "
        "there, or `hf download RLinf/maniskill_assets --repo-type dataset --include 'carrot/*' "
        f"--local-dir {tmp_path}` and `python -m mani_skill.utils.download_asset widowx250s -y`"
    )
    assert (tmp_path / "tasks/bridge_v2_real2sim_dataset/stages").is_dir()  # the third one was fetched
    server.answers.clear()
    server.pages[WIDOWX] = ROBOT_ZIP
    assert "was there" in fetch_all(server, tmp_path)[2]


def test_a_damaged_archive_is_refused(server, tmp_path):
    bridge = server.files(BRIDGE, "dataset")
    server.objects[hashlib.sha256(BRIDGE_ZIP).hexdigest()] = BRIDGE_ZIP[:-9] + b"?" * 9
    assert "SHA-256 hash does not match" in refusal(server, tmp_path) and bridge
    begin = ROBOT_ZIP.index(b"wx250s.urdf") + len("wx250s.urdf")  # its data, of which only a CRC is known
    server.pages[WIDOWX] = ROBOT_ZIP[:begin] + b"\0\0\0" + ROBOT_ZIP[begin + 3 :]
    shutil.rmtree(tmp_path / "robots")
    assert "v0.2.0.zip arrived damaged" in refusal(server, tmp_path)
    server.pages[WIDOWX] = zipped({"other/readme": b""})
    assert "holds no wx250s.urdf" in refusal(server, tmp_path)
    assert not any(path.name.startswith(("widowx", "bridge")) for path in tmp_path.glob("*/*"))


def test_a_folder_of_yours_is_not_overwritten(server, tmp_path):
    (tmp_path / "robots/widowx").mkdir(parents=True)
    (tmp_path / "robots/widowx/mine.txt").write_text("mine")
    assert "widowx exists without wx250s.urdf: move it away" in refusal(server, tmp_path)
    assert (tmp_path / "robots/widowx/mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "3 of 3 parts are missing" in refusal(server, tmp_path / "file")


# ---------------------------------------------------------------------- archives that mean no good
def robot_zip(*more: tuple[str, int, bytes]) -> bytes:
    """This server's zip of the robot with further entries: name, Unix mode, content."""
    buffer = io.BytesIO(ROBOT_ZIP)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, mode, data in more:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return buffer.getvalue()


def install_robot(server: Hub, folder: Path) -> str:
    return download.install(download.ARCHIVES[0], folder, server.url)


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a", "x\\..\\a", "C:/a", "x/con", "x/\x1b]0;a"])
def test_a_zip_with_a_name_that_leaves_its_folder_is_refused(server, tmp_path, name):
    server.pages[WIDOWX] = robot_zip((name, 0, b"!"))
    with pytest.raises(RuntimeError, match="which is not a plain name: not unpacked"):
        install_robot(server, tmp_path / "here")
    assert not list(tmp_path.rglob("robots/*"))


def test_links_of_a_zip_are_left_out(server, tmp_path):
    server.pages[WIDOWX] = robot_zip((f"{TOP}/l", stat.S_IFLNK | 0o777, b"/etc"), (f"{TOP}/p", stat.S_IFIFO, b""))
    said = install_robot(server, tmp_path)
    assert said.startswith("fetched, in") and "left out 2 links" in said
    assert sorted(path.name for path in (tmp_path / "robots").rglob("*")) == ["a.stl", "m", "widowx", "wx250s.urdf"]


def test_a_zip_that_unpacks_to_too_much_is_refused(server, tmp_path, monkeypatch):
    """By its sizes, before anything is unpacked; and by the number of its files."""
    server.pages[WIDOWX] = robot_zip((f"{TOP}/zeros", 0, bytes(1 << 24)))
    assert len(server.pages[WIDOWX]) < 1 << 15
    monkeypatch.setattr(download, "MAX_BYTES", 1 << 23)
    with pytest.raises(RuntimeError, match="unpacks to 3 files of 17 MB"):
        install_robot(server, tmp_path)
    server.pages[WIDOWX] = robot_zip(*((f"x/{i}", 0, b"") for i in range(9)))
    monkeypatch.setattr(download, "MAX_FILES", 10)
    with pytest.raises(RuntimeError, match="unpacks to 11 files"):
        install_robot(server, tmp_path)
    assert not list(tmp_path.rglob("robots/*"))


def test_an_archive_with_other_content_is_refused(server, tmp_path):
    """GitHub's zips have no lasting checksum, their content has one."""
    server.pages[WIDOWX] = robot_zip((f"{TOP}/more", 0, b"!"))
    with pytest.raises(RuntimeError, match="holds other files than the published ones"):
        install_robot(server, tmp_path)
    assert not list(tmp_path.rglob("robots/*"))


@pytest.mark.skipif(not ASSETS.exists(), reason=f"no published meshes at {ASSETS}")
def test_the_robots_checksum_is_that_of_the_published_files():
    assert download.git_tree(ASSETS / "robots/widowx").hex() == download.ARCHIVES[0].git_tree


# ---------------------------------------------------------------------- PhysX's library for GPUs
def test_the_librarys_place_is_sapiens(monkeypatch, tmp_path):
    """Where SAPIEN itself would download it from, and which file it would load."""
    import ctypes

    import sapien

    from envs.gpu import library

    loaded, asked = [], []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sapien.physx, "is_gpu_enabled", lambda: False)
    monkeypatch.setattr(sapien.physx, "_enable_gpu", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: loaded.append(name))
    monkeypatch.setattr(
        sapien.physx.requests, "get", lambda url: asked.append(url) or SimpleNamespace(content=zipped({}))
    )
    sapien.physx.enable_gpu()
    assert asked == [library.library_url()] and loaded[-1] == str(library.library_path())


@pytest.fixture
def library_at(server, monkeypatch, tmp_path):
    """The library's path in a home of its own, and the page from which it comes."""
    from envs.gpu import library

    monkeypatch.setenv("HOME", str(tmp_path))
    page = library.library_url().removeprefix("https://github.com")
    server.pages[page] = zipped({"libPhysXGpu_64.so": b"\x7fELF" + b"x" * 5000})
    return library.library_path(), page


def test_the_library_arrives_whole_for_several_ranks(server, library_at):
    """A second process fetches it while the first one waits for its answer."""
    from envs.gpu import library

    path, page = library_at
    said = []

    def first_request(method: str, asked: str) -> None:
        server.on_request = lambda method, asked: None
        assert asked == page and not path.exists()
        said.append(library.fetch_library(server.url))

    with pytest.raises(RuntimeError, match=r"libPhysXGpu_64\.so is missing: run `python doctor\.py --download`, or"):
        library.check_library()
    server.on_request = first_request
    said.append(library.fetch_library(server.url))
    assert said == [f"fetched, in {path.parent}"] * 2 and path.stat().st_size == 5004
    assert list(path.parent.iterdir()) == [path]
    library.check_library()
    server.requests.clear()
    assert library.fetch_library(server.url).startswith("was there") and not server.requests


@pytest.mark.parametrize(
    "page, problem",
    [
        (None, r"cannot be fetched \(HTTP status 404\)"),
        (zipped({"libPhysXGpu_64.so": b"<html>"}), "holds no library libPhysXGpu_64.so"),
        (zipped({"readme": b"\x7fELF"}), "holds no library libPhysXGpu_64.so"),
        (b"<html>sign in</html>", "arrived damaged"),
        ("cut", "cannot be fetched .*got only 100 out of"),
    ],
)
def test_a_library_that_does_not_arrive_leaves_nothing(server, library_at, page, problem):
    from envs.gpu import library

    path, name = library_at
    if page == "cut":
        server.cuts[name] = [100] * download.ATTEMPTS
    elif page is None:
        del server.pages[name]
    else:
        server.pages[name] = page
    with pytest.raises(RuntimeError, match=problem):
        library.fetch_library(server.url)
    assert not list(path.parent.iterdir())


def test_doctor_fetches_the_library_where_there_is_a_gpu(server, library_at, tmp_path, monkeypatch, capsys):
    import doctor

    path, _ = library_at
    for driver in (None, {"gpus": ["NVIDIA H100"]}):
        monkeypatch.setattr(doctor, "driver_facts", lambda driver=driver: driver)
        assert doctor.main(["--download", "--asset_dir", str(tmp_path / "x"), "--mirror", server.url]) == 0
        assert path.exists() == (driver is not None)
    assert f"PhysX's library for GPUs: fetched, in {path.parent}\n" in capsys.readouterr().out


# ---------------------------------------------------------------------- as a user types it
@pytest.mark.parametrize("mirror", ["nonsense", "", "file:///etc", "ftp://a", "https://", "http://a:b", "http://a b/"])
def test_a_mirror_that_is_no_address_is_refused_before_anything_is_made(tmp_path, mirror):
    with pytest.raises(UserError, match=r"^--mirror .* is not a url: it must begin with https://"):
        download.fetch_assets(tmp_path / "x", print, mirror=mirror)
    assert not (tmp_path / "x").exists()


def test_doctor_downloads(tmp_path):
    """The zips of this server hold other files than the published ones, and that is said."""
    with serving() as hub:
        serve_all(hub)
        command = ["doctor.py", "--download", "--asset_dir", tmp_path / "x", "--mirror", hub.url]
        run = python(*command, env={"no_proxy": "127.0.0.1,localhost", "HOME": str(tmp_path)}, stdin=subprocess.DEVNULL)
    assert run.returncode == 1 and run.stdout.startswith("carrot: 4 files, 1.0 MB, in "), run.stderr
    assert "holds other files than" in run.stdout and "hash does not match" in run.stdout
    line = next(line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: 2 of 3 parts are missing in ") and content(tmp_path / "x") == FILES
    run = python(*command[:-1], "nonsense")
    assert run.returncode == 2 and run.stderr.startswith("error: --mirror 'nonsense' is not a url")
    run = python("doctor.py", "--mirror", "x")
    assert run.returncode == 2 and "--asset_dir and --mirror need --download" in run.stderr


CHECK = """
import sys
from envs import check_envs, make_envs
world = dict(obj_set="train", asset_pack="bridge", asset_dir=sys.argv[1], image_size=(16, 16), sim_freq=100,
             max_episode_steps=4, num_env_workers=0, pipeline_stages=1, worker_timeout=60.0, sim_backend="physx_cpu",
             render_backend="cpu", auto_reset=False, ignore_terminations=False, protocol="rl4vla", seed=0, first_env=0,
             instruction=None, privileged=False)
check_envs("PutOnPlateInScene25Main-v3", 1, **world)
print(make_envs.__module__, "checked")
if "draw" in sys.argv:
    with make_envs("PutOnPlateInScene25Main-v3", 1, **world) as envs:
        print("drawn", envs.reset([0])["image"].float().std() > 10)
"""


def test_meshes_from_the_cache_are_files_and_not_links(tmp_path, monkeypatch):
    """SAPIEN looks for the images of a mesh beside the file to which a link leads."""
    blobs, snapshot = tmp_path / "cache/datasets--a--b/blobs", tmp_path / "cache/datasets--a--b/snapshots/1234"
    (snapshot / "carrot").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "5678").write_bytes(b"mesh")
    (snapshot / "carrot" / "textured.dae").symlink_to("../../../blobs/5678")
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "ms"))
    for _ in range(2):
        mesh = download.without_links(snapshot) / "carrot" / "textured.dae"
        assert mesh.resolve() == mesh and mesh.samefile(blobs / "5678") and mesh.is_relative_to(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/datasets--a--b/plain")
    (tmp_path / "cache/datasets--a--b/plain").touch()  # nothing can be made there
    mesh = download.without_links(snapshot) / "carrot" / "textured.dae"
    assert mesh.read_bytes() == b"mesh" and mesh.is_relative_to(tmp_path / "ms/hub/1234")
    shutil.rmtree(tmp_path / "ms")
    (tmp_path / "ms").touch()
    with pytest.raises(UserError, match="set HF_HOME or MS_ASSET_DIR to a folder of yours"):
        download.without_links(snapshot)


@pytest.mark.skipif(not ASSETS.exists(), reason=f"no published meshes at {ASSETS}")
def test_an_asset_dir_on_the_hub_is_fetched_once(tmp_path):
    """The data set comes from the Hub. ManiSkill's folder has the two archives already."""
    files = {str(path.relative_to(ASSETS)): path for path in (ASSETS / "carrot").rglob("*") if path.is_file()}
    for part in ("robots", "tasks"):
        shutil.copytree(ASSETS / part, tmp_path / "ms" / "data" / part)
    (tmp_path / "ms/data/tasks/bridge_v2_real2sim_dataset/real_inpainting").mkdir(exist_ok=True)
    (tmp_path / "ms/data/tasks/bridge_v2_real2sim_dataset/real_inpainting/bridge_real_eval_1.png").touch()
    with serving() as hub:
        hub.add("RLinf/maniskill_assets", {name: path.read_bytes() for name, path in files.items()}, "dataset")
        env = hub.environment(tmp_path / "home", MS_ASSET_DIR=str(tmp_path / "ms"))
        script = tmp_path / "check.py"
        script.write_text(CHECK)
        env["PYTHONPATH"] = str(ROOT)
        for num_fetched, words in ((len(files), ["draw"]), (0, [])):
            hub.requests.clear()
            run = python(script, "RLinf/maniskill_assets", *words, env=env)
            assert run.returncode == 0 and "checked" in run.stdout, run.stderr[-2000:]
            assert not words or "drawn tensor(True)" in run.stdout
            assert sum(hub.bodies().values()) == num_fetched
        run = python(script, "RLinf/maniskill_assets", env=env | {"MS_ASSET_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"})
        assert run.returncode == 1 and "asset pack 'bridge' lacks" in run.stderr and not run.stdout
        assert "download_asset widowx250s -y` and `python -m" in run.stderr
