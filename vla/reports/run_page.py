"""report.html of a run: what it is, where it stands, what it learned and costs, and what its episodes look like."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from vla.evaluation.statistics import difference_interval, percent, wilson_interval
from vla.files.whole import write_whole
from vla.reports.page import Media, State, origin_of, render, time_text
from vla.reports.run_record import FACTS, Clip, RunRecord
from vla.text import flag_in_words, started_with, without_keys

KINDS = {"train_ppo.py": "PPO", "train_grpo.py": "GRPO", "train_sft.py": "Cloning"}
# flags that say where a run is, or that the script itself sets
NO_CHOICES = ("config", "resume", "run_dir", "export_dir", "local_rank", "max_prompt_length")
ORDER = ("won", "lost", "both", "neither")  # of pairs: what changed comes first


@dataclass(frozen=True)
class Tile:
    """A number of the headline."""

    label: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Pair:
    """The clips of one episode in the first and in the newest evaluation."""

    before: Clip
    after: Clip

    @property
    def change(self) -> str:
        if self.before.succeeded == self.after.succeeded:
            return "both" if self.after.succeeded else "neither"
        return "won" if self.after.succeeded else "lost"


def write_run_page(record: RunRecord, now: float, silent_after: float = 3600.0) -> Path:
    """Write report.html into the run folder.

    Args:
        now: seconds since 1970.
        silent_after: if the run goes on, but the page is older than so many seconds, it says that the run may be dead.

    Raises:
        OSError: the disk is full, or a file is not readable.
    """
    path = record.folder / "report.html"
    write_whole(path, run_page(record, now, silent_after))
    return path


def run_page(record: RunRecord, now: float, silent_after: float) -> str:
    """The content of report.html."""
    media = Media(record.folder)
    learning, metrics, costs = charts_of(record)
    pairs, clips = gallery(record)
    return render(
        "run.html",
        title=record.name,
        with_charts=bool(learning or metrics or costs),
        state=state_of(record, now, silent_after),
        kind=kind_of(record),
        record=record,
        tiles=tiles_of(record),
        learning=learning,
        metrics=metrics,
        costs=costs,
        roles=record.description.get("roles"),
        breakdowns=breakdowns(record),
        media=media,
        video=video_of(record),
        pairs=pairs,
        clips=clips,
        history=history(record),
        changed=changed_flags(record),
        flags={name: flag_text(value) for name, value in sorted(record.flags.items())},
        preset=record.preset_files,
        facts=origin_of_run(record),
    )


def state_of(record: RunRecord, now: float, silent_after: float) -> State:
    """How far the run is: "after iteration 3 of 16, about 4 min left, resumed twice"."""
    words = f"after iteration {record.iteration}"
    words += f" of {record.num_iterations}" if record.num_iterations else ""
    left = time_left(record) if record.phase == "running" else ""
    words += f", about {left} left" if left else ""
    words += f", resumed {times(record.times_resumed)}" if record.times_resumed else ""
    newest = "This command continues from the newest checkpoint:"
    return State(
        record.phase,
        words,
        now,
        record.reason,
        resume_command(record),
        continues="This command continues it:" if record.phase == "stopped" else newest,
        silent_after=silent_after,
        hint="Its last lines are in progress.log.",
    )


def charts_of(record: RunRecord) -> tuple[list, list, list]:
    """Charts of learning, of single metrics, and of time and memory."""
    if not record.lines and not record.evaluations:
        return [], [], []  # the page at the start of a run does not wait for plotly's import
    from vla.reports import run_charts

    return run_charts.learning_charts(record), run_charts.metric_charts(record), run_charts.cost_charts(record)


# ---------------------------------------------------------------------- the headline
def kind_of(record: RunRecord) -> str:
    """Such as "PPO on openvla-oft-tiny-warmup in PutOnPlateInScene25Single-v1"."""
    words = record.description.get("command", "").split()
    script = Path(words[0]).name if words else ""
    model = Path(str(record.flags.get("model_path", ""))).name
    parts = [
        KINDS.get(script, "Run"),
        model and f"on {model}",
        record.flags.get("env_id") and f"in {record.flags['env_id']}",
    ]
    return " ".join(filter(None, parts))


def times(number: int) -> str:
    """How often something happened, in words.

    >>> times(0), times(1), times(2), times(5)
    ('', 'once', 'twice', '5 times')
    """
    return {0: "", 1: "once", 2: "twice"}.get(number, f"{number} times")


def duration(seconds: float) -> str:
    """A duration in its two largest units.

    >>> duration(42), duration(3600 * 26 + 120), duration(600)
    ('42 s', '26 h 2 min', '10 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def time_left(record: RunRecord) -> str:
    """About how long the run will still take, from its last ten iterations. "" if that is not known."""
    last = [line["time/iteration"] for line in record.lines[-10:] if "time/iteration" in line]
    left = record.num_iterations - record.iteration
    return duration(left * sum(last) / len(last)) if last and left > 0 else ""


def resume_command(record: RunRecord) -> str:
    """The command that continues the run. "" if its description is missing."""
    words = record.description.get("command", "").split()
    if not words:
        return ""
    start = started_with(record.description["num_ranks"])
    return f"{start} {shlex.quote(words[0])} --resume {shlex.quote(str(record.folder))}"


def tiles_of(record: RunRecord) -> list[Tile]:
    """The numbers that a reader wants first."""
    of_cloning = cloning_tiles(record.lines) if record.is_cloning else []
    return [*success_tiles(record.evaluations), *of_cloning, cost_tile(record)]


def success_tiles(evaluations: list[dict]) -> list[Tile]:
    """Success before and after, the change, and the return."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    tiles = [success_tile("Success before" if first["global_step"] == 0 else "First evaluation", first)]
    if last is not first:
        rates = [(line["eval/success_once"], line["eval/num_episodes"]) for line in (first, last)]
        low, high = difference_interval(*rates)
        change = f"{100 * (rates[1][0] - rates[0][0]):+.1f}"
        tiles.append(success_tile("Success now", last))
        tiles.append(Tile("Change in points", change, f"[{100 * low:+.1f}, {100 * high:+.1f}]"))
    returns = [f"{line['eval/return']:.3f}" for line in ([first, last] if last is not first else [first])]
    tiles.append(Tile("Return", returns[-1], f"from {returns[0]}" if last is not first else "held-out episodes"))
    return tiles


def success_tile(label: str, line: dict) -> Tile:
    """Success of one evaluation with its interval."""
    rate, count = line["eval/success_once"], line["eval/num_episodes"]
    low, high = wilson_interval(rate, count)
    return Tile(label, f"{100 * rate:.1f} %", f"[{100 * low:.1f}, {100 * high:.1f}] of {count:.0f} episodes")


def cloning_tiles(lines: list[dict]) -> list[Tile]:
    """Loss and token accuracy of the newest iteration."""
    found = [line for line in lines if {"train/loss", "train/token_accuracy"} <= line.keys()]
    if not found:
        return []
    losses = [f"{line['train/loss']:.3f}" for line in (found[0], found[-1])]
    accuracies = [f"{100 * line['train/token_accuracy']:.1f} %" for line in (found[0], found[-1])]
    return [
        Tile("Loss", losses[1], f"from {losses[0]}"),
        Tile("Token accuracy", accuracies[1], f"from {accuracies[0]}"),
    ]


def cost_tile(record: RunRecord) -> Tile:
    """How much was done, and how long that took."""
    seconds = sum(line.get("time/iteration", 0.0) for line in record.lines)
    steps = record.lines[-1]["global_step"] if record.lines else 0
    of_all = f" / {record.num_iterations}" if record.num_iterations else ""
    more = f"{steps:,.0f} {record.step_name}" + (f" in {duration(seconds)}" if seconds else "")
    return Tile("Iterations", f"{record.iteration}{of_all}", more)


# ---------------------------------------------------------------------- what happened when
def history(record: RunRecord) -> list[dict[str, str]]:
    """One row per event. A start that follows a start says that the run was killed in between."""
    rows: list[dict[str, str]] = []
    for place, session in enumerate(record.sessions):
        after = f"after iteration {session['iteration']}" if session["iteration"] else "before the first iteration"
        previous = record.sessions[place - 1]["event"] if place else None
        if session["event"] == "started" and previous == "started":
            rows.append({"when": "unknown", "what": "killed, or the machine went down", "reason": ""})
        what = {"started": "started" if place == 0 else "resumed"}.get(session["event"], session["event"])
        where = "" if place == 0 and not session["iteration"] else f" {after}"
        rows.append({"when": time_text(session["time"]), "what": what + where, "reason": session["reason"]})
    return rows


def origin_of_run(record: RunRecord) -> dict[str, str]:
    """How the run was made: its first command, and the newest start's if it was resumed."""
    if not record.descriptions:
        return {}
    first, newest = record.descriptions[0]["command"], origin_of(record.description)
    return newest if first == newest["command"] else {"command": first, "resumed by": newest.pop("command")} | newest


# ---------------------------------------------------------------------- flags
def flag_text(value: object) -> str:
    """A flag's value as it is typed, without the keys that it may hold."""
    return without_keys(flag_in_words(value))


def typed_flags(record: RunRecord) -> set[str]:
    """Names of the flags in the commands of all starts."""
    words = [word for one in record.descriptions for word in one["command"].split() if word.startswith("--")]
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words}
    return names | {name.removeprefix("no_") for name in names}


def changed_flags(record: RunRecord) -> list[dict]:
    """Flags that are not as the script's default or the preset says.

    Those of which the preset says otherwise, or that a command names, are the run's own and come first. The others come
    from the preset or from the model's folder.

    A description of an older version names no defaults, and then no flag is known to differ.
    """
    if "defaults" not in record.description:
        return []
    defaults, preset = record.description["defaults"], record.preset
    rows, typed = [], typed_flags(record)
    for name, value in record.flags.items():
        default = defaults.get(name, value)
        expected = preset.get(name, default)
        if name in NO_CHOICES or value == expected == default:
            continue
        shown = {"of_preset": flag_text(preset[name]) if name in preset else "", "default": flag_text(default)}
        own = value != expected and name in {*preset, *typed}
        rows.append(shown | {"name": name, "value": flag_text(value), "own": own})
    return sorted(rows, key=lambda row: (not row["own"], row["name"]))


# ---------------------------------------------------------------------- episodes
def breakdowns(record: RunRecord) -> list[dict]:
    """Success by object, receptacle and table in the first and the newest evaluation, where the env names them."""
    found = [line["iteration"] for line in record.evaluations if record.episodes(int(line["iteration"]))]
    if not found:
        return []
    first, last = record.episodes(int(found[0])), record.episodes(int(found[-1]))
    has_two = found[0] != found[-1]
    tables = [breakdown(fact, first if has_two else [], last) for fact in FACTS]
    return [table for table in tables if len(table["rows"]) > 1]


def breakdown(fact: str, first: list[dict], last: list[dict]) -> dict:
    """Success by one fact: the rows with most success now come first."""
    rows = []
    for name in sorted({episode[fact] for episode in last if episode.get(fact)}):
        now, before = (
            [episode["success_once"] for episode in episodes if episode.get(fact) == name] for episodes in (last, first)
        )
        rate = sum(now) / len(now)
        low, high = wilson_interval(rate, len(now))
        row = {"name": name, "count": len(now), "rate": rate, "now": percent(rate)}
        row["interval"] = f"[{100 * low:.0f}, {100 * high:.0f}]"
        rows.append(row | {"before": percent(sum(before) / len(before)) if before else ""})
    return {"fact": fact, "rows": sorted(rows, key=lambda row: -row["rate"]), "has_before": bool(first)}


def gallery(record: RunRecord) -> tuple[list[Pair], list[Clip]]:
    """Pairs of episodes that both the first and the newest evaluation recorded, and the newest one's other clips."""
    if not record.evaluated:
        return [], []
    first, last = record.evaluated[0], record.evaluated[-1]
    now = record.clips(last)
    before = {clip.episode_id: clip for clip in record.clips(first)} if first != last else {}
    pairs = [Pair(before[clip.episode_id], clip) for clip in now if clip.episode_id in before]
    alone = [clip for clip in now if clip.episode_id not in before]
    return sorted(pairs, key=lambda pair: ORDER.index(pair.change)), sorted(alone, key=lambda clip: not clip.succeeded)


def video_of(record: RunRecord) -> dict | None:
    """The video of the first evaluation above the newest one, or else the video of the newest evaluation."""
    folder = record.folder / "videos"
    names = ["before_after.mp4", *sorted((path.name for path in folder.glob("eval_*.mp4")), reverse=True)]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    words = "the first evaluation above the newest one" if path.name == names[0] else "the newest evaluation"
    poster = path.with_suffix(".jpg")
    return {"file": path, "poster": poster if poster.is_file() else None, "words": words}
