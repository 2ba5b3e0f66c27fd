"""A run that is asked to end saves itself, and resumes later as if nothing had happened.

A cluster or a launcher asks by SIGTERM, and slurm/*.sbatch ahead of the time limit by SIGUSR1. A person asks by Ctrl-C,
or by a file called `stop` in the run folder (`touch runs/my_run/stop`). A second Ctrl-C ends the run at once. The rank
that got a signal writes the file, so that the others know before the ranks meet. This is needed because DeepSpeed's
launcher (0.19.8) signals one rank and waits 30 s for it to end before it signals the next.

Rollouts and evaluations look at the request before every decision, because ranks are independent there. Elsewhere all
ranks agree after every optimizer step, so that they leave together.

An interrupted iteration is undone: weights, moments and env states are restored to its start and saved. The run exits
with code 75 (EX_TEMPFAIL of sysexits.h: "start me again"). `--resume` then repeats the iteration from its start, so at
most one iteration is lost. The log of a stopped run equals that of a run that was not stopped. A model with more
than 500 million trained parameters has no copy to go back to (optimizer_state.Snapshot). Its rollouts end at once, too,
but an update is finished, and the run ends at the start of the next iteration.

An interrupted evaluation undoes nothing: the weights that it measures are saved, and `--resume` begins with that
evaluation. evaluate.py watches its output folder in the same way.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from vla.distributed import REQUEUE, Engine, agree, all_reduce_max, barrier, rank
from vla.start.terminal import say_last
from vla.training.checkpoint import checkpoint_dir, damage, save_checkpoint
from vla.training.critics import StateCritic
from vla.training.optimizer_state import Snapshot

Item = TypeVar("Item")


def say_last0(text: str) -> None:
    """say_last() on rank 0."""
    if rank() == 0:
        say_last(text, stream=1)


class StopRequest:
    """Watches for signals. All ranks create it together. A signal before that ends the process.

    Args:
        folder: exists on rank 0. A file `stop` in it is a request, too. One that is left from before is removed.
    """

    def __init__(self, folder: Path):
        self.stop_file = folder / "stop"
        self.signal: str | None = None  # the one that this rank got. It may come twice
        self.meeting = False  # True while ranks exchange requests, so that no file is needed
        if rank() == 0:
            self.stop_file.unlink(missing_ok=True)  # left by a process that was killed
        barrier()  # wait until rank 0 has removed the old file
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if rank() == 0:  # not with print(), which the signal may have interrupted
                os.write(2, b"Ctrl-C: the run saves itself and ends. Press it again to end at once.\n")
        if not self.meeting:
            with contextlib.suppress(OSError):  # without the file the other ranks learn of it when ranks meet
                self.stop_file.touch()

    @property
    def requested(self) -> bool:
        """Whether this rank should stop: it got a signal, another rank did, or there is a file `stop`."""
        return self.signal is not None or self.stop_file.exists()

    def hear(self) -> None:
        """A rank that only acts was asked to end (vla/placement)."""
        self.signal = self.signal or "a rank that acts"

    def until_requested(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items until this rank should stop."""
        for item in items:
            if self.requested:
                return
            yield item

    def agreed(self) -> bool:
        """Whether any rank was asked to end. All ranks together."""
        self.meeting = True
        any_requested = bool(all_reduce_max(torch.tensor(float(self.requested))))
        self.meeting = any_requested
        return any_requested

    def end(self, message: str, say: Callable[[str], None] = say_last0) -> NoReturn:
        """Raise SystemExit with REQUEUE, and say on rank 0 why. All ranks have stopped and saved, and call it together.

        Args:
            say: is called on all ranks with the message.
        """
        self.meeting = True
        if rank() == 0:
            self.stop_file.unlink(missing_ok=True)
        say(f"{self.signal or self.stop_file}: {message}")
        raise SystemExit(REQUEUE)


class Preemption(StopRequest):
    """The StopRequest of a training run, which saves itself before it ends.

    Create it once the run folder exists. Until then a signal ends the process, because nothing has been trained yet.

    Args:
        keep: as for save_checkpoint().
        critic: the critic outside the engine. Fit it after the last call of exit_if_requested() in an iteration,
            because it is never undone.
        say: prints the last words of the run, such as Logger.close(). All ranks call it.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: Path,
        keep: int,
        critic: StateCritic | None = None,
        say: Callable[[str], None] = say_last0,
    ):
        self.engine, self.run_dir, self.keep, self.critic, self.say = engine, run_dir, keep, critic, say
        self.start = Snapshot()
        super().__init__(run_dir)

    def snapshot(self, iteration: int, global_step: int, env_states: list[dict]) -> None:
        """Copy an adapter or a small model at the start of an iteration. An interrupted iteration restores it."""
        self.began = (iteration, global_step, env_states)
        self.start.take(self.engine)

    def exit_if_requested(self, together: bool = True) -> None:
        """If any rank was asked to end: undo the iteration, save, and raise SystemExit with REQUEUE.

        All ranks make this call together, or it does nothing (together=False).
        """
        if not together or not self.agreed() or not self.start.can_restore(self.engine):
            return
        folder = checkpoint_dir(self.run_dir, self.began[0])
        if agree(damage(folder) if rank() == 0 else None):  # it is missing or incomplete
            self.start.restore(self.engine)
            save_checkpoint(self.engine, self.run_dir, *self.began, self.keep, self.critic)
        self.exit(folder)

    def exit(self, checkpoint: Path) -> NoReturn:
        """Raise SystemExit with REQUEUE after this checkpoint was written. All ranks together."""
        self.end(f"{checkpoint} is complete. Continue with --resume {self.run_dir}", self.say)
