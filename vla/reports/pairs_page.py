"""Two evaluations side by side: report.html with the table, a chart, and videos of episodes in which they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vla.evaluation.pairs import PairedEpisode, pair_file
from vla.evaluation.statistics import comparison_table, temperature_name
from vla.reports.charts import Chart, Dots, dots
from vla.reports.curves import BLUE, ORANGE
from vla.reports.page import Media, render
from vla.text import counted

LEGEND = (
    "An episode is the same start state and instruction for both. 'only the first' and 'only the second' count "
    "episodes in which only that one succeeded. p is McNemar's exact test over them, corrected by Holm for several "
    "settings."
)


SIDES, LONGEST_HEADER = ("the first", "the second"), 24  # instead of longer names in the head of the table


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


def pair_videos(videos: Path, pair: PairedEpisode, words: str) -> PairVideos | None:
    """The videos of an episode. None unless both sides were recorded."""
    files = [pair_file(videos, pair, side) for side in (0, 1)]
    if not all(path.is_file() for path in files):
        return None
    clips = [PairClip(path, path.with_suffix(".jpg"), end) for path, end in zip(files, pair.outcomes)]
    return PairVideos(f"{pair.setting}, episode {pair.episode_id}{words and f': {words}'}", (clips[0], clips[1]))


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
        table=comparison_table(list(rows), names if max(map(len, names)) <= LONGEST_HEADER else SIDES),
        legend=LEGEND,
        chart=pairs_chart(rows, names),
        num_differing=num_differing,
        videos=videos,
        problem=problem,
        media=Media(folder),
    )
