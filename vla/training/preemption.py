"""A run that is asked to end saves itself and can be started again as if nothing had happened.

SIGTERM (a cluster's, a launcher's), SIGUSR1 (what slurm/*.sbatch ask for ahead of the time limit), Ctrl-C (once; a
second one ends the run as it is) and a file called `stop` in the run folder (`touch runs/my_run/stop`) only raise a
flag. The rank that got the signal writes the file, so that the others know before they meet: DeepSpeed's launcher
(0.19.8) signals one rank and waits 30 s for it to end before it signals the next. Rollouts and evaluations look at the
flag before every decision, since ranks are free there; outside them all ranks agree after every optimizer step, so that
they leave in lock-step.

An iteration that was broken off is undone: weights, moments and env states are put back to its start, saved, and the
run exits with code 75 (EX_TEMPFAIL of sysexits.h: start me again). `--resume` then makes the same iteration from its
start: at most one is lost, and the log of a run that was stopped is that of a run that was not. An evaluation that was
broken off undoes nothing: what it was to measure is saved, and `--resume` begins with that evaluation. evaluate.py
watches for the same signals in its output folder.

    preemption = Preemption(engine, run_dir, keep_checkpoints)
    for iteration in ...:
        preemption.snapshot(iteration, global_step, envs.state_dict())
        with rollout_stage(...):
            for t in preemption.until_requested(range(...)):
                ...
        preemption.exit_if_requested()
        with update_stage(...):
            ...                                 # after each optimizer step
            preemption.exit_if_requested()
        if evaluate(..., stop=preemption) is None:
            preemption.exit(save_checkpoint(...))
"""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from vla.distributed import REQUEUE, Engine, agree, all_reduce_max, barrier, print0, rank
from vla.training.checkpoint import checkpoint_dir, damage, save_checkpoint
from vla.training.critics import StateCritic
from vla.training.optimizer_state import Snapshot

Item = TypeVar("Item")


class StopRequest:
    """Watches for signals from when it is made, by all ranks together; a signal before that ends the process.

    Args:
        folder: exists on rank 0. A file `stop` in it asks, too; one that an earlier process left is removed.
    """

    def __init__(self, folder: Path):
        self.stop_file = folder / "stop"
        self.signal: str | None = None  # what this rank got; it may come twice
        self.meeting = False  # the other ranks hear of it anyway
        if rank() == 0:
            self.stop_file.unlink(missing_ok=True)  # of a process that was killed
        barrier()  # nobody looks before it is gone
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if rank() == 0:  # not by print, which may be at work already
                os.write(2, b"Ctrl-C: the run saves itself and ends. Press it again to end at once.\n")
        if not self.meeting:
            with contextlib.suppress(OSError):  # the others then hear of it when they meet
                self.stop_file.touch()

    @property
    def requested(self) -> bool:
        """This rank should go no further: it got a signal, or another one did, or there is a file `stop`."""
        return self.signal is not None or self.stop_file.exists()

    def until_requested(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until this rank should go no further."""
        for item in items:
            if self.requested:
                return
            yield item

    def agreed(self) -> bool:
        """Whether any rank was asked to end. All ranks together."""
        self.meeting = True
        asked = bool(all_reduce_max(torch.tensor(float(self.requested))))
        self.meeting = asked
        return asked

    def end(self, said: str) -> NoReturn:
        """SystemExit with REQUEUE; rank 0 says why and how to go on. All ranks have stopped, and all is saved."""
        self.meeting = True
        if rank() == 0:
            self.stop_file.unlink(missing_ok=True)
        print0(f"{self.signal or self.stop_file}: {said}")
        raise SystemExit(REQUEUE)


class Preemption(StopRequest):
    """The StopRequest of a training run, which saves itself before it ends. Made when the run folder is there; until
    then a signal ends the process, since nothing has been trained yet.

    Args:
        keep: of save_checkpoint().
        critic: beside the engine; it is to be fitted behind the last look at `requested`, so it is never undone.
    """

    def __init__(self, engine: Engine, run_dir: Path, keep: int, critic: StateCritic | None = None):
        self.engine, self.run_dir, self.keep, self.critic = engine, run_dir, keep, critic
        self.start = Snapshot()
        super().__init__(run_dir)

    def snapshot(self, iteration: int, global_step: int, env_states: list[dict]) -> None:
        """An iteration begins here: what a broken-off one goes back to. Copies the trained weights and moments."""
        self.iteration, self.global_step, self.env_states = iteration, global_step, env_states
        self.start.take(self.engine)

    def exit_if_requested(self, together: bool = True) -> None:
        """Where any rank was asked to end: undo the iteration, save, SystemExit with REQUEUE.

        Args:
            together: all ranks are here. Where it is False nothing happens.
        """
        if not together or not self.agreed():
            return
        folder = checkpoint_dir(self.run_dir, self.iteration)
        if agree(damage(folder) if rank() == 0 else None):  # there is none yet, or no whole one
            self.start.restore(self.engine)
            save_checkpoint(
                self.engine, self.run_dir, self.iteration, self.global_step, self.env_states, self.keep, self.critic
            )
        self.exit(folder)

    def exit(self, checkpoint: Path) -> NoReturn:
        """SystemExit with REQUEUE, after this checkpoint was written. All ranks together."""
        self.end(f"{checkpoint} is complete. Go on with --resume {self.run_dir}")
