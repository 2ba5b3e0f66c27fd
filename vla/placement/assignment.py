"""Assigns a rollout: every rank that trains gets the envs that it trains on, whoever acted in them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vla.logger import due
from vla.placement.rules import Placement
from vla.placement.weights import SendingStages, WiredStages
from vla.placement.wire import EXPERIENCE, Wire
from vla.training.critics import HiddenCritic, StateCritic
from vla.training.rollout_buffer import RolloutBuffer


def goes_ahead(iteration: int, *, rollout_ahead: int, num_iterations: int, eval_freq: int, save_freq: int) -> bool:
    """Whether the next rollout begins before the update of this iteration.

    It does not where an evaluation needs the ranks that act. Nor does it before a checkpoint, so that a run which
    resumes there goes on like one that was not stopped.
    """
    ends = due(iteration, eval_freq, num_iterations) or due(iteration, save_freq, num_iterations)
    return rollout_ahead > 0 and not ends


class Assigner:
    """Moves columns of buffers from ranks that act to ranks that train.

    A rank that acts keeps `seen`, and a rank that trains `trained`. A rank may be both, with other envs.

    Args:
        num_envs: over all ranks.
        envs: theirs get the states that came with a rollout, where the ranks of the envs do not train.
        stopper: learns that another rank was asked to stop.
        critic: its states are assigned, too.
        ahead: whether the weights of the next rollout are sent before the update of this iteration.
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        num_envs: int,
        wire: Wire,
        seen: RolloutBuffer,
        trained: RolloutBuffer,
        envs: Any,
        stopper: Any,
        stages: WiredStages,
        critic: StateCritic | HiddenCritic | None = None,
        ahead: Callable[[int], bool] = lambda iteration: False,
    ):
        self.rank, self.wire, self.seen, self.trained = rank, wire, seen, trained
        self.envs, self.stopper, self.stages, self.ahead = envs, stopper, stages, ahead
        self.parts, self.keepers = placement.overlaps(num_envs), placement.keepers(num_envs)
        self.sends_weights = placement.sends_weights
        self.critic = critic if isinstance(critic, StateCritic) else None
        if self.critic is not None:
            self.critic.fitted = self.critic.states.new_zeros(
                self.critic.states.shape[0], trained.num_envs, *self.critic.states.shape[2:]
            )
            stages.critic = critic

    def assign(self, iteration: int, episodes: list[dict], *columns: Tensor) -> tuple:
        """Give every rank that trains its envs. All ranks together that act or train.

        Args:
            episodes: statistics of the episodes that ended on this rank.
            columns: [N, ...], one row for each env that this rank acted in.

        Returns:
            the episodes that this rank logs, and the rows of the envs that it trains on.
        """
        sources = [self.seen.fields[name] for name in self.trained.fields]  # [T, N, ...]
        targets = list(self.trained.fields.values())
        if self.critic is not None:
            sources.append(self.critic.states)
            targets.append(self.critic.fitted)
        assigned = [column.new_zeros(self.trained.num_envs, *column.shape[1:]) for column in columns]
        sources += [column[None] for column in columns]
        targets += [column[None] for column in assigned]
        own = [part for part in self.parts if part.rollout == part.actor == self.rank]
        for part in self.parts:
            if part.rollout == self.rank != part.actor:
                for source in sources:
                    self.wire.send(source[:, part.acted], part.actor, EXPERIENCE)
        said = self._say(episodes)
        for part in own:
            for source, target in zip(sources, targets):
                target[:, part.trained] = source[:, part.acted]
        for part in self.parts:
            if part.actor == self.rank != part.rollout:
                for target in targets:
                    target[:, part.trained] = self.wire.receive(part.rollout, EXPERIENCE)
        kept = self._hear(said)
        if isinstance(self.stages, SendingStages):
            self.stages.staleness = float(self.stages.was_sent)
            if self.ahead(iteration):
                self.stages.send()
                self.stages.sent = True
        return kept, *assigned

    def _say(self, episodes: list[dict]) -> dict | None:
        """Send what a rollout says once to the rank that keeps it. Returns it if that is this rank."""
        keeper = self.keepers.get(self.rank)
        if keeper is None:
            return None
        stopped = self.stopper.requested  # in the middle of steps, whose states nobody needs
        said = {"episodes": episodes, "stopped": stopped}
        if self.sends_weights:
            said |= {"states": [] if stopped else self.envs.state_dict(), "counts": self.wire.pop_counts()}
        if keeper == self.rank:
            return said
        self.wire.send(said, keeper, EXPERIENCE)
        return None

    def _hear(self, own: dict | None) -> list[dict]:
        """What ranks that acted say once. Returns their episodes, in the order of envs."""
        everything = [
            own if rank == self.rank else self.wire.receive(rank, EXPERIENCE)
            for rank, keeper in self.keepers.items()
            if keeper == self.rank
        ]
        if any(said["stopped"] for said in everything):
            self.stopper.hear()
        elif self.sends_weights and everything:
            self.envs.states = [state for said in everything for state in said["states"]]
            self.stages.counts += [said["counts"] for said in everything]
        return [episode for said in everything for episode in said["episodes"]]
