"""The log of a run: metrics.jsonl, progress.log, a plot, and a description of the run.

metrics.jsonl has one JSON object per iteration. Its keys are the TensorBoard tags, `iteration` and `global_step` (env
steps over all ranks). `eval/*` in a line belongs to the last evaluation since the line before, which was made after
`eval/global_step` env steps. All evaluations, also that of the starting policy, are in evaluations.jsonl. progress.log
has one line per iteration for people. Without a terminal it replaces the progress bar.
"""

import contextlib
import datetime
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from schemas import UserError
from vla import ROOT, VERSION
from vla.backends import open_backends, show_video
from vla.closing import closing_lines, success_in_words
from vla.distributed import all_gather_lists, all_reduce_sum, at_end, world_size
from vla.files.run_lines import read_evaluations, read_line, read_lines, text_lines
from vla.files.whole import write_whole
from vla.reports.writer import ReportWriter
from vla.start.flag_files import preset_values
from vla.start.terminal import say_last
from vla.text import counted, without_keys, without_places

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "mani_skill", "sapien", "numpy")


def describe_run(
    flags: dict, sizes: dict, num_ranks: int, defaults: dict | None = None, roles: list[list[str]] | None = None
) -> dict:
    """Resolved flags, derived sizes, versions, commit, machine. roles: of a placement, which ranks do what.

    The defaults are those of the script. Of these, the result keeps those that the run does not use, so that its page
    can say what differs from them and from the files of --config.

    What a run writes into the repository itself is no uncommitted change: results/, and a cloning run's policies.
    """

    def git(*command: str) -> str:
        try:
            run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    written = ("results", "checkpoints") if "export_dir" in flags else ("results",)
    return {
        "command": without_keys(shlex.join(word for word in sys.argv if not word.startswith("--local_rank="))),
        "args": flags,
        "defaults": {name: value for name, value in (defaults or flags).items() if value != flags[name]},
        "preset": preset_values(flags.get("config") or ()),
        "sizes": sizes,
        "seed": flags["seed"],
        "num_ranks": num_ranks,
        "roles": roles,
        "version": VERSION,
        "commit": git("rev-parse", "HEAD") or "not a git checkout",
        "uncommitted_changes": bool(
            git("status", "--porcelain", "--", ".", *(f":(exclude){name}" for name in written))
        ),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def cpu_name() -> str:
    """The processor's model if Linux reports it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Averages:
    """Sums of scalar metrics over micro batches, averaged over ranks and minibatches."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for tag, value in metrics.items():
            self.sums[tag] = self.sums[tag] + value if tag in self.sums else value

    def reduce(self, count: int) -> dict[str, float]:
        """{tag: mean} over `count` minibatches, whose values add up to a minibatch's mean. All ranks together."""
        means = all_reduce_sum(torch.stack(list(self.sums.values()))) / (count * world_size())
        return dict(zip(self.sums, means.tolist()))


# what people see of an iteration: a name, a metric and how its value is written
OF_EPISODES = (
    ("success", "env/success_once", "{:.3f}"),
    ("return", "env/return", "{:.3f}"),
    ("steps/s", "time/env_steps_per_second", "{:.0f}"),
)
OF_LABELS = (
    ("loss", "train/loss", "{:.4f}"),
    ("token accuracy", "train/token_accuracy", "{:.3f}"),
    ("action L1", "train/action_l1", "{:.4f}"),
)
STAGES = {"eval": "evaluation"}  # timer -> word of the bar


class Logger:
    """The log of a run. It writes on rank 0 (`enabled`) and does nothing elsewhere. It creates the run folder.

    Args:
        start_iteration, start_step: 0 for a new run. For a resumed run, lines of later iterations are moved to
            *.lost.jsonl.
        step_name: the unit of global_step.
        progress: what people see of an iteration: OF_EPISODES, or OF_LABELS in cloning.
        project_name, experiment_name: names of the run at wandb and swanlab.
    """

    def __init__(
        self,
        run_dir: Path,
        enabled: bool,
        num_iterations: int,
        start_iteration: int = 0,
        start_step: int = 0,
        backends: tuple[str, ...] = ("tensorboard",),
        step_name: str = "env steps",
        progress: tuple[tuple[str, str, str], ...] = OF_EPISODES,
        *,
        project_name: str = "solovla",
        experiment_name: str | None = None,
    ):
        self.step_name, self.progress = step_name, progress
        self.run_dir, self.enabled = run_dir, enabled
        self.start_iteration, self.start_step, self.num_iterations = start_iteration, start_step, num_iterations
        self.seconds: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}  # not yet in a line of metrics.jsonl
        self.description: dict = {}
        self.iteration_start = time.perf_counter()
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "evaluations"):
            self._set_aside_lines_after(start_iteration, name)
        purge_step = start_step + 1 if start_iteration else None
        self.backends = open_backends(backends, run_dir, purge_step, project_name, experiment_name)
        if start_iteration == 0:  # the first line has the evaluation of the starting policy
            for line in read_lines(run_dir / "evaluations.jsonl"):
                self.evaluation = {tag: value for tag, value in line.items() if tag.startswith("eval/")}
                self.evaluation["eval/global_step"] = line["global_step"]
        self.reports = ReportWriter(run_dir, start_iteration)
        self.bar = tqdm(
            total=num_iterations, initial=start_iteration, desc="start", unit="it", dynamic_ncols=True, disable=None
        )

    def _set_aside_lines_after(self, iteration: int, name: str) -> None:
        """Move the lines after the last checkpoint to another file, because these iterations are repeated."""
        path = self.run_dir / f"{name}.jsonl"
        lines = text_lines(path)
        kept = [line for line in lines if (found := read_line(line)) and found["iteration"] <= iteration]
        if len(kept) < len(lines):
            with (self.run_dir / f"{name}.lost.jsonl").open("ab") as file:
                file.writelines(line for line in lines if line not in kept)
            path.write_bytes(b"".join(kept))

    def describe(self, description: dict) -> None:
        """Write the run's description before it starts. --resume reads its args.json."""
        if self.enabled:
            self.description = description
            name = f"run_from_iteration_{self.start_iteration:06d}.json"
            write_whole(self.run_dir / name, json.dumps(description, indent=2) + "\n")
            write_whole(self.run_dir / "args.json", json.dumps(description["args"], indent=2) + "\n")
            for backend in self.backends:
                backend.describe(without_places(description), self.start_step)
            self.reports.begin()
            at_end(self.reports.broken_off)
            say(f"{self.run_dir}: {counted(description['num_ranks'], 'rank')} on {description['device']}")
            if self.start_iteration == 0 and not self.evaluation:
                say(f"first, {description['args']['num_eval_episodes']} held-out episodes ...")

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the block's seconds to time/<name> of the current iteration."""
        start = time.perf_counter()
        if self.enabled:
            self.bar.set_description(STAGES.get(name, name))
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def owes_evaluation(self, eval_freq: int) -> bool:
        """Whether this run begins with an evaluation: of the starting policy, or one that was interrupted.

        All ranks together.
        """
        wanted = self.start_iteration == 0 or due(self.start_iteration - 1, eval_freq, self.num_iterations)
        return wanted and self.lacks_evaluation(self.start_iteration)

    def lacks_evaluation(self, iteration: int) -> bool:
        """Whether evaluations.jsonl lacks the evaluation after this iteration. All ranks together."""
        logged = [line["iteration"] for line in read_lines(self.run_dir / "evaluations.jsonl")] if self.enabled else []
        return iteration not in all_gather_lists(logged)

    def write_evaluation(self, iteration: int, global_step: int, means: dict[str, float]) -> None:
        """Write an evaluation to evaluations.jsonl and TensorBoard now, and into a line of metrics.jsonl.

        That is the next line, or the iteration's own line if it exists already: a resumed run begins with the
        evaluation that was interrupted.
        """
        tagged = {f"eval/{name}": value for name, value in means.items()}
        self.evaluation = tagged | {"eval/global_step": global_step}
        if self.enabled:
            self._complete_last_line(iteration)
            self._append("evaluations", {"iteration": iteration, "global_step": global_step, **tagged})
            say(f"iteration {iteration}: {success_in_words(means['success_once'], means['num_episodes'])}")
            self._scalars(tagged, global_step)

    def show_videos(self, iteration: int, global_step: int) -> None:
        """Show the videos of an evaluation in the backends, as far as they were recorded."""
        if self.enabled:
            self.reports.update(iteration)
            videos = self.run_dir / "videos"
            show_video(self.backends, "video/evaluation", videos / f"eval_{iteration:06d}.mp4", global_step)
            show_video(self.backends, "video/before_after", videos / "before_after.mp4", global_step)

    def write(
        self,
        iteration: int,
        global_step: int,
        metrics: dict[str, float],
        episodes: list[dict[str, float]],
        env_steps: int,
        note: str = "",
    ) -> None:
        """Write one iteration to TensorBoard, metrics.jsonl and the progress bar. All ranks together.

        The timers then start again.

        Args:
            episodes: statistics of this rank's episodes that ended. Their means over all ranks become env/*. If none
                ended, env/num_episodes is the only such metric.
            env_steps: number of env steps in this iteration, over all ranks.
            note: a remark on this iteration for people who read the progress.
        """
        episodes = all_gather_lists(episodes)
        now = time.perf_counter()
        self.seconds["iteration"] = now - self.iteration_start
        times = {f"time/{name}": self.seconds.get(name, 0.0) for name in ("rollout", "update", "eval", "iteration")}
        times["time/env_steps_per_second"] = env_steps / (times["time/iteration"] - times["time/eval"])
        self.seconds, self.iteration_start = {}, now
        if not self.enabled:
            return
        try:
            self._write(iteration, global_step, metrics, episodes, times, note)
        except OSError as failure:
            raise UserError(
                f"{self.run_dir} could not be written ({failure}): fix that, then continue with --resume"
            ) from failure
        self.reports.update(iteration)

    def _write(
        self, iteration: int, global_step: int, metrics: dict, episodes: list[dict], times: dict, note: str
    ) -> None:
        env_means = {f"env/{name}": mean for name, mean in mean_over(episodes).items()} if episodes else {}
        if len(episodes) > 1:
            env_means["env/return_std"] = statistics.stdev(episode["return"] for episode in episodes)
        metrics = metrics | env_means | {"env/num_episodes": len(episodes)} | times
        self._scalars(metrics, global_step)
        self._append("metrics", {"iteration": iteration, "global_step": global_step, **metrics, **self.evaluation})
        self.evaluation = {}
        shown = {name: text.format(metrics[tag]) if tag in metrics else "-" for name, tag, text in self.progress}
        with_note = shown | {"note": note} if note else shown
        self.bar.set_postfix(with_note, refresh=False)
        self.bar.update()
        self._progress(iteration, global_step, shown, times["time/iteration"] - times["time/eval"], note)

    def _progress(self, iteration: int, global_step: int, shown: dict[str, str], seconds: float, note: str) -> None:
        """Write a line of progress.log: "<time>  iteration 3/400  61,440 env steps  success 0.41 ... 1:02 left"."""
        left = datetime.timedelta(seconds=round(seconds * (self.num_iterations - iteration)))
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        progress = f"iteration {iteration}/{self.num_iterations}  {global_step:,} {self.step_name}"
        line = f"{time.strftime('%F %T')}  {progress}  {values}  {seconds:.1f} s  about {left} left"
        if note:
            line += f"  ({note})"
        with (self.run_dir / "progress.log").open("a") as file:
            file.write(line + "\n")
        if self.bar.disable:
            print(line, flush=True)

    def _append(self, name: str, line: dict) -> None:
        with (self.run_dir / f"{name}.jsonl").open("a") as file:
            # skipped steps make means NaN, which is not valid JSON, so these are left out
            file.write(json.dumps({tag: value for tag, value in line.items() if math.isfinite(value)}) + "\n")

    def _complete_last_line(self, iteration: int) -> None:
        """Put the evaluation into the last line of metrics.jsonl, if that is the line of this iteration."""
        path = self.run_dir / "metrics.jsonl"
        lines = read_lines(path)
        if lines and lines[-1]["iteration"] == iteration:
            lines[-1] |= self.evaluation
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.evaluation = {}

    def _scalars(self, metrics: dict[str, float], global_step: int) -> None:
        for backend in self.backends:
            backend.log(metrics, global_step)

    def say(self, text: str) -> None:
        """Print a line above the bar on rank 0."""
        if self.enabled:
            say(text)

    def close(self, last: str | None = None) -> None:
        """Draw the plot, and print the results, every file of the run and the next commands.

        Args:
            last: the last line, of a run that was asked to end and exits now.
        """
        if not self.enabled:
            return
        self.bar.close()
        for backend in self.backends:
            backend.finish()
        if last is None:
            self.reports.finish()
        else:
            self.reports.stop(last.partition(": ")[0])
        evaluations, ranks = read_evaluations(self.run_dir), self.description.get("num_ranks", 1)
        flags = self.description.get("args", {})
        lines = closing_lines(self.run_dir, sys.argv[0], ranks, flags, evaluations, self.step_name, last is None)
        if last is None:
            print("\n".join(lines), flush=True)
        else:
            say_last("\n".join([*lines, last]), stream=1)


def say(text: str) -> None:
    """Print a line above the bar, at once also where the output is a pipe."""
    tqdm.write(text)
    sys.stdout.flush()


def mean_over(epochs: list[dict[str, float]]) -> dict[str, float]:
    """{tag: mean} over dicts with the same tags, such as the passes of an update."""
    return {tag: sum(epoch[tag] for epoch in epochs) / len(epochs) for tag in epochs[0]}


def due(iteration: int, frequency: int, num_iterations: int) -> bool:
    """Whether something is done after this iteration: after every `frequency` iterations and after the last one.

    Args:
        iteration: counted from 0.
        frequency: 0 means only after the last one.
    """
    done = iteration + 1
    return done == num_iterations or (frequency > 0 and done % frequency == 0)


def row_dicts(columns: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """M dicts of floats from a dict of tensors [M].

    >>> row_dicts({"return": torch.tensor([1.0, 0.5]), "episode_len": torch.tensor([80.0, 12.0])})
    [{'return': 1.0, 'episode_len': 80.0}, {'return': 0.5, 'episode_len': 12.0}]
    """
    return [dict(zip(columns, row)) for row in zip(*(column.tolist() for column in columns.values()))]
