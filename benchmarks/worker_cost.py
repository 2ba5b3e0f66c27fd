"""What env workers cost: memory, start, and processes with an evaluation beside the training.

    python benchmarks/worker_cost.py                              # this checkout
    python benchmarks/worker_cost.py --against ../before          # in turns with another checkout, in one run
    python benchmarks/worker_cost.py --asset_pack bridge --asset_dir DIR --image_size 640 480

PSS is the memory of all processes below the measuring one, where a page that n of them share counts as 1/n in each.
CPU seconds are those of the same processes until every env has shown its first image.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = "PutOnPlateInScene25Main-v3"
TICKS = os.sysconf("SC_CLK_TCK")


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    return found


def below(process: int) -> list[int]:
    """All processes that this one started, and those that they started."""
    known, children = parents(), [process]
    for one in children:
        children += [pid for pid, parent in known.items() if parent == one]
    return children[1:]


def pss_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(workers: int, with_evaluation: bool, world: dict) -> dict[str, float]:
    """Start one env in each of so many workers, and with_evaluation as many envs that evaluate."""
    from envs import make_envs

    began = time.perf_counter()
    with make_envs(MAIN, workers, num_env_workers=workers, auto_reset=True, **world) as envs:
        envs.reset()
        seconds = time.perf_counter() - began
        processes = below(os.getpid())
        spent = sum(map(cpu_seconds, processes))
        if with_evaluation:
            shared = {"beside": envs} if "beside" in inspect.signature(make_envs).parameters else {}
            with make_envs(MAIN, workers, num_env_workers=workers, **shared, **world) as eval_envs:
                eval_envs.reset(list(range(workers)))
                processes = below(os.getpid())
                total = sum(map(pss_mib, processes))
        else:
            total = sum(map(pss_mib, processes))
    return {"processes": len(processes), "seconds": seconds, "cpu": spent, "mib": total, "each": total / workers}


def table(versions: dict[str, Path], rounds: int, cases: list[tuple[int, bool]], world: dict) -> None:
    """Measure the versions in turns, and print a row of medians for each. cases: workers, and whether they evaluate."""
    print("| workers | evaluation | version | processes | start, s | start, CPU s | PSS, MiB | PSS per worker, MiB |")
    print("|--:|---|---|--:|--:|--:|--:|--:|")
    for case in cases:
        found: dict[str, list[dict]] = {name: [] for name in versions}
        for _ in range(rounds):
            for name, folder in versions.items():
                command = [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps([*case, world])]
                environment = os.environ | {"PYTHONPATH": str(folder)}
                run = subprocess.run(
                    command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
        for name, results in found.items():
            middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
            print(
                f"| {case[0]} | {'yes' if case[1] else 'no'} | {name} | {middle['processes']:.0f} | "
                f"{middle['seconds']:.1f} | {middle['cpu']:.1f} | {middle['mib']:.0f} | {middle['each']:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--evaluating", type=int, nargs="*", default=[8], help="workers, with an evaluation beside")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asset_pack", default="builtin")
    parser.add_argument("--asset_dir")
    parser.add_argument("--image_size", type=int, nargs=2, default=(96, 96))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(*json.loads(flags.measure))))
        return
    world = {
        "asset_pack": flags.asset_pack,
        "asset_dir": flags.asset_dir,
        "image_size": flags.image_size,
        "sim_freq": 100,
        "worker_timeout": 3000.0,  # on a loaded machine
    }
    versions = {} if flags.against is None else {"before": flags.against.resolve()}
    cases = [(count, False) for count in flags.workers] + [(count, True) for count in flags.evaluating]
    table(versions | {"now": ROOT}, flags.rounds, cases, world)


if __name__ == "__main__":
    main()
