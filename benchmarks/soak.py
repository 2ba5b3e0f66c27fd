"""Long tests of runs that are killed and resumed again and again.

    python benchmarks/soak.py grid            12 iterations at once, against 5, kill -9 of a rank and 7 more. ZeRO 0,
                                              2 and 3 on one and two ranks, with equal metrics after the resume
    python benchmarks/soak.py kills           20 kills at random times: launcher, its helper, a rank, an env worker, or
                                              the process that starts workers

It uses CPU ranks, in a temporary folder or in --folder. The exit code is 1 if anything is wrong.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.storm import left_in_shared_memory  # noqa: E402
from envs.processes import SERVER_TITLE  # noqa: E402
from envs.workers import WORKER_TITLE  # noqa: E402
from vla.training.checkpoint import complete_checkpoints, damage  # noqa: E402

SMALL = {
    "num_envs": 4,
    "num_steps": 16,
    "max_episode_steps": 8,
    "num_minibatches": 2,
    "micro_batch_size": 8,
    "num_eval_episodes": 2,
    "num_eval_envs": 2,
    "eval_freq": 0,
}
MARK = "SOLOVLA_SOAK"  # in the environment of everything that is started here
END_SECONDS = 600.0  # for the ranks of a killed launcher to notice, save and end, on a busy machine too


def free_port() -> str:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return str(server.getsockname()[1])


def start(ranks: int, mark: str, log: Path, **flags: object) -> subprocess.Popen:
    """`deepspeed --num_gpus RANKS train_ppo.py ...` on CPUs; what it prints goes to `log`."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", free_port()]
    command += ["train_ppo.py"] + ([] if "resume" in flags else ["--config", "tests/helpers/ppo_random_openvla.yaml"])
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", MARK: mark}
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def processes(mark: str) -> dict[str, list[int]]:
    """Everything started under a mark that is alive, by what it is."""
    found: dict[str, list[int]] = {kind: [] for kind in ("launcher", "helper", "rank", "server", "worker", "other")}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes():
                continue
            command = (folder / "cmdline").read_bytes().split(b"\0")
            title = (folder / "comm").read_text().strip()
        except OSError:  # it has just ended
            continue
        if b"deepspeed.launcher.launch" in command:
            kind = "helper"
        elif any(word.endswith(b"/deepspeed") for word in command):
            kind = "launcher"
        elif b"train_ppo.py" in command:
            kind = "rank"
        else:
            kind = {WORKER_TITLE: "worker", SERVER_TITLE: "server"}.get(title, "other")
        found[kind].append(int(folder.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"after {seconds:g} s still not: {what}")
        time.sleep(0.1)


def all_gone(mark: str) -> bool:
    return not any(processes(mark).values())


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith(("time/", "memory/"))} for line in lines]


def grid(folder: Path, stages: list[int], all_ranks: list[int]) -> None:
    print("| ZeRO | ranks | largest difference of any metric, iterations 6 to 12 |\n|---|---|---|")
    for stage in stages:
        for ranks in all_ranks:
            place = folder / f"zero{stage}_{ranks}"
            place.mkdir(parents=True)
            mark, log = uuid.uuid4().hex, place / "log"
            flags = SMALL | {"deepspeed_config": f"ds_configs/zero{stage}.json", "num_iterations": 12}
            whole, cut = place / "whole", place / "cut"
            if start(ranks, mark, log, **flags, save_freq=0, run_dir=whole).wait() != 0:
                raise SystemExit(f"the whole run failed, see {log}")
            launcher = start(ranks, mark, log, **flags, save_freq=5, run_dir=cut)
            wait_until((cut / "checkpoints" / "iteration_000005").is_dir, 600, "checkpoint 5")
            os.kill(max(processes(mark)["rank"]), signal.SIGKILL)
            if launcher.wait() == 0:
                raise SystemExit("the launcher of a killed rank ended with 0")
            wait_until(lambda mark=mark: all_gone(mark), END_SECONDS, "end of all processes")
            if start(ranks, mark, log, resume=cut).wait() != 0:
                raise SystemExit(f"the resumed run failed, see {log}")
            ours, theirs = metrics(cut)[5:], metrics(whole)[5:]
            if [line.keys() for line in ours] != [line.keys() for line in theirs] or len(ours) != 7:
                raise SystemExit(f"{cut} and {whole} have other metrics")
            largest = max(abs(a[tag] - b[tag]) for a, b in zip(ours, theirs) for tag in a)
            print(f"| {stage} | {ranks} | {largest:.1e} |", flush=True)
            if largest > 1e-6:
                raise SystemExit(1)


def kills(folder: Path, rounds: int, seed: int) -> None:
    """Each round starts or resumes the run, and kills something at a random time from its start to its tenth iteration.

    A killed env worker or server ends nothing, once all envs are made: its rank starts another, and the round ends with
    the next victim.
    """
    choose = random.Random(seed)
    mark, run_dir, log = uuid.uuid4().hex, folder / "run", folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    shared_memory = set(os.listdir("/dev/shm"))
    flags = SMALL | {"save_freq": 1, "num_env_workers": 1, "keep_checkpoints": 2}
    killed = 0
    while killed < rounds:
        words = {"resume": run_dir} if run_dir.exists() and complete_checkpoints(run_dir) else None
        if words is None and run_dir.exists():  # killed before its first checkpoint: nothing to go on from
            run_dir.rename(folder / f"lost_{killed}")
        more = words or flags | {"run_dir": run_dir}
        launcher = start(2, mark, log, **more, num_iterations=1000)
        begin, delay = time.monotonic(), choose.uniform(2, 40)
        time.sleep(delay)
        while True:
            alive = processes(mark)
            kind = choose.choice([kind for kind in alive if kind != "other" and alive[kind]] or ["none"])
            if kind == "none":  # an env worker that dies while the envs are made ends the run
                print("       -      after the worker:", end="  ")
                if launcher.wait() == 0:
                    raise SystemExit(f"the run ended by itself with 0, see {log}")
                break
            replaced = kind in ("server", "worker")
            how = signal.SIGKILL if replaced else choose.choice([signal.SIGKILL, signal.SIGTERM])
            os.kill(choose.choice(alive[kind]), how)
            killed += 1
            print(f"{killed:3}  {time.monotonic() - begin:5.1f} s  {kind:8} {how.name:7}", end="  ", flush=True)
            if not replaced:
                break
            time.sleep(choose.uniform(2, 10))
            print("", flush=True)
        killed_at = time.monotonic()
        wait_until(lambda: all_gone(mark), END_SECONDS, "end of all processes")
        code = launcher.wait()
        checkpoints = complete_checkpoints(run_dir) if run_dir.exists() else []
        wrong = [f"{path.name}: {damage(path)}" for path in checkpoints if damage(path)]
        newest = checkpoints[-1].name if checkpoints else "no checkpoint yet"
        print(f"launcher {code:3}, all gone after {time.monotonic() - killed_at:4.1f} s, {newest}", flush=True)
        if wrong:
            raise SystemExit(f"damaged: {wrong}")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["iteration"]
    if start(2, mark, log, resume=run_dir, num_iterations=last + 2).wait() != 0:
        raise SystemExit(f"the last run failed, see {log}")
    lines = [line["iteration"] for line in metrics(run_dir)]
    leftovers = [str(path) for path in run_dir.rglob("*") if path.suffix == ".partial" or path.name == "stop"]
    leftovers += sorted(left_in_shared_memory(shared_memory))
    print(f"iterations 1 to {lines[-1]}, each once: {lines == list(range(1, lines[-1] + 1))}; left behind: {leftovers}")
    if leftovers or lines != list(range(1, lines[-1] + 1)) or not all_gone(mark):
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "kills"))
    parser.add_argument(
        "--folder", type=Path, help="Folder of the runs, which is kept. Without it, a temporary folder is used."
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages of the grid. (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="Numbers of ranks of the grid. (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="Number of kills. (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the kills. (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = given.folder or Path(temporary)
        if given.what == "grid":
            grid(where, given.stages, given.ranks)
        else:
            kills(where, given.rounds, given.seed)
