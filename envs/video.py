"""Videos of N camera images per step, tiled into one frame and streamed into an h264 file. No frame is kept in memory.

Captions are in a strip above each image, so they cover nothing of it.

with VideoWriter("run/eval.mp4") as video:
    video.add(obs["image"], captions=[["put carrot on plate", "t=3"], ...])
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import torch

MIN_TILE_HEIGHT = 240  # smaller images are enlarged by a whole factor, so that captions can be read
LINE_HEIGHT, MARGIN = 14, 4
MAX_CAPTION = 500  # characters of a line that are used
CAPTION_ROWS = 4  # the same for all, because the frames of a video have one size: two for a long instruction, two more


def _fitted(lines: Sequence[str], width: float, length: Callable[[str], float]) -> list[str]:
    """Break `lines` at spaces to fit `width` pixels. The longest line is cut where they need more than CAPTION_ROWS.

    length: width of a text in pixels.
    """
    blocks = [_wrapped(line[:MAX_CAPTION], width, length) for line in lines]  # the rows of each line
    while sum(map(len, blocks)) > CAPTION_ROWS and max(map(len, blocks)) > 1:
        longest = max(blocks, key=len)
        longest.pop()
        longest[-1] = longest[-1].removesuffix(" ...") + " ..."
    return [row for block in blocks for row in block][:CAPTION_ROWS]


def _wrapped(line: str, width: float, length: Callable[[str], float]) -> list[str]:
    """One line as rows of at most `width` pixels. A longer word gets a row of its own."""
    rows = [""]
    for word in line.split():
        joined = f"{rows[-1]} {word}".strip()
        if rows[-1] and length(joined) > width:
            rows.append(word)
        else:
            rows[-1] = joined
    return rows


class VideoWriter:
    """A video file, as a context manager. It is complete once closed. 5 fps is real time: one frame a control step."""

    def __init__(self, path: str | os.PathLike, fps: int = 5):
        self.path, self.fps = os.fspath(path), fps
        self._writer = None
        self._frame_shape: tuple[int, ...] | None = None

    def add(self, images: torch.Tensor | np.ndarray, captions: Sequence[Sequence[str]] | None = None) -> None:
        """Add one frame of images uint8 [N, H, W, 3]. captions: N lists of short lines."""
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 [N, H, W, 3].")
        if captions is not None and len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} images: give one list of lines per image.")
        lines = captions if captions is not None else [None] * len(images)
        frame = self._grid([self._tile(image, caption) for image, caption in zip(images, lines)])
        if self._frame_shape not in (None, frame.shape):
            raise ValueError(
                f"this frame is {frame.shape}, earlier ones are {self._frame_shape}: keep number and size of images."
            )
        if self._writer is None:
            self._frame_shape = frame.shape
            self._writer = self._open()
        self._writer.append_data(frame)

    def _open(self) -> imageio.core.format.Format.Writer:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        return imageio.get_writer(
            self.path,
            format="FFMPEG",
            fps=self.fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,  # yuv420p needs even sides
        )

    @staticmethod
    def _tile(image: np.ndarray, lines: Sequence[str] | None) -> np.ndarray:
        """One image, enlarged if it is small, below its caption if it has one: uint8 [h, w, 3]."""
        factor = max(1, math.ceil(MIN_TILE_HEIGHT / image.shape[0]))
        large = image.repeat(factor, axis=0).repeat(factor, axis=1)
        if lines is None:
            return large
        strip = Image.new("RGB", (large.shape[1], CAPTION_ROWS * LINE_HEIGHT + MARGIN))
        draw = ImageDraw.Draw(strip)
        for row, line in enumerate(_fitted(lines, strip.width - 2 * MARGIN, draw.textlength)):
            draw.text((MARGIN, MARGIN // 2 + row * LINE_HEIGHT), line, fill=(255, 255, 255))
        return np.concatenate([np.asarray(strip), large])

    @staticmethod
    def _grid(tiles: list[np.ndarray]) -> np.ndarray:
        """All tiles in one nearly square frame with even sides, black where there is no tile: uint8 [H, W, 3]."""
        columns = math.ceil(math.sqrt(len(tiles)))
        rows = math.ceil(len(tiles) / columns)
        height, width, _ = tiles[0].shape
        frame = np.zeros((_even(rows * height), _even(columns * width), 3), np.uint8)
        for i, tile in enumerate(tiles):
            top, left = i // columns * height, i % columns * width
            frame[top : top + height, left : left + width] = tile
        return frame

    def close(self) -> None:
        """Finish the file. A second call does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _even(size: int) -> int:
    """The next even number."""
    return size + size % 2
