"""mp4 files of a set, written and read by the ffmpeg that imageio-ffmpeg brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from schemas import UserError, require_file

# every second frame is a keyframe, as in LeRobot's own videos: loaders jump to any frame
CODECS = {
    "video": dict(codec="libx264", pix_fmt_out="yuv420p", output_params=["-crf", "18", "-g", "2"]),
    "lossless": dict(codec="libx264rgb", pix_fmt_out="rgb24", output_params=["-qp", "0", "-g", "2"]),
}
PIXEL_FORMATS = {"video": "yuv420p", "lossless": "gbrp"}  # as a decoder names them


def check_size(images: str, width: int, height: int) -> None:
    """Raise UserError for images that the codec cannot hold."""
    if images == "video" and (width % 2 or height % 2):
        raise UserError(
            f"--images video needs even sizes, and the images have {width} x {height} pixels: give --images lossless"
        )


class VideoFile:
    """One mp4 file that is being written, frame by frame."""

    def __init__(self, path: Path, images: str, fps: float, width: int, height: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.num_frames = path, 0
        how = dict(fps=fps, quality=None, macro_block_size=1, ffmpeg_log_level="quiet", **CODECS[images])
        self._ffmpeg = imageio_ffmpeg.write_frames(str(path), (width, height), pix_fmt_in="rgb24", **how)
        self._ffmpeg.send(None)

    def add(self, image: np.ndarray) -> None:
        """Append a frame, uint8 [H, W, 3]."""
        self._ffmpeg.send(np.ascontiguousarray(image))
        self.num_frames += 1

    def is_full(self, limit: int) -> bool:
        """Whether the file has this many bytes on the disk. The last few frames may not be there yet."""
        return self.path.exists() and self.path.stat().st_size >= limit

    def close(self) -> None:
        """Complete the file. Raises OSError where it does not hold every frame, such as on a full disk."""
        self._ffmpeg.close()
        try:
            held, _ = imageio_ffmpeg.count_frames_and_secs(str(self.path))
        except RuntimeError:  # no video at all
            held = 0
        if held != self.num_frames:
            raise OSError(f"{self.path.name} holds {held} of {self.num_frames} frames")


def read_video(path: Path, width: int, height: int, fps: float, remedy: str) -> Iterator[np.ndarray]:
    """The frames of an mp4 file in order, uint8 [H, W, 3] each.

    Raises:
        UserError: the file is missing or no mp4, or has another size or rate.
    """
    require_file(path, remedy)
    # -f mp4: nothing but mp4, so that no playlist makes ffmpeg open other files. passthrough: each frame once
    frames = imageio_ffmpeg.read_frames(
        str(path), pix_fmt="rgb24", input_params=["-f", "mp4"], output_params=["-fps_mode", "passthrough"]
    )
    with contextlib.closing(frames):
        try:
            found = next(frames)
        except (OSError, RuntimeError, StopIteration, IndexError) as error:
            raise UserError(f"{path} is cut short or no mp4 video: {remedy}") from error
        if tuple(found["size"]) != (width, height):
            size = " x ".join(map(str, found["size"]))
            raise UserError(f"{path} has {size} pixels, and meta/info.json says {width} x {height}: {remedy}")
        if abs(found["fps"] - fps) > 0.01 * fps:
            raise UserError(f"{path} has {found['fps']:g} frames per second, and meta/info.json says {fps:g}: {remedy}")
        for frame in frames:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
