"""Variables that a launcher sets for its processes, checked before anything uses them.

A variable that a scheduler or an earlier shell left behind would make a process wait silently for ranks that nobody
started.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from schemas import UserError

LAUNCHER = b"deepspeed.launcher.launch"  # in the command of the process between `deepspeed` and the ranks
# command that starts processes -> variable with their number. These processes have no ranks
TASKS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}
LARGEST = {"MASTER_PORT": 2**16 - 1}
SMALLEST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": 1}


class Launch(NamedTuple):
    """The place of this process among all, from the launcher. Without one, it is the only process."""

    rank: int
    world_size: int
    ranks_here: int  # on this machine
    local_rank: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the variables of the launcher. Raises UserError if they do not fit together or some are missing."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        if name in environment:
            numbers[name] = number_in(name, environment[name])
    if ("RANK" in numbers) != ("WORLD_SIZE" in numbers):
        there, other = ("RANK", "WORLD_SIZE") if "RANK" in numbers else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{there} is {environment[there]}, but {other} is not set: unset {there}, or start the script "
            "with `deepspeed`"
        )
    rank, world_size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if rank >= world_size:
        raise UserError(f"RANK is {rank}, but it must be below WORLD_SIZE, which is {world_size}: unset both variables")
    if world_size > 1 and "MASTER_PORT" not in numbers:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but MASTER_PORT is not set, so ranks cannot meet: unset RANK and WORLD_SIZE, "
            "or start the script with `deepspeed`"
        )
    if "RANK" not in numbers:
        check_no_tasks(environment)
    here = numbers.get("LOCAL_WORLD_SIZE", numbers.get("LOCAL_SIZE", world_size))
    return Launch(rank, world_size, here, numbers.get("LOCAL_RANK", 0))


def job_cores(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of CPU cores that this job may use on this machine, which may have more.

    It is the smallest of what the scheduler allows this process, what Slurm gave to the job here (SLURM_CPUS_ON_NODE),
    and the limits of its control groups, rounded up.

    Args:
        groups: the file that names the control groups. mounted: where they are.
    """
    cores = [len(os.sched_getaffinity(0))]
    if (given := os.environ.get("SLURM_CPUS_ON_NODE", "")).isdecimal():
        cores.append(int(given))
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / controllers if controllers else mounted  # version 1, or version 2
        place = root / name.lstrip("/")
        cores += [limit for folder in (place, *place.parents) if folder.is_relative_to(root) for limit in quota(folder)]
    return max(1, min(cores))


def quota(folder: Path) -> list[int]:
    """The cores that a control group allows, or an empty list where it has no limit."""
    try:
        if (folder / "cpu.max").exists():  # version 2
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return [math.ceil(int(limit) / int(period))] if int(limit) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):  # "max", no such file
        return []


def number_in(name: str, text: str) -> int:
    """The number in a launcher's variable. Raises UserError if it is not in the range of the variable."""
    smallest, largest = SMALLEST.get(name, 0), LARGEST.get(name, 2**31 - 1)
    if not (text.isascii() and text.isdecimal() and smallest <= int(text) <= largest):
        raise UserError(f"{name} is {text!r}, but it must be a whole number from {smallest} to {largest}: unset it")
    return int(text)


def check_no_tasks(environment: Mapping[str, str]) -> None:
    """Raise UserError for one of several processes without ranks, since each would be a run of its own."""
    for command, name in TASKS.items():
        if environment.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{command} started {environment[name]} processes without ranks ({name}): start one of them per "
                "machine, with `deepspeed` in front of the script"
            )


def parent_of(process: int) -> int | None:
    """Id of the parent of a process, or None if the process has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command_of(process: int) -> bytes:
    """Command line of a process, with a null byte after each word. Empty if it has ended or there is no /proc."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
