"""Passes over recorded data: which samples an update reads, and at which learning rate.

Both depend on the seed and the number of the update alone, so any number of ranks trains on the same batches.
"""

from functools import lru_cache

import torch

from schemas import UserError
from vla.training.engine import decay_at


def check_sizes(*, num_updates: int, updates_per_iteration: int, batch_size: int, world_size: int) -> None:
    """Raise UserError for sizes that do not divide."""
    if num_updates % updates_per_iteration:
        raise UserError(
            f"--num_updates {num_updates} is not a multiple of --updates_per_iteration {updates_per_iteration}: "
            "change one of them"
        )
    if batch_size % world_size:
        raise UserError(f"--batch_size {batch_size} is not divisible by {world_size} ranks: change one")


def learning_rate_at(
    update: int, *, num_updates: int, learning_rate: float, schedule: str, warmup_updates: int
) -> float:
    """Learning rate of an update (0 to num_updates - 1). It rises linearly, then follows the schedule."""
    if update < warmup_updates:
        return learning_rate * (update + 1) / (warmup_updates + 1)
    return learning_rate * decay_at(schedule, (update - warmup_updates) / max(num_updates - warmup_updates, 1))


@lru_cache(maxsize=1)  # called once per update
def order_of_pass(number: int, num_samples: int, seed: int) -> torch.Tensor:
    """The order of one pass over the data, int64 [num_samples]."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


def batch_indices(update: int, num_samples: int, batch_size: int, seed: int) -> torch.Tensor:
    """The samples of one update, int64 [batch_size]. Every pass over the data has a new order and drops its rest."""
    number, position = divmod(update, num_samples // batch_size)
    return order_of_pass(number, num_samples, seed)[position * batch_size : (position + 1) * batch_size]
