"""Learning curves of several runs side by side: report.html, comparison.png, comparison.md and comparison.json."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib import pyplot as plt

from vla.evaluation.statistics import markdown_table
from vla.files.whole import write_whole
from vla.reports.charts import Chart, curves
from vla.reports.curves import Curve, steady_range
from vla.reports.page import render
from vla.reports.plots import draw_curves, save_figure
from vla.reports.run_groups import Group, at_minute, at_step, flags_table, group_curve, groups_table, runs_table, tag
from vla.text import counted, drawn

FOOTNOTE = (
    "Success is on the held-out episodes of each run, in percent. Brackets are 95 % intervals: over the episodes of "
    "one run (Wilson), over the means of several runs (Student's t). Minutes are of training, without evaluations."
)
CHART_HEIGHT, LEGEND_ROW = 250, 20  # pixels
BAND = "Bands: the range over runs that differ only in their seed, or the 95 % interval of a single run."
# of a chart: id, title, caption, source of the lines, metric, x, title of x, whether it is a rate
LEARNED = (
    (
        "held-out-steps",
        "Success on held-out episodes",
        f"Good: high, and early. {BAND}",
        "evaluations",
        "eval/success_once",
        at_step,
        "env steps",
        True,
    ),
    (
        "held-out-minutes",
        "The same over minutes",
        "Good: high, and early. Minutes compare only runs of one machine.",
        "evaluations",
        "eval/success_once",
        at_minute,
        "minutes of training",
        True,
    ),
    (
        "training-steps",
        "Success of training episodes",
        "Good: rising. These episodes are not the same for every run.",
        "lines",
        "env/success_once",
        at_step,
        "env steps",
        True,
    ),
    (
        "return-steps",
        "Return of held-out episodes",
        "Good: rising with the success.",
        "evaluations",
        "eval/return",
        at_step,
        "env steps",
        False,
    ),
)
CLONED = (
    (
        "cloned-loss",
        "Loss of cloning",
        "Good: falling. Losses compare only with the same --label_sigma.",
        "lines",
        "train/loss",
        at_step,
        "decisions",
        False,
    ),
    (
        "cloned-accuracy",
        "Token accuracy of cloning",
        "Good: high.",
        "lines",
        "train/token_accuracy",
        at_step,
        "decisions",
        True,
    ),
    (
        "cloned-held-out",
        "Success of cloned policies on held-out episodes",
        f"Good: high. {BAND}",
        "evaluations",
        "eval/success_once",
        at_step,
        "decisions",
        True,
    ),
)


def drawn_curves(groups: Sequence[Group], spec: tuple) -> list[Curve]:
    """The curves of one chart. Groups without a value are left out."""
    _, _, _, lines, metric, x, _, _ = spec
    found = [group_curve(group, lines, tag(metric), x) for group in groups]
    return [curve for curve in found if curve.x]


def charts_of(groups: Sequence[Group]) -> list[Chart]:
    """The charts of the learning runs, then those of the cloning runs, as far as there is something to draw."""
    charts = []
    for is_cloning, specs in ((False, LEARNED), (True, CLONED)):
        of_kind = [group for group in groups if group.is_cloning == is_cloning]
        for spec in specs:
            ident, title, caption, _, _, _, x_title, is_rate = spec
            lines = drawn_curves(of_kind, spec)
            if lines:
                look = dict(x_title=x_title, percent=is_rate, y_range=(-0.02, 1.02) if is_rate else steady_range(lines))
                chart = curves(ident, title, caption, lines, **look)
                charts.append(replace(chart, height=CHART_HEIGHT + LEGEND_ROW * len(lines)))
    return charts


def write_comparison(folder: Path, groups: Sequence[Group], command: str) -> None:
    """Write report.html, comparison.png, comparison.md and comparison.json."""
    tables = {"groups": groups_table(groups), "runs": runs_table(groups), "flags": flags_table(groups)}
    plot_groups(groups, folder / "comparison.png")
    parts = ["# Runs side by side", FOOTNOTE, *map(markdown_table, tables.values())]
    write_whole(folder / "comparison.md", "\n\n".join(filter(None, parts)) + "\n")
    write_whole(folder / "comparison.json", json.dumps(tables, indent=1) + "\n")
    write_whole(folder / "report.html", comparison_page(groups, tables, command))


def comparison_page(groups: Sequence[Group], tables: dict[str, list[list[str]]], command: str) -> str:
    """The content of report.html, which needs no other file and no network."""
    charts = charts_of(groups)
    num_runs = sum(len(group.runs) for group in groups)
    return render(
        "comparison.html",
        title=f"{counted(num_runs, 'run')} in {counted(len(groups), 'group')}",
        with_charts=bool(charts),
        charts=charts,
        tables=tables,
        colors=[group.color for group in groups],
        footnote=FOOTNOTE,
        command=command,
    )


def plot_groups(groups: Sequence[Group], path: Path) -> None:
    """Draw the first two charts, of the learning runs if there are any: success against steps and against minutes."""
    plt.switch_backend("Agg")
    learning = [group for group in groups if not group.is_cloning]
    specs = LEARNED[:2] if learning else CLONED[:2]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, spec in zip(axes, specs):
        _, title, _, _, _, _, x_title, is_rate = spec
        titles = {group.short: group.title for group in groups}  # the plot has no table of groups beside it
        lines = drawn_curves(learning or groups, spec)
        draw_curves(axis, [replace(line, name=drawn(titles[line.name])) for line in lines])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(x_title)
        axis.locator_params(axis="x", nbins=6)
        if is_rate:
            axis.set_ylim(-0.02, 1.02)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if len(handles) > 4 else 2, fontsize=8)
    save_figure(figure, path)
