"""Episodes in which exactly one of two policies succeeded, and their videos, replayed from the stored actions."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas import UserError, check, parse_json, require_file
from schemas.evaluations import Episode
from vla.evaluation.episode_log import unpack_actions
from vla.evaluation.episodes import NEVER
from vla.evaluation.recording import Look, OpenEnvs, record_share
from vla.evaluation.statistics import by_temperature

Key = tuple[str, float, int]  # setting, temperature, episode id


@dataclass(frozen=True)
class PairedEpisode:
    """An episode in which exactly one of two policies succeeded."""

    setting: str
    temperature: float
    episode_id: int
    first_succeeded: bool

    @property
    def key(self) -> Key:
        return self.setting, self.temperature, self.episode_id

    @property
    def outcomes(self) -> tuple[str, str]:
        return ("success", "failed") if self.first_succeeded else ("failed", "success")


def differing_episodes(first: dict, second: dict) -> list[PairedEpisode]:
    """The episodes in which exactly one succeeded, in the order of settings and ids.

    Args:
        first, second: the content of two results.json of one world.
    """
    of_second = {temperature: part["settings"] for temperature, part in by_temperature(second)}
    found = []
    for temperature, part in by_temperature(first):
        for setting, one in part["settings"].items():
            other = of_second.get(temperature, {}).get(setting, {"outcomes": []})
            theirs = {row["episode_id"]: bool(row["success_once"]) for row in other["outcomes"]}
            for row in one["outcomes"]:
                succeeded = bool(row["success_once"])
                if theirs.get(row["episode_id"], succeeded) != succeeded:
                    found.append(PairedEpisode(setting, temperature, row["episode_id"], succeeded))
    return found


def choose_pairs(pairs: Sequence[PairedEpisode], number: int) -> list[PairedEpisode]:
    """At most so many episodes, by turns from every setting, of those that only the second or only the first solved."""
    kinds = {(pair.first_succeeded, pair.setting): [] for pair in sorted(pairs, key=lambda pair: pair.first_succeeded)}
    for pair in pairs:
        kinds[pair.first_succeeded, pair.setting].append(pair)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return [pair for pair in turns if pair is not None][:number]


def pair_file(videos: Path, pair: PairedEpisode, side: int) -> Path:
    """The video of one side (0 or 1) of a pair."""
    stem = re.sub(r"[^\w.-]", "_", pair.setting)
    name = f"{stem}_t{pair.temperature:g}_id{pair.episode_id}_{('first', 'second')[side]}_{pair.outcomes[side]}.mp4"
    return videos / name


def read_logged(path: Path, wanted: set[Key]) -> dict[Key, dict]:
    """Chosen episodes of an episodes.jsonl, with their actions as float32 [T, 7].

    Raises:
        UserError: the file is missing, a line is damaged, or an episode is not in it.
    """
    remedy = "evaluate again, or give --video_pairs 0"
    require_file(path, remedy)
    found = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        source = f"{path} line {number}"
        episode = parse_json(line, source, remedy)
        check(Episode, episode, source, remedy)
        key = episode["setting"], episode["temperature"], episode["episode_id"]
        if key in wanted:
            found[key] = episode | {"actions": unpack_actions(episode["actions"])}
    if missing := sorted(wanted - found.keys()):
        raise UserError(f"{path} lacks episode {missing[0][2]} of {missing[0][0]}: {remedy}")
    return found


def record_pairs(
    pairs: Sequence[PairedEpisode],
    folders: tuple[Path, Path],
    videos: Path,
    open_envs: Callable[[str], OpenEnvs],
    look: Look,
) -> str | None:
    """Record both sides of these episodes, setting by setting.

    Args:
        folders: of the two evaluations. videos: the folder to write to.
        open_envs: from the name of a setting to what makes its envs.

    Returns:
        why videos are missing, or None.
    """
    if not pairs:
        return None
    try:
        logged = [read_logged(folder / "episodes.jsonl", {pair.key for pair in pairs}) for folder in folders]
        videos.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        return str(error)
    problems = []
    for setting in dict.fromkeys(pair.setting for pair in pairs):
        own = [pair for pair in pairs if pair.setting == setting]
        wanted = {pair_file(videos, pair, side): logged[side][pair.key] for side in (0, 1) for pair in own}
        try:
            problems.append(record_share(wanted, open_envs(setting), look, NEVER))
        except UserError as error:
            problems.append(str(error))
    return next(filter(None, problems), None)
