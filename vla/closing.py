"""The last lines of a run in the terminal: its result, every file that a user wants to open, and the next commands."""

import shlex
from pathlib import Path

from vla.evaluation.statistics import wilson_interval
from vla.text import started_with

# what a line is about -> file in the run folder. Lines of files that do not exist are left out
FILES = {"page": "report.html", "plot": "progress.png", "video": "videos/before_after.mp4", "metrics": "metrics.jsonl"}


def closing_lines(
    run_dir: Path,
    script: str,
    num_ranks: int,
    flags: dict,
    evaluations: list[dict],
    step_name: str,
    finished: bool = False,
) -> list[str]:
    """The lines, each a word and what it stands for.

    Args:
        script: the file that was started, such as train_ppo.py.
        flags: of the run, {} if it has not begun.
        evaluations: lines of evaluations.jsonl, oldest first.
        step_name: the unit of their global_step.
        finished: whether the run has made all its iterations, so that it continues only for more of them.
    """
    first_and_last = [evaluations[0], evaluations[-1]][: len(evaluations)] if evaluations else []
    lines = [f"{name:11} {in_words(line, step_name)}" for name, line in zip(("before", "after"), first_and_last)]
    lines.append(f"run folder  {run_dir}")
    lines += [f"{name:11} {run_dir / path}" for name, path in FILES.items() if (run_dir / path).is_file()]
    newest = max((run_dir / "videos").glob("eval_*.mp4"), default=None)
    if newest is not None and not (run_dir / FILES["video"]).is_file():
        lines.append(f"{'video':11} {newest}")
    policy = newest_policy(run_dir, flags)
    if policy is not None and policy.parent.parent.name == "checkpoints":
        lines.append(f"checkpoint  {policy.parent}")
    folder, whole = shlex.quote(str(run_dir)), shlex.quote(str(run_dir.parent))
    if policy is not None:
        lines.append(f"policy      {policy}")
        lines.append(f"evaluate    python evaluate.py --checkpoint {folder} {evaluation_flags(flags)}".rstrip())
    if "tensorboard" in flags.get("logger_backends", ()):
        lines.append(f"curves      tensorboard --logdir {whole}")
    if any((run_dir / "checkpoints").glob("iteration_*")):
        more = f" {more_flags(flags)}" if finished else ""
        lines.append(f"resume      {started_with(num_ranks)} {Path(script).name} --resume {folder}{more}".rstrip())
    return lines


def in_words(evaluation: dict, step_name: str) -> str:
    """The result of one evaluation."""
    success = success_in_words(evaluation["eval/success_once"], evaluation["eval/num_episodes"])
    return f"{success}, return {evaluation['eval/return']:.3f}, after {evaluation['global_step']} {step_name}"


def success_in_words(success: float, episodes: float) -> str:
    """A success rate with its 95 % interval.

    >>> success_in_words(0.5, 16)
    'success 0.500 [0.28, 0.72] on 16 held-out episodes'
    """
    low, high = wilson_interval(success, episodes)
    return f"success {success:.3f} [{low:.2f}, {high:.2f}] on {episodes:.0f} held-out episodes"


def newest_policy(run_dir: Path, flags: dict) -> Path | None:
    """The folder of the newest policy in the published layout: a finished cloning run's own, or a checkpoint's."""
    exported = Path(flags.get("export_dir") or run_dir / "export")
    if "export_dir" in flags and (exported / "config.json").is_file():
        return exported
    return max((run_dir / "checkpoints").glob("iteration_*[0-9]/policy"), default=None)


def more_flags(flags: dict) -> str:
    """The flag that makes a finished run twice as long.

    >>> more_flags({"num_iterations": 16, "total_timesteps": None})
    '--num_iterations 32'
    """
    wanted = next((name for name in ("total_timesteps", "num_updates", "num_iterations") if flags.get(name)), None)
    return f"--{wanted} {2 * flags[wanted]}" if wanted else ""


def evaluation_flags(flags: dict) -> str:
    """The flags with which evaluate.py runs what the run evaluated: its setting and temperature."""
    if "env_id" not in flags:
        return ""
    setting = flags["env_id"] if flags.get("instruction") else f"{flags['env_id']}:{flags['obj_set']}"
    return f"--settings {shlex.quote(setting)} --temperature {flags['eval_temperature']:g}"
