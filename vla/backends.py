"""Where the curves of a run go besides its own files: TensorBoard, wandb and SwanLab, through one interface.

    backend.describe(description, 0)             # flags, command, commit and machine
    backend.log({"train/loss": 0.3}, 4096)       # values at a step of the run
    backend.show("video/evaluation", video, 4096)       # a video of an evaluation
    backend.finish()

wandb and SwanLab are imported only if they are used. They get metrics, videos and a description without paths and
access keys. They collect nothing themselves: no command line, no environment, no terminal output, no host's name.
"""

import importlib
import importlib.util
import io
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any, Protocol

import imageio.v2 as imageio
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from schemas import UserError, read_json
from schemas.runs import Tracking
from vla.files.whole import write_whole
from vla.text import error_text, flag_in_words, markdown_code, markdown_text

RESULT = "eval/success_once"  # the metric by which TensorBoard's table of hyperparameters ranks runs
OLD_FOLDER = "tensorboard"  # of runs from before 0.4.0, whose names in TensorBoard ended in it
GIF_WIDTH, GIF_FRAMES = 480, 48  # at most
WANDB_COLLECTS_NOTHING = {
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
    "console": "off",
    "host": "",
}
SWANLAB_COLLECTS_NOTHING = {
    "probe": dict.fromkeys(("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor"), False),
    "terminal": {"proxy_type": "none"},
}


class Backend(Protocol):
    """What a run tells each of them. Only rank 0 does."""

    def describe(self, description: dict, step: int) -> None:
        """Take the description of a start (vla.logger.describe_run) without places of one machine."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take values at a step of the run."""

    def show(self, tag: str, video: Path, step: int) -> None:
        """Take a video of an evaluation."""

    def finish(self) -> None:
        """Write what is left, and close."""


class TensorBoard:
    """TensorBoard. Its files are in the run folder itself, so that a run has the name of its folder.

    A resumed run of an older version has them in `tensorboard/`. They are moved, so that its curves stay whole.
    """

    def __init__(self, run_dir: Path, purge_step: int | None):
        old = run_dir / OLD_FOLDER
        for path in sorted(old.glob("events.out.tfevents.*")):
            os.replace(path, run_dir / path.name)
        if old.is_dir() and not any(old.iterdir()):
            old.rmdir()
        self.writer = SummaryWriter(run_dir, purge_step=purge_step)

    def describe(self, description: dict, step: int) -> None:
        """Write the description as text, and the flags as hyperparameters with the success as their metric.

        SummaryWriter.add_hparams() would make a second run for them.
        """
        self.writer.add_text("run", markdown(description), step)
        self.writer.add_text("flags", markdown_flags(description["args"]), step)
        start, session, self.end = hparams(plain_flags(description["args"]), {RESULT: 0.0})
        for summary in (start, session):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def log(self, metrics: dict[str, float], step: int) -> None:
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def show(self, tag: str, video: Path, step: int) -> None:
        """Write the video as a GIF, which moves in the tab of images. SummaryWriter.add_video() needs moviepy."""
        content, (width, height) = gif_of(video)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        self.writer.flush()

    def finish(self) -> None:
        if hasattr(self, "end"):
            self.writer.file_writer.add_summary(self.end)
        self.writer.close()


class Wandb:
    """Weights & Biases. WANDB_MODE=offline keeps everything in the run folder."""

    def __init__(self, run_dir: Path, project: str, title: str):
        self.wandb = importlib.import_module("wandb")
        known = self.wandb.Settings.model_fields
        if missing := [name for name in WANDB_COLLECTS_NOTHING if name not in known]:
            raise UserError(too_old("wandb", missing))
        self.run = self.wandb.init(
            project=project,
            id=tracking_id(run_dir),
            resume="allow",
            name=title,
            dir=str(run_dir),
            settings=WANDB_COLLECTS_NOTHING,
        )

    def describe(self, description: dict, step: int) -> None:
        self.run.config.update(description, allow_val_change=True)  # a resumed run may have other flags
        if not self.run.notes:
            self.run.notes = markdown(description)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def show(self, tag: str, video: Path, step: int) -> None:
        self.run.log({tag: self.wandb.Video(str(video), format="mp4")}, step=step)

    def finish(self) -> None:
        self.run.finish()


class SwanLab:
    """SwanLab. SWANLAB_MODE=offline or local keeps everything in the run folder."""

    def __init__(self, run_dir: Path, project: str, title: str):
        self.swanlab = importlib.import_module("swanlab")
        known = self.swanlab.Settings.model_fields
        if missing := [name for name in SWANLAB_COLLECTS_NOTHING if name not in known]:
            raise UserError(too_old("swanlab", missing))
        self.run = self.swanlab.init(
            project=project,
            id=tracking_id(run_dir),
            resume="allow",
            name=title,
            log_dir=str(run_dir / "swanlab"),
            settings=self.swanlab.Settings(**SWANLAB_COLLECTS_NOTHING),
        )

    def describe(self, description: dict, step: int) -> None:
        self.run.config.update(description)
        self.run.log({"run": self.swanlab.Text(markdown(description))}, step=step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def show(self, tag: str, video: Path, step: int) -> None:
        content, _ = gif_of(video)  # it takes no other format
        self.run.log({tag: self.swanlab.Video(io.BytesIO(content))}, step=step)

    def finish(self) -> None:
        self.run.finish()


def too_old(name: str, missing: list[str]) -> str:
    """Settings that a version does not know would be ignored, and it would collect what nobody asked it to."""
    return f"--logger_backends {name}: it has no setting {missing[0]!r}, run `pip install --upgrade {name}`"


def check_backends(names: tuple[str, ...]) -> None:
    """Raise UserError if a backend is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f"--logger_backends {name}: it is not installed, run `pip install {name}`")


def open_backends(
    names: tuple[str, ...], run_dir: Path, purge_step: int | None, project: str, experiment: str | None
) -> list[Backend]:
    """The backends of these names.

    Args:
        purge_step: steps from here on are repeated, so that TensorBoard drops what it has of them.
        project, experiment: names at wandb and SwanLab. Without an experiment, the name of the run folder is used.
    """
    title = experiment or run_dir.resolve().name
    hosted = {"wandb": Wandb, "swanlab": SwanLab}
    return [
        TensorBoard(run_dir, purge_step) if name == "tensorboard" else hosted[name](run_dir, project, title)
        for name in names
    ]


def show_video(backends: list[Backend], tag: str, video: Path, step: int) -> None:
    """Show a video in all backends, if it exists. A video that cannot be shown does not end a run."""
    if not video.is_file():
        return
    for backend in backends:
        try:
            backend.show(tag, video, step)
        except Exception as error:  # whatever the libraries raise
            where = type(backend).__name__
            print(f"{video} is not shown in {where} ({error_text(error)[:200]})", file=sys.stderr, flush=True)


def tracking_id(run_dir: Path) -> str:
    """The run's id at wandb and SwanLab. It is kept in the run folder, so that a resumed run continues there."""
    path = run_dir / "tracking.json"
    if not path.exists():
        write_whole(path, json.dumps({"id": uuid.uuid4().hex[:21]}) + "\n")  # SwanLab wants 21 characters
    return read_json(path, Tracking, "remove it, and the run becomes a new one at wandb and SwanLab").id


# ---------------------------------------------------------------------- what they show
def markdown(description: dict) -> str:
    """Command, commit and machine of a start, as a list in Markdown."""
    changes = ", with uncommitted changes" if description["uncommitted_changes"] else ""
    lines = {
        "command": markdown_code(description["command"]),
        "commit": markdown_text(description["commit"]) + changes,
        "machine": markdown_text(f"{description['num_ranks']} x {description['device']}"),
        "started": markdown_text(description["started"]),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def markdown_flags(flags: dict[str, Any]) -> str:
    """The flags as a table in Markdown."""
    rows = [f"| {name} | {markdown_text(flag_in_words(value))} |" for name, value in sorted(flags.items())]
    return "\n".join(["| flag | value |", "|---|---|", *rows])


def plain_flags(flags: dict[str, Any]) -> dict[str, float | str]:
    """Numbers as they are, everything else as text. Flags that are None are left out."""
    is_number = {name: isinstance(value, (int, float)) and not isinstance(value, bool) for name, value in flags.items()}
    return {
        name: value if is_number[name] else flag_in_words(value)
        for name, value in flags.items()
        if value not in (None, ())
    }


def gif_of(video: Path) -> tuple[bytes, tuple[int, int]]:
    """A video as a GIF of at most GIF_FRAMES frames and GIF_WIDTH pixels, which takes as long as the video.

    Returns:
        the file's content, and its width and height.
    """
    with imageio.get_reader(video, format="FFMPEG") as reader:
        facts = reader.get_meta_data()
        scale = min(1.0, GIF_WIDTH / facts["size"][0])
        size = round(scale * facts["size"][0]), round(scale * facts["size"][1])
        frames = [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in reader.iter_data()]
    stride = -(-len(frames) // GIF_FRAMES)
    small = [image.quantize(128, method=Image.Quantize.FASTOCTREE) for image in frames[::stride]]
    buffer = io.BytesIO()
    duration = round(1000 * stride / facts["fps"])  # ms
    small[0].save(buffer, "GIF", save_all=True, append_images=small[1:], duration=duration, loop=0)
    return buffer.getvalue(), size
