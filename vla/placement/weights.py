"""Weights on their way from the first rank that trains to ranks that only act, once per rollout and evaluation.

Trained parameters are gathered one at a time and broadcast in the model's number format: over NCCL if every one of
these ranks has a GPU, else over gloo. Frozen ones are what every rank has loaded.

With --rollout_ahead 1 they are sent before an update instead of after it. Ranks that act then use weights that are one
update old, and act while the others train.
"""

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vla.distributed import Engine, all_reduce_max, all_reduce_sum, to_group_device
from vla.placement.wire import WORDS, Wire, as_bytes
from vla.training.critics import HiddenCritic, StateCritic
from vla.training.engine import NonFiniteGuard
from vla.training.stages import GIB, StageSwitcher, trained_parameters

# what crosses -> its metrics: seconds and GiB
TAGS = {
    "observations": ("time/wire_observations", "time/wire_observations_gib"),
    "experience": ("time/wire_experience", "time/wire_experience_gib"),
    "weights": ("time/wire_weights", "time/wire_weights_gib"),
}


class Broadcast:
    """One tensor at a time from the first member to all others.

    Args:
        members: ranks of the launcher, the sender first. rank: this one.
        wire: counts seconds, and where tensors arrive bytes.
    """

    def __init__(self, store: dist.Store, members: list[int], rank: int, timeout: timedelta, wire: Wire):
        self.wire = wire
        store = dist.PrefixStore("weights", store)
        store.set(f"device of {rank}", to_group_device(torch.zeros(1)).device.type)
        self.on_gpus = all(store.get(f"device of {member}") == b"cuda" for member in members)
        number, size = members.index(rank), len(members)
        self.sends = number == 0
        if self.on_gpus:
            options = dist.ProcessGroupNCCL.Options()
            self.group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), number, size, options)
        else:
            self.group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), number, size, timeout)

    def __call__(self, tensor: torch.Tensor) -> None:
        """Send the tensor, or fill it."""
        began = time.perf_counter()
        data = tensor.detach().contiguous()
        moved = data if self.on_gpus else data.cpu()
        self.group.broadcast([moved if self.on_gpus else as_bytes(moved)]).wait()
        if moved.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(moved)
        self.wire.count("weights", 0 if self.sends else moved.nbytes, time.perf_counter() - began)


class WiredStages(StageSwitcher):
    """The stages of a rank that trains in a placement, with what crossed between ranks among their metrics.

    These count from the beginning of a rollout to that of its update. What crosses in an evaluation does not count.
    """

    def __init__(self, engine: Engine, rollout_copy: nn.Module | None, offload: str, wire: Wire):
        super().__init__(engine, rollout_copy, offload)
        self.wire = wire
        # of this rank, and of ranks that do not train, as they came with their experience
        self.counts: list[dict[str, float]] = []

    def to_rollout(self) -> nn.Module:
        self.wire.pop_counts()  # of an evaluation, or of the start
        return super().to_rollout()

    @contextlib.contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        if stage == "update":
            self.counts.append(self.wire.pop_counts())
        with super().measured(stage):
            yield

    def pop_metrics(self) -> dict[str, float]:
        """Also time/wire_<boundary> in seconds, of the rank that took longest, and time/wire_<boundary>_gib of all."""
        counts, self.counts = self.counts, []
        metrics = super().pop_metrics()
        seconds = [max((count.get(f"seconds_{name}", 0.0) for count in counts), default=0.0) for name in TAGS]
        sizes = [sum(count.get(f"bytes_{name}", 0.0) for count in counts) / GIB for name in TAGS]
        slowest, total = all_reduce_max(torch.tensor(seconds)), all_reduce_sum(torch.tensor(sizes))
        for (of_seconds, of_sizes), longest, size in zip(TAGS.values(), slowest.tolist(), total.tolist()):
            metrics |= {of_seconds: longest, of_sizes: size}
        return metrics


class SendingStages(WiredStages):
    """The stages of a rank that trains, while others act.

    Args:
        broadcast: of the first rank that trains. None elsewhere.
        receivers: ranks that only act.
    """

    def __init__(self, engine: Engine, wire: Wire, broadcast: Broadcast | None, receivers: list[int]):
        super().__init__(engine, None, "none", wire)
        self.broadcast, self.receivers = broadcast, receivers
        self.critic: StateCritic | HiddenCritic | None = None
        self.sent = False  # whether the weights of the next rollout are on their way already
        self.was_sent = False  # whether those of the present one were
        self.staleness = 0.0  # updates that the weights of the latest rollout were old

    def to_rollout(self) -> nn.Module:
        """Send the weights unless they were sent before the update. The policy that this returns does not act."""
        self.wire.pop_counts()
        self.was_sent, self.sent = self.sent, False
        if not self.was_sent:
            self.send()
        return self.engine.module

    def send(self) -> None:
        """Send the trained weights as they are. All ranks that train together."""
        if self.broadcast is not None:
            critic = self.critic.weights() if isinstance(self.critic, StateCritic) else None
            for receiver in self.receivers:
                self.wire.send({"critic": critic}, receiver, WORDS)
        for parameter in trained_parameters(self.engine):
            if self.broadcast is not None:
                self.broadcast(parameter)


STALE = {  # names of metrics, and those under which they stand if the weights that acted were older
    "train/actor/ratio_first_microbatch_error": "train/actor/stale_ratio_first_microbatch_error",
    "train/actor/ratio_first_microbatch_mean": "train/actor/stale_ratio_first_microbatch_mean",
    "train/actor/ratio_first_microbatch_std": "train/actor/stale_ratio_first_microbatch_std",
}


class StaleGuard(NonFiniteGuard):
    """A guard under --rollout_ahead 1: the ratios of a rollout with older weights have names of their own."""

    def __init__(self, run_dir: Path, rank: int, stages: SendingStages):
        super().__init__(run_dir, rank)
        self.stages = stages

    def pop_metrics(self) -> dict[str, float]:
        metrics = super().pop_metrics() | {"rollout/staleness": self.stages.staleness}
        if self.stages.staleness:
            metrics |= {stale: metrics.pop(name) for name, stale in STALE.items()}
        return metrics


class ReceivingStages(WiredStages):
    """The stages of a rank that only acts.

    Args:
        policy: becomes frozen under ZeRO-3, like the copy that acts in other placements: otherwise the last bits of
            its outputs would differ.
        sender: the first rank that trains.
    """

    def __init__(self, policy: nn.Module, zero_stage: int, wire: Wire, broadcast: Broadcast, sender: int):
        super().__init__(None, policy, "none", wire)
        self.broadcast, self.sender = broadcast, sender
        self.critic: StateCritic | HiddenCritic | None = None
        self.trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if zero_stage == 3:
            policy.requires_grad_(False)

    def to_rollout(self) -> nn.Module:
        """The policy with the weights that come next. Raises SystemExit if the run ends instead."""
        self.wire.pop_counts()
        message: dict[str, Any] = self.wire.receive(self.sender, WORDS)
        if "end" in message:
            raise SystemExit(message["end"])
        if message["critic"] is not None:
            self.critic.load_weights(message["critic"])
        for parameter in self.trained:
            self.broadcast(parameter)
        return self.rollout_copy
