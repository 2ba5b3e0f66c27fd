"""A few episodes of each evaluation as videos for people: a video and a poster each, and montages.

    <run>/episodes/eval_000016.jsonl            every held-out episode of that evaluation, with its actions
    <run>/videos/eval_000016/7.mp4, 7.jpg       the video of episode 7, and its last frame
    <run>/videos/eval_000016/clips.json         the list of these videos
    <run>/videos/eval_000016.mp4                all of them in one video
    <run>/videos/before_after.mp4, .jpg         the first evaluation above the newest one

The episodes are replayed from their actions in envs of their own, so recording touches neither the envs nor the random
numbers of the run. Where the simulation does not repeat (physx_cuda), the videos show what the policy saw.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from schemas import UserError
from vla.distributed import all_gather_lists, barrier, rank, world_size
from vla.evaluation.episode_log import episode_file, read_episodes, write_episodes
from vla.evaluation.episodes import Stop, is_lost, outcome, replay
from vla.evaluation.montage import clip_folder, write_before_after, write_montage
from vla.evaluation.vector_env import VectorEnv
from vla.evaluation.video import VideoWriter, draw_frame, frame_size, resized, save_image
from vla.text import error_text

AS_SEEN = "what the policy saw, since this simulation does not repeat"
OpenEnvs = Callable[..., VectorEnv]  # called with num_envs, image_size and num_env_workers


class Stopped(Exception):
    """This rank was asked to stop while it recorded."""


@dataclass(frozen=True)
class Look:
    """How episodes are drawn."""

    frame_size: tuple[int, int]  # width, height in pixels
    image_size: tuple[int, int]  # of what the policy saw
    chunk_size: int  # actions per decision: the policy saw one image for each of them
    num_env_workers: int  # as for make_envs()

    @property
    def has_inset(self) -> bool:
        return self.frame_size != self.image_size


# ---------------------------------------------------------------------- one episode
class EpisodeVideo:
    """The video of one episode, as a context manager. The poster is written beside it, as `<name>.jpg`."""

    def __init__(self, path: Path, episode: dict, note: str = ""):
        self.path, self.episode, self.note = path, episode, note
        self.length = len(episode["actions"])
        self.video = VideoWriter(path)

    def add(self, step: int, image: np.ndarray, text: str, total: float, inset: np.ndarray | None = None) -> None:
        """Add the image after `step` actions, uint8 [H, W, 3]. After the last one, the video is held and ends."""
        if step > self.length:
            return
        ended = outcome(self.episode) if step == self.length else None
        frame = draw_frame(image, text, f"step {step}, return {total:.2f}", ended, inset, self.note)
        self.video.add(frame)
        if ended:
            self.video.hold(frame)
            save_image(frame, self.path.with_suffix(".jpg"))

    def __enter__(self) -> "EpisodeVideo":
        self.video.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.video.__exit__(*error)


def record_clips(wanted: dict[Path, dict], open_envs: OpenEnvs, look: Look, stop: Stop) -> None:
    """Replay episodes into videos with posters, a frame per action.

    Args:
        wanted: {video file: episode}. open_envs: makes envs for the replay. They are closed again.

    Raises:
        Stopped: this rank was asked to stop. No part of a video is left.
        OSError, RuntimeError: the encoder or the renderer does not work.
    """
    if not wanted:
        return
    number = min(max(1, look.num_env_workers), len(wanted))  # making an env takes as long as an episode
    with contextlib.ExitStack() as stack:

        def opened(size: tuple[int, int]) -> VectorEnv:
            workers = min(number, look.num_env_workers)
            return stack.enter_context(open_envs(num_envs=number, image_size=size, num_env_workers=workers))

        shown = opened(look.frame_size)
        if not shown.repeats:
            raise RuntimeError("this simulation does not repeat, so its episodes cannot be replayed")
        seen = opened(look.image_size) if look.has_inset else None
        paths = list(wanted)
        for start in range(0, len(paths), number):
            batch = {path: wanted[path] for path in paths[start : start + number]}
            record_batch(batch, shown, seen, look.chunk_size, stop)


def record_batch(
    wanted: dict[Path, dict], shown: VectorEnv, seen: VectorEnv | None, chunk_size: int, stop: Stop
) -> None:
    """record_clips() of at most as many episodes as there are envs.

    Args:
        shown: envs at the size for people. seen: envs at the size of what the policy saw, for the insets.
    """
    episodes = list(wanted.values())
    episodes += [episodes[-1]] * (shown.num_envs - len(episodes))  # idle envs repeat the last one
    insets: Sequence[np.ndarray | None] = [None] * len(episodes)
    decisions = replay(seen, episodes, chunk_size, stop) if seen is not None else iter(())
    try:
        with contextlib.ExitStack() as stack:
            videos = [stack.enter_context(EpisodeVideo(path, episode)) for path, episode in wanted.items()]
            for moment in replay(shown, episodes, 1, stop):
                if moment.step % chunk_size == 0:
                    latest = next(decisions, None)
                    insets = insets if latest is None else latest.images
                for video, *drawn in zip(videos, moment.images, moment.instructions, moment.returns, insets):
                    video.add(moment.step, *drawn)
            if stop.requested:
                raise Stopped
    except OSError as failure:
        if stop.requested:  # a signal to all processes ends the one that encodes, too
            raise Stopped from failure
        raise


# ---------------------------------------------------------------------- where the simulation does not repeat
class Seen:
    """What the policy saw in chosen episodes while they ran (an episodes.Watch)."""

    def __init__(self, episode_ids: Sequence[int]):
        # per episode, the moment of each decision: step, image, instruction, return
        self.moments: dict[int, list[tuple[int, np.ndarray, str, float]]] = {one: [] for one in episode_ids}

    def whole(self) -> list[int]:
        """The ids of the episodes that were seen on this rank."""
        return [episode_id for episode_id, kept in self.moments.items() if kept]

    def add(self, episode_ids: Sequence[int], obs: dict, executed: Sequence[list], returns: torch.Tensor) -> None:
        for env, episode_id in enumerate(episode_ids):
            kept, step = self.moments.get(episode_id), len(executed[env])
            if kept is None:
                continue
            if step == 0:  # it begins, perhaps again
                kept.clear()
            if not kept or kept[-1][0] < step:  # else it has ended
                image = torch.as_tensor(obs["image"][env]).cpu().numpy().copy()
                kept.append((step, image, obs["task_description"][env], float(returns[env])))


def record_seen(wanted: dict[Path, dict], seen: Seen, look: Look) -> None:
    """Videos and posters of what the policy saw, as long as the episodes were. Raises OSError."""
    for path, episode in wanted.items():
        kept = seen.moments[episode["episode_id"]]
        with EpisodeVideo(path, episode, AS_SEEN) as video:
            for (step, image, *rest), following in zip(kept, [*kept[1:], None]):
                large = resized(image, *look.frame_size)
                until = step + 1 if following is None else following[0]
                for shown in range(step, until):
                    video.add(shown, large, *rest)


def record_share(
    wanted: dict[Path, dict], open_envs: OpenEnvs, look: Look, stop: Stop, watch: Seen | None = None
) -> str | None:
    """Record this rank's videos, from what the policy saw if `watch` has it, else by replay. Lost episodes have none.

    Returns:
        what went wrong, or None. Videos that exist are whole.
    """
    wanted = {path: episode for path, episode in wanted.items() if not is_lost(episode)}
    try:
        if watch is None:
            record_clips(wanted, open_envs, look, stop)
        else:
            record_seen(wanted, watch, look)
    except Stopped:
        return None
    except Exception as failure:  # whatever the renderer or the encoder raises
        return error_text(failure)
    return None


# ---------------------------------------------------------------------- the evaluations of a run
class Recorder:
    """Keeps the held-out episodes of a training run's evaluations, and records the first few of them each time.

    All ranks call its methods together and share the work. A video that cannot be recorded never ends a run: there is
    one warning.

    Args:
        envs: those of the evaluation. They are not used for recording.
        open_envs: makes envs of the same world, called with num_envs, image_size and num_env_workers.
        facts: {episode id: what the env names about it}, in the order of the evaluation.
        stop: looked at before every step.
    """

    def __init__(
        self,
        run_dir: Path,
        envs: VectorEnv,
        open_envs: OpenEnvs,
        facts: dict[int, dict],
        stop: Stop,
        *,
        video_episodes: int,
        video_size: tuple[int, int],
        image_size: tuple[int, int],
        chunk_size: int,
        num_env_workers: int,
    ):
        self.run_dir, self.open_envs, self.facts, self.stop = run_dir, open_envs, facts, stop
        self.repeats = envs.repeats
        self.ids = list(facts)[:video_episodes]
        image_size, video_size = tuple(image_size), tuple(video_size)
        self.look = Look(frame_size(video_size, image_size), image_size, chunk_size, num_env_workers)
        self.warned: set[str] = set()

    def watch(self) -> Seen | None:
        """What evaluate() shows its images to. None where episodes can be replayed."""
        return None if self.repeats else Seen(self.ids)

    def keep(self, iteration: int, episodes: list[dict]) -> None:
        """Write episodes/eval_*.jsonl on rank 0. Raises UserError if that is not possible."""
        if rank() > 0:
            return
        path = episode_file(self.run_dir, iteration)
        try:
            write_episodes(path, episodes, self.facts)
        except OSError as failure:
            raise UserError(
                f"{path} could not be written ({failure.strerror}): fix that, then continue with --resume"
            ) from failure

    def record(self, iteration: int, episodes: list[dict], watch: Seen | None = None) -> None:
        """Record the videos of an evaluation, and compose the montages.

        Args:
            watch: what the policy saw, where the simulation does not repeat.

        If a rank was asked to stop, nothing is left of these videos. catch_up() records them.
        """
        if not self.ids:
            return
        place = clip_folder(self.run_dir, iteration)
        partial = place.with_name(f"{place.name}.partial")
        problem = make_empty(partial) if rank() == 0 else None
        barrier()  # the folder is there
        recorded: list[int] = []
        if problem is None:
            recorded, problem = self._record_own(partial, episodes, watch)
        done = set(all_gather_lists(recorded))
        problems = [text for text in all_gather_lists([problem]) if text is not None]
        if rank() == 0:
            shown = [episode for episode in episodes if episode["episode_id"] in done]
            due = [one for one in episodes if one["episode_id"] in self.ids and not is_lost(one)]
            if len(shown) == len(due) or problems:  # else a rank was asked to stop
                problems += self._finish(iteration, partial, shown)
            shutil.rmtree(partial, ignore_errors=True)
            self._warn(iteration, problems)

    def catch_up(self, iteration: int) -> None:
        """Record the videos of an evaluation that a stopped run still owes."""
        path, clips = episode_file(self.run_dir, iteration), clip_folder(self.run_dir, iteration) / "clips.json"
        owed = rank() == 0 and self.ids and self.repeats and path.exists() and not clips.exists()
        kept = read_episodes(path) if owed else []
        episodes = all_gather_lists(kept)
        if episodes:
            self.record(iteration, episodes)

    def _record_own(self, folder: Path, episodes: list[dict], watch: Seen | None) -> tuple[list[int], str | None]:
        """Record this rank's share. Returns the ids of the recorded episodes, and what went wrong or None."""
        chosen = [episode for episode in episodes if episode["episode_id"] in self.ids]
        if watch is None:
            mine = chosen[rank() :: world_size()]
        else:  # the images are where the episode ran
            mine = [episode for episode in chosen if episode["episode_id"] in watch.whole()]
        wanted = {folder / f"{episode['episode_id']}.mp4": episode for episode in mine}
        problem = record_share(wanted, self.open_envs, self.look, self.stop, watch)
        return [episode["episode_id"] for path, episode in wanted.items() if path.exists()], problem

    def _finish(self, iteration: int, partial: Path, episodes: list[dict]) -> list[str]:
        """List the clips, give their folder its name, and compose the montages. Returns what went wrong."""
        place = clip_folder(self.run_dir, iteration)
        if not episodes:
            return []
        try:
            clips = [clip_of(episode, self.facts.get(episode["episode_id"], {})) for episode in episodes]
            (partial / "clips.json").write_text(json.dumps(clips, indent=1) + "\n")
            shutil.rmtree(place, ignore_errors=True)
            os.replace(partial, place)
            write_montage([place / clip["file"] for clip in clips], place.with_suffix(".mp4"))
            write_before_after(self.run_dir, iteration)
        except Exception as failure:
            return [error_text(failure)]
        return []

    def _warn(self, iteration: int, problems: list[str]) -> None:
        """Say once what went wrong."""
        new = [text for text in dict.fromkeys(problems) if text not in self.warned]
        self.warned.update(new)
        if new:
            warn(f"of the evaluation after iteration {iteration}", new[0])


def warn(whose: str, problem: str) -> None:
    """One sentence about videos that could not be recorded."""
    tqdm.write(
        f"warning: not all videos {whose} could be recorded ({problem}). The run continues. `python doctor.py` checks "
        "the renderer, and --video_episodes 0 records nothing",
        file=sys.stderr,
    )


def make_empty(folder: Path) -> str | None:
    """Make a folder, without what a killed run left there. Returns what went wrong, or None."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as failure:
        return error_text(failure)
    return None


def clip_of(episode: dict, facts: dict) -> dict:
    """An item of clips.json."""
    name = episode["episode_id"]
    return {
        "episode_id": name,
        "file": f"{name}.mp4",
        "poster": f"{name}.jpg",
        "outcome": outcome(episode),
        **facts,
        "return": episode["return"],
        "episode_len": len(episode["actions"]),
    }
