"""Two evaluations side by side: report.html with the table, a chart, and videos of episodes in which they differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla.evaluation.statistics import by_temperature, comparison_table, temperature_name
from vla.reports.charts import Chart, Dots, dots
from vla.reports.curves import BLUE, ORANGE
from vla.reports.page import Media, render
from vla.text import counted

LEGEND = (
    "An episode is the same start state and instruction for both. 'only the first' and 'only the second' count "
    "episodes in which only that one succeeded. p is McNemar's exact test over them, corrected by Holm for several "
    "settings."
)


@dataclass(frozen=True)
class PairedEpisode:
    """An episode in which exactly one of two policies succeeded."""

    setting: str
    temperature: float
    episode_id: int
    first_succeeded: bool

    @property
    def outcomes(self) -> tuple[str, str]:
        return ("success", "failed") if self.first_succeeded else ("failed", "success")


@dataclass(frozen=True)
class PairClip:
    """The video of one side."""

    file: Path
    poster: Path | None
    outcome: str


@dataclass(frozen=True)
class PairVideos:
    """The videos of one episode, and its instruction."""

    words: str
    clips: tuple[PairClip, PairClip]


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
    """At most so many episodes, by turns one that only the second solved and one that only the first solved."""
    by_winner = [[pair for pair in pairs if pair.first_succeeded == first] for first in (False, True)]

    def turns() -> Iterator[PairedEpisode]:
        for place in range(max(map(len, by_winner), default=0)):
            yield from (own[place] for own in by_winner if place < len(own))

    return [pair for pair, _ in zip(turns(), range(number))]


def pairs_chart(rows: Sequence[dict], names: tuple[str, str]) -> Chart:
    """Success of both in every setting, with 95 % intervals."""
    labels = [f"{row['setting']}, {temperature_name(row['temperature'])}" for row in rows]
    series = []
    for side, (name, color) in enumerate(zip(names, (BLUE, ORANGE))):
        low, high = zip(*(row["wilson_95"][side] for row in rows))
        series.append(Dots(name, labels, [row["success_once"][side] for row in rows], low, high, color))
    caption = "Bars are 95 % intervals over the paired episodes. The test in the table is sharper than these bars."
    return dots("pairs-chart", "Success of both", caption, series)


def pairs_page(
    folder: Path,
    names: tuple[str, str],
    rows: Sequence[dict],
    num_differing: int,
    videos: Sequence[PairVideos],
    problem: str | None,
) -> str:
    """The content of report.html.

    Args:
        folder: where the page will be.
        rows: see vla.evaluation.statistics.compare().
        problem: why videos are missing, or None.
    """
    differ = [row["setting"] for row in rows if row["differs"]]
    verdict = (
        f"They differ in {counted(len(differ), 'setting')} of {len(rows)}." if differ else "No difference is shown."
    )
    return render(
        "pairs.html",
        title=f"{names[0]} against {names[1]}",
        with_charts=True,
        names=names,
        verdict=verdict,
        table=comparison_table(list(rows), names),
        legend=LEGEND,
        chart=pairs_chart(rows, names),
        num_differing=num_differing,
        videos=videos,
        problem=problem,
        media=Media(folder),
    )
