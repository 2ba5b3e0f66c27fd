"""Models and data sets on the Hub, against a local server that speaks its protocol and breaks where told to."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import Hub, serving
from launching import one_rank_environment

from schemas import CommonError, UserError, hub
from schemas.hub import Repo, amount, name_of, repo_of

WARMUP = "gen-robot/openvla-7b-rlvla-warmup"
OFT, ADAPTER = "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Main", "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Lora"
FETCH = """
import sys
from schemas import CommonError, UserError, hub
try:
    for call in sys.argv[1:]:
        print(eval(call, vars(hub)))
except UserError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def server():
    with serving() as served:
        yield served


def fetch(server: Hub, home: Path, *calls: str, **more: str) -> subprocess.CompletedProcess:
    """Call functions of schemas/hub.py in a fresh process, since huggingface_hub reads its variables when imported."""
    environment = one_rank_environment() | server.environment(home, **more)
    command = [sys.executable, "-c", FETCH, *calls]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def lfs(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "name, wanted",
    [
        ("a/b", Repo("a/b", None, "model")),
        ("a/b@v1.0", Repo("a/b", "v1.0", "model")),
        ("a/b@refs/pr/3", Repo("a/b", "refs/pr/3", "model")),
        ("openvla-tiny", None),
        ("./a/b", None),
        ("/a/b", None),
        ("~/b", None),
        ("a/b/", None),
        ("a/b/c", None),
        ("a/../b", None),
        ("a/b@", None),
        ("a b/c", None),
    ],
)
def test_a_name_of_the_hub_has_two_parts(name, wanted):
    assert repo_of(name) == wanted


def test_a_folder_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gen-robot" / "mine").mkdir(parents=True)
    assert repo_of("gen-robot/mine") is None and hub.whole_folder("gen-robot/mine") == Path("gen-robot/mine")
    assert repo_of("gen-robot/other") == Repo("gen-robot/other", None, "model")


def test_a_folder_of_the_cache_has_a_name():
    folder = Path(f"/home/me/.cache/huggingface/hub/models--gen-robot--a-b/snapshots/{'0' * 40}")
    assert name_of(folder) == ("gen-robot/a-b", "0" * 40)
    assert name_of(Path("checkpoints/openvla-tiny-warmup")) is None
    assert amount(15.1e9) == "15.1 GB"


# ---------------------------------------------------------------------- fetching
def test_small_files_first_then_weights_once(server, tmp_path):
    """The second start asks one question. Offline it asks none, nor while the server is down."""
    weights = os.urandom(25_000_000)
    files = {"config.json": b"{}", "model.safetensors": weights, "other.bin": b"x" * 2000, "a/b.safetensors": b"y"}
    commit = server.add("a/b", files)
    server.cuts[lfs(weights)] = [15_000_000]  # the connection breaks, and is resumed
    run = fetch(server, tmp_path, "small_folder('a/b')", "sorted(top_files('a/b'))")
    folder, names = run.stdout.splitlines()
    assert folder.endswith(f"models--a--b/snapshots/{commit}") and os.listdir(folder) == ["config.json"], run.stderr
    assert names == "['config.json', 'model.safetensors', 'other.bin']"
    assert not any(path.startswith("/lfs") for path in server.bodies())
    run = fetch(server, tmp_path, "whole_folder('a/b')")
    assert run.stdout.startswith(f"fetch   a/b from {server.url}: 1 file, 25.0 MB, to {tmp_path}/hub\n"), run.stderr
    assert Path(folder, "model.safetensors").read_bytes() == weights
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    resumed = [asked for _, path, asked in server.requests if path == f"/lfs/{lfs(weights)}"]
    assert resumed == [None, "bytes=10485760-"]  # the library keeps whole parts of 10 MiB
    server.requests.clear()
    assert fetch(server, tmp_path, "whole_folder('a/b')").stdout == f"{folder}\n"
    assert [path for _, path, _ in server.requests] == ["/api/models/a/b"]
    server.requests.clear()
    assert fetch(server, tmp_path, "whole_folder('a/b')", HF_HUB_OFFLINE="1").stdout == f"{folder}\n"
    assert not server.requests
    server.answers["/"] = 503
    assert fetch(server, tmp_path, "whole_folder('a/b')").stdout == f"{folder}\n"


def test_a_revision_is_what_was_asked_for(server, tmp_path):
    old = server.add("a/b", {"config.json": b"1"}, refs=("main", "v1"))
    new = server.add("a/b", {"config.json": b"2"})
    names = ("a/b", "a/b@v1", f"a/b@{old}")
    run = fetch(server, tmp_path, *(f"small_folder({name!r}).name" for name in names))
    assert run.stdout.split() == [new, old, old], run.stderr
    assert "no revision v2" in fetch(server, tmp_path, "small_folder('a/b@v2')").stderr


def test_what_arrives_damaged_is_fetched_again(server, tmp_path):
    weights = os.urandom(20_000)
    server.add("a/b", {"config.json": b"{}", "model.safetensors": weights})
    server.objects[lfs(weights)] = weights[:-1] + b"!" if weights[-1:] != b"!" else weights[:-1] + b"?"
    said = fetch(server, tmp_path, "whole_folder('a/b')").stderr.splitlines()[-1]
    assert said.startswith("error: model.safetensors of a/b arrived damaged (sha256 is ")
    server.objects[lfs(weights)] = weights
    run = fetch(server, tmp_path, "whole_folder('a/b')")
    assert Path(run.stdout.splitlines()[-1], "model.safetensors").read_bytes() == weights


def test_tokens_open_what_is_private(server, tmp_path):
    server.add("a/b", {"config.json": b"{}"})
    server.private.add("a/b")
    said = fetch(server, tmp_path, "small_folder('a/b', '--model_path')").stderr
    assert "--model_path a/b is neither a folder here nor a model that" in said and "`hf auth login`" in said
    assert fetch(server, tmp_path, "small_folder('a/b')", HF_TOKEN="hf_of_the_tests").returncode == 0
    server.gated.add("a/b")
    said = fetch(server, tmp_path / "2", "small_folder('a/b')", HF_TOKEN="hf_of_the_tests").stderr
    assert f"a/b is a model with conditions: accept them at {server.url}/a/b, then run `hf auth login`" in said


@pytest.mark.parametrize(
    "more, said",
    [
        ({}, "is neither a folder here nor a model that http"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "is not a folder here (did you mean checkpoints/openvla-tiny-warmup?)"),
        ({"HF_HUB_OFFLINE": "1"}, "is not a folder here, and HF_HUB_OFFLINE is set while the cache"),
    ],
)
def test_a_typo_of_a_folder_says_both(server, tmp_path, more, said):
    name = "checkpoints/openvla-tiny-warmpu"
    run = fetch(server, tmp_path, f"small_folder({name!r}, '--model_path')", **more)
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: --model_path {name} ") and said in line and run.returncode == 1
    assert more or "did you mean checkpoints/openvla-tiny-warmup?" in line


def test_a_full_disk_is_said_before_the_download(server, tmp_path):
    server.add("a/b", {"config.json": b"{}", "model.safetensors": b"x" * 2000})
    full = "__import__('shutil').__setattr__('disk_usage', lambda place: type('', (), {'free': 7})())"
    said = fetch(server, tmp_path, full, "whole_folder('a/b')").stderr.splitlines()[-1]
    assert "a/b has 0.0 MB to fetch, but only 0.0 MB are free in" in said and "set HF_HOME to a folder" in said
    assert not any(path.startswith("/lfs") for path in server.bodies())


# ---------------------------------------------------------------------- several processes
def start(server: Hub, home: Path, *calls: str, **more: str) -> subprocess.Popen:
    environment = one_rank_environment() | server.environment(home, **more)
    command = [sys.executable, "-c", FETCH, *calls]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


def test_one_of_three_ranks_fetches_and_the_others_wait(server, tmp_path):
    weights = os.urandom(20_000)
    server.add("a/b", {"config.json": b"{}", "model.safetensors": weights})
    server.on_request = lambda method, path: time.sleep(0.5 if path.startswith("/lfs") else 0.1)
    ranks = [start(server, tmp_path, "whole_folder('a/b')", LOCAL_RANK=str(rank)) for rank in range(3)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    folders = {output.splitlines()[-1] for output, _ in outputs}
    assert len(folders) == 1 and not any(rank.returncode for rank in ranks), outputs
    assert set(server.bodies().values()) == {1}
    assert sum("fetch   a/b from" in output for output, _ in outputs) == 1
    resolved = [path for _, path, _ in server.requests if path == "/api/models/a/b"]
    assert len(resolved) == 1  # the others took over the answer


def test_an_error_of_the_first_is_that_of_all(server, tmp_path):
    server.on_request = lambda method, path: time.sleep(1.0)
    ranks = [start(server, tmp_path, "small_folder('a/b')", LOCAL_RANK=str(rank)) for rank in range(3)]
    errors = [rank.communicate(timeout=120)[1].splitlines()[-1] for rank in ranks]
    assert len(set(errors)) == 1 and "neither a folder here nor a model" in errors[0]
    assert len(server.requests) == 1


def test_a_killed_download_leaves_no_lock(server, tmp_path):
    weights, more = os.urandom(20_000), os.urandom(20_000)
    server.add("a/b", {"config.json": b"{}", "1.safetensors": weights, "2.safetensors": more})
    server.on_request = lambda method, path: time.sleep(60 if path == f"/lfs/{lfs(more)}" else 0)
    first = start(server, tmp_path, "whole_folder('a/b')")
    while not list(tmp_path.rglob("1.safetensors")):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.communicate()
    server.on_request = lambda method, path: None
    run = fetch(server, tmp_path, "whole_folder('a/b')")
    assert run.returncode == 0 and "1 file, 0.0 MB" in run.stdout, run.stderr  # the other one was whole
    assert server.bodies()[f"/lfs/{lfs(weights)}"] == 1


def test_a_failure_is_not_remembered_by_its_own_process(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def fail() -> str:
        raise UserError("no") from OSError("cut")

    with pytest.raises(CommonError, match="no"):  # so the other ranks of this machine do not repeat it
        hub.once("key", fail)
    assert hub.once("key", lambda: "yes") == "yes"
