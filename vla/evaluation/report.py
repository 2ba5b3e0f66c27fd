"""Reports for people: results.md, results.png, and results.html, which holds table, plot and videos in one file."""

import base64
import html
import json
import os
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from schemas import UserError
from vla.evaluation.episode_log import not_written
from vla.evaluation.settings import GROUP_OF, GROUPS
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
from vla.text import drawn, html_text

GROUP_COLORS = {"in_distribution": "#4c566a", "vision": "#2b7a9b", "semantic": "#b3561d", "execution": "#4d7c37"}
OTHER_COLOR = "#777777"
MARKERS = "Dv^sPX*<>"  # of published rows

STYLE = """
:root { font: 15px/1.5 system-ui, sans-serif; color: #20242c; background: #fff; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.headline { font-weight: 600; white-space: pre-line; } .note { color: #5b6270; font-size: .87rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid #20242c; padding: .3rem .6rem .3rem 0; }
td { border-bottom: 1px solid #e3e6ea; padding: .28rem .6rem .28rem 0; white-space: nowrap; }
tr:hover td { background: #f5f7f9; } img { max-width: 100%; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem; }
figure { margin: 0; border: 2px solid #e3e6ea; border-radius: 6px; overflow: hidden; }
figure:target { border-color: #2b7a9b; } video { width: 100%; display: block; background: #000; }
figcaption { padding: .4rem .6rem; font-size: .82rem; } .success { color: #2e7d32; } .failed { color: #b3261e; }
a { color: #1a5fb4; text-decoration: none; } a:hover { text-decoration: underline; }
"""
SCRIPT = """
for (const link of document.querySelectorAll("a[data-video]"))
  link.addEventListener("click", () => document.getElementById(link.dataset.video).querySelector("video").play());
"""


def write_report(folder: Path, results: dict, published: dict[str, dict]) -> None:
    """Write results.json, results.md, results.png and results.html. Each replaces an older file once it is complete.

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
    plot_settings(results, published, folder / "results.png")
    contents = {
        "results.md": markdown(results, published),
        "results.html": page(results, published, folder),
        "results.json": json.dumps(results, indent=1) + "\n",  # last: it shows that the evaluation is finished
    }
    for name, content in contents.items():
        (folder / f"{name}.partial").write_text(content, encoding="utf-8")
        os.replace(folder / f"{name}.partial", folder / name)


# ---------------------------------------------------------------------- plots
def save_figure(figure, path: Path) -> None:
    """Save a plot. It is complete when the file has its final name."""
    partial = path.with_name(f"partial_{path.name}")
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    os.replace(partial, path)


def new_axis(num_rows: int):
    """A figure with room for `num_rows` settings side by side."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(max(6.0, 2.0 + 0.55 * num_rows), 4.2), layout="constrained")
    axis.set_ylim(-0.02, 1.02)
    axis.set_ylabel("success_once")
    axis.grid(axis="y", alpha=0.3)
    return figure, axis


def interval_bars(axis, place: float, rate: float, interval: list[float], **look) -> None:
    """Draw one success rate with its interval."""
    errors = [[max(0.0, rate - interval[0])], [max(0.0, interval[1] - rate)]]
    axis.errorbar([place], [rate], yerr=errors, capsize=2.5, markersize=6, elinewidth=1.2, linestyle="none", **look)


def plot_settings(results: dict, published: dict[str, dict], path: Path) -> None:
    """Plot success per setting with 95 % intervals, and published rows.

    Markers of the first temperature are filled, those of further ones hollow.
    """
    names = sorted(results["settings"], key=lambda name: [*GROUP_OF, name].index(name))
    figure, axis = new_axis(len(names))
    temperatures = list(by_temperature(results))
    for number, (temperature, of_temperature) in enumerate(temperatures):
        shift = 0.22 * (number - (len(temperatures) - 1) / 2)
        for place, name in enumerate(names):
            one, color = of_temperature["settings"][name], color_of(name)
            face = color if number == 0 else "white"
            look = dict(marker="o", color=color, markerfacecolor=face)
            interval_bars(axis, place + shift, one["success_once"], one["wilson_95"], **look)
        face = "black" if number == 0 else "white"
        axis.plot([], [], "o", color="black", markerfacecolor=face, label=temperature_name(temperature))
    for row, marker in zip(published.values(), MARKERS * len(published)):
        plot_published(axis, row, names, marker)
    axis.set_xticks(range(len(names)), map(drawn, names), rotation=40, ha="right")
    for label, name in zip(axis.get_xticklabels(), names):
        label.set_color(color_of(name))
    axis.set_title(f"{drawn(results['name'])}: 95 % Wilson intervals", fontsize=10)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)


def color_of(setting: str) -> str:
    """The color of a setting's group."""
    return GROUP_COLORS.get(GROUP_OF.get(setting, ""), OTHER_COLOR)


def plot_published(axis, row: dict, names: list[str], marker: str) -> None:
    """Draw a published row: a marker per setting if the row has settings, else a line at each group's mean."""
    means, n = published_means(row), row["episodes_per_setting"]
    label, color = drawn(row["name"]), None
    if "settings" in row:
        places = [place for place, name in enumerate(names) if name in row["settings"]]
        rates = [row["settings"][names[place]] / n for place in places]
        axis.plot(places, rates, marker, markersize=4.5, alpha=0.7, label=label)
        return
    for group in GROUPS:
        places = [place for place, name in enumerate(names) if GROUP_OF.get(name) == group]
        if places:
            ends = [min(places) - 0.35, max(places) + 0.35]
            (line,) = axis.plot(ends, [means[group]["success_once"]] * 2, "--", color=color, alpha=0.7, label=label)
            label, color = None, line.get_color()  # one entry in the legend


def plot_comparison(rows: list[dict], names: tuple[str, str], path: Path) -> None:
    """Plot the success of two checkpoints in every setting. A star marks settings in which they differ."""
    figure, axis = new_axis(len(rows))
    for side, (name, color) in enumerate(zip(names, ("#4c566a", "#b3561d"))):
        for place, row in enumerate(rows):
            where = place - 0.13 + 0.26 * side
            interval_bars(axis, where, row["success_once"][side], row["wilson_95"][side], marker="o", color=color)
        axis.plot([], [], "o", color=color, label=drawn(name))
    for place, row in enumerate(rows):
        if row["differs"]:
            axis.annotate("*", (place, 1.0), ha="center", va="top", fontsize=16)
    labels = [f"{drawn(row['setting'])} {temperature_name(row['temperature'])}" for row in rows]
    axis.set_xticks(range(len(rows)), labels, rotation=40, ha="right")
    axis.set_title("* differs: McNemar over paired episodes, Holm-corrected p < 0.05", fontsize=10)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)


# ---------------------------------------------------------------------- the page
def data_url(path: Path, kind: str) -> str:
    """A URL that holds the content of the file."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def html_table(table: list[list[str]], ident: str, videos: dict[str, list[dict]] | None = None) -> str:
    """A table of text.

    Args:
        videos: by the text of the first column. A further column links to them, once for each such text.
    """
    header, *rows = table
    not_linked = dict(videos or {})
    lines = [f'<table id="{ident}"><thead><tr>']
    lines += [f"<th>{html_text(cell)}</th>" for cell in [*header, *(["videos"] if videos else [])]]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = [html_text(cell) for cell in row]
        if videos:
            own_videos = [(html_text(video["file"]), video["outcome"]) for video in not_linked.pop(row[0], [])]
            links = [f'<a href="#{file}" data-video="{file}">&#9654; {outcome}</a>' for file, outcome in own_videos]
            cells.append(" ".join(links))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def video_figure(name: str, video: dict, folder: Path) -> str:
    """The video of one episode, with its caption."""
    return (
        f'<figure id="{html_text(video["file"])}"><video controls muted loop playsinline preload="metadata" '
        f'src="{data_url(folder / video["file"], "video/mp4")}"></video><figcaption>{html_text(name)}, episode '
        f'{video["episode_id"]}: <b class="{video["outcome"]}">{video["outcome"]}</b></figcaption></figure>'
    )


def page(results: dict, published: dict[str, dict], folder: Path) -> str:
    """The content of results.html. The page needs no other file and no network."""
    videos = {name: one["videos"] for name, one in results["settings"].items()}
    notes = "".join(
        f"<li>{html_text(row['name'])}: {html_text(row['note'])} {html_text(row['source'])}</li>"
        for row in published.values()
    )
    figures = "\n".join(video_figure(name, video, folder) for name, own in videos.items() for video in own)
    sampling = html_text(temperature_name(results["temperature"]))
    all_videos = f'<h2>Videos</h2>\n<p class="note">{sampling}, replayed from '
    all_videos += f'the recorded actions, in real time</p>\n<div class="videos">{figures}</div>'
    means = means_table(results, published)
    made = (
        f"{results['command']} on {results['num_ranks']} ranks of {results['device']}, commit {results['commit']}"
        f"{' with uncommitted changes' if results['uncommitted_changes'] else ''}, {results['started']}"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html_text(results["name"])}</title><style>{STYLE}</style></head>
<body>
<h1>{html_text(results["name"])}</h1>
<p class="headline">{html.escape(headline(results))}</p>
{"<h2>Means</h2>" + html_table(means, "means") if means else ""}
<p class="note">{BRACKETS}</p><ul class="note">{notes}</ul>
<h2>Settings</h2>
<img alt="success per setting" src="{data_url(folder / "results.png", "image/png")}">
{html_table(settings_table(results), "settings", videos)}
{all_videos if figures else ""}
<h2>How it was made</h2>
<p class="note">{html_text(made)}</p>
<script>{SCRIPT}</script>
</body></html>
"""
