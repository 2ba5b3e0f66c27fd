"""What a rank does in a run: everything (`Together`), or its part of a placement (`Apart`). The scripts use both alike.

Ranks that train are a world of their own, joined before DeepSpeed starts, because ZeRO-3 (DeepSpeed 0.19.8) has
collectives that take no group. rank(), world_size(), reductions, checkpoints and requests to stop mean that world.
Ranks that only act are another world. Ranks that only simulate answer calls, and end when they are told to.

                         train                    only act                        only simulate
    rollout              get experience           get weights, send experience    answer
    advantage, update    as always                wait for weights                wait for calls
    evaluation           get the episodes         play and record them            answer
    checkpoint, log      write                    -                               -

A rank that trains may also simulate or act. If all ranks that act also train, weights are gathered as always
(vla/training/stages.py). Otherwise the first rank that trains sends them (weights.py).
"""

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from schemas import UserError
from schemas.pixels import Pixels
from vla.cli import Sizes, derive_sizes
from vla.distributed import REQUEUE, Engine, print0, where_ranks_meet
from vla.evaluation.vector_env import VectorEnv
from vla.placement.assignment import Assigner
from vla.placement.rules import Placement, parse_placement, ranks_by_roles, shown
from vla.placement.weights import Broadcast, ReceivingStages, SendingStages, WiredStages
from vla.placement.wire import CALLS, EXPERIENCE, STEPS, WORDS, Wire
from vla.start.launch import Launch, launched
from vla.training.checkpoint import begin_run, open_run
from vla.training.preemption import StopRequest
from vla.training.stages import StageSwitcher, make_rollout_copy

DOES = {"env": "simulate", "rollout": "act", "actor": "train"}
END_SECONDS = 60.0  # for the other ranks to hear that the run ends


def placed(words: Sequence[str], offload: str, rollout_ahead: int, ends: ModuleType) -> "Together | Apart":
    """What this rank does. Raises UserError for a placement that makes no sense.

    ends: the module envs.remote, which vla does not import.
    """
    launch = launched()
    placement = parse_placement(words, launch.world_size)
    if rollout_ahead and not placement.sends_weights:
        raise UserError(
            f"--rollout_ahead {rollout_ahead} needs ranks that act and do not train: give some, as in --placement "
            "env,rollout=0 actor=1"
        )
    if placement.together:
        return Together(launch.world_size)
    if placement.sends_weights and offload == "stage":
        raise UserError(
            "--offload stage makes room for a policy that acts beside its own update, and no rank of this --placement "
            "does both: leave it out"
        )
    return Apart(placement, launch, ends)


class Together:
    """A rank that does everything, like all others."""

    simulates = acts = trains = True
    only_simulates = False
    assigns = False  # whether ranks train on what others saw
    roles = None  # of a placement: ranks, and what they do
    meet = staticmethod(where_ranks_meet)

    def __init__(self, ranks: int):
        self.ranks = ranks

    def sizes(self, **flags: Any) -> Sizes:
        """derive_sizes() of this rank."""
        return derive_sizes(**flags)

    def in_words(self, sizes: str) -> str:
        """The sizes of this rank's world in words, with the placement if there is one."""
        return sizes

    def say(self, text: str) -> None:
        """Print a text once, on the first rank that trains."""
        print0(text)

    def here(self, role: str, launch: Launch) -> int:
        """Number of ranks with this role on this machine."""
        return launch.ranks_here

    def open_run(self, *arguments: Any) -> tuple[Path, Path | None]:
        """open_run() of vla/training/checkpoint.py."""
        return open_run(*arguments)

    def begin_run(self, run_dir: Path, checkpoint: Path | None) -> None:
        begin_run(run_dir, checkpoint)

    def envs(self, make: Callable[..., VectorEnv], own: Pixels | None, sent: Pixels) -> VectorEnv:
        """The envs of training.

        Args:
            own: as make_envs() takes them, for images that this rank reads itself.
            sent: the images that travel.
        """
        return make(pixels=own)

    def eval_envs(
        self, make: Callable[..., VectorEnv], num_envs: int, envs: VectorEnv, own: Pixels | None
    ) -> tuple[VectorEnv, Callable]:
        """The envs of evaluation, and what makes such envs for recording."""
        return make(num_envs=num_envs, beside=envs, pixels=own), partial(make, beside=envs)

    def stages(self, policy: nn.Module, build: Callable[[], Engine], zero_stage: int, offload: str) -> StageSwitcher:
        """The stages of an iteration, with the engine that `build` makes of the policy."""
        rollout_copy = make_rollout_copy(policy, zero_stage, offload)
        return StageSwitcher(build(), rollout_copy, offload)

    def shared(self, obs: dict, envs: VectorEnv) -> dict:
        """The first observation of these envs, or one of another rank's where this rank has no envs."""
        return obs

    def stopper(self, make: Callable[[], StopRequest], run_dir: Path, stages: StageSwitcher) -> Any:
        """The Preemption that `make` makes."""
        return make()

    def agreed(self, function: Callable, *arguments: Any) -> Any:
        """What the function returns on the ranks that train."""
        return function(*arguments)

    def played(self, function: Callable, *arguments: Any) -> Any:
        """What the function returns on the ranks that play evaluations."""
        return function(*arguments)

    def assigner(self, *arguments: Any) -> None:
        """Nothing is assigned: every rank trains on what it saw."""

    def end(self, cause: BaseException) -> None:
        """Tell ranks that wait for this one that the run ends."""

    def close(self) -> None:
        """Wait until other ranks have received everything."""


class Apart:
    """A rank of a placement in which ranks differ."""

    def __init__(self, placement: Placement, launch: Launch, ends: ModuleType):
        self.ends, self.placement, self.ranks, self.rank = ends, placement, launch.world_size, launch.rank
        first = launch.rank // launch.ranks_here * launch.ranks_here
        self.machine = range(first, first + launch.ranks_here)  # ranks on this rank's machine
        self.simulates = self.rank in placement.env
        self.acts = self.rank in placement.rollout
        self.trains = self.rank in placement.actor
        self.only_simulates = not (self.acts or self.trains)
        self.assigns = placement.rollout != placement.actor
        self.remote: VectorEnv | None = None  # envs at a rank that only simulates
        self.broadcast: Broadcast | None = None

    # ------------------------------------------------------------------ set-up
    def sizes(self, *, num_envs: int, group_size: int, **flags: Any) -> Sizes:
        """The sizes of this rank's roles: envs that it simulates or acts in, and envs that it trains on."""
        placement, pairs = self.placement, len(self.placement.rollout)
        own = dict(rank=placement.actor.index(self.rank) if self.trains else 0, world_size=len(placement.actor))
        sizes = derive_sizes(**flags | own, num_envs=num_envs, group_size=group_size)
        if num_envs % pairs:
            raise UserError(f"--num_envs {num_envs} is not divisible by {pairs} rollout ranks: use a multiple of them")
        acted = num_envs // pairs
        if acted % group_size:
            raise UserError(
                f"--group_size {group_size} does not divide the {acted} envs of a rollout rank: change one of them"
            )
        pair = None
        if self.acts or self.simulates:
            pair = (placement.rollout if self.acts else placement.env).index(self.rank)
        self.num_envs = num_envs
        players = len(placement.actor) if placement.plays_everywhere else pairs
        eval_envs, workers = max(1, flags["num_eval_envs"] // players), flags["num_env_workers"]
        return replace(
            sizes,
            local_num_envs=0 if pair is None else acted,
            first_env=0 if pair is None else pair * acted,
            local_num_eval_envs=eval_envs,
            num_env_workers=min(workers, acted),
            num_eval_env_workers=min(workers, eval_envs),
        )

    @property
    def roles(self) -> list[list[str]]:
        found = ranks_by_roles(self.placement).items()
        return [[shown(ranks), " and ".join(DOES[role] for role in roles)] for roles, ranks in found]

    def in_words(self, sizes: str) -> str:
        return f"{sizes}\nroles   {self.placement}"

    def say(self, text: str) -> None:
        if self.trains:
            print0(text)

    def here(self, role: str, launch: Launch) -> int:
        return sum(rank in self.machine for rank in getattr(self.placement, role))

    def meet(self) -> str:
        """Join the wire. Returns the init_method of this rank's own world (torch.distributed)."""
        timeout = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
        store = next(rendezvous(where_ranks_meet() or "env://", timeout=timeout))[0]
        self.wire = Wire(store, self.rank, self.ranks, timeout)
        receivers = self.placement.only_act
        members = [self.placement.actor[0], *receivers]
        if receivers and self.rank in members:
            self.broadcast = Broadcast(store, members, self.rank, timeout, self.wire)
        name, world = self._world()

        def own_world(url: str, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
            yield dist.PrefixStore(name, store), world.index(self.rank), len(world)

        dist.register_rendezvous_handler("placement", own_world)
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.index(self.rank)), str(len(world))
        os.environ["LOCAL_WORLD_SIZE"] = str(sum(rank in self.machine for rank in world))
        # DeepSpeed's shared memory is named after these numbers, so only one world may have it
        os.environ.pop("LOCAL_SIZE", None)
        if self.trains:
            os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
        return "placement://"

    def _world(self) -> tuple[str, list[int]]:
        """The name and the ranks of this rank's world."""
        if self.trains:
            return "train", [*self.placement.actor]
        if self.acts:
            return "act", self.placement.only_act
        return "simulate", self.placement.only_simulate

    def open_run(self, *arguments: Any) -> tuple[Path, Path | None]:
        run_dir, checkpoint = self.agreed(lambda: [path and str(path) for path in open_run(*arguments)])
        return Path(run_dir), checkpoint and Path(checkpoint)

    def begin_run(self, run_dir: Path, checkpoint: Path | None) -> None:
        if self.trains:
            begin_run(run_dir, checkpoint)

    # ------------------------------------------------------------------ envs
    def line(self) -> "PairLine":
        return PairLine(self.wire, self.placement.partner(self.rank))

    def envs(self, make: Callable[..., VectorEnv], own: Pixels | None, sent: Pixels) -> VectorEnv:
        if self.simulates and self.acts:
            return make(pixels=own)
        if self.simulates:
            return self.ends.ServedEnvs(self.ends.Service(make(pixels=sent), self.line(), sent))
        if not self.acts:
            return self.ends.NoEnvs()
        alone = self.placement.partner(self.rank) in self.placement.only_simulate
        envs = self.ends.RemoteEnvs(self.line(), keeps_states=alone)
        self.remote = envs if alone else None
        return envs

    def eval_envs(
        self, make: Callable[..., VectorEnv], num_envs: int, envs: VectorEnv, own: Pixels | None
    ) -> tuple[VectorEnv, Callable]:
        """See Together. In a hybrid placement all ranks train, so each of them has whole weights and plays a share."""
        if self.remote is not None:
            numbers = itertools.count(2)
            opened = self.remote.open(1, True, num_envs=num_envs)
            return opened, lambda **settings: self.remote.open(next(numbers), False, **settings)
        if self.acts or self.placement.plays_everywhere:
            beside = envs.service.opened[0] if isinstance(envs, self.ends.ServedEnvs) else envs
            beside = beside if beside.workers else None
            return make(num_envs=num_envs, beside=beside, pixels=own), partial(make, beside=beside)
        return self.ends.NoEnvs(), make

    def simulate(self, make: Callable[..., VectorEnv], make_eval: Callable[..., VectorEnv], sent: Pixels) -> None:
        """Simulate for the rank that acts, until it says that the run ends. Raises SystemExit with its exit code."""
        envs = make(pixels=sent)
        service = self.ends.Service(envs, self.line(), sent, partial(make_eval, beside=envs if envs.workers else None))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # those that train decide, and say it
            signal.signal(number, lambda *_: None)
        try:
            code = service.calls()
        finally:
            service.close()
        if code:
            raise SystemExit(code)

    def shared(self, obs: dict | None, envs: VectorEnv) -> dict:
        """See Together. The states of the envs go to the ranks that save them, if their own ranks do not train."""
        placement, wire = self.placement, self.wire
        if self.rank == placement.rollout[0]:
            for other in placement.only_train:
                wire.send({name: value[:1] for name, value in obs.items()}, other, EXPERIENCE)
        if self.rank in placement.only_train:
            obs = wire.receive(placement.rollout[0], EXPERIENCE)
        if placement.sends_weights:
            keepers = placement.keepers(self.num_envs)
            if self.acts:
                wire.send(envs.state_dict(), keepers[self.rank], EXPERIENCE)
            else:
                kept = [wire.receive(rank, EXPERIENCE) for rank, keeper in keepers.items() if keeper == self.rank]
                envs.states = [state for states in kept for state in states]
        return obs

    # ------------------------------------------------------------------ the run
    def stages(self, policy: nn.Module, build: Callable[[], Engine], zero_stage: int, offload: str) -> StageSwitcher:
        if not self.placement.sends_weights:
            rollout_copy = make_rollout_copy(policy, zero_stage, offload)
            return WiredStages(build(), rollout_copy, offload, self.wire)
        if self.trains:
            return SendingStages(build(), self.wire, self.broadcast, self.placement.only_act)
        return ReceivingStages(policy, zero_stage, self.wire, self.broadcast, self.placement.actor[0])

    def stopper(self, make: Callable[[], StopRequest], run_dir: Path, stages: StageSwitcher) -> Any:
        return make() if self.trains else Bystander(run_dir, stages)

    def assigner(self, *arguments: Any) -> Assigner | None:
        """What gives ranks that train what others saw, or None if every rank trains on what it saw itself."""
        if not self.assigns:
            return None
        return Assigner(self.placement, self.rank, self.num_envs, self.wire, *arguments)

    def agreed(self, function: Callable, *arguments: Any) -> Any:
        return self._told(self.placement.actor, self.placement.only_act, function, *arguments)

    def played(self, function: Callable, *arguments: Any) -> Any:
        if not self.placement.sends_weights:  # ranks that train play
            return function(*arguments)
        return self._told(self.placement.rollout, self.placement.actor, function, *arguments)

    def _told(self, callers: range, hearers: Sequence[int], function: Callable, *arguments: Any) -> Any:
        """What the function returns on the ranks that call it. Their first one tells the hearers."""
        if self.rank not in callers:
            return self.wire.receive(callers[0], EXPERIENCE)
        result = function(*arguments)
        if self.rank == callers[0]:
            for other in hearers:
                self.wire.send(result, other, EXPERIENCE)
        return result

    def end(self, cause: BaseException) -> None:
        """Tell ranks that wait for this one that the run has saved itself. Of other ends, the launcher tells them."""
        code = cause.code if isinstance(cause, SystemExit) else None
        if code != REQUEUE:
            return
        if self.trains and self.rank == self.placement.actor[0]:
            for other in self.placement.only_act:
                self.wire.send({"end": code}, other, WORDS)
            self.wire.flush(WORDS, END_SECONDS)
        if self.remote is not None:
            self.remote.end(code)
            self.wire.flush(CALLS, END_SECONDS)

    def close(self) -> None:
        self.wire.flush()


class Bystander(StopRequest):
    """Requests to stop, on a rank that only acts. It cuts its rollout short. What follows is up to ranks that train."""

    def __init__(self, run_dir: Path, stages: StageSwitcher):
        super().__init__(run_dir)
        self.stages = stages

    def snapshot(self, *start: Any) -> None:
        """Nothing is trained here."""

    def exit_if_requested(self, together: bool = True) -> None:
        """Those that train tell this rank in place of the next weights."""

    def exit(self, checkpoint: Path) -> None:
        """Wait until those that train have saved. Raises SystemExit with REQUEUE."""
        self.stages.to_rollout()


class PairLine:
    """The line between an env rank and its rollout rank (envs/remote.py)."""

    def __init__(self, wire: Wire, other: int):
        self.wire, self.other = wire, other

    def send(self, value: Any, half: int | None = None) -> None:
        self.wire.send(value, self.other, CALLS if half is None else STEPS + half)

    def receive(self, half: int | None = None) -> Any:
        return self.wire.receive(self.other, CALLS if half is None else STEPS + half)
