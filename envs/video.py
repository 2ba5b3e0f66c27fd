"""N camera pictures per step, tiled into one frame, captioned and streamed into an h264 file. Keeps no frames.

Captions stand in a strip above each picture, so they cover nothing of it.

with VideoWriter("run/eval.mp4") as video:
    video.add(obs["image"], captions=[["put carrot on plate", "t=3"], ...])
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw

MIN_TILE_HEIGHT = 240  # smaller pictures are enlarged by a whole factor, so that captions can be read
LINE_HEIGHT, MARGIN = 14, 4
MAX_CAPTION = 500  # characters of a line that are looked at
MAX_CHARACTERS = 400  # of a caption's line: more than fits into all rows
CAPTION_ROWS = 4  # fixed, because a video's frames all have one size: a long instruction takes two, step and outcome


def drawable(line: str) -> str:
    """What the font may be asked to draw: a caption is data, whoever wrote it. What cannot be printed becomes "?"."""
    cut = line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]} ..."
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in cut)


def _fitted(lines: Sequence[str], width: float, length: Callable[[str], float]) -> list[str]:
    """`lines` broken at spaces to fit `width` pixels, at most CAPTION_ROWS; the longest one is cut short for that."""
    blocks = []
    for line in lines:
        block = [""]
        for word in line[:MAX_CAPTION].split():
            joined = f"{block[-1]} {word}".strip()
            if block[-1] and length(joined) > width:
                block.append(word)
            else:
                block[-1] = joined
        blocks.append(block)
    while sum(map(len, blocks)) > CAPTION_ROWS and max(map(len, blocks)) > 1:
        longest = max(blocks, key=len)
        longest.pop()
        longest[-1] = longest[-1].removesuffix(" ...") + " ..."
    return [row for block in blocks for row in block][:CAPTION_ROWS]


class VideoWriter:
    """Context manager; the file is complete when it closes. fps 5 = real time, one frame per control step."""

    def __init__(self, path: str | os.PathLike, fps: int = 5):
        self.path, self.fps = os.fspath(path), fps
        self._writer = None
        self._frame_shape: tuple[int, ...] | None = None

    def add(self, images, captions: Sequence[Sequence[str]] | None = None) -> None:
        """One frame: images uint8 [N, H, W, 3] (torch or numpy), captions N lists of short lines."""
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 [N, H, W, 3].")
        if captions is not None and len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} images: give one list of lines per image.")
        tiles = [self._tile(image, captions[i] if captions is not None else None) for i, image in enumerate(images)]
        frame = self._grid(tiles)
        if self._frame_shape not in (None, frame.shape):
            raise ValueError(
                f"this frame is {frame.shape}, the video's are {self._frame_shape}: keep number and size of images."
            )
        if self._writer is None:
            self._frame_shape = frame.shape
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            # macro_block_size 2: yuv420p needs even sides, nothing more
            self._writer = imageio.get_writer(
                self.path, format="FFMPEG", fps=self.fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2
            )
        self._writer.append_data(frame)

    @staticmethod
    def _tile(image: np.ndarray, lines: Sequence[str] | None) -> np.ndarray:
        """One picture, enlarged if small, below its caption if it has one; uint8 [h, w, 3]."""
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
        """As square as it gets, black where no tile is, even sides; uint8 [H, W, 3]."""
        columns = math.ceil(math.sqrt(len(tiles)))
        rows = math.ceil(len(tiles) / columns)
        height, width, _ = tiles[0].shape
        frame = np.zeros((rows * height + rows * height % 2, columns * width + columns * width % 2, 3), np.uint8)
        for i, tile in enumerate(tiles):
            top, left = i // columns * height, i % columns * width
            frame[top : top + height, left : left + width] = tile
        return frame

    def close(self) -> None:
        """Finish the file; safe to call twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
