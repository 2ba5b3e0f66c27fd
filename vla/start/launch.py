"""What a launcher says to the processes it starts, read once and checked before anything trusts it.

A variable that a scheduler or an earlier shell left behind makes a process wait for ranks that nobody started, and
nothing is printed meanwhile.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from schemas import UserError

# by what starts processes: how many of them know of no rank
TASKS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}
LARGEST = {"MASTER_PORT": 2**16 - 1}
SMALLEST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": 1}


class Launch(NamedTuple):
    """This process among all, as the launcher says; one of one without a launcher."""

    rank: int
    world_size: int
    ranks_here: int  # on this machine
    local_rank: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Raises UserError where the launcher's variables do not fit together, or where a part of them is missing."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        if name in environment:
            numbers[name] = number_in(name, environment[name])
    if ("RANK" in numbers) != ("WORLD_SIZE" in numbers):
        there, other = ("RANK", "WORLD_SIZE") if "RANK" in numbers else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{there} is {environment[there]} and {other} is not set, as no launcher does: unset {there}, or start "
            "with `deepspeed`"
        )
    rank, world_size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if rank >= world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}, a rank is below it: unset both variables")
    if world_size > 1 and "MASTER_PORT" not in numbers:
        raise UserError(
            f"WORLD_SIZE is {world_size} and MASTER_PORT is not set, so ranks can not meet: unset RANK and WORLD_SIZE, "
            "or start with `deepspeed`"
        )
    if "RANK" not in numbers:
        check_no_tasks(environment)
    here = numbers.get("LOCAL_WORLD_SIZE", numbers.get("LOCAL_SIZE", world_size))
    return Launch(rank, world_size, here, numbers.get("LOCAL_RANK", 0))


def number_in(name: str, text: str) -> int:
    """A launcher's variable as a number of its range. Raises UserError."""
    smallest, largest = SMALLEST.get(name, 0), LARGEST.get(name, 2**31 - 1)
    if not (text.isascii() and text.isdecimal() and smallest <= int(text) <= largest):
        raise UserError(f"{name} is {text!r}, but it must be a whole number from {smallest} to {largest}: unset it")
    return int(text)


def check_no_tasks(environment: Mapping[str, str]) -> None:
    """Raise UserError for one of several processes that nobody told their ranks: each would be a run of its own."""
    for command, name in TASKS.items():
        if environment.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{command} started {environment[name]} processes without ranks ({name}): start one of them per "
                "machine, with `deepspeed` in front of the script"
            )
