"""Two ends of a wire in one process."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from vla.placement.wire import Wire


def two_wires() -> list[Wire]:
    """The wires of ranks 0 and 1, which meet in memory."""
    store, longest = dist.HashStore(), timedelta(seconds=60)
    with ThreadPoolExecutor(2) as ranks:  # each waits for the other
        return list(ranks.map(lambda rank: Wire(store, rank, 2, longest), range(2)))
