"""A cluster of one machine: sbatch, srun and scontrol as far as slurm/*.sbatch use them.

install() makes scripts with these names that call this file. tests/scripts/test_stopped_runs.py and
benchmarks/rehearse.py put them on PATH.

    sbatch [--nodes=N] [--ntasks-per-node=M] FILE ...    runs the file now; a job that was requeued is started again
    srun OPTIONS COMMAND ...         starts nodes x tasks processes, one log each; the exit code is the highest one
    scontrol show hostnames LIST | requeue JOB

What a node is here: a number in the ranks' environment. Every rank's process id is written to $FAKE_SLURM/pids.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ.get("FAKE_SLURM", ""))


def install(folder: Path) -> dict[str, str]:
    """Make the three commands in a folder, which also keeps their state. Returns the variables that choose them."""
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        tool = folder / "bin" / name
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        tool.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(folder), "PYTHON": sys.executable}


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """--name=value in front of a command, and the command."""
    named = {}
    while words and words[0].startswith("--"):
        name, _, value = words[0][2:].partition("=")
        named[name] = value
        words = words[1:]
    return named, words


def sbatch(words: list[str]) -> int:
    given, (script, *arguments) = options(words)
    lines = re.findall(r"^#SBATCH --(\S+?)(?:=(\S+))?$", Path(script).read_text(), re.M)
    asked = {**dict(lines), **given}
    if "requeue" not in asked or not re.fullmatch(r"USR1@\d+", asked["signal"]) or asked["open-mode"] != "append":
        raise SystemExit("sbatch: this file would not survive being requeued")
    nodes, per_node = int(asked["nodes"]), int(asked["ntasks-per-node"])
    number, names = os.environ.get("FAKE_JOB", str(os.getpid())), f"node[1-{nodes}]"
    job = {
        "SLURM_JOB_ID": number,
        "SLURM_JOBID": number,
        "SLURM_JOB_NAME": asked["job-name"],
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NPROCS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
        "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
        "SLURM_CPUS_ON_NODE": str(per_node * int(asked["cpus-per-task"])),
        "SLURM_GPUS_ON_NODE": asked["gpus-per-node"],
        "SLURM_GPUS_PER_NODE": asked["gpus-per-node"],
        "SLURM_JOB_NODELIST": names,
        "SLURM_NODELIST": names,
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_NODEID": "0",  # the script itself is the first task of the first node
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_EXPORT_ENV": "ALL",
    }
    spooled = STATE / "slurm_script"  # the cluster runs a copy from somewhere else
    spooled.write_text(Path(script).read_text())
    for restart in range(10):
        (STATE / "requeued").unlink(missing_ok=True)
        environment = os.environ | job | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})
        code = subprocess.run(["bash", str(spooled), *arguments], env=environment).returncode
        if not (STATE / "requeued").exists():
            return code
    raise SystemExit("sbatch: requeued ten times")


def srun(words: list[str]) -> int:
    named, command = options(words)
    # since version 22.05, srun does not read the number that sbatch was given, and binds every task to one core
    if (named.get("cpus-per-task") or os.environ.get("SRUN_CPUS_PER_TASK")) != os.environ["SLURM_CPUS_PER_TASK"]:
        raise SystemExit("srun: every task would have one core")
    tasks, nodes = os.environ["SLURM_NTASKS"], os.environ["SLURM_JOB_NUM_NODES"]
    per_node = int(tasks) // int(nodes)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
    ranks = []
    for number in range(int(tasks)):
        place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % per_node)} | step
        place["SLURM_NODEID"] = str(number // per_node)
        log_name = re.sub(
            "%[t%]", lambda field, number=number: {"%t": str(number), "%%": "%"}[field[0]], named["output"]
        )
        with open(log_name, "a") as log:
            ranks.append(subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log))
    (STATE / "pids").write_text(" ".join(str(rank.pid) for rank in ranks))
    codes = [rank.wait() for rank in ranks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.1")
    elif words == ["requeue", os.environ["SLURM_JOB_ID"]]:
        (STATE / "requeued").touch()
    else:
        raise SystemExit(f"scontrol: {words}")
    return 0


if __name__ == "__main__":
    raise SystemExit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
