"""A cluster of one machine: sbatch, srun and scontrol as far as slurm/*.sbatch use them.

tests/scripts/test_stopped_runs.py puts scripts with these names on PATH that call this file.

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

STATE = Path(os.environ["FAKE_SLURM"])


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
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_SUBMIT_DIR": os.getcwd(),
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
    per_node = int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_JOB_NUM_NODES"])
    ranks = []
    for number in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % per_node)}
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
