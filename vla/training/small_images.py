"""Images of demonstrations at the model's size: each is read and resized once, and then kept in a file.

Every pass over a set needs every image. Reading one of 640 x 480 and resizing it takes 20 times as long as reading the
model's size from this file. The file is named after the set and what decides the bits, and lies in the user's
cache. All ranks of a machine share it, and so do later runs. Crops and colours are made afterwards, from the small
image (augmentation.py), so every pass has its own.

The files of all sets together take at most half of what would be free without them. A new set drops those that were
not used for longest, unless a run has them open. You can delete them all at any time.

A record is a checksum and an image. A record that is missing, or was written half, has a wrong sum and is made again.
So any number of processes write one file without a lock, and a process may die at any time.
"""

import contextlib
import fcntl
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from schemas.pixels import Pixels, resize
from vla.distributed import print0

SUM_BYTES = 8
SHARE_OF_DISK = 0.5  # of what would be free without these files
SUFFIX = ".images"  # of their names, by which the other sets' files are found
DEPTH = 2  # micro batches that are read ahead
Job = TypeVar("Job")
Result = TypeVar("Result")


class SmallImages:
    """Call it with B indices for their images, uint8 [B, h, w, 3].

    Args:
        read: images [B, H, W, 3] of the set at the camera's size, for B indices.
        count: number of images in the set.
        pixels: the model's size and resampling.
        file: where the small images are kept. If it cannot be written, they are read and resized every time.
    """

    def __init__(self, read: Callable[[list[int]], np.ndarray], count: int, pixels: Pixels, file: Path):
        self.read, self.pixels, self.file = read, pixels, file
        self.shape = (*pixels.size, 3)
        self.record = SUM_BYTES + int(np.prod(self.shape))  # bytes
        self.room = 0  # images 0 .. room - 1 have a place in the file
        self.writes = True
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            is_new = os.fstat(self.descriptor).st_size == 0
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is dropped
                fcntl.flock(self.descriptor, fcntl.LOCK_SH)  # in use, until the process ends
            os.utime(file)
            self.room = self._make_room(count)
        except OSError as error:
            self._say(f"cannot be written ({error.strerror}), so images are read and resized every time")
        else:
            if is_new:
                size = count * self.record / 1e9
                print0(f"{file} keeps the images of this set, {size:.1f} GB. You can delete it at any time")
            if self.room < count:
                self._say(f"has room for {self.room} of {count} images, the others are resized every time")

    def _make_room(self, count: int) -> int:
        """How many of the set's images may be kept. Drops files of other sets, the longest unused first."""
        others = [path for path in self.file.parent.glob(f"*{SUFFIX}") if path != self.file]
        unused = iter(sorted(others, key=last_use))
        while True:
            disk, own, theirs = os.fstatvfs(self.descriptor), taken(self.file), sum(map(taken, others))
            whole = SHARE_OF_DISK * (disk.f_bavail * disk.f_frsize + own + theirs)
            room = min(count, int(max(own, whole - theirs)) // self.record)
            oldest = next(unused, None)
            if room == count or oldest is None:
                return room
            drop_unless_open(oldest)

    def _say(self, what: str) -> None:
        print0(f"{self.file} {what}: set XDG_CACHE_HOME to a folder with {self.record} bytes per image")

    def __call__(self, index: list[int]) -> Tensor:
        images = {number: self._kept(number) for number in sorted(set(index))}
        missing = [number for number, image in images.items() if image is None]
        if missing:
            small = resize(torch.from_numpy(self.read(missing)), self.pixels.size, self.pixels.how)
            for number, image in zip(missing, small):
                images[number] = image
                self._keep(number, image)
        return torch.stack([images[number] for number in index])

    def _kept(self, number: int) -> Tensor | None:
        if number >= self.room:
            return None
        found = os.pread(self.descriptor, self.record, number * self.record)
        image = found[SUM_BYTES:]
        if len(found) < self.record or found[:SUM_BYTES] != checksum(image):
            return None
        return torch.frombuffer(bytearray(image), dtype=torch.uint8).view(self.shape)

    def _keep(self, number: int, image: Tensor) -> None:
        if number >= self.room or not self.writes:
            return
        content = image.numpy().tobytes()
        try:
            os.pwrite(self.descriptor, checksum(content) + content, number * self.record)
        except OSError as error:
            self.writes = False
            self._say(f"cannot grow ({error.strerror}), so the other images are resized every time")


def last_use(path: Path) -> float:
    """In seconds of the clock, 0 for a file that is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def taken(path: Path) -> int:
    """Bytes on the disk. A file with holes takes less than its size."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def drop_unless_open(path: Path) -> None:
    """Delete a set's file, unless a process has it open or it is another user's."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = taken(path) / 1e9
        path.unlink()
        print(f"{path}, {size:.1f} GB, was deleted: images of a set that was not used for long", flush=True)
    except OSError:
        return
    finally:
        os.close(descriptor)


def checksum(content: bytes) -> bytes:
    """SUM_BYTES that no hole of a file has: a hole reads as zeros."""
    return (zlib.crc32(content) + 1).to_bytes(SUM_BYTES, "little")


def read_ahead(read: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    """Every job with read(job), in order. A thread reads the next ones while the caller uses the last.

    What read() raises is raised here, at its job.
    """
    pool, waiting = ThreadPoolExecutor(1, "read_ahead"), deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(read, job)))
            if len(waiting) > DEPTH:
                job_now, result = waiting.popleft()
                yield job_now, result.result()
        for job, result in waiting:
            yield job, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
