"""Plots as PNG, drawn by matplotlib: progress.png of a run, results.png of an evaluation, comparison.png of two."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from vla.evaluation.settings import GROUP_OF, GROUPS
from vla.evaluation.statistics import by_temperature, published_means, temperature_name
from vla.reports.curves import Curve, steady_range
from vla.reports.run_curves import return_curves, success_curves
from vla.reports.run_record import RunRecord
from vla.text import drawn

GROUP_COLORS = {"in_distribution": "#4c566a", "vision": "#2b7a9b", "semantic": "#b3561d", "execution": "#4d7c37"}
OTHER_COLOR = "#777777"
MARKERS = "Dv^sPX*<>"  # of published rows


def plot_progress(record: RunRecord) -> Path:
    """Draw progress.png of a run: success and return over env steps, with 95 % intervals."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    success, returns = success_curves(record), return_curves(record)
    for axis, curves, label in zip(axes, (success, returns), ("success rate", "return")):
        draw_curves(axis, curves)
        axis.set_xlabel(record.step_name)
        axis.locator_params(axis="x", nbins=5)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].set_ylim(steady_range(returns))
    if success:
        axes[0].legend(fontsize=8)
    title = f"{drawn(record.name)}: {record.progress_in_words}"
    if roles := record.description.get("roles"):
        ahead = record.flags.get("rollout_ahead")
        title += "\n" + "; ".join(f"ranks {ranks}: {does}" for ranks, does in roles)
        title += f"; {ahead} rollout ahead" if ahead else ""
    figure.suptitle(title, fontsize=10)
    save_figure(figure, record.folder / "progress.png")
    return record.folder / "progress.png"


def draw_curves(axis, curves: Sequence[Curve]) -> None:
    """Draw curves with their bands."""
    for curve in curves:
        axis.plot(curve.x, curve.y, "o-" if curve.markers else "-", markersize=4, color=curve.color, label=curve.name)
        known = [place for place, low in enumerate(curve.low or ()) if low is not None]
        x, low, high = ([values[place] for place in known] for values in (curve.x, curve.low or (), curve.high or ()))
        axis.fill_between(x, low, high, color=curve.color, alpha=0.18, linewidth=0)


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
