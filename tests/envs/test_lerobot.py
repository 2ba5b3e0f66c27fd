"""LeRobot's format: what SoloVLA writes comes back whole, what LeRobot wrote is read, and broken sets are refused.

LeRobot 0.4.4 itself wrote the two folders of lerobot_sets/: three episodes of 4, 5 and 6 steps at 10 Hz. In episode e
and step t the action is (0.01 e, 0.001 t, 0, 0, 0, 0.1, gripper), where the gripper is 1 or -1. The image is (60 e,
20 t, 200 in the upper half).
"""

import json
import re
import shutil
import threading
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launching import python
from made_up import write_demos

from envs.demo_sets import open_demos
from envs.demonstrations import PICTURES, Demos, Recipe
from envs.lerobot import layout, statistics
from envs.lerobot.__main__ import main
from envs.lerobot.layout import CAMERA
from envs.lerobot.read import read_set
from envs.lerobot.write import write_set
from schemas import UserError

ENV_ID = "PutOnPlateInScene25Single-v1"
THEIRS = Path(__file__).parent / "lerobot_sets"
TOP = "observation.images.top"
VIDEO = "videos/{}/chunk-000/file-000.mp4"
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """Four episodes of 3 to 6 steps, with noise as images, idle steps, executed actions and states of a world."""
    folder, rng = tmp_path_factory.mktemp("ours") / "set", np.random.default_rng(0)
    lengths = [3, 4, 5, 6]
    steps = [
        [np.array([*rng.uniform(-0.05, 0.05, 3), 0, 0, 0.1, t % 2], np.float32) for t in range(T)] for T in lengths
    ]
    images = [[rng.integers(0, 256, (24, 32, 3), np.uint8) for _ in range(T + 1)] for T in lengths]
    recipe = Recipe(ENV_ID, "train", "builtin", "rl4vla", [32, 24], 100, 40, 0, 0.0, True, 0.05, 0.4)
    write_demos(folder, recipe, steps, images)
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        for number, length in enumerate(lengths):
            group = file[f"traj_{number}"]
            group["actions"][:, :3] += 0.001
            group["keep"][1] = False
            state = rng.standard_normal((length + 1, 13 + 2 * 8)).astype(np.float32)
            group["env_states/articulations/widowx"] = state
            group["env_states/actors/carrot"] = rng.standard_normal((length + 1, 13))
    return folder


def arrays(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(folder / "trajectory.h5") as file:
        file.visititems(lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def rewritten(source: Path, folder: Path, **flags) -> Path:
    write_set(source, folder / "lerobot", **flags)
    read_set(folder / "lerobot", folder / "back")
    return folder / "back"


# ------------------------------------------------------------------ ours
@pytest.mark.parametrize("images", ["lossless", "png"])
def test_nothing_is_lost_on_the_way_there_and_back(ours, tmp_path, images):
    back = rewritten(ours, tmp_path, images=images)
    assert same(arrays(back), arrays(ours))
    for name in ("trajectory.json", "dataset_statistics.json", "recipe.json"):
        assert (back / name).read_bytes() == (ours / name).read_bytes()
    with h5py.File(back / "trajectory.h5") as one, h5py.File(ours / "trajectory.h5") as other:
        assert all(dict(one[name].attrs) == dict(other[name].attrs) for name in other)


def test_files_that_are_full_are_followed_by_the_next(ours, tmp_path, monkeypatch):
    """Files of at most one byte, and two files per folder."""
    for module in ("layout", "write"):
        monkeypatch.setattr(f"envs.lerobot.{module}.FILES_PER_CHUNK", 2)
    monkeypatch.setattr("envs.lerobot.write.DATA_MIB", 2**-20)
    monkeypatch.setattr("envs.lerobot.write.VIDEO_MIB", 2**-20)
    monkeypatch.setattr("envs.lerobot.videos.VideoFile.is_full", lambda self, limit: limit == 1)
    back = rewritten(ours, tmp_path, images="lossless")
    files = {str(path.relative_to(tmp_path / "lerobot")) for path in (tmp_path / "lerobot").rglob("*-00*/file-*")}
    for pattern in ("data/chunk-{}/file-{}.parquet", f"videos/{CAMERA}/chunk-{{}}/file-{{}}.mp4"):
        assert {pattern.format(chunk, file) for chunk in ("000", "001") for file in ("000", "001")} <= files
    assert same(arrays(back), arrays(ours))


def test_a_video_loses_only_a_little(tmp_path):
    """Of images as smooth as a camera's, 3 levels of 255 on average. Actions are exact."""
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    images = [[np.stack([4 * x, 5 * y, x + y + 9 * t], -1).astype(np.uint8) for t in range(5)] for _ in range(2)]
    steps = [[np.full(7, 0.01 * t, np.float32) for t in range(4)] for _ in range(2)]
    recipe = Recipe(ENV_ID, "train", "builtin", "rl4vla", [64, 48], 100, 40, 0, 0.0, False, 0.05, 0.4)
    write_demos(tmp_path / "set", recipe, steps, images)
    one, other = Demos(tmp_path / "set"), Demos(rewritten(tmp_path / "set", tmp_path))
    assert np.array_equal(one.labels, other.labels) and one.instructions == other.instructions
    difference = np.abs(one.images(range(8)).astype(int) - other.images(range(8)))
    assert 0 < difference.mean() < 3


def test_the_files_are_as_lerobot_reads_them(ours, tmp_path):
    info = write_set(ours, tmp_path / "set", "lossless")
    assert info == json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (4, 18, 4, 5)
    assert info["splits"] == {"train": "0:4"}
    data = pq.read_table(tmp_path / "set" / DATA)
    assert set(data.column_names) == info["features"].keys() - {CAMERA}
    assert data["index"].to_pylist() == list(range(18)) and data["episode_index"].to_pylist()[2:4] == [0, 1]
    assert data["frame_index"].to_pylist()[:5] == [0, 1, 2, 0, 1]
    assert data["timestamp"].to_pylist()[:4] == pytest.approx([0, 0.2, 0.4, 0])
    assert data["next.done"].to_pylist()[:4] == [False, False, True, False]
    content = arrays(ours)
    for key, dataset in (("action", "actions"), ("expert_actions", "expert_actions"), ("keep", "keep")):
        wanted = np.concatenate([content[f"traj_{n}/{dataset}"] for n in range(4)])
        assert np.array_equal(np.array(data[key].to_pylist(), wanted.dtype), wanted)
    joints = np.array(data[layout.STATE].to_pylist(), np.float32)
    assert np.array_equal(joints[:3], content["traj_0/env_states/articulations/widowx"][:3, 13:21])
    tasks = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == [layout.TASK_INDEX]
    assert tasks.to_pylist()[1] == {"task_index": 1, layout.TASK_INDEX: "put 1"}
    listed = pq.read_table(tmp_path / "set" / EPISODES).to_pylist()
    assert [row["dataset_to_index"] for row in listed] == [3, 7, 12, 18]
    assert [row[f"videos/{CAMERA}/from_timestamp"] for row in listed] == pytest.approx([0, 0.6, 1.4, 2.4])
    assert listed[1]["tasks"] == ["put 1"] and listed[1]["stats/keep/mean"] == [0.75]
    whole = json.loads((tmp_path / "set/meta/stats.json").read_text())
    assert whole.keys() == info["features"].keys() and whole["keep"]["mean"] == [pytest.approx(14 / 18)]
    shown = np.concatenate([content[f"traj_{n}/{PICTURES}"][:-1] for n in range(4)]) / 255
    assert np.allclose(np.ravel(whole[CAMERA]["mean"]), shown.mean((0, 1, 2)))
    assert np.allclose(np.ravel(whole[CAMERA]["std"]), shown.std((0, 1, 2)))


def test_a_video_that_lacks_frames_is_never_kept(ours, tmp_path, monkeypatch):
    """ffmpeg may fail after its last frame came in, as on a full disk."""
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (17, 3.4))
    with pytest.raises(UserError, match=r"cannot be written .file-000.mp4 holds 17 of 18 frames.: check the disk"):
        write_set(ours, tmp_path / "lerobot")
    assert list(tmp_path.iterdir()) == []


def test_statistics_by_hand():
    found = statistics.of_numbers(np.arange(101.0))
    assert (found["min"], found["q10"], found["q50"], found["max"], found["count"]) == ([0], [10], [50], [100], [101])
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = [[0, 51], [204, 255]]
    found = statistics.of_levels(statistics.levels(image), 1)
    assert found["mean"] == [[[pytest.approx(0.5)]], [[0.0]], [[0.0]]] and found["count"] == [1]
    assert (found["min"][0], found["q50"][0], found["max"][0]) == ([[0.0]], [[pytest.approx(0.2)]], [[1.0]])


# ------------------------------------------------------------------ theirs
@pytest.mark.parametrize("images", ["video", "image"])
def test_a_set_that_lerobot_wrote_is_read(tmp_path, images):
    demos = open_set(THEIRS / images, tmp_path, TOP)
    assert len(demos) == 15 and demos.num_episodes == 3 and demos.recipe["image_size"] == [32, 24]
    assert [demos.instructions[i] for i in (0, 4, 9)] == [f"put thing {n} on plate" for n in (0, 1, 0)]
    places = [(e, t) for e in range(3) for t in range(4 + e)]
    wanted = [[0.01 * e, 0.001 * t, 0, 0, 0, 0.1, 1 - t % 2] for e, t in places]
    assert np.allclose(demos.labels, wanted)
    assert demos.statistics[images]["action"]["max"][0] == pytest.approx(0.02)
    seen = demos.images(range(15)).astype(int)  # [15, 24, 32, 3]
    allowed = 0.1 if images == "image" else 8
    for image, (e, t) in zip(seen, places):
        assert np.abs(image[:10] - [60 * e, 20 * t, 200]).mean() < allowed, (e, t)
        assert np.abs(image[14:] - [60 * e, 20 * t, 0]).mean() < allowed, (e, t)
    assert demos.chunks([3], 2)[1].tolist() == [[True, False]]
    demos.check_world(env_id="any", asset_pack="any", protocol="any", hulls="any", image_size=(32, 24), sim_freq=500)
    with pytest.raises(UserError, match="image_size"):
        demos.check_world(
            env_id="any", asset_pack="any", protocol="any", hulls="any", image_size=(64, 48), sim_freq=500
        )


def open_set(folder: Path, tmp_path: Path, camera: str | None = None) -> Demos:
    read_set(folder, tmp_path / folder.name, camera)
    return Demos(tmp_path / folder.name)


def test_the_gripper_may_be_the_other_way_round(tmp_path):
    read_set(THEIRS / "image", tmp_path / "set", gripper_closes=True)
    assert Demos(tmp_path / "set").labels[:4, 6].tolist() == [0, 1, 0, 1]


def test_a_set_from_elsewhere_keeps_its_rate(tmp_path):
    read_set(THEIRS / "image", tmp_path / "set")
    assert write_set(tmp_path / "set", tmp_path / "again")["fps"] == 10
    assert len(open_set(tmp_path / "again", tmp_path / "back")) == 15


# ------------------------------------------------------------------ the cache
def test_a_set_is_rewritten_once_for_many_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(THEIRS / "video", tmp_path / "theirs"))
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(open_demos(folder, TOP))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 3 and all(demos.folder == folder and len(demos) == 15 for demos in opened)
    assert capsys.readouterr().out.count("is rewritten for training") == 1
    rows = pq.read_table(folder / DATA)
    actions = np.array(rows["action"].to_pylist(), np.float32) * 0.5
    column = pa.array(actions.tolist(), rows.schema.field("action").type)
    pq.write_table(rows.set_column(rows.schema.get_field_index("action"), "action", column), folder / DATA)
    assert np.allclose(open_demos(folder, TOP).labels[:, :6], opened[0].labels[:, :6] / 2)  # another file, another set


def test_a_camera_is_for_lerobots_format(ours):
    assert len(open_demos(ours)) == 14
    with pytest.raises(UserError, match="--demos_camera top is for a set in LeRobot's format"):
        open_demos(ours, "top")


# ------------------------------------------------------------------ sets that are not what they say
def in_json(change, name: str = "meta/info.json"):
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def in_rows(change, name: str = DATA):
    """Other rows in a parquet file: a function of a table."""

    def spoil(folder: Path) -> None:
        pq.write_table(change(pq.read_table(folder / name)), folder / name)

    return spoil


def with_column(name: str, change):
    """A column that holds something else: a function of its list."""

    def changed(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array(change(table[name].to_pylist())))

    return changed


def cut(name: str):
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def feature(name: str, **changes):
    return in_json(lambda content: content["features"][name].update(changes))


def without(name: str):
    return in_json(lambda content: content["features"].pop(name))


def shorter_video(folder: Path) -> None:
    """The last episode begins later than its frames do."""
    time = f"videos/{TOP}/from_timestamp"
    in_rows(with_column(time, lambda times: [*times[:-1], times[-1] + 0.2]), EPISODES)(folder)


def playlist(folder: Path) -> None:
    """A list of other files, which ffmpeg would open if it guessed the format."""
    (folder / VIDEO.format(TOP)).write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")


CASES = [
    # meta
    (cut("meta/info.json"), "info.json is not valid JSON"),
    (
        in_json(lambda content: content.update(codebase_version="v2.1")),
        "it must be v3.0: LeRobot's own convert_dataset",
    ),
    (in_json(lambda content: content.update(fps=0)), "fps"),
    (in_json(lambda content: content.update(total_frames=14)), "lists 3 episodes with 15 frames"),
    (in_json(lambda content: content.update(total_episodes=10**12)), "total_episodes"),
    (in_json(lambda content: content.update(data_path="../../etc/passwd")), "data_path"),
    (in_json(lambda content: content["features"].update({"../x": {"dtype": "video", "shape": [1]}})), "a name of"),
    (without("action"), "has no feature action: SoloVLA needs 7"),
    (removed("meta/tasks.parquet"), "tasks.parquet cannot be read"),
    (in_rows(lambda table: table.slice(0, 1), "meta/tasks.parquet"), "has no task 1, but data/ names it"),
    (in_rows(with_column("task_index", lambda _: ["a", "b"]), "meta/tasks.parquet"), "not whole numbers"),
    (cut(EPISODES), "is cut short or no parquet file"),
    (removed(EPISODES), "has no meta/episodes/chunk-000/file-000.parquet"),
    (in_rows(with_column("length", lambda old: [4, 5, 5]), EPISODES), "lists 3 episodes with 14 frames"),
    (in_rows(with_column("length", lambda old: [5, 4, 6]), EPISODES), "has a row of episode 1 in data/ where"),
    (in_rows(with_column("length", lambda old: [4, 5, 10**9]), EPISODES), "it must be at most 100000"),
    (in_rows(lambda table: table.drop_columns(["length"]), EPISODES), "has no column length"),
    # rows
    (cut(DATA), "is cut short or no parquet file"),
    (removed(DATA), "cannot be read"),
    (in_rows(lambda table: table.slice(0, 12)), "has 12 rows in data/, and its episodes have 15"),
    (in_rows(with_column("action", lambda old: [row[:6] for row in old])), "has 6 dimensions in the feature action"),
    (in_rows(with_column("action", lambda old: [row[0] for row in old])), "it must be float32 with 7 dimensions"),
    (in_rows(with_column("action", lambda old: [[np.nan] * 7, *old[1:]])), "actions out of range"),
    (in_rows(with_column("action", lambda old: [[20.0] * 7, *old[1:]])), "actions out of range"),
    (in_rows(with_column("action", lambda old: [None, *old[1:]])), "has gaps in the column action"),
    (in_rows(lambda table: table.drop_columns(["action"])), "has no column action"),
]
VIDEO_CASES = [
    (removed(VIDEO.format(TOP)), "file-000.mp4 cannot be read"),
    (cut(VIDEO.format(TOP)), "ends before episode 0 does"),
    (playlist, "is cut short or no mp4 video"),
    (shorter_video, "ends before episode 2 does"),
    (in_rows(with_column(f"videos/{TOP}/from_timestamp", lambda _: [0.0] * 3), EPISODES), "two episodes at one time"),
    (in_json(lambda content: content.update(fps=20)), "has 10 frames per second, and meta/info.json says 20"),
    (feature(TOP, shape=[48, 64, 3]), "has 32 x 24 pixels, and meta/info.json says 64 x 48"),
    (feature(TOP, shape=[24, 32, 1]), "choose a camera with colours"),
    (feature(TOP, shape=[10**6, 32, 3]), "it must be at most 4096"),
    (without(TOP), "has no camera observation.images.top: give --demos_camera one of observation.images.wrist"),
]
IMAGE_CASES = [
    (in_rows(with_column(TOP, lambda old: [{"bytes": b"?", "path": None}] * 15)), "step 0 has no readable image"),
    (in_rows(with_column(TOP, lambda old: list(range(15)))), "has no images in the column"),
    (feature(TOP, shape=[48, 64, 3]), "has an image of 32 x 24 pixels"),
    (without(TOP), "has no camera, that is no feature of type video or image"),
]
ALL = [("video", *case) for case in CASES + VIDEO_CASES] + [("image", *case) for case in IMAGE_CASES]


@pytest.mark.parametrize("images, spoil, said", ALL)
def test_a_broken_set_is_one_sentence(tmp_path, images, spoil, said):
    folder = Path(shutil.copytree(THEIRS / images, tmp_path / "theirs"))
    spoil(folder)
    with pytest.raises(UserError) as caught:
        read_set(folder, tmp_path / "set", TOP)
    sentence = str(caught.value)
    assert said in sentence and str(folder) in sentence and "\n" not in sentence
    assert not (tmp_path / "set").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_set_that_keeps_nothing_is_one_sentence(ours, tmp_path):
    write_set(ours, tmp_path / "lerobot", "png")
    shutil.rmtree(tmp_path / "lerobot/meta/solovla")
    in_rows(with_column("keep", lambda old: [False] * len(old)))(tmp_path / "lerobot")
    with pytest.raises(UserError, match="lerobot keeps no step of any episode"):
        read_set(tmp_path / "lerobot", tmp_path / "back")


def linked_rest(folder: Path) -> None:
    with h5py.File(folder / "meta/solovla/rest.h5", "r+") as file:
        del file[f"traj_1/{PICTURES}"]
        file["traj_1"].create_dataset(PICTURES, (1, 24, 32, 3), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def without_an_episode(folder: Path) -> None:
    with h5py.File(folder / "meta/solovla/rest.h5", "r+") as file:
        del file["traj_1"]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            in_json(lambda content: content["episodes"].pop(), "meta/solovla/trajectory.json"),
            "since the set was edited",
        ),
        (linked_rest, "in another file, it must be in this one"),
        (
            in_json(lambda content: content["episodes"][0].pop("episode_id"), "meta/solovla/trajectory.json"),
            "episode_id",
        ),
        (without_an_episode, "lacks an episode (traj_1)"),
        (cut("meta/solovla/rest.h5"), "is cut short or no HDF5 file"),
    ],
)
def test_our_own_files_must_belong_to_the_set(ours, tmp_path, spoil, said):
    write_set(ours, tmp_path / "lerobot", "png")
    spoil(tmp_path / "lerobot")
    with pytest.raises(UserError, match=re.escape(said)):
        read_set(tmp_path / "lerobot", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    shutil.rmtree(tmp_path / "lerobot/meta/solovla")  # as the sentence says
    read_set(tmp_path / "lerobot", tmp_path / "back")
    assert np.array_equal(Demos(tmp_path / "back").labels, Demos(ours).labels)


# ------------------------------------------------------------------ the command
def test_the_command_goes_both_ways(ours, tmp_path):
    run = python("-m", "envs.lerobot", ours, tmp_path / "lerobot", "--images", "lossless")
    assert run.returncode == 0 and f"{tmp_path}/lerobot: 4 episodes" in run.stdout, run.stderr
    run = python("-m", "envs.lerobot", tmp_path / "lerobot", tmp_path / "back")
    assert run.returncode == 0 and same(arrays(tmp_path / "back"), arrays(ours)), run.stderr


def test_wrong_use_is_one_sentence(ours, tmp_path, capsys):
    write_demos(
        tmp_path / "odd",
        Recipe(ENV_ID, "train", "builtin", "rl4vla", [5, 3], 100, 40, 0, 0.0, False, 0.05, 0.4),
        [[np.zeros(7, np.float32)]],
        [[np.zeros((3, 5, 3), np.uint8)] * 2],
    )
    for words, said in (
        ([ours, ours], "set exists already: name a new folder"),
        ([tmp_path / "nowhere", tmp_path / "new"], "nowhere has no trajectory.json"),
        ([tmp_path / "odd", tmp_path / "new"], "needs even sizes, and the images have 5 x 3 pixels"),
        ([ours, tmp_path / "odd/trajectory.h5/new"], "cannot be written"),
        (
            [THEIRS / "video", tmp_path / "new"],
            f"has 2 cameras: name one of {TOP}, observation.images.wrist with --demos",
        ),
    ):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1, error
    for words, said in (
        ([THEIRS / "video", tmp_path / "new", "--images", "png"], "--images is for sets in ManiSkill's format"),
        ([ours, tmp_path / "new", "--gripper_closes"], "need a set in LeRobot's format"),
    ):
        with pytest.raises(SystemExit):
            main([str(word) for word in words])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
