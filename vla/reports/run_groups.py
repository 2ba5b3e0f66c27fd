"""Runs side by side: those that differ only in their seed are one group, with a mean and a spread.

A group's name is what its flags have that other groups' have not: "PPO, learning_rate 0.0002".
"""

import math
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtrit

from schemas import UserError
from vla.evaluation.statistics import wilson_interval
from vla.reports.curves import CYCLE, Curve
from vla.reports.run_record import RunRecord, read_run
from vla.text import counted, flag_in_words

# flags that do not change what is learned: names, places, logging, and how the work is shared out
NOT_LEARNED = """config resume run_dir seed logger_backends project_name experiment_name save_freq keep_checkpoints
eval_freq num_eval_episodes num_eval_envs video_episodes video_size export_dir asset_dir num_env_workers worker_timeout
render_backend micro_batch_size gradient_checkpointing offload local_rank""".split()
ABSENT = "-"  # of a flag that a script or an older version does not have
MOST_IN_NAME = 3  # flags in the name of a group
Value = Callable[[dict], float | None]  # of a line of metrics.jsonl or evaluations.jsonl


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        label: its folder as the user named it.
        minutes: of every line of metrics.jsonl, since the start and without evaluations.
    """

    label: str
    record: RunRecord
    minutes: dict[int, float]

    @property
    def algorithm(self) -> str:
        if self.record.is_cloning:
            return "cloning"
        return "GRPO" if "group_size" in self.record.flags else "PPO"

    @property
    def learned_by(self) -> dict[str, str]:
        """The flags that decide what is learned, as text."""
        flags = {name: value for name, value in self.record.flags.items() if name not in NOT_LEARNED}
        return {"algorithm": self.algorithm} | {name: flag_in_words(value) for name, value in flags.items()}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed. The letter stands for the name where there is little room."""

    letter: str
    name: str
    runs: tuple[Run, ...]
    color: str

    @property
    def is_cloning(self) -> bool:
        return self.runs[0].record.is_cloning

    @property
    def title(self) -> str:
        """Letter, name, and how many runs the group has if there are several."""
        return f"{self.letter}: {self.name}" + (f" ({len(self.runs)} runs)" if len(self.runs) > 1 else "")

    @property
    def short(self) -> str:
        """Letter, algorithm, and how many runs the group has."""
        return f"{self.letter}: {self.runs[0].algorithm}, {counted(len(self.runs), 'run')}"


# ---------------------------------------------------------------------- reading
def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders. Raises UserError for a folder that holds no run, or that is named twice."""
    places: dict[Path, str] = {}
    for folder in folders:
        place = Path(folder).resolve()
        if place in places:
            raise UserError(f"{folder} is the same folder as {places[place]}: name each run once")
        places[place] = folder
    return [read_one(folder) for folder in folders]


def read_one(folder: str) -> Run:
    """The run in a folder. Raises UserError if there is none."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{folder} is not a folder: give run folders, such as runs/my_run")
    if (place / "evaluation.json").exists() or (place / "results.json").exists():
        raise UserError(f"{folder} is an evaluation, not a run: use `python evaluate.py --compare` for two of them")
    record = read_run(place)
    if not record.descriptions:
        raise UserError(f"{folder} holds no run, since it has no run_from_iteration_*.json: give run folders")
    return Run(folder, record, minutes_of(record.lines))


def minutes_of(lines: Sequence[dict]) -> dict[int, float]:
    """{iteration: minutes since the start, without evaluations}."""
    found, total = {}, 0.0
    for line in lines:
        total += (line.get("time/iteration", 0.0) - line.get("time/eval", 0.0)) / 60
        found[int(line["iteration"])] = total
    return found


# ---------------------------------------------------------------------- grouping
def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs."""
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        alike.setdefault(tuple(sorted(run.learned_by.items())), []).append(run)
    names = group_names([members[0].learned_by for members in alike.values()])
    return [
        Group(letter_of(number), name, tuple(members), CYCLE[number % len(CYCLE)])
        for number, (name, members) in enumerate(zip(names, alike.values()))
    ]


def letter_of(number: int) -> str:
    """A for the first group, and numbers where letters end.

    >>> letter_of(0), letter_of(26)
    ('A', '27')
    """
    return string.ascii_uppercase[number] if number < 26 else str(number + 1)


def differing_flags(flags: Sequence[dict[str, str]]) -> list[str]:
    """Names of the flags that are not the same in all of these, the algorithm first."""
    names = list(dict.fromkeys(name for one in flags for name in one))
    return [name for name in names if len({one.get(name, ABSENT) for one in flags}) > 1]


def group_names(flags: Sequence[dict[str, str]]) -> list[str]:
    """A name for each group: the values of the flags that differ, as far as its script has them.

    >>> group_names([{"algorithm": "PPO", "num_envs": "8"}, {"algorithm": "PPO", "num_envs": "16"}])
    ['num_envs 8', 'num_envs 16']
    >>> group_names([{"algorithm": "PPO", "gamma": "1"}, {"algorithm": "GRPO", "group_size": "4"}])
    ['PPO', 'GRPO']
    """
    if len(flags) == 1:
        return [flags[0]["algorithm"]]
    differing = differing_flags(flags)
    everywhere = [name for name in differing if all(name in one for one in flags)]
    chosen = everywhere[:MOST_IN_NAME]
    names = [", ".join(word(name, one[name]) for name in chosen) for one in flags]
    if len(set(names)) < len(names):  # these flags do not tell them apart
        chosen = differing
        names = [", ".join(word(name, one[name]) for name in chosen if name in one) for one in flags]
    twins = len(set(names)) < len(names)  # the ends of paths can be the same
    return [f"{name} ({number})" for number, name in enumerate(names, 1)] if twins else names


def word(name: str, value: str) -> str:
    """A flag and its value in a group's name. An algorithm needs no flag in front of it, and a path only its end.

    >>> word("model_path", "checkpoints/openvla-tiny-warmup")
    'model_path openvla-tiny-warmup'
    """
    return value if name == "algorithm" else f"{name} {value.rpartition('/')[2] or value}"


# ---------------------------------------------------------------------- curves
def group_curve(group: Group, lines: str, value: Value, x: Callable[[Run, dict], float | None]) -> Curve:
    """The mean of a value over the runs of a group, with the range over seeds, or with the interval of a single run.

    Only iterations that all runs have are drawn, because a mean over fewer runs would jump.

    Args:
        lines: "lines" for metrics.jsonl, "evaluations" for evaluations.jsonl.
        value, x: of a line. None leaves the line out.
    """
    columns: list[dict[int, tuple[float, float, dict]]] = []
    for run in group.runs:
        found = {}
        for line in getattr(run.record, lines):
            point = x(run, line), value(line)
            if None not in point:
                found[int(line["iteration"])] = (*point, line)
        columns.append(found)
    common = sorted(set(columns[0]).intersection(*columns[1:]))
    rows = [[column[iteration] for column in columns] for iteration in common]
    xs = [statistics.fmean(point[0] for point in row) for row in rows]
    ys = [statistics.fmean(point[1] for point in row) for row in rows]
    ends = [spread([point[1] for point in row], row[0][2], lines) for row in rows]
    low, high = [low for low, _ in ends], [high for _, high in ends]
    return Curve(group.short, xs, ys, low, high, color=group.color, markers=lines == "evaluations")


def spread(values: Sequence[float], line: dict, lines: str) -> tuple[float | None, float | None]:
    """The range over seeds. For the success of one run in an evaluation, its 95 % interval over episodes."""
    if len(values) > 1:
        return min(values), max(values)
    if lines == "evaluations" and values[0] == line.get("eval/success_once"):
        return wilson_interval(values[0], line["eval/num_episodes"])
    return None, None


def tag(name: str) -> Value:
    """The value of a metric."""
    return lambda line: line.get(name)


def at_step(run: Run, line: dict) -> float | None:
    """The env steps (or decisions) of a line."""
    return line.get("global_step")


def at_minute(run: Run, line: dict) -> float | None:
    """The minutes of training before a line was written."""
    return run.minutes.get(int(line["iteration"]), 0.0 if line["iteration"] == 0 else None)


# ---------------------------------------------------------------------- numbers
def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds (Student's t). At least two values.

    >>> low, high = mean_interval([0.5, 0.6, 0.7])
    >>> f"{low:.3f} {high:.3f}"
    '0.352 0.848'
    """
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def success_cell(evaluations: Sequence[dict | None]) -> str:
    """Success in percent with its 95 % interval: over the means of several runs, or over the episodes of one.

    Runs that start from one policy have one success before, which has no interval over runs.
    """
    found = [line for line in evaluations if line]
    if not found:
        return ABSENT
    rates = [line["eval/success_once"] for line in found]
    one = len(set(rates)) == 1
    low, high = wilson_interval(rates[0], found[0]["eval/num_episodes"]) if one else mean_interval(rates)
    return f"{100 * statistics.fmean(rates):.1f} [{100 * max(0.0, low):.1f}, {100 * min(1.0, high):.1f}]"


def gain_cell(runs: Sequence[Run]) -> str:
    """How many points of success training gained, with the 95 % interval over seeds if there are several."""
    gains = [
        100 * (run.record.evaluations[-1]["eval/success_once"] - run.record.evaluations[0]["eval/success_once"])
        for run in runs
        if len(run.record.evaluations) > 1
    ]
    if not gains:
        return ABSENT
    interval = mean_interval(gains) if len(gains) > 1 else None
    return f"{statistics.fmean(gains):+.1f}" + (f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "")


def range_cell(values: Sequence[float], form: str) -> str:
    """A number, or the smallest and the largest one.

    >>> range_cell([4.2, 3.9], ".1f"), range_cell([4000, 4000], ",.0f")
    ('3.9 to 4.2', '4,000')
    """
    texts = [format(value, form) for value in (min(values), max(values))] if values else [ABSENT] * 2
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def steps_of(run: Run) -> float:
    return run.record.lines[-1]["global_step"] if run.record.lines else 0


def minutes_in_all(run: Run) -> float:
    return max(run.minutes.values(), default=0.0)


def groups_table(groups: Sequence[Group]) -> list[list[str]]:
    """Header and one row per group."""
    header = ["group", "runs", "seeds", "success before %", "after %", "gain", "steps", "minutes"]
    table = [header]
    for group in groups:
        evaluated = [run.record.evaluations for run in group.runs if run.record.evaluations]
        table.append(
            [
                group.letter,
                group.name,
                ", ".join(sorted({flag_in_words(run.record.flags.get("seed", ABSENT)) for run in group.runs})),
                success_cell([lines[0] for lines in evaluated]),
                success_cell([lines[-1] for lines in evaluated if len(lines) > 1]),
                gain_cell(group.runs),
                f"{range_cell([steps_of(run) for run in group.runs], ',.0f')} {group.runs[0].record.step_name}",
                range_cell([minutes_in_all(run) for run in group.runs], ".1f"),
            ]
        )
    return table


def runs_table(groups: Sequence[Group]) -> list[list[str]]:
    """Header and one row per run, in the order of the groups."""
    table = [["folder", "group", "seed", "state", "success before %", "after %", "episodes", "steps", "minutes"]]
    for group in groups:
        for run in group.runs:
            evaluations = run.record.evaluations
            table.append(
                [
                    run.label,
                    group.letter,
                    flag_in_words(run.record.flags.get("seed", ABSENT)),
                    run.record.progress_in_words,
                    success_cell(evaluations[:1]),
                    success_cell(evaluations[-1:] if len(evaluations) > 1 else []),
                    range_cell([line["eval/num_episodes"] for line in evaluations[-1:]], ".0f"),
                    f"{steps_of(run):,.0f}",
                    f"{minutes_in_all(run):.1f}",
                ]
            )
    return table


def flags_table(groups: Sequence[Group]) -> list[list[str]]:
    """Header and one row per flag that differs between the groups. [] for a single group."""
    flags = [group.runs[0].learned_by for group in groups]
    names = differing_flags(flags)
    if not names:
        return []
    return [
        ["flag", *(group.letter for group in groups)],
        *([n, *(one.get(n, ABSENT) for one in flags)] for n in names),
    ]
