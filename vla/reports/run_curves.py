"""The curves of a run with their intervals. progress.png and report.html draw the same ones."""

import statistics

from vla.evaluation.statistics import wilson_interval
from vla.reports.curves import BLUE, ORANGE, Curve, normal_interval
from vla.reports.run_record import RunRecord


def curve_of(lines: list[dict], tag: str, name: str, color: str = BLUE) -> Curve:
    """One metric over env steps, without a band."""
    found = [line for line in lines if tag in line and "global_step" in line]
    return Curve(name, [line["global_step"] for line in found], [line[tag] for line in found], color=color)


def with_band(name: str, lines: list[dict], tag: str, ends: list[tuple], **look: object) -> Curve:
    """A metric over env steps. ends: the interval of each line, (low, high), or (None, None) where it is unknown."""
    low, high = zip(*ends) if ends else ((), ())
    return Curve(
        name, [line["global_step"] for line in lines], [line[tag] for line in lines], list(low), list(high), **look
    )


def of_training(lines: list[dict], name: str) -> Curve:
    """success_once or return of the episodes that ended in each iteration, with its interval."""
    found = [line for line in lines if {f"env/{name}", "global_step"} <= line.keys()]
    ends = [training_interval(line, name) for line in found]
    return with_band("training episodes", found, f"env/{name}", ends, color=BLUE)


def training_interval(line: dict, name: str) -> tuple[float | None, float | None]:
    """The 95 % interval of one line of metrics.jsonl: Wilson's for success, the normal one for the return."""
    mean, count = line[f"env/{name}"], line.get("env/num_episodes", 0)
    if count < 1:
        return None, None
    if name == "success_once":
        return wilson_interval(mean, count)
    return normal_interval(mean, line.get("env/return_std"), count)


def of_evaluations(record: RunRecord, name: str) -> Curve:
    """success_once or return of every evaluation on the held-out episodes, with its interval."""
    ends = [held_out_interval(record, line, name) for line in record.evaluations]
    return with_band("held-out episodes", record.evaluations, f"eval/{name}", ends, color=ORANGE, markers=True)


def held_out_interval(record: RunRecord, line: dict, name: str) -> tuple[float | None, float | None]:
    """The 95 % interval of one line of evaluations.jsonl. That of the return needs the file of its episodes."""
    if name == "success_once":
        return wilson_interval(line["eval/success_once"], line["eval/num_episodes"])
    returns = [episode["return"] for episode in record.episodes(int(line["iteration"]))]
    if len(returns) < 2:
        return None, None
    return normal_interval(line["eval/return"], statistics.stdev(returns), len(returns))


def success_curves(record: RunRecord) -> list[Curve]:
    """Success of training episodes and of held-out ones, as far as there are any."""
    curves = [of_training(record.lines, "success_once"), of_evaluations(record, "success_once")]
    return [curve for curve in curves if curve.x]


def return_curves(record: RunRecord) -> list[Curve]:
    """The return of training episodes and of held-out ones, as far as there are any."""
    curves = [of_training(record.lines, "return"), of_evaluations(record, "return")]
    return [curve for curve in curves if curve.x]
