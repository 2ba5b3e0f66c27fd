"""What a run folder says about its run, as its page and its plot need it.

Everything comes from files, so that the page of an older run can be made again. Files that a run did not write, or that
are damaged, are left out: they are no reason to have no page.
"""

import contextlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from schemas import UserError, check, parse_json, read_json
from schemas.runs import Clips, Description, HeldOutEpisode, Session
from vla.files.run_lines import read_evaluations, read_lines, text_lines

FACTS = ("object", "receptacle", "table")  # what an episode may be grouped by


@dataclass(frozen=True)
class Clip:
    """One recorded episode. Without a poster, the first frame is shown."""

    episode_id: int
    file: Path
    poster: Path | None
    succeeded: bool
    words: str  # instruction, or "" without one

    @property
    def outcome(self) -> str:
        return "success" if self.succeeded else "failed"


@dataclass
class RunRecord:
    """The files of a run folder.

    Args:
        descriptions: of every start, in the order of their iterations.
        sessions: events in the order of time, see schemas.runs.Session.
        lines: of metrics.jsonl. evaluations: of evaluations.jsonl.
    """

    folder: Path
    descriptions: list[dict] = field(default_factory=list)
    sessions: list[dict] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    _episodes: dict[int, list[dict]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def description(self) -> dict:
        """That of the newest start, or {}."""
        return self.descriptions[-1] if self.descriptions else {}

    @property
    def flags(self) -> dict:
        return self.description.get("args", {})

    @property
    def preset(self) -> dict:
        """The flags in the files of --config. A resumed run has those of its first start."""
        return next((one["preset"] for one in reversed(self.descriptions) if one.get("preset")), {})

    @property
    def preset_files(self) -> str:
        """The files of --config. "" without any."""
        names = next((one["args"]["config"] for one in reversed(self.descriptions) if one["args"].get("config")), ())
        return names if isinstance(names, str) else " ".join(map(str, names))

    @property
    def is_cloning(self) -> bool:
        return "updates_per_iteration" in self.flags

    @property
    def step_name(self) -> str:
        """The unit of global_step."""
        return "decisions" if self.is_cloning else "env steps"

    @property
    def num_iterations(self) -> int:
        """How many iterations the run will have. 0 if that is not known."""
        wanted = self.description.get("sizes", {}).get("num_iterations", 0)
        return wanted if isinstance(wanted, int) else 0

    @property
    def iteration(self) -> int:
        """How many iterations are done."""
        return int(self.lines[-1]["iteration"]) if self.lines else 0

    @property
    def phase(self) -> str:
        """running, stopped, failed, finished, or unknown for an unfinished run of an older version."""
        if self.sessions:
            event = self.sessions[-1]["event"]
            return "running" if event == "started" else event
        return "finished" if 0 < self.num_iterations <= self.iteration else "unknown"

    @property
    def reason(self) -> str:
        """What asked the run to stop, or the error that ended it. "" if it runs or is finished."""
        return self.sessions[-1]["reason"] if self.sessions else ""

    @property
    def progress_in_words(self) -> str:
        """Such as "stopped after iteration 8 of 16"."""
        of_all = f" of {self.num_iterations}" if self.num_iterations else ""
        words = {
            "unknown": "after",
            "running": "running, after",
            "finished": "finished after",
            "failed": "failed after",
        }
        return f"{words.get(self.phase, 'stopped after')} iteration {self.iteration}{of_all}"

    @property
    def times_resumed(self) -> int:
        starts = [session for session in self.sessions if session["event"] == "started"]
        return max(len(starts), len(self.descriptions), 1) - 1

    @cached_property
    def evaluated(self) -> list[int]:
        """Iterations whose evaluation left clips, in ascending order."""
        names = [path.parent.name for path in self.folder.glob("videos/eval_*/clips.json")]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def episodes(self, iteration: int) -> list[dict]:
        """The held-out episodes of one evaluation. [] without its file."""
        if iteration not in self._episodes:
            self._episodes[iteration] = read_episodes(self.folder / "episodes" / f"eval_{iteration:06d}.jsonl")
        return self._episodes[iteration]

    def clips(self, iteration: int) -> list[Clip]:
        """The recorded episodes of one evaluation, as far as their files are there."""
        return read_clips(self.folder / "videos" / f"eval_{iteration:06d}")


def read_run(folder: Path) -> RunRecord:
    """Read a run folder."""
    descriptions = []
    for path in sorted(folder.glob("run_from_iteration_*.json")):
        with contextlib.suppress(UserError):
            descriptions.append(read_json(path, Description, "").model_dump())
    return RunRecord(
        folder,
        descriptions,
        read_sessions(folder / "sessions.jsonl"),
        read_lines(folder / "metrics.jsonl"),
        read_evaluations(folder),
    )


def read_sessions(path: Path) -> list[dict]:
    """The events of a run: when it started, stopped, failed and finished. Damaged lines are left out."""
    found = []
    for line in text_lines(path):
        with contextlib.suppress(UserError):
            found.append(check(Session, parse_json(line, "", ""), "").model_dump())
    return found


def read_episodes(path: Path) -> list[dict]:
    """The lines of episodes/eval_*.jsonl without their actions. Damaged lines are left out."""
    try:
        state = path.stat()
    except OSError:
        return []
    return list(parsed_episodes(path, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=256)  # a page is written many times, and old evaluations stay as they are
def parsed_episodes(path: Path, changed: int, size: int) -> tuple[dict, ...]:
    """read_episodes() of a file that changed at this time and has this size."""
    found = []
    for line in text_lines(path):
        with contextlib.suppress(UserError):
            episode = parse_json(line, "", "")
            check(HeldOutEpisode, episode, "")
            found.append({name: value for name, value in episode.items() if name != "actions"})
    return tuple(found)


def read_clips(folder: Path) -> list[Clip]:
    """The clips that clips.json of an evaluation lists, as far as their files are there."""
    try:
        listed = read_json(folder / "clips.json", Clips, "")
    except (UserError, OSError):
        return []
    clips = [clip_of(folder, one.model_dump(by_alias=True)) for one in listed]
    return [clip for clip in clips if clip.file.is_file()]


def clip_of(folder: Path, item: dict) -> Clip:
    """A clip from an item of clips.json."""
    poster = folder / item["poster"]
    return Clip(
        item["episode_id"],
        folder / item["file"],
        poster if poster.is_file() else None,
        item["outcome"] == "success",
        item.get("instruction") or "",
    )
