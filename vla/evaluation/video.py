"""Frames of videos for people, and the h264 files that they are streamed into. No frame is kept in memory.

A frame of an episode has the instruction over its upper edge and the progress over its lower one. What the policy saw
is inset in a corner, at its own size. The border is grey while the episode runs. Then it is green for success and red
for failure.

    with VideoWriter(folder / "7.mp4") as video:
        for step, image in enumerate(images):                                   # uint8 [H, W, 3]
            video.add(draw_frame(image, "put carrot on plate", f"step {step}", inset=seen))
        video.hold(last_frame)
    save_image(last_frame, folder / "7.jpg")
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import imageio.v2 as imageio
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FPS = 5  # real time in the family: one frame per action, and control runs at 5 Hz
HOLD_SECONDS = 1.0  # for which a video shows its last frame
BORDER = 4  # pixels around an image
BORDER_COLORS = {None: (120, 124, 130), "success": (38, 160, 65), "failed": (214, 48, 49)}
OUTCOME_TEXT = {"success": ((110, 231, 135), "SUCCESS"), "failed": ((255, 138, 128), "FAILED")}
FONT_SIZE, MARGIN = 13, 5
BAND = (0, 0, 0, 150)  # what a caption is written on: black that the image shines through
MAX_CAPTION = 500  # characters of a caption that are used
MAX_ROWS = 2  # of an instruction
INSET_SHARE = 0.6  # largest share of a frame's width and height that an inset may take


# ---------------------------------------------------------------------- text
@functools.cache
def font(bold: bool = False, size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def plain(text: str) -> str:
    """The text as one line that the font can draw. Control characters become spaces, lone surrogates question marks."""
    written = text[:MAX_CAPTION].encode("utf-8", "replace").decode()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in written).split())


def wrapped(text: str, width: float, length: Callable[[str], float], max_rows: int = MAX_ROWS) -> list[str]:
    """The text as rows of at most `width` pixels. What does not fit into `max_rows` becomes " ...".

    length: width of a text in pixels.
    """
    rows = [""]
    for word in plain(text).split():
        joined = f"{rows[-1]} {word}".strip()
        if rows[-1] and length(joined) > width:
            rows.append(word)
        else:
            rows[-1] = joined
    kept = rows[:max_rows]
    if len(rows) > max_rows:
        kept[-1] += " ..."
    return [shortened(row, width, length) for row in kept]


def shortened(row: str, width: float, length: Callable[[str], float]) -> str:
    """The row, cut to `width` pixels."""
    if length(row) <= width:
        return row
    while row and length(f"{row} ...") > width:
        row = row[:-1]
    return f"{row} ..."


# ---------------------------------------------------------------------- frames
def fits_inset(image_size: tuple[int, int], frame_size: tuple[int, int]) -> bool:
    """Whether an image of (width, height) pixels leaves enough of a frame to see."""
    return all(own <= INSET_SHARE * whole for own, whole in zip(image_size, frame_size))


def frame_size(video_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Width and height at which episodes are drawn for people, in pixels.

    Images that are at least that large are shown as they are. Otherwise, video_size grows by a whole factor until the
    image fits into a corner.

    >>> frame_size((480, 360), (96, 96)), frame_size((480, 360), (320, 240)), frame_size((480, 360), (640, 480))
    ((480, 360), (960, 720), (640, 480))
    """
    if all(own >= asked for own, asked in zip(image_size, video_size)):
        return image_size
    factor = 1
    while not fits_inset(image_size, (factor * video_size[0], factor * video_size[1])):
        factor += 1
    return factor * video_size[0], factor * video_size[1]


def draw_frame(
    image: np.ndarray,
    instruction: str,
    progress: str,
    outcome: str | None = None,
    inset: np.ndarray | None = None,
    note: str = "",
) -> np.ndarray:
    """One frame of an episode.

    Args:
        image: uint8 [H, W, 3]. inset: what the policy saw, uint8 [h, w, 3] with h < H and w < W, or None.
        progress: such as "step 3, return 0.10".
        outcome: "success", "failed", or None while the episode runs.
        note: a remark that is written above the progress.

    Returns:
        uint8 [H + 2 * BORDER, W + 2 * BORDER, 3].
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    draw = ImageDraw.Draw(picture, "RGBA")
    width, height = picture.size
    row_height = FONT_SIZE + 4
    rows = wrapped(instruction, width - 2 * MARGIN, font().getlength)
    draw_rows(draw, rows, 0, width, row_height)
    below = wrapped(note, width - 2 * MARGIN, font().getlength) if note else []
    below.append(plain(progress))
    top = height - len(below) * row_height - MARGIN
    draw_rows(draw, below, top, width, row_height)
    if outcome is not None:
        color, word = OUTCOME_TEXT[outcome]
        left = width - MARGIN - font(bold=True).getlength(word)
        draw.text((left, height - row_height - MARGIN // 2), word, fill=color, font=font(bold=True))
    if inset is not None:
        paste_inset(picture, inset, bottom=top - MARGIN)
    return np.pad(np.asarray(picture), ((BORDER, BORDER), (BORDER, BORDER), (0, 0))) + border_only(
        (height, width), BORDER_COLORS[outcome]
    )


def draw_rows(draw: ImageDraw.ImageDraw, rows: list[str], top: int, width: int, row_height: int) -> None:
    """Write rows of text on a band that the image shines through."""
    draw.rectangle((0, top, width, top + len(rows) * row_height + MARGIN), fill=BAND)
    for number, row in enumerate(rows):
        draw.text((MARGIN, top + MARGIN // 2 + number * row_height), row, fill=(255, 255, 255), font=font())


def paste_inset(picture: Image.Image, inset: np.ndarray, bottom: int) -> None:
    """Put what the policy saw into the right corner above `bottom`, with a thin white edge and a label."""
    height, width, _ = inset.shape
    left, top = picture.width - width - MARGIN, bottom - height
    draw = ImageDraw.Draw(picture, "RGBA")
    draw.rectangle((left - 1, top - 1, left + width, top + height), outline=(255, 255, 255))
    picture.paste(Image.fromarray(np.ascontiguousarray(inset)), (left, top))
    small = font(size=FONT_SIZE - 3)
    label = "policy input"
    draw.rectangle((left, top, left + small.getlength(label) + 3, top + FONT_SIZE), fill=BAND)
    draw.text((left + 2, top), label, fill=(255, 255, 255), font=small)


@functools.lru_cache(maxsize=8)
def border_only(shape: tuple[int, int], color: tuple[int, int, int]) -> np.ndarray:
    """A border around a black image of `shape` (height, width): uint8 [H + 2 * BORDER, W + 2 * BORDER, 3]."""
    height, width = shape
    frame = np.empty((height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    frame[:] = color
    frame[BORDER:-BORDER, BORDER:-BORDER] = 0
    return frame


def resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """The frame at another size, uint8 [height, width, 3]."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def even(frame: np.ndarray) -> np.ndarray:
    """The frame with even sides, which yuv420p needs. The last row or column is repeated where a side is odd."""
    height, width, _ = frame.shape
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


# ---------------------------------------------------------------------- many episodes in one frame
def row_sizes(count: int) -> list[int]:
    """How many tiles each row of a grid without empty tiles has. Rows differ by at most one tile.

    >>> row_sizes(8), row_sizes(7), row_sizes(16), row_sizes(1)
    ([4, 4], [3, 4], [4, 4, 4, 4], [1])
    """
    rows = max(1, round(math.sqrt(count / 1.5)))
    for better in (rows, rows + 1, rows - 1):
        if better > 1 and count % better == 0 and better <= count // better <= 3 * better:
            rows = better
            break
    return [count // rows + (row >= rows - count % rows) for row in range(rows)]


def grid(tiles: Sequence[np.ndarray], width: int) -> np.ndarray:
    """All tiles [h, w, 3] of one shape in one frame of `width` pixels. Rows with fewer tiles have larger ones."""
    height, own_width, _ = tiles[0].shape
    rows, first = [], 0
    for size in row_sizes(len(tiles)):
        edges = [width * k // size for k in range(size + 1)]
        row_height = round(height * width / size / own_width)
        row = [
            resized(tile, right - left, row_height)
            for tile, left, right in zip(tiles[first : first + size], edges, edges[1:])
        ]
        rows.append(np.concatenate(row, axis=1))
        first += size
    return np.concatenate(rows)


# ---------------------------------------------------------------------- files
class VideoWriter:
    """A video file, as a context manager. It is complete once the block has ended without an error.

    The frames go into partial_<name> first, so a file with its final name is whole. An error removes the partial file.
    """

    def __init__(self, path: str | os.PathLike, fps: int = FPS):
        self.path, self.fps = Path(path), fps
        self.partial = self.path.with_name(f"partial_{self.path.name}")
        self._writer = None
        self._shape: tuple[int, ...] | None = None

    def add(self, frame: np.ndarray) -> None:
        """Add one frame, uint8 [H, W, 3], the same size every time.

        Raises:
            ValueError: it is something else. OSError: the encoder has ended, for example because the disk is full.
        """
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"the frame is {frame.dtype} {frame.shape}: give uint8 [H, W, 3].")
        if self._shape not in (None, frame.shape):
            raise ValueError(f"this frame is {frame.shape}, earlier ones are {self._shape}: keep the size.")
        if self._writer is None:
            self._shape = frame.shape
            self._writer = self._open()
        self._writer.append_data(even(frame))

    def hold(self, frame: np.ndarray) -> None:
        """Show the last frame for another HOLD_SECONDS."""
        for _ in range(round(HOLD_SECONDS * self.fps)):
            self.add(frame)

    def _open(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return imageio.get_writer(
            self.partial,
            format="FFMPEG",
            fps=self.fps,
            codec="libx264",
            quality=6,
            pixelformat="yuv420p",
            macro_block_size=2,  # yuv420p needs even sides
            ffmpeg_log_level="error",
            # a browser shows the first frame before it has the whole file
            output_params=["-preset", "veryfast", "-movflags", "+faststart"],
        )

    def _finish(self) -> None:
        """End the encoder, and give the file its name. Raises OSError if the file is not whole."""
        if self._writer is None:
            return
        self._writer.close()
        if not self.partial.exists() or b"moov" not in self.partial.read_bytes():  # the index, which comes last
            raise OSError(f"{self.path.name} was not encoded to its end")
        os.replace(self.partial, self.path)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if error_type is None:
                self._finish()
            elif self._writer is not None:
                self._writer.close()
        finally:
            self.partial.unlink(missing_ok=True)


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 [H, W, 3], one by one. Raises OSError if it is not a video."""
    with imageio.get_reader(path, format="FFMPEG") as reader:
        yield from reader


def together(paths: Sequence[Path]) -> Iterator[list[np.ndarray]]:
    """The frames of several videos at the same time. A video that has ended keeps its last frame. Raises OSError."""
    readers = [read_frames(path) for path in paths]
    latest = [next(reader, None) for reader in readers]
    if any(frame is None for frame in latest):
        raise OSError("a video has no frames")
    running = True
    while running:
        yield latest
        following = [next(reader, None) for reader in readers]
        running = any(frame is not None for frame in following)
        latest = [old if new is None else new for old, new in zip(latest, following)]


def save_image(frame: np.ndarray, path: Path) -> None:
    """Write a frame as JPEG, whole or not at all."""
    partial = path.with_name(f"partial_{path.name}")
    try:
        Image.fromarray(frame).save(partial, format="JPEG", quality=88)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
