"""Videos of held-out episodes: recorded by replay, composed into montages, and never a reason for a run to end."""

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from schemas import UserError
from vla.evaluation import video
from vla.evaluation.episode_log import episode_file, read_episodes, write_episodes
from vla.evaluation.episodes import NEVER, run_episodes
from vla.evaluation.montage import choose_pairs, read_clips, read_side
from vla.evaluation.recording import AS_SEEN, Recorder, Seen
from vla.evaluation.video import BORDER, BORDER_COLORS, FPS, draw_frame, frame_size, grid, row_sizes

LENGTH = 6  # actions in an episode of the fake envs
STATISTICS = ("success_once", "success_at_end", "return", "episode_len", "reward")


class FakeEnvs:
    """N envs without a simulator. After t actions an image is as bright as 20 t. Odd episodes succeed."""

    env_id, repeats = "Fake-v1", True

    def __init__(self, num_envs: int, image_size: tuple[int, int], num_env_workers: int = 0, at_step=lambda t: None):
        self.num_envs, self.image_size, self.at_step = num_envs, image_size, at_step

    def reset(self, episode_ids):
        self.ids, self.t = list(episode_ids), np.zeros(len(episode_ids), int)
        return self.obs()

    def obs(self) -> dict:
        width, height = self.image_size
        images = np.broadcast_to((20 * self.t)[:, None, None, None], (self.num_envs, height, width, 3))
        texts = [f"put thing {episode_id} on plate" for episode_id in self.ids]
        return {"image": torch.from_numpy(images.astype(np.uint8)), "task_description": texts}

    def step(self, actions):
        chunk = actions.shape[1]
        valid = torch.tensor(self.t[:, None] + np.arange(chunk) < LENGTH)
        self.t = np.minimum(self.t + chunk, LENGTH)
        self.at_step(int(self.t.max()))
        ended = [env for env in range(self.num_envs) if self.t[env] == LENGTH and valid[env].any()]
        success = torch.tensor([float(self.ids[env] % 2) for env in ended])
        infos = {
            **dict.fromkeys(("dropped", "lost"), torch.zeros(self.num_envs, dtype=torch.bool)),
            "valid": valid,
            "ended": torch.tensor(ended, dtype=torch.int64),
            "episode": dict.fromkeys(STATISTICS, success) | {"episode_len": torch.full_like(success, LENGTH)},
        }
        return self.obs(), torch.zeros(self.num_envs, chunk), None, None, infos

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


class FakeActor:
    chunk_size = 4

    def begin(self, episode_ids):
        pass

    def act(self, obs, envs):
        return np.zeros((envs.num_envs, self.chunk_size, 7), np.float32)


def evaluated(ids: list[int], watch=None) -> list[dict]:
    envs = FakeEnvs(len(ids), (48, 36))
    return [episode for batch in run_episodes(FakeActor(), envs, ids, watch) for episode in batch]


def recorder(run_dir: Path, ids: list[int], open_envs=FakeEnvs, stop=NEVER, **changed) -> Recorder:
    facts = {one: {"instruction": f"put thing {one} on plate", "object": f"thing {one}"} for one in ids}
    flags = dict(video_episodes=8, video_size=(320, 240), image_size=(48, 36), chunk_size=4, num_env_workers=0)
    envs = FakeEnvs(1, (48, 36))
    envs.repeats = changed.pop("repeats", True)
    return Recorder(run_dir, envs, open_envs, facts, stop, **flags | changed)


def frames_of(path: Path) -> list[np.ndarray]:
    return [frame for frame in imageio.get_reader(path)]  # list() would ask for its length, which is infinite


def is_color(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    """Whether all pixels are nearly that color, as the encoder is lossy."""
    return bool(np.abs(pixels.reshape(-1, 3).astype(int) - color).max() < 40)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Two evaluations of nine episodes, of which eight are recorded. In the second one, episode 4 succeeds as well."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ids = [4, 5, 2, 7, 8, 9, 1, 6, 3]
    mine = recorder(folder, ids)
    for iteration in (0, 3):
        episodes = evaluated(ids)
        if iteration:
            episodes[0] = episodes[0] | {"success_once": 1.0}
        mine.keep(iteration, episodes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the outcome that is made up
            mine.record(iteration, episodes)
    return folder


def test_a_lost_episode_has_no_clip(tmp_path):
    ids = [1, 2]
    mine = recorder(tmp_path, ids)
    first, second = evaluated(ids)
    lost = first | {"episode_len": 0.0, "actions": np.zeros((0, 7), np.float32)}
    mine.keep(0, [lost, second])
    mine.catch_up(0)
    assert [clip["episode_id"] for clip in read_clips(tmp_path, 0)] == [2]


# ---------------------------------------------------------------------- clips
def test_a_clip_has_a_frame_per_action_and_holds_the_last_one(run_dir):
    """The policy decided every four actions, the video has every action, and the inset has every decision."""
    frames = frames_of(run_dir / "videos" / "eval_000000" / "7.mp4")
    assert len(frames) == 1 + LENGTH + FPS
    assert frames[0].shape == (240 + 2 * BORDER, 320 + 2 * BORDER, 3)
    middle = [float(frame[120, 160].mean()) for frame in frames]
    assert np.allclose(middle, [20 * min(t, LENGTH) for t in range(len(frames))], atol=6)
    inset = [float(frame[-46:-36, -30:-20].mean()) for frame in frames[: LENGTH + 1]]  # below its label
    assert np.allclose(inset, [0, 0, 0, 0, 80, 80, 80], atol=6)


@pytest.mark.parametrize("name, outcome", [("7", "success"), ("2", "failed")])
def test_the_border_says_how_it_ended(run_dir, name, outcome):
    frames = frames_of(run_dir / "videos" / "eval_000000" / f"{name}.mp4")
    for number, frame in enumerate(frames):
        color = BORDER_COLORS[outcome if number >= LENGTH else None]
        edges = [frame[1:3, 8:-8], frame[-3:-1, 8:-8], frame[8:-8, 1:3], frame[8:-8, -3:-1]]
        assert all(is_color(edge, color) for edge in edges), number
    poster = np.asarray(Image.open(run_dir / "videos" / "eval_000000" / f"{name}.jpg"))
    assert poster.shape == frames[-1].shape and np.abs(poster.astype(int) - frames[-1]).mean() < 8
    assert is_color(poster[1:3, 8:-8], BORDER_COLORS[outcome])


def test_clips_are_listed(run_dir):
    clips = read_clips(run_dir, 3)
    assert [clip["episode_id"] for clip in clips] == [4, 5, 2, 7, 8, 9, 1, 6]  # the first eight of the evaluation
    assert clips[0] == {
        "episode_id": 4,
        "file": "4.mp4",
        "poster": "4.jpg",
        "outcome": "success",
        "instruction": "put thing 4 on plate",
        "object": "thing 4",
        "return": 0.0,
        "episode_len": LENGTH,
    }
    for clip in clips:
        for key in ("file", "poster"):
            assert (run_dir / "videos" / "eval_000003" / clip[key]).stat().st_size > 0
    assert not list(run_dir.rglob("*partial*"))
    assert read_clips(run_dir, 7) == []


def test_a_damaged_list_is_one_sentence(run_dir, tmp_path):
    place = tmp_path / "videos" / "eval_000001"
    place.mkdir(parents=True)
    (place / "clips.json").write_text('[{"episode_id": 1, "file": "../1.mp4"}]')
    with pytest.raises(UserError, match=r"clips.json has .*file"):
        read_clips(tmp_path, 1)


# ---------------------------------------------------------------------- records
def test_episodes_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    actions = rng.normal(0, 0.03, (5, 7)).astype(np.float32)
    episode = dict.fromkeys(STATISTICS, 1.0) | {"episode_id": 11, "actions": actions, "return": 0.30000001192092896}
    path = episode_file(tmp_path, 16)
    assert path == tmp_path / "episodes" / "eval_000016.jsonl"
    write_episodes(path, [episode], {11: {"instruction": "put carrot on plate", "table": "001 table"}})
    (found,) = read_episodes(path)
    assert np.array_equal(found.pop("actions"), actions)
    line = json.loads(path.read_text())
    assert found["episode_len"] == 5 and found["table"] == "001 table" and len(line["actions"]) == 5
    assert found["return"] == episode["return"] and "object" not in found
    path.write_text(path.read_text().replace('"episode_len": 5', '"episode_len": 6'))
    with pytest.raises(UserError, match=r"line 1 has actions .* one action for each of episode_len steps"):
        read_episodes(path)


def test_every_held_out_episode_is_kept(run_dir):
    episodes = read_episodes(episode_file(run_dir, 3))
    assert [episode["episode_id"] for episode in episodes] == [4, 5, 2, 7, 8, 9, 1, 6, 3]
    assert all(episode["actions"].shape == (LENGTH, 7) for episode in episodes)


# ---------------------------------------------------------------------- montages
def test_a_montage_has_no_empty_tiles(run_dir):
    """Eight tiles in two rows of four: at the end each of them has a colored border."""
    frames = frames_of(run_dir / "videos" / "eval_000000.mp4")
    height, width = 240 + 2 * BORDER, 320 + 2 * BORDER
    assert frames[0].shape == (2 * height, 4 * width, 3) and len(frames) == 1 + LENGTH + FPS
    for number, episode_id in enumerate([4, 5, 2, 7, 8, 9, 1, 6]):
        top, left = number // 4 * height, number % 4 * width
        color = BORDER_COLORS["success" if episode_id % 2 else "failed"]
        assert is_color(frames[-1][top + 1 : top + 3, left + 8 : left + width - 8], color)


@pytest.mark.parametrize("count", range(1, 17))
def test_every_number_of_tiles_fills_the_picture(count):
    tiles = [np.full((30, 40, 3), 255, np.uint8)] * count
    sizes = row_sizes(count)
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    frame = grid(tiles, 40 * max(sizes))
    assert frame.min() == 255 and frame.shape[1] == 40 * max(sizes)


def test_before_and_after_stand_above_each_other(run_dir):
    frames = frames_of(run_dir / "videos" / "before_after.mp4")
    assert len(frames) == 1 + LENGTH + FPS
    assert frames[0].shape[1] == 4 * (320 + 2 * BORDER)
    before, after = read_side(run_dir, 0), read_side(run_dir, 3)
    assert before.in_words() == "after 0 iterations: success in 5 of 9 held-out episodes (56%)"
    assert after.in_words() == "after 3 iterations: success in 6 of 9 held-out episodes (67%)"
    poster = np.asarray(Image.open(run_dir / "videos" / "before_after.jpg"))
    assert poster.shape == frames[0].shape
    assert np.abs(poster.astype(int) - frames[-1]).mean() < 8


def test_changed_outcomes_are_shown_first(run_dir):
    before, after = read_side(run_dir, 0), read_side(run_dir, 3)
    chosen, how = choose_pairs(before, after, most=3)
    assert chosen == [4, 5, 2]
    assert how == "3 of the 8 recorded episodes, changed outcomes first. In all: 1 better, 0 worse."
    back, how = choose_pairs(after, before, most=1)  # as if training had made it worse
    assert back == [4] and how.endswith("In all: 0 better, 1 worse.")
    assert choose_pairs(before, after, most=8)[1] == "All 8 recorded episodes: 1 better, 0 worse."


def test_the_moving_image_of_readme_comes_from_a_run(run_dir, tmp_path):
    command = [sys.executable, "benchmarks/before_after.py", str(run_dir), "--output", str(tmp_path / "a.gif")]
    made = subprocess.run([*command, "--pairs", "2", "--width", "320"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "2 of the 8 recorded episodes, changed outcomes first. In all: 1 better, 0 worse." in made.stdout
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 1 + LENGTH + FPS and gif.width == 320 and gif.info["loop"] == 0
    command[2] = str(tmp_path)
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "has 0 recorded evaluations, but two are needed" in refused.stderr


def test_the_first_evaluation_has_nothing_before_it(tmp_path):
    mine = recorder(tmp_path, [1])
    mine.keep(0, evaluated([1]))
    mine.record(0, evaluated([1]))
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["eval_000000", "eval_000000.mp4"]


# ---------------------------------------------------------------------- frames
def test_a_caption_lies_over_the_picture_and_the_inset_keeps_its_size():
    image = np.full((240, 320, 3), 200, np.uint8)
    seen = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    frame = draw_frame(image, "put carrot on plate", "step 3, return 0.10", None, seen)
    assert frame.shape == (248, 328, 3)
    inside = frame[BORDER:-BORDER, BORDER:-BORDER]
    assert (inside[100, :200] == 200).all()  # no bar: the image is as large as before
    dark = inside.min(axis=(1, 2)) < 120  # [240]
    assert dark[:18].any() and dark[-18:].any()  # the bands behind the captions
    places = [
        (top, left)
        for top in range(240 - 96)
        for left in range(320 - 96)
        if np.array_equal(inside[top + 30 : top + 40, left + 30 : left + 40], seen[30:40, 30:40])
    ]
    (place,) = places
    assert np.array_equal(inside[place[0] + 20 : place[0] + 96, place[1] : place[1] + 96], seen[20:])


@pytest.mark.parametrize(
    "asked, own, drawn",
    [
        ((480, 360), (96, 96), (480, 360)),
        ((480, 360), (224, 224), (960, 720)),
        ((480, 360), (640, 480), (640, 480)),
        ((480, 360), (480, 360), (480, 360)),
        ((64, 48), (96, 96), (96, 96)),
    ],
)
def test_the_size_of_a_video(asked, own, drawn):
    assert frame_size(asked, own) == drawn


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\r\nand\ttabs",
        "put \U0001f955 on \U0001f37d\ufe0f",
        "\u628a\u80e1\u841d\u535c\u653e\u5728\u76d8\u5b50\u4e0a",
        "\u0636\u0639 \u202e\u0627\u0644\u062c\u0632\u0631\u0629",
        "\x00\x07\x1b[31m red",
        "\ud800 half a letter",
        "e" + "\u0301" * 500,
        "$x_y_{z$ <b>%s {0}\\n",
        "word" * 100_000,
        "many words " * 100_000,
        "",
        " ",
    ],
)
def test_any_text_can_be_a_caption(text):
    """One picture of the usual size, with ink where there is a text that can be drawn."""
    frame = draw_frame(np.zeros((96, 128, 3), np.uint8), text, "step 1", "success", note=text)
    assert frame.shape == (96 + 2 * BORDER, 128 + 2 * BORDER, 3)
    rows = video.wrapped(text, 118, video.font().getlength)
    assert 1 <= len(rows) <= 2 and max(map(video.font().getlength, rows)) <= 118 + video.font().getlength(" ...")
    assert (frame[6:20, 8:-8].max() > 128) == bool(rows[0].strip())


# ---------------------------------------------------------------------- physics that does not repeat
def test_what_the_policy_saw_is_shown_where_nothing_repeats(tmp_path):
    ids = [3, 4]

    def never(**_):
        raise AssertionError("no replay")

    mine = recorder(tmp_path, ids, never, repeats=False)
    watch = mine.watch()
    episodes = evaluated(ids, watch)
    mine.keep(0, episodes)
    mine.record(0, episodes, watch)
    frames = frames_of(tmp_path / "videos" / "eval_000000" / "3.mp4")
    middle = [float(frame[120, 160].mean()) for frame in frames]
    assert np.allclose(middle[: LENGTH + 1], [0, 0, 0, 0, 80, 80, 120], atol=6)  # a new image for every decision
    assert len(frames) == 1 + LENGTH + FPS and is_color(frames[-1][1:3, 8:-8], BORDER_COLORS["success"])
    plain = draw_frame(np.full((240, 320, 3), 120, np.uint8), "put thing 3 on plate", "step 6, return 0.00", "success")
    noted = draw_frame(
        np.full((240, 320, 3), 120, np.uint8), "put thing 3 on plate", "step 6, return 0.00", "success", note=AS_SEEN
    )
    error = [np.abs(frames[-1].astype(int) - one).mean() for one in (plain, noted)]
    assert error[1] < error[0]


def test_an_episode_that_begins_again_is_seen_once():
    seen = Seen([5])
    obs = {"image": np.zeros((2, 4, 4, 3), np.uint8), "task_description": ["a", "b"]}
    for steps in (0, 4, 0, 4, 6, 6):
        seen.add([7, 5], obs, [[], [None] * steps], torch.zeros(2))
    assert [moment[0] for moment in seen.moments[5]] == [0, 4, 6] and seen.whole() == [5]


def test_nothing_is_replayed_in_envs_that_do_not_repeat(tmp_path, capsys):
    def open_envs(**sizes):
        envs = FakeEnvs(**sizes)
        envs.repeats = False
        return envs

    recorder(tmp_path, [1], open_envs).record(0, evaluated([1]))
    assert "does not repeat" in capsys.readouterr().err


# ---------------------------------------------------------------------- failures
def broken_renderer(**_):
    raise RuntimeError("no Vulkan device can render here")


@pytest.fixture
def dead_encoder(monkeypatch):
    """ffmpeg ends in the middle of a video."""
    add = video.VideoWriter.add

    def dies(self, frame):
        add(self, frame)
        if self._writer is not None and not hasattr(self, "killed"):
            self.killed = True
            generator = self._writer._write_gen
            generator.gi_frame.f_locals["p"].kill()
            generator.gi_frame.f_locals["p"].wait()

    monkeypatch.setattr(video.VideoWriter, "add", dies)


def check_no_video(run_dir: Path, said: str, why: str) -> None:
    assert said.count("warning: not all videos") == 1 and why in said and "The run continues" in said
    assert not list(run_dir.rglob("*partial*")) and not list(run_dir.rglob("*.mp4"))
    assert len(read_episodes(episode_file(run_dir, 0))) == 2  # the evaluation itself is kept


def test_a_run_without_a_renderer_goes_on(tmp_path, capsys):
    mine = recorder(tmp_path, [1, 2], broken_renderer)
    mine.keep(0, evaluated([1, 2]))
    for iteration in (0, 1, 2):  # it is said once
        mine.record(iteration, evaluated([1, 2]))
    check_no_video(tmp_path, capsys.readouterr().err, "no Vulkan device")


def test_a_run_goes_on_when_the_encoder_dies(tmp_path, capsys, dead_encoder):
    mine = recorder(tmp_path, [1, 2])
    mine.keep(0, evaluated([1, 2]))
    mine.record(0, evaluated([1, 2]))
    check_no_video(tmp_path, capsys.readouterr().err, "warning")


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/a disk/that is gone")])
def test_a_run_goes_on_when_the_folder_cannot_be_written(tmp_path, capsys, make):
    make(tmp_path / "videos")
    mine = recorder(tmp_path, [1, 2])
    mine.keep(0, evaluated([1, 2]))
    mine.record(0, evaluated([1, 2]))
    check_no_video(tmp_path, capsys.readouterr().err, "videos")


def test_a_full_disk_is_one_sentence_for_the_records(tmp_path):
    (tmp_path / "episodes").write_text("a file")
    with pytest.raises(UserError, match=r"eval_000000\.jsonl could not be written .*continue with --resume"):
        recorder(tmp_path, [1]).keep(0, evaluated([1]))


def test_zero_videos_open_no_envs(tmp_path):
    mine = recorder(tmp_path, [1], broken_renderer, video_episodes=0)
    mine.record(0, evaluated([1]))
    mine.catch_up(0)
    assert not (tmp_path / "videos").exists()


# ---------------------------------------------------------------------- a run that is asked to stop
class Asked:
    """A stop request by SIGTERM, as vla.training.preemption has it."""

    requested = False

    def note(self, *_: object) -> None:
        self.requested = True


def test_sigterm_leaves_no_part_of_a_video_and_the_next_start_records_it(tmp_path, capsys):
    stop, steps = Asked(), []
    before = signal.signal(signal.SIGTERM, stop.note)

    def ask(step: int) -> None:
        steps.append(step)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    def open_envs(**sizes):
        return FakeEnvs(**sizes, at_step=ask)

    try:
        mine = recorder(tmp_path, [1, 2], open_envs, stop, image_size=(320, 240), chunk_size=1)
        mine.keep(4, evaluated([1, 2]))
        mine.record(4, evaluated([1, 2]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps == [1, 2, 3] and not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("*partial*"))
    assert capsys.readouterr().err == ""
    again = recorder(tmp_path, [1, 2])
    again.catch_up(4)
    assert len(read_clips(tmp_path, 4)) == 2 and (tmp_path / "videos" / "eval_000004.mp4").exists()
    changed = (tmp_path / "videos" / "eval_000004.mp4").stat().st_mtime_ns
    again.catch_up(4)
    again.catch_up(5)  # an evaluation that was never made
    assert (tmp_path / "videos" / "eval_000004.mp4").stat().st_mtime_ns == changed


def test_recording_draws_no_random_numbers(tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    mine = recorder(tmp_path, [1, 2])
    mine.keep(0, evaluated([1, 2]))
    mine.record(0, evaluated([1, 2]))
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])


def test_frames_are_not_kept(tmp_path):
    """Memory does not grow with the length of a video."""
    code = (
        "import numpy as np, resource, sys\n"
        "from vla.evaluation.video import VideoWriter\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "frame = np.random.RandomState(0).randint(0, 255, (480, 640, 3), np.uint8)\n"
        "with VideoWriter(sys.argv[1]) as video:\n"
        "    for _ in range(20): video.add(frame)\n"
        "    before = peak()\n"
        "    for _ in range(280): video.add(frame)\n"
        "    print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "long.mp4")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(out.stdout) < 60  # MB; 280 frames are 258


def test_frames_of_another_size_or_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give uint8 \[H, W, 3\]"), video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.add(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="keep the size"), video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.add(np.zeros((4, 4, 3), np.uint8))
        writer.add(np.zeros((6, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_encoded(tmp_path):
    image = np.full((51, 49, 3), 90, np.uint8)
    with video.VideoWriter(tmp_path / "odd.mp4") as writer:
        writer.add(image)
    (frame,) = frames_of(tmp_path / "odd.mp4")
    assert frame.shape == (52, 50, 3) and np.abs(frame.astype(int) - 90).max() < 12
