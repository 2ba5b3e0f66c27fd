"""The episodes of an evaluation as they end: a file from which an interrupted evaluation resumes, and a progress bar.

A training run keeps the held-out episodes of an evaluation in `episodes/eval_000016.jsonl`, see write_episodes().

evaluate.py keeps all episodes in one file, `episodes.jsonl`. A line has setting, temperature, episode_id, statistics,
seconds (its share of its batch's seconds), and the executed actions as base64 of little-endian float32
[episode_len, 7].
"""

import base64
import json
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from schemas import UserError, check, parse_json, require_file
from schemas.evaluations import Episode
from schemas.runs import HeldOutEpisode
from vla.distributed import at_end, barrier, print0, rank
from vla.evaluation.episodes import STATISTICS
from vla.files.whole import write_whole

SECONDS_BETWEEN_LINES = 20.0  # of progress, if standard error is not a terminal


def pack_actions(actions: np.ndarray) -> str:
    """float32 [T, 7] -> text."""
    return base64.b64encode(np.ascontiguousarray(actions, "<f4").tobytes()).decode()


def unpack_actions(text: str) -> np.ndarray:
    """The inverse of pack_actions, bit for bit."""
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, 7).astype(np.float32)


def not_written(path: Path, failure: OSError) -> str:
    return f"{path} could not be written ({failure.strerror}): fix that, then run the same command with --resume"


def episode_file(run_dir: Path, iteration: int) -> Path:
    """The file of the evaluation that a training run made after so many iterations."""
    return run_dir / "episodes" / f"eval_{iteration:06d}.jsonl"


def write_episodes(path: Path, episodes: list[dict], facts: dict[int, dict]) -> None:
    """Write the held-out episodes of one evaluation, one JSON object per line, whole or not at all.

    Args:
        episodes: see run_episodes(). facts: {episode id: what the env names about it}.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    lines = []
    for episode in episodes:
        line = {"episode_id": episode["episode_id"]} | {name: episode[name] for name in STATISTICS}
        line |= facts.get(episode["episode_id"], {})
        # the shortest text that gives the same float32 number
        actions = [[float(str(number)) for number in action] for action in episode["actions"]]
        line |= {"episode_len": len(actions), "actions": actions}
        lines.append(json.dumps(line) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))


def read_episodes(path: Path) -> list[dict]:
    """The episodes of one evaluation of a training run, in the order of the ids.

    Returns:
        dicts with episode_id, the STATISTICS, actions (float32 [episode_len, 7]), and the facts that the env names:
        instruction, object, receptacle, table.

    Raises:
        UserError: a line does not hold an episode.
    """
    require_file(path, "evaluate again")
    episodes = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        source = f"{path} line {number}"
        episode = parse_json(line, source, "delete the file")
        check(HeldOutEpisode, episode, source, "delete the file")
        episodes.append(episode | {"actions": np.asarray(episode["actions"], np.float32)})
    return episodes


class EpisodeLog:
    """The episodes that have ended, by (setting, temperature) and episode id. Rank 0 writes it, all ranks hold it."""

    def __init__(self, path: Path):
        """Read an existing file. All ranks together. If a kill cut off the last line, it is removed with a notice.

        Raises:
            UserError: a line does not hold an episode.
        """
        self.path = path
        self.done: dict[tuple[str, float], dict[int, dict]] = {}
        content = b""
        if path.exists() or path.is_symlink():
            require_file(path, "pass another --output")
            content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            episode = self._read(line, number)
            self._remember(episode.pop("setting"), episode.pop("temperature"), episode)
        if len(whole) < len(content):
            print0(f"{path}: the last line is cut short and is dropped. Its episode is run again")
        barrier()  # all ranks have read the file
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(len(whole))

    def _read(self, line: bytes, number: int) -> dict:
        """Parse a line of the file. `number` counts lines from 1. The actions become float32 [episode_len, 7]."""
        source, remedy = f"{self.path} line {number}", "delete that line, and its episode is run again"
        episode = parse_json(line, source, remedy)
        check(Episode, episode, source, remedy)
        return episode | {"actions": unpack_actions(episode["actions"])}

    def _remember(self, setting: str, temperature: float, episode: dict) -> None:
        self.done.setdefault((setting, temperature), {})[episode["episode_id"]] = episode

    def missing(self, setting: str, temperature: float, episode_ids: list[int]) -> list[int]:
        done = self.done.get((setting, temperature), {})
        return [episode_id for episode_id in episode_ids if episode_id not in done]

    def episodes(self, setting: str, temperature: float, episode_ids: list[int]) -> list[dict]:
        return [self.done[setting, temperature][episode_id] for episode_id in episode_ids]

    def ended(self, setting: str, temperature: float, episode_ids: list[int]) -> list[dict]:
        """Those of the episodes that have ended, in the order of episode_ids."""
        done = self.done.get((setting, temperature), {})
        return [done[episode_id] for episode_id in episode_ids if episode_id in done]

    def add(self, setting: str, temperature: float, episodes: list[dict]) -> None:
        """Add episodes that have ended, and write them on rank 0. Raises UserError if the disk is full."""
        lines = []
        for episode in episodes:
            self._remember(setting, temperature, episode)
            line = {"setting": setting, "temperature": temperature, **episode}
            lines.append(json.dumps(line | {"actions": pack_actions(episode["actions"])}).encode() + b"\n")
        if rank() == 0:
            try:
                self._file.write(b"".join(lines))
                self._file.flush()
            except OSError as failure:
                raise UserError(not_written(self.path, failure)) from failure

    def close(self) -> None:
        if rank() == 0:
            self._file.close()


class Page(Protocol):
    """The page of an evaluation, such as vla.reports.evaluation_writer.EvaluationWriter."""

    def update(self, done: int) -> None: ...

    def finish(self) -> None: ...

    def stop(self, reason: str) -> None: ...

    def broken_off(self, cause: BaseException) -> None: ...


class Progress:
    """Shows episodes run and success so far: a bar in a terminal, else a line now and then, and the page.

    Only rank 0 prints and writes.
    """

    def __init__(self, total: int, done: int, page: Page):
        self.page = page if rank() == 0 else None
        self.total, self.done = total, done
        self.cell, self.successes, self.count = "", 0.0, 0
        self.start = self.last_line = time.monotonic()
        self.begun_with = done
        in_terminal = sys.stderr.isatty()
        self.bar = None
        if rank() == 0 and in_terminal:
            self.bar = tqdm(total=total, initial=done, desc="evaluating", unit="ep", dynamic_ncols=True)
        if self.page is not None:
            at_end(self.page.broken_off)
            self.page.update(done)

    def begin(self, cell: str, episodes: list[dict]) -> None:
        """Begin a (setting, temperature). These episodes of it have already been run."""
        self.cell, self.count = cell, len(episodes)
        self.successes = sum(episode["success_once"] for episode in episodes)

    def add(self, episodes: list[dict]) -> None:
        """Count episodes that have just ended."""
        self.done += len(episodes)
        self.count += len(episodes)
        self.successes += sum(episode["success_once"] for episode in episodes)
        if self.page is not None:
            self.page.update(self.done)
        success = f"{self.successes / max(self.count, 1):.3f}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.cell} success {success}", refresh=False)
            self.bar.update(len(episodes))
        elif rank() == 0 and (self.done == self.total or time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES):
            self.last_line = time.monotonic()
            rate = (self.last_line - self.start) / max(self.done - self.begun_with, 1)
            left = f", about {rate * (self.total - self.done) / 60:.1f} min left" if self.done < self.total else ""
            print(
                f"{self.done}/{self.total} episodes: {self.cell} success {success} of {self.count}{left}",
                file=sys.stderr,
                flush=True,
            )

    def close(self, stopped_by: str | None = None) -> None:
        """All episodes have ended, or a signal or a file ends the evaluation."""
        if self.bar is not None:
            self.bar.close()
        if self.page is not None:
            self.page.finish() if stopped_by is None else self.page.stop(stopped_by)
