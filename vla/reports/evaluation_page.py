"""The report of an evaluation for people: results.md, results.png, and report.html, which holds charts and videos."""

import json
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from schemas import UserError
from vla.evaluation.episode_log import not_written
from vla.evaluation.settings import GROUP_OF
from vla.evaluation.statistics import (
    BRACKETS,
    by_temperature,
    headline,
    markdown,
    means_table,
    published_means,
    settings_table,
    temperature_name,
)
from vla.files.whole import write_whole
from vla.reports.charts import Chart, Dots, dots
from vla.reports.curves import CYCLE, GRAY
from vla.reports.page import Media, State, origin_of, render
from vla.reports.plots import plot_settings
from vla.text import counted

SYMBOLS = ("diamond-open", "square-open", "triangle-up-open", "x-open", "star-open")  # of published rows


@dataclass(frozen=True)
class EvaluationClip:
    """A video of results.json."""

    ident: str
    file: Path
    poster: Path | None
    outcome: str
    words: str


def write_report(folder: Path, results: dict, published: dict[str, dict]) -> None:
    """Write results.json, results.md, results.png and report.html. Each replaces an older file once it is complete.

    Args:
        published: rows of benchmarks/published.yaml to show next to the results.

    Raises:
        UserError: the disk is full.
    """
    try:
        write_files(folder, results, published)
    except OSError as failure:
        raise UserError(not_written(folder, failure)) from failure


def write_files(folder: Path, results: dict, published: dict[str, dict]) -> None:
    """write_report() without its sentence for a full disk."""
    plot_settings(results, published, folder / "results.png")
    write_whole(folder / "results.md", markdown(results, published))
    count = sum(one["episodes"] for _, part in by_temperature(results) for one in part["settings"].values())
    state = State("finished", counted(count, "episode"), time.time())
    write_whole(folder / "report.html", evaluation_page(folder, results, results, published, state))
    # last: it shows that the evaluation is finished
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")


def clips_of(folder: Path, results: dict) -> dict[str, list[EvaluationClip]]:
    """The videos by setting. Those of other temperatures are not recorded."""
    clips: dict[str, list[EvaluationClip]] = {}
    for name, one in results["settings"].items():
        for video in one.get("videos", []):
            poster = video.get("poster")
            words = f"{name}, episode {video['episode_id']}:"
            ident = f"video-{sum(map(len, clips.values()))}"
            clip = EvaluationClip(ident, folder / video["file"], poster and folder / poster, video["outcome"], words)
            clips.setdefault(name, []).append(clip)
    return clips


def settings_chart(results: dict, published: dict[str, dict]) -> Chart:
    """Success per setting at every temperature, and published rows that name the same settings."""
    names = sorted(results["settings"], key=lambda name: [*GROUP_OF, name].index(name))
    series = []
    for (temperature, part), color in zip(by_temperature(results), cycle(CYCLE)):
        found = [part["settings"][name] for name in names]
        rates = [one["success_once"] for one in found]
        low, high = zip(*(one["wilson_95"] for one in found))
        series.append(Dots(temperature_name(temperature), names, rates, low, high, color))
    series += [published_dots(row, names, symbol) for row, symbol in zip(published.values(), cycle(SYMBOLS))]
    caption = "Good: a dot far to the right, whose bar overlaps no dot that it should beat. Bars are 95 % intervals."
    return dots("settings-chart", "Success per setting", caption, [one for one in series if one.categories])


def published_dots(row: dict, names: list[str], symbol: str) -> Dots:
    """A published row: its own rate per setting, or the mean of each setting's group."""
    if "settings" in row:
        rates = {name: row["settings"][name] / row["episodes_per_setting"] for name in names if name in row["settings"]}
    else:
        means = published_means(row)
        rates = {name: means[GROUP_OF[name]]["success_once"] for name in names if name in GROUP_OF}
    return Dots(row["name"], list(rates), list(rates.values()), color=GRAY, symbol=symbol)


def evaluation_page(folder: Path, results: dict | None, about: dict, published: dict[str, dict], state: State) -> str:
    """The content of report.html. The page needs no network, and no other file unless its videos are large.

    Args:
        results: the content of results.json. None before the first episode has ended.
        about: a description of what is evaluated, how and where.
    """
    shown = {} if results is None else results_values(folder, results, published)
    return render(
        "evaluation.html",
        title=about["name"],
        with_charts=results is not None,
        state=state,
        has_results=results is not None,
        media=Media(folder),
        facts=origin_of(about),
        **shown,
    )


def results_values(folder: Path, results: dict, published: dict[str, dict]) -> dict:
    """What the template shows of results."""
    clips = clips_of(folder, results)
    not_linked = dict(clips)  # the first row of a setting links its videos
    header, *rows = settings_table(results)
    return {
        "headline": headline(results).split("\n"),
        "means": means_table(results, published),
        "brackets": BRACKETS,
        "notes": [f"{row['name']}: {row['note']} {row['source']}" for row in published.values()],
        "chart": settings_chart(results, published),
        "settings": [header, *({"cells": row, "clips": not_linked.pop(row[0], [])} for row in rows)],
        "clips": [clip for own in clips.values() for clip in own],
        "sampling": temperature_name(results["temperature"]),
    }
