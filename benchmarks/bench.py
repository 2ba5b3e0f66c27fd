"""Where the time of an iteration goes, and how much of it is needed: `make bench`, one table in a quarter of an hour.

    python benchmarks/bench.py                                  # everything, to benchmarks/results/
    python benchmarks/bench.py --only limits quickstart         # some of it
    python benchmarks/bench.py --machine my_laptop --minutes 30

benchmarks/components.py measures parts. The real script under the real launcher measures whole iterations: the median
of time/* in metrics.jsonl without the first iteration. Shares compare with what the machine can do in the same run: a
large matrix product, and copying memory. Physics and the arithmetic of the task have no such limit, so the table has
their share of an env step. Measurements that do not start in time are listed as not done. Results are written as JSON
and as a table. benchmarks/cost_model.py predicts other runs from the JSON.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.soak import free_port
from envs.workers import WORKER_TITLE
from vla.files.run_lines import read_lines
from vla.logger import cpu_name, describe_run
from vla.text import without_places
from vla.training.stages import GIB

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "yaml/quickstart_ppo_openvlaoft.yaml"
RESULTS = ROOT / "benchmarks" / "results"
TARGET = 0.7  # of a quickstart iteration: env stepping + act + update, measured separately
EPISODE_STEPS = 80  # of the published task
PIXEL_BYTES = 30  # of an image: colour and segmentation written and read (2 x 12), table read, result written (2 x 3)

SHORT = {"num_steps": 64, "num_iterations": 4}  # decisions as in the preset, fewer of them
UNTRAINED = {"unnorm_key": "bridge_orig"}
CHUNK_1 = {"model_type": "openvla", "model_path": "openvla-tiny", "chunk_size": 1, **UNTRAINED}  # token by token
CHUNK_8 = {"model_path": "openvla-oft-tiny", "chunk_size": 8, **UNTRAINED}
CLOCKED = {"num_eval_episodes": 2, "num_eval_envs": 2, "save_freq": 0, "eval_freq": 0}
PUBLISHED_ENV = {
    "env_id": "PutOnPlateInScene25Main-v3",
    "image_size": (640, 480),
    "sim_freq": 500,
    "num_envs": 2,
    "num_steps": 48,
    "max_episode_steps": 12,
    "num_minibatches": 1,
}
ONE_MINIBATCH = {"num_minibatches": 1}
TWO_WORKERS = {"num_env_workers": 2}
SHORTER = {"num_steps": 32, "num_iterations": 3}
STEPS = ("rollout", "act", "update", "engine")
ITERATION_APART = "iteration on cores of their own"  # a part of its own: plan.py knows of no such bound


class Job(NamedTuple):
    """One process group. what: parts that it measures. Empty: it runs the script. apart: the policy on one core, env
    workers on the other."""

    ranks: int
    what: tuple[str, ...]
    flags: dict
    apart: bool = False


# by importance: the last ones are left out where time runs out
JOBS = {
    "limits": Job(1, ("limits", "transport"), {}),
    "parts": Job(1, STEPS, {"num_steps": 88, **ONE_MINIBATCH}),
    "parts_2_ranks": Job(2, ("limits", *STEPS), {"num_steps": 88, **ONE_MINIBATCH}),
    "quickstart": Job(2, (), {"num_iterations": 3}),
    "published_env": Job(1, ("env",), PUBLISHED_ENV),
    "100m": Job(1, ("model",), {"preset": "100m", "batch": 4, "repeats": 2}),
    "1_rank": Job(1, (), SHORT),
    "2_ranks": Job(2, (), SHORT),
    "1_worker": Job(1, (), SHORT | {"num_env_workers": 1}),
    "apart": Job(1, (), SHORT | TWO_WORKERS, apart=True),
    "apart_pipeline": Job(1, (), SHORT | TWO_WORKERS | {"pipeline_stages": 2}, apart=True),
    "parts_chunk_8": Job(1, STEPS, {"num_steps": 88, **ONE_MINIBATCH, **CHUNK_8}),
    "chunk_8": Job(1, (), SHORT | CHUNK_8),
    "parts_chunk_1": Job(1, STEPS, {"num_steps": 44, **ONE_MINIBATCH, **CHUNK_1}),
    "chunk_1": Job(1, (), SHORT | CHUNK_1),
    "chunk_1_apart": Job(1, (), SHORTER | CHUNK_1 | TWO_WORKERS, apart=True),
    "chunk_1_apart_pipeline": Job(1, (), SHORTER | CHUNK_1 | TWO_WORKERS | {"pipeline_stages": 2}, apart=True),
}
# a row of the table: setting, job, the job that it is compared with
SCALING = (
    ("ranks 2 against 1", "2_ranks", "1_rank"),
    ("num_env_workers 1 against 0", "1_worker", "1_rank"),
    ("chunk_size 4 against 1 (openvla)", "1_rank", "chunk_1"),
    ("chunk_size 8 against 4", "chunk_8", "1_rank"),
)
# the same for rollouts alone: what the stages overlap in
ROLLOUT_SCALING = (
    ("pipeline_stages 2 against 1, a core each, chunk 4", "apart_pipeline", "apart"),
    ("pipeline_stages 2 against 1, a core each, chunk 1", "chunk_1_apart_pipeline", "chunk_1_apart"),
)


# ---------------------------------------------------------------------- running
def run_group(commands: list[list[str]], environments: list[dict], seconds: float) -> str:
    """Run processes at the same time. Returns what the first one printed.

    Raises:
        RuntimeError: one failed, with the last line it wrote; or the time is up. Nothing is left running.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(len(commands))]
        running = []
        try:
            for command, environment, log in zip(commands, environments, logs):
                with log.open("w") as file:
                    settings = dict(stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
                    running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **settings))
            deadline = time.monotonic() + seconds
            while any(process.poll() is None for process in running):
                failed = [log for process, log in zip(running, logs) if process.poll()]
                if failed:
                    raise RuntimeError(last_line(failed[0]))
                if time.monotonic() > deadline:
                    raise RuntimeError(f"took longer than the {seconds:.0f} s that were left")
                time.sleep(0.05)
            failed = [log for process, log in zip(running, logs) if process.returncode]
            if failed:
                raise RuntimeError(last_line(failed[0]))
            return logs[0].read_text()
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_line(log: Path) -> str:
    """What a process that failed said last, before what DeepSpeed's launcher says of it in brackets."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip() and not line.startswith("[")]
    return (lines or ["it ended without a word"])[-1][:300]


def to_words(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def environment_of(accelerator: str = "cpu", **more: str) -> dict:
    ours = {"DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | ours | more


def measure_parts(ranks: int, what: tuple[str, ...], flags: dict, seconds: float, accelerator: str = "cpu") -> list:
    """Entries of benchmarks/components.py, on so many ranks at the same time."""
    command = [sys.executable, "benchmarks/components.py", "--config", CONFIG, "--what", *what, *to_words(flags)]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    numbers = [{"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(ranks)]
    environments = [environment_of(accelerator, **group, **number) for number in numbers]
    printed = run_group([command] * ranks, environments, seconds)
    return json.loads(re.search(r"^PARTS (.*)$", printed, re.M).group(1))


@contextlib.contextmanager
def workers_on_a_core_of_their_own(wanted: bool) -> Iterator[list[str]]:
    """While the block runs, env workers are moved to the second core. Yields the words to put before a command that is
    to begin on the first."""
    cores, over, moved = sorted(os.sched_getaffinity(0)), threading.Event(), set()
    if not wanted:
        yield []
        return
    if len(cores) < 2:
        raise RuntimeError("there is one core only: workers and policy cannot have one each")

    def move() -> None:
        while not over.wait(0.2):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it may be gone, or another user's
                    if (process / "comm").read_text() == f"{WORKER_TITLE}\n":
                        moved.add(process.name)
                        for thread in (process / "task").iterdir():
                            os.sched_setaffinity(int(thread.name), {cores[1]})

    mover = threading.Thread(target=move)
    mover.start()
    try:
        yield ["taskset", "-c", str(cores[0])]
    finally:
        over.set()
        mover.join()
    if not moved:
        raise RuntimeError("no env worker was found that could be moved: all of it ran on one core")


def measure_iterations(ranks: int, flags: dict, seconds: float, accelerator: str = "cpu", apart: bool = False) -> dict:
    """The script through the launcher, in a temporary run folder."""
    with tempfile.TemporaryDirectory() as folder, workers_on_a_core_of_their_own(apart) as before:
        command = [*before, str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
        command += ["--master_port", free_port(), "train_ppo.py", "--config", CONFIG]
        command += to_words(CLOCKED | flags | {"run_dir": f"{folder}/run"})
        run_group([command], [environment_of(accelerator)], seconds)
        used = json.loads((Path(folder) / "run" / "args.json").read_text())
        del used["run_dir"], used["local_rank"]
        lines = read_lines(Path(folder) / "run" / "metrics.jsonl")
    part = ITERATION_APART if apart else "iteration"
    entry = {"part": part, "ranks": ranks, "iterations": len(lines) - 1, "flags": used}
    evaluated = [line["time/iteration"] - line["time/eval"] for line in lines[1:]]
    entry |= {
        f"{name}_s": statistics.median(line[f"time/{name}"] for line in lines[1:]) for name in ("rollout", "update")
    }
    steps = [after["global_step"] - before["global_step"] for before, after in itertools.pairwise(lines)]
    return entry | {"iteration_s": statistics.median(evaluated), "env_steps": statistics.median(steps)}


def measure_model(flags: dict, seconds: float) -> dict:
    """What benchmarks/model_speed.py says of one process with one thread: acting, and a LoRA update in fp32."""
    command = [sys.executable, "benchmarks/model_speed.py", "--update", *to_words(flags)]
    printed = run_group([command], [environment_of()], seconds)
    return {"part": "model", "ranks": 1, **json.loads(printed.splitlines()[-1])}


def measure(names: list[str], minutes: float, say) -> tuple[list[dict], dict[str, str]]:
    """All entries of the jobs, each with its job's name. Also what was not done, with the reason."""
    began, measured, not_done = time.monotonic(), [], {}
    for number, name in enumerate(names, 1):
        job, left = JOBS[name], 60 * minutes - (time.monotonic() - began)
        say(f"{number}/{len(names)}  {name}  ({left / 60:.1f} minutes left)")
        try:
            if left < 10:
                raise RuntimeError(f"the {minutes:g} minutes were over")
            if job.what == ("model",):
                found = [measure_model(job.flags, left)]
            elif job.what:
                found = measure_parts(job.ranks, job.what, job.flags, left)
            else:
                found = [measure_iterations(job.ranks, job.flags, left, apart=job.apart)]
            measured += [{"job": name, **one} for one in found]
        except RuntimeError as failure:
            not_done[name] = str(failure)
    return measured, not_done


# ---------------------------------------------------------------------- the table
class Row(NamedTuple):
    """One line. share: of the limit, or None."""

    part: str
    setting: str
    value: float
    unit: str
    limit: str = ""
    share: float | None = None


def pick_entry(measured: list[dict], part: str, **wanted) -> dict | None:
    """The first entry of a part whose fields, or whose run's flags, are as wanted."""
    for entry in measured:
        known = entry.get("flags", {}) | entry
        if entry["part"] == part and all(known.get(name) == value for name, value in wanted.items()):
            return entry
    return None


def limit_rows(measured: list[dict]) -> list[Row]:
    rows = []
    for one in (entry for entry in measured if entry["part"] == "limits"):
        setting = f"{one['device']}, {one['dtype']}, {one['ranks']} at once, each"
        rows.append(Row("matrix peak", setting, one["matrix_flops_per_s"] / 1e9, "GFLOP/s"))
        rows.append(Row("memory bandwidth", setting, one["memory_bytes_per_s"] / 1e9, "GB/s"))
    return rows


def env_rows(measured: list[dict]) -> list[Row]:
    """Stages of one env on one core. A step here has one image."""
    rows, limits = [], pick_entry(measured, "limits", ranks=1)
    for one in (e for e in measured if e["part"] == "env" and e["job"] in ("parts", "published_env")):
        width, height = one["image_size"]
        setting = f"{width} x {height}, {one['sim_freq']} Hz"
        whole = one["physics_s"] + one["task_s"] + one["picture_s"]
        rows.append(Row("env step", setting, 1 / whole, "env steps/s"))
        for name, key in (("physics", "physics_s"), ("task", "task_s"), ("render", "picture_s")):
            rows.append(Row(name, setting, 1 / one[key], "env steps/s", "env step", one[key] / whole))
        if limits:
            share = PIXEL_BYTES * width * height / limits["memory_bytes_per_s"] / one["picture_s"]
            rows.append(Row("render", setting, 1 / one["picture_s"], "env steps/s", "memory bandwidth", share))
        if one["reset_s"]:
            again = one["reset_s"] + one["picture_s"]
            share = again / (again + EPISODE_STEPS * whole)
            rows.append(Row("reset", setting, 1 / again, "resets/s", f"episode of {EPISODE_STEPS} steps", share))
    for one in (entry for entry in measured if entry["part"] == "transport"):
        width, height = one["image_size"]
        where = f"{one['num_env_workers']} workers, {one['num_envs']} envs, {width} x {height}"
        share = None
        if limits:
            share = 2 * 3 * width * height * one["num_envs"] / limits["memory_bytes_per_s"] / one["seconds"]
        rows.append(Row("transport", where, one["num_envs"] / one["seconds"], "env steps/s", "memory bandwidth", share))
    return rows


def model_rows(measured: list[dict]) -> list[Row]:
    rows = []
    for one in (entry for entry in measured if entry["part"] in ("act", "update", "engine")):
        limits = pick_entry(measured, "limits", ranks=one["ranks"])
        setting = f"{one['model_type']}, chunk {one['chunk_size']}, {one['ranks']} rank" + "s" * (one["ranks"] > 1)
        if one["part"] == "act":
            batch, seconds = one["points"][-1]
            needs = {}
            if limits:
                needs["matrix peak"] = batch * one["flops"] / limits["matrix_flops_per_s"]
                needs["memory bandwidth"] = one["passes"] * one["weight_bytes"] / limits["memory_bytes_per_s"]
            limit = max(needs, key=needs.get, default="")
            rate = one["ranks"] * batch * one["chunk_size"] / seconds
            share = needs[limit] / seconds if needs else None
            rows.append(Row("act", f"{setting}, {batch} envs each", rate, "env steps/s", limit, share))
            continue
        rate = one["ranks"] * one["micro_batch_size"] / one["seconds"]
        if one["part"] == "update":
            share = (
                one["micro_batch_size"] * one["flops"] / one["seconds"] / limits["matrix_flops_per_s"] if limits else 0
            )
            rows.append(Row("update, bare", setting, rate, "decisions/s", "matrix peak", share or None))
        else:
            bare = pick_entry(measured, "update", job=one["job"])
            share = bare["seconds"] / one["seconds"] if bare else None
            rows.append(Row(f"update, ZeRO-{one['zero_stage']}", setting, rate, "decisions/s", "bare update", share))
    for one in (entry for entry in measured if entry["part"] == "model"):
        setting, rate = f"{one['model_type']}, {one['preset']}, one thread", one["update_samples_per_s"]
        rows.append(Row("LoRA update", setting, rate, "decisions/s", "matrix peak", one["share_of_matrix_peak"]))
    return rows


def unavoidable(measured: list[dict], iteration: dict) -> dict[str, float] | None:
    """Seconds of env stepping, acting and the bare update in an iteration of envs in the ranks' own processes.

    They are computed from parts that were measured on as many ranks. None: they were not measured.
    """
    flags, ranks = iteration["flags"], iteration["ranks"]
    same = {"ranks": ranks, "model_path": flags["model_path"], "chunk_size": flags["chunk_size"]}
    rollout, update = (pick_entry(measured, part, **same) for part in ("rollout", "update"))
    if flags["num_env_workers"] or flags["pipeline_stages"] > 1 or not rollout or not update:
        return None
    decisions = flags["num_steps"] // flags["chunk_size"]
    scale = decisions * flags["num_envs"] / ranks / rollout["num_envs"]
    samples = decisions * flags["num_envs"] / ranks
    once = samples / update["micro_batch_size"] * update["seconds"] + flags["num_minibatches"] * update["step_seconds"]
    return {"env": scale * rollout["step_s"], "act": scale * rollout["act_s"], "update": flags["update_epochs"] * once}


def iteration_rows(measured: list[dict]) -> list[Row]:
    rows = []
    rates = {one["job"]: one["env_steps"] / one["iteration_s"] for one in measured if one["part"] == "iteration"}
    for one in (entry for entry in measured if entry["part"] == "iteration"):
        flags, parts = one["flags"], unavoidable(measured, one)
        setting = f"{one['ranks']} ranks, {flags['num_env_workers']} workers, chunk {flags['chunk_size']}, "
        setting += f"pipeline {flags['pipeline_stages']}, {flags['num_envs']} x {flags['num_steps']}"
        share = sum(parts.values()) / one["iteration_s"] if parts else None
        limit = "env + act + update" if parts else ""
        rows.append(Row("iteration", setting, rates[one["job"]], "env steps/s", limit, share))
    apart = [one for one in measured if one["part"] == ITERATION_APART]
    rollouts = {one["job"]: one["env_steps"] / one["rollout_s"] for one in apart}
    for what, pairs, rate in (("scaling", SCALING, rates), ("rollout scaling", ROLLOUT_SCALING, rollouts)):
        for setting, job, base in pairs:
            if job in rate and base in rate:
                rows.append(Row(what, setting, rate[job] / rate[base], "times"))
    return rows


def quickstart_sentence(measured: list[dict]) -> str:
    """What share of the quickstart's iteration had to be."""
    one = pick_entry(measured, "iteration", job="quickstart")
    parts = unavoidable(measured, one) if one else None
    if parts is None:
        return "the quickstart's iteration and its parts were not all measured: no share to state"
    share = sum(parts.values()) / one["iteration_s"]
    sums = " + ".join(f"{name} {value:.2f}" for name, value in parts.items())
    verdict = "reached" if share >= TARGET else "missed"
    return (
        f"a quickstart iteration on 2 ranks takes {one['iteration_s']:.2f} s; its parts, measured separately, {sums} = "
        f"{sum(parts.values()):.2f} s, {share:.0%} of it (target {TARGET:.0%}: {verdict})"
    )


def table(rows: list[Row], not_done: dict[str, str]) -> list[str]:
    """Markdown."""
    lines = ["| part | setting | value | unit | limit | share |", "|---|---|---:|---|---|---:|"]
    for row in rows:
        share = "" if row.share is None else f"{row.share:.1%}"
        lines.append(f"| {row.part} | {row.setting} | {row.value:,.4g} | {row.unit} | {row.limit} | {share} |")
    return lines + [f"| {name} | not done: {reason} | | | | |" for name, reason in not_done.items()]


# ---------------------------------------------------------------------- the file
def machine() -> dict:
    """What it was measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "load_before": os.getloadavg()[0],
    }


def machine_name(host: dict, accelerator: str = "") -> str:
    words = re.sub(r"\(.*?\)|CPU|Processor|@.*", "", accelerator or host["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {host['cores']} cores".lower()).strip("-")


def new_files(folder: Path, name: str) -> list[Path]:
    """<date>_<name>.json and .md, which are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{time.strftime('%Y-%m-%d')}_{name}", 1
    while (folder / f"{stem}.json").exists():
        number += 1
        stem = f"{time.strftime('%Y-%m-%d')}_{name}_{number}"
    return [folder / f"{stem}.json", folder / f"{stem}.md"]


def write_results(files: list[Path], content: dict, lines: list[str]) -> None:
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    files[1].write_text("\n".join(lines) + "\n")


def header(description: dict, host: dict) -> list[str]:
    """Machine, commit, versions: a line each."""
    changes = " with uncommitted changes" if description["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    lines = [
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; {description['device']}",
        f"- commit: {description['commit']}{changes}",
        f"- versions: {versions}",
        f"- command: {description['command']}, started {description['started']}",
    ]
    if host["load_before"] > host["cores"] / 4:
        lines.append(f"- the machine was not idle when it began (load {host['load_before']:.1f}): do not quote this")
    return lines


def main(flags: argparse.Namespace) -> int:
    host = machine()
    description = without_places(describe_run(vars(flags) | {"seed": 0}, {}, num_ranks=2))
    names = [name for name in JOBS if name in (flags.only or JOBS)]
    began = time.monotonic()
    measured, not_done = measure(names, flags.minutes, lambda line: print(line, file=sys.stderr, flush=True))
    rows = limit_rows(measured) + env_rows(measured) + model_rows(measured) + iteration_rows(measured)
    lines = [*header(description, host), "", *table(rows, not_done), "", quickstart_sentence(measured)]
    lines.append(f"{(time.monotonic() - began) / 60:.1f} minutes")
    content = {
        "kind": "bench",
        "description": description,
        "machine": host,
        "measured": measured,
        "not_done": not_done,
        "rows": [row._asdict() for row in rows],
    }
    print("\n".join(lines))
    files = new_files(flags.output, flags.machine or machine_name(host))
    write_results(files, content, lines)
    print("written: " + " ".join(map(str, files)))
    return 1 if not_done else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=JOBS, help="Measurements to run. Without it, all are run.")
    parser.add_argument(
        "--minutes",
        type=float,
        default=14,
        help="Minutes after which no measurement is started. (default: %(default)s)",
    )
    parser.add_argument(
        "--machine", help="Name of the machine in the file name of the results. Without it, the CPU gives the name."
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of the results. (default: %(default)s)")
    raise SystemExit(main(parser.parse_args()))
