"""The charts of a run's page."""

from dataclasses import dataclass

from vla.reports.charts import Chart, curves, stacked_bars
from vla.reports.curves import BLUE, GREEN, ORANGE, VIOLET, Curve, steady_range
from vla.reports.run_curves import curve_of, return_curves, success_curves
from vla.reports.run_record import RunRecord

MAX_BARS = 100  # in the chart of seconds. Longer runs show means over several iterations
STAGES = {"rollout": "time/rollout", "update": "time/update", "evaluation": "time/eval"}
MEMORY = {
    "GPU, rollout": ("memory/rollout_peak_gib", BLUE),
    "GPU, update": ("memory/update_peak_gib", ORANGE),
    "host, rollout": ("memory/host_rollout_peak_gib", GREEN),
    "host, update": ("memory/host_update_peak_gib", VIOLET),
}
WIRE = {  # what crosses between the ranks of a placement
    "observations": ("time/wire_observations", BLUE),
    "experience": ("time/wire_experience", ORANGE),
    "weights": ("time/wire_weights", GREEN),
}


@dataclass(frozen=True)
class Metric:
    """A metric with a chart of its own.

    Args:
        caption: one sentence that says what good looks like.
        percent: whether it is a share in [0, 1].
        least: the y axis spans at least this much.
        limit: the flag that limits it, which a dotted line marks.
    """

    tag: str
    title: str
    caption: str
    percent: bool = False
    least: float = 0.0
    limit: str | None = None


METRICS = (
    Metric("train/loss", "Loss", "Good: it falls, and then flattens. It is the cross entropy of the labels' tokens."),
    Metric("train/token_accuracy", "Token accuracy", "Good: it rises. A random policy has 1 in 256.", percent=True),
    Metric(
        "train/action_l1",
        "Action error (L1)",
        "Good: it falls towards 0. A dimension of an action spans 2, from -1 to 1.",
    ),
    Metric(
        "train/actor/approx_kl",
        "KL divergence of an update",
        "Good: small and steady. A peak means that an update went too far.",
        least=0.01,
        limit="target_kl",
    ),
    Metric(
        "train/actor/clip_fraction",
        "Clip fraction",
        "Good: above 0, and below about 30 %. More means that updates are too large.",
        percent=True,
        least=0.1,
    ),
    Metric("train/entropy_loss", "Entropy", "Good: it falls slowly. Near 0 the policy no longer explores.", least=0.5),
    Metric(
        "train/critic/explained_variance",
        "Explained variance",
        "Good: close to 1. At 0 the critic is no better than a constant.",
        least=0.5,
    ),
    Metric(
        "rollout/live_groups",
        "Live groups",
        "Good: well above 0. A group whose members all score the same teaches nothing.",
        percent=True,
        least=0.5,
    ),
    Metric(
        "rollout/staleness",
        "Staleness",
        "Good: 0 or 1, the updates that the acting weights are old. It is 0 after a checkpoint or an evaluation.",
        least=1.0,
    ),
    Metric(
        "train/actor/stale_ratio_first_microbatch_std",
        "Spread of the first ratios, with older weights",
        "Good: small beside the clip range. It is how far one update moved the policy.",
        least=0.1,
    ),
    Metric("train/actor/grad_norm", "Gradient norm", "Good: no trend and few peaks.", limit="max_grad_norm"),
)
OF_CLONING = ("train/loss", "train/token_accuracy", "train/action_l1", "train/actor/grad_norm")
OF_REINFORCEMENT = tuple(metric.tag for metric in METRICS if metric.tag != "train/loss")


def learning_charts(record: RunRecord) -> list[Chart]:
    """Success and return, as far as there are any."""
    x_title = record.step_name
    charts = []
    if success := success_curves(record):
        caption = "Good: it rises, and the bands at the end lie above those of the start. Bands are 95 % intervals."
        look = dict(x_title=x_title, y_range=(-0.02, 1.02), percent=True)
        charts.append(curves("success", "Success", caption, success, **look))
    if returns := return_curves(record):
        caption = "Good: it rises together with success. Bands are 95 % intervals of the mean."
        charts.append(curves("return", "Return", caption, returns, x_title=x_title, y_range=steady_range(returns)))
    return charts


def metric_charts(record: RunRecord) -> list[Chart]:
    """One chart for every metric that the run has."""
    wanted = OF_CLONING if record.is_cloning else OF_REINFORCEMENT
    charts = []
    for metric in METRICS:
        curve = curve_of(record.lines, metric.tag, metric.title)
        if metric.tag in wanted and curve.x:
            charts.append(metric_chart(metric, curve, record))
    return charts


def metric_chart(metric: Metric, curve: Curve, record: RunRecord) -> Chart:
    """The chart of one metric, with the limit that a flag sets if the curve comes near it."""
    limit = record.flags.get(metric.limit) if metric.limit else None
    known = isinstance(limit, (int, float)) and 0 < limit <= 2 * max(curve.y)
    ident = metric.tag.replace("/", "-")
    return curves(
        ident,
        metric.title,
        f"{metric.caption} The dotted line is --{metric.limit}." if known else metric.caption,
        [curve],
        x_title=record.step_name,
        y_range=steady_range([curve], metric.least),
        percent=metric.percent,
        limit=limit if known else None,
    )


def cost_charts(record: RunRecord) -> list[Chart]:
    """Seconds by stage, what crossed between ranks, and memory."""
    lines = [line for line in record.lines if "time/iteration" in line]
    charts = []
    if lines:
        x, parts = seconds_by_stage(lines)
        caption = "Good: rollout and update take most of it. --eval_freq and --num_eval_episodes decide the evaluation."
        look = dict(x_title="iteration", unit="s")
        charts.append(stacked_bars("seconds", "Seconds of an iteration", caption, x, parts, **look))
    charts += wire_charts(lines)
    if peaks := memory_curves(lines):
        caption = "Good: flat after the first iterations, and below what the machine has. Peaks, of the rank with most."
        look = dict(x_title="iteration", y_range=(0, 1.15 * max(max(curve.y) for curve in peaks)))
        charts.append(curves("memory", "Memory in GiB", caption, peaks, **look))
    return charts


def wire_charts(lines: list[dict]) -> list[Chart]:
    """Seconds and GiB that crossed between the ranks of a placement. [] without one."""
    charts = []
    kinds = (
        (
            "wire-seconds",
            "Seconds between ranks",
            "",
            "Good: small beside the seconds of an iteration. Waiting is left out.",
        ),
        ("wire-gib", "GiB between ranks", "_gib", "Good: flat. `benchmarks/wire_bytes.py` computes what is expected."),
    )
    for ident, title, end, caption in kinds:
        found = []
        for name, (tag, color) in WIRE.items():
            known = [line for line in lines if line.get(f"{tag}{end}")]
            x, y = ([line[what] for line in known] for what in ("iteration", f"{tag}{end}"))
            found += [Curve(name, x, y, color=color)] if known else []
        if found:
            look = dict(x_title="iteration", y_range=(0, 1.15 * max(max(curve.y) for curve in found)))
            charts.append(curves(ident, title, caption, found, **look))
    return charts


def seconds_by_stage(lines: list[dict]) -> tuple[list[float], dict[str, list[float]]]:
    """Iterations and seconds of every stage. More than MAX_BARS iterations become means over equally many of them."""
    size = -(-len(lines) // MAX_BARS)
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]

    def mean(group: list[dict], tag: str) -> float:
        return sum(line.get(tag, 0.0) for line in group) / len(group)

    parts = {name: [mean(group, tag) for group in groups] for name, tag in STAGES.items()}
    whole = [mean(group, "time/iteration") for group in groups]
    known = [sum(values) for values in zip(*parts.values())]
    parts["saving and the rest"] = [max(0.0, all_of_it - some) for all_of_it, some in zip(whole, known)]
    x = [group[-1]["iteration"] for group in groups]
    return x, parts


def memory_curves(lines: list[dict]) -> list[Curve]:
    """Peaks of memory over iterations. Without a GPU, both kinds are the same and only the host's are shown."""
    tags = {tag for line in lines for tag in line}
    on_gpu = any(line.get("memory/update_peak_gib") != line.get("memory/host_update_peak_gib") for line in lines)
    found = []
    for name, (tag, color) in MEMORY.items():
        if tag in tags and (on_gpu or name.startswith("host") or "memory/host_update_peak_gib" not in tags):
            known = [line for line in lines if tag in line]
            found.append(Curve(name, [line["iteration"] for line in known], [line[tag] for line in known], color=color))
    return found
