"""What ranks of different roles send to each other: Python values around raw tensors, over gloo.

A message is a small JSON header (vla/files/trees.py) and the bytes of its tensors. Nothing is pickled. The header and
small tensors travel together, and each large tensor by itself: a part takes 0.1 ms, however small it is.

gloo moves nothing until the receiver asks for it. So a message that was sent waits here, and send() returns at once. A
channel keeps at most WAITING_MESSAGES and WAITING_BYTES. Beyond that, send() waits for its oldest one.

    wire.send([7, {"image": images}], to=3, channel=STEPS)      # on rank 2
    wire.receive(source=2, channel=STEPS)                       # on rank 3

Ranks are those of the launcher. Messages of one channel between two ranks arrive in their order, and channels do not
wait for each other. One thread at a time uses a channel.
"""

import json
import threading
import time
from collections import defaultdict, deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vla.files.trees import decoded, encoded

FIRST = 4096  # bytes of the first part of every message: two lengths, and what fits of the header and small tensors
SMALL = 2**16  # bytes of a tensor that travels with the header
WAITING_MESSAGES = 32
WAITING_BYTES = 256 * 2**20
# channels. From STEPS on, there is one for each half-batch of envs
CALLS, EXPERIENCE, WORDS, STEPS = range(4)
NAMES = {CALLS: "observations", EXPERIENCE: "experience", WORDS: "weights"}  # and observations from STEPS on


class Received:
    """Tensors of a message by name, as decoded() asks for them."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.get_tensor = tensors.__getitem__


class Wire:
    """Messages between all ranks of a launch. All ranks make it together.

    Args:
        store: where the ranks meet. rank, ranks: of the launcher.
        timeout: longest time without a message, which must exceed the longest stage of an iteration.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, timeout: timedelta):
        self.rank, self.timeout = rank, timeout
        self.group = dist.ProcessGroupGloo(dist.PrefixStore("wire", store), rank, ranks, timeout)
        # (receiver, channel) -> messages on their way: each part with the work that sends it
        self.waiting: dict[tuple[int, int], deque[list]] = defaultdict(deque)
        self.bytes: dict[str, int] = defaultdict(int)  # received since pop_counts()
        self.seconds: dict[str, float] = defaultdict(float)  # that the tensors of messages took, without the wait
        self.counting = threading.Lock()  # channels have threads of their own

    def send(self, value: Any, to: int, channel: int) -> None:
        """Send a value as it is now: dicts, lists, tuples, numbers, texts, None, tensors and numpy arrays."""
        tensors: dict[str, torch.Tensor] = {}
        tree = encoded(value, tensors)  # tensors are copies
        kinds = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors.values()]
        header = torch.frombuffer(bytearray(json.dumps([tree, kinds]).encode()), dtype=torch.uint8)
        contents = [as_bytes(tensor) for tensor in tensors.values()]
        body = torch.cat([header, *(content for content in contents if len(content) <= SMALL)])
        first = torch.zeros(FIRST, dtype=torch.uint8)
        first[:16] = as_bytes(torch.tensor([len(header), len(body)]))
        inside = min(len(body), FIRST - 16)
        first[16 : 16 + inside] = body[:inside]
        parts = [first, body[inside:], *(content for content in contents if len(content) > SMALL)]
        waiting = self.waiting[to, channel]
        while waiting and (len(waiting) >= WAITING_MESSAGES or size_of(waiting) + size_of([parts]) > WAITING_BYTES):
            self._finish(waiting.popleft())
        waiting.append([(part, self.group.send([part], to, channel)) for part in parts if len(part)])

    def receive(self, source: int, channel: int) -> Any:
        """The next value that this rank sent. Waits for it.

        Raises:
            RuntimeError: the other rank has ended, or the timeout is over.
        """
        first = self._receive(FIRST, source, channel)
        began = time.perf_counter()
        header_length, length = first[:16].view(torch.int64).tolist()
        rest = length - (FIRST - 16)
        body = torch.cat([first[16:], self._receive(rest, source, channel)]) if rest > 0 else first[16 : 16 + length]
        tree, kinds = json.loads(bytes(body[:header_length].numpy()))
        tensors, place = {}, header_length
        for name, (dtype, shape) in enumerate(kinds):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.nbytes <= SMALL:
                as_bytes(tensor)[:] = body[place : place + tensor.nbytes]
                place += tensor.nbytes
            else:
                self.group.recv([as_bytes(tensor)], source, channel).wait()
            tensors[str(name)] = tensor
        boundary = NAMES.get(channel, NAMES[CALLS])
        size = length + sum(tensor.nbytes for tensor in tensors.values() if tensor.nbytes > SMALL)
        self.count(boundary, size, time.perf_counter() - began)
        return decoded(tree, Received(tensors))

    def flush(self, channel: int | None = None, seconds: float | None = None) -> None:
        """Wait until everything was received, in one channel or in all, for so many seconds at most."""
        longest = timedelta(seconds=seconds) if seconds else self.timeout
        for (_, used), waiting in self.waiting.items():
            while waiting and channel in (None, used):
                self._finish(waiting.popleft(), longest)

    def pop_counts(self) -> dict[str, float]:
        """{"bytes_<boundary>" and "seconds_<boundary>"} of what this rank received. Counting then starts again."""
        with self.counting:
            counts = {f"bytes_{name}": float(count) for name, count in self.bytes.items()}
            counts |= {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
            self.bytes.clear()
            self.seconds.clear()
        return counts

    def count(self, boundary: str, size: int, seconds: float) -> None:
        """Count bytes that arrived, and the seconds that they took."""
        with self.counting:
            self.bytes[boundary] += size
            self.seconds[boundary] += seconds

    def _receive(self, size: int, source: int, channel: int) -> torch.Tensor:
        part = torch.empty(size, dtype=torch.uint8)
        self.group.recv([part], source, channel).wait()
        return part

    def _finish(self, message: list, longest: timedelta | None = None) -> None:
        for _, work in message:
            work.wait(longest or self.timeout)  # is_completed() of a finished send stays False (torch 2.13)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 [bytes]. Both share their memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a gathered weight of one element has a stride of 0
    return flat.view(torch.uint8)


def size_of(messages: Any) -> int:
    """Bytes of messages, whose parts are tensors or pairs that begin with one."""
    parts = (part if isinstance(part, torch.Tensor) else part[0] for message in messages for part in message)
    return sum(part.nbytes for part in parts)
