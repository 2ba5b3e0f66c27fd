"""Montages: the videos of several episodes in one, composed without a simulation.

<run>/videos/eval_000016.mp4           all videos of one evaluation in one picture
<run>/videos/before_after.mp4, .jpg    the first evaluation above the newest one, the same episodes side by side
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from schemas import read_json
from schemas.runs import Clips
from vla.evaluation.episode_log import episode_file, read_episodes
from vla.evaluation.video import VideoWriter, even, font, grid, row_sizes, save_image, together, wrapped
from vla.text import counted

MAX_PAIRS = 4  # episodes in before_after.mp4
PAPER, INK, QUIET = (247, 248, 250), (28, 32, 40), (88, 94, 106)
LABEL_SIZE, NOTE_SIZE = 19, 14  # of letters, in pixels
MARGIN = 8
EVALUATION = re.compile(r"eval_(\d{6})")


def write_montage(clips: Sequence[Path], path: Path) -> None:
    """All videos in one, without empty tiles. Those that have ended keep their last frame."""
    with VideoWriter(path) as video:
        for tiles in together(clips):
            width = tiles[0].shape[1] * max(row_sizes(len(tiles)))
            video.add(grid(tiles, width))


def clip_folder(run_dir: Path, iteration: int) -> Path:
    return run_dir / "videos" / f"eval_{iteration:06d}"


def read_clips(run_dir: Path, iteration: int) -> list[dict]:
    """The items of clips.json of one evaluation, [] if nothing was recorded. Raises UserError if it is damaged."""
    path = clip_folder(run_dir, iteration) / "clips.json"
    if not path.exists():
        return []
    found = read_json(path, Clips, "delete the folder, and the videos are recorded again")
    return [clip.model_dump(by_alias=True, exclude_none=True) for clip in found]


# ---------------------------------------------------------------------- before and after
@dataclass(frozen=True)
class Side:
    """One of the two evaluations of before_after.mp4."""

    iteration: int
    folder: Path
    clips: dict[int, dict]  # by episode id, in the order of the evaluation
    successes: int  # of all held-out episodes
    episodes: int

    def in_words(self) -> str:
        share = f"{self.successes} of {self.episodes} held-out episodes ({self.successes / self.episodes:.0%})"
        return f"after {counted(self.iteration, 'iteration')}: success in {share}"


def recorded_iterations(run_dir: Path) -> list[int]:
    """The iterations after which an evaluation was recorded, ascending."""
    found = (EVALUATION.fullmatch(place.parent.name) for place in run_dir.glob("videos/eval_*/clips.json"))
    return sorted(int(match[1]) for match in found if match)


def read_side(run_dir: Path, iteration: int) -> Side:
    """One recorded evaluation. Raises UserError if a file of it is damaged or missing."""
    by_id = {clip["episode_id"]: clip for clip in read_clips(run_dir, iteration)}
    episodes = read_episodes(episode_file(run_dir, iteration))
    successes = sum(episode["success_once"] > 0 for episode in episodes)
    return Side(iteration, clip_folder(run_dir, iteration), by_id, successes, len(episodes))


def choose_pairs(before: Side, after: Side, most: int = MAX_PAIRS) -> tuple[list[int], str]:
    """Which episodes before_after.mp4 shows, and one sentence that says how they were chosen.

    Episodes whose outcome changed come first, whether it became better or worse. Both kinds and the rest keep the
    order of the evaluation.
    """
    both = [episode_id for episode_id in after.clips if episode_id in before.clips]
    outcomes = {one: (before.clips[one]["outcome"], after.clips[one]["outcome"]) for one in both}
    changed = [one for one in both if outcomes[one][0] != outcomes[one][1]]
    chosen = (changed + [one for one in both if one not in changed])[:most]
    better = sum(outcomes[one][1] == "success" for one in changed)
    counts = f"{better} better, {len(changed) - better} worse"
    if len(both) <= most:
        return chosen, f"All {len(both)} recorded episodes: {counts}."
    return chosen, f"{len(chosen)} of the {len(both)} recorded episodes, changed outcomes first. In all: {counts}."


def write_before_after(run_dir: Path, iteration: int) -> bool:
    """Make before_after.mp4 and its poster of the first recorded evaluation and this one.

    Returns:
        False if there is no earlier evaluation with the same episodes.

    Raises:
        OSError, UserError: a video cannot be read or written.
    """
    earlier = [one for one in recorded_iterations(run_dir) if one < iteration]
    if not earlier:
        return False
    before, after = read_side(run_dir, earlier[0]), read_side(run_dir, iteration)
    chosen, how = choose_pairs(before, after)
    if not chosen:
        return False
    path = run_dir / "videos" / "before_after.mp4"
    with VideoWriter(path) as video:
        for frame in paired_frames(before, after, chosen, how):
            video.add(frame)
    save_image(frame, path.with_suffix(".jpg"))
    return True


def paired_frames(before: Side, after: Side, chosen: list[int], how: str) -> Iterator[np.ndarray]:
    """The frames of before_after.mp4, uint8 [H, W, 3]. Both show the same step."""
    paths = [side.folder / side.clips[one]["file"] for side in (before, after) for one in chosen]
    bands: list[np.ndarray] = []
    for tiles in together(paths):
        rows = [np.concatenate(tiles[: len(chosen)], axis=1), np.concatenate(tiles[len(chosen) :], axis=1)]
        if not bands:
            width = rows[0].shape[1]
            bands = [label(width, "BEFORE", before.in_words()), label(width, "AFTER", after.in_words())]
            bands.append(label(width, "", how))
        yield even(np.concatenate([bands[0], rows[0], bands[1], rows[1], bands[2]]))


def label(width: int, title: str, text: str) -> np.ndarray:
    """A light band with a bold title and a text: uint8 [h, width, 3]."""
    big, small = font(bold=True, size=LABEL_SIZE), font(size=NOTE_SIZE)
    left = MARGIN + (big.getlength(title) + 2 * MARGIN if title else 0)
    rows = wrapped(text, width - left - MARGIN, small.getlength)
    height = max(LABEL_SIZE + 2 * MARGIN if title else 0, len(rows) * (NOTE_SIZE + 4) + MARGIN)
    band = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(band)
    if title:
        draw.text((MARGIN, (height - LABEL_SIZE) // 2 - 2), title, fill=INK, font=big)
    top = (height - len(rows) * (NOTE_SIZE + 4)) // 2
    for number, row in enumerate(rows):
        draw.text((left, top + number * (NOTE_SIZE + 4)), row, fill=QUIET, font=small)
    return np.asarray(band)
