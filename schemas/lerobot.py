"""meta/info.json of a data set in LeRobot's format, version 3."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from schemas import Schema
from schemas.demonstrations import MAX_STEPS, Whole

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def version_3(text: str) -> str:
    if not re.fullmatch(r"v3\.\d+", text):
        raise ValueError("v3.0: LeRobot's own convert_dataset_v21_to_v30 converts older sets")
    return text


def feature_name(text: str) -> str:
    """The name of a video feature is also a folder's name."""
    if not text.strip(".") or not re.fullmatch(r"[\w. -]+", text):
        raise ValueError("a name of letters, digits and dots")
    return text


class Feature(Schema):
    """One column, or one camera."""

    dtype: str
    shape: tuple[Whole, ...]


class Info(Schema):
    """meta/info.json."""

    codebase_version: Annotated[str, AfterValidator(version_3)]
    fps: Annotated[int | float, Field(gt=0, le=10_000)]
    total_episodes: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    total_frames: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    data_path: Literal[DATA_PATH]
    video_path: Literal[VIDEO_PATH] | None = None
    features: Annotated[dict[Annotated[str, AfterValidator(feature_name)], Feature], Field(min_length=1)]


class Entry(Schema):
    """One episode in meta/solovla/trajectory.json."""

    episode_id: Whole
    elapsed_steps: Whole


class Original(Schema):
    """meta/solovla/trajectory.json, as far as it is compared with the set around it."""

    episodes: list[Entry]
    recipe: Any
