"""Recorded demonstrations: trajectory.json, recipe.json, dataset_statistics.json and the datasets of trajectory.h5.

An HDF5 dataset is described as {"dtype": "float32", "shape": [12, 7]} and checked like a value of JSON:

    check(arrays_of(steps=12, width=96, height=96), {"keep": {"dtype": "bool", "shape": [12]}, ...}, "x.h5: traj_0")
"""

import functools
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, create_model, field_validator

from schemas import Schema, flags

PICTURES = "obs/sensor_data/3rd_view_camera/rgb"
TRAINED_ON = {  # dataset -> dtype and shape, for an episode of T steps with images of H x W pixels
    "expert_actions": ("float32", "T", 7),
    "keep": ("bool", "T"),
    PICTURES: ("uint8", "T + 1", "H", "W", 3),
}
RECORDED = {  # for ManiSkill's own tools, so another set may lack them
    "actions": ("float32", "T", 7),
    "rewards": ("float32", "T"),
    "terminated": ("bool", "T"),
    "truncated": ("bool", "T"),
    "success": ("bool", "T"),
}
ENV_STATES = "env_states"  # the group of ManiSkill's states, which sets of before 0.4.0 lack
STATE_ARRAYS = {
    f"{ENV_STATES}/{name}": ("float32", "T + 1", size)
    for name, size in {
        "actors/object": 13,
        "actors/receptacle": 13,
        "actors/distractor": 13,
        "articulations/solovla_widowx250s": 29,
        "controller/arm/target_pose": 7,
        "task/episode": 4,
        "task/steps": 1,
        "task/streak": 1,
        "task/flags": 4,
        "task/rest_rotations": 8,
        "task/joint_targets": 8,
        "task/asleep": 3,
    }.items()
}
MAX_STEPS = 10**8  # of a whole set, of which training keeps 3 GB in memory
MAX_CHUNK_BYTES = 256 * 2**20  # HDF5 unpacks a whole chunk to read one image


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text that is not empty")
    return text


def not_negative(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if min(numbers) < 0:
        raise ValueError("at least 0 in every dimension")
    return numbers


Instruction = Annotated[str, AfterValidator(not_blank)]
Seven = tuple[(Annotated[float, Field(allow_inf_nan=False)],) * 7]
Whole = Annotated[int, Field(ge=0)]


class Recipe(Schema):
    """Settings of a set that training compares with its own flags. None is not known: the set was made elsewhere."""

    env_id: str | None
    obj_set: str | None
    asset_pack: str | None
    protocol: str | None
    hulls: flags.SavedHulls = None  # None where the asset pack has no meshes
    edition: flags.SavedEdition = None  # of the builtin pack, None in another one
    image_size: tuple[flags.Pixels, flags.Pixels]  # width, height
    sim_freq: flags.Hertz | None
    max_episode_steps: flags.EpisodeSteps | None


class Entry(Schema):
    """Facts about one episode."""

    control_mode: str
    elapsed_steps: flags.EpisodeSteps
    instruction: Instruction


class Try(Entry):
    """The same before the set is finished. Tries are numbered, and some of them failed."""

    attempt: Whole


class Episode(Entry):
    episode_id: Whole


class Trajectories(Schema):
    """trajectory.json."""

    recipe: Recipe
    episodes: Annotated[list[Episode], Field(min_length=1)]


class RecordedEpisode(Schema):
    """One episode of a file that ManiSkill's RecordEpisode wrote."""

    episode_id: Whole
    control_mode: str
    elapsed_steps: flags.EpisodeSteps
    success: bool | None = None


class RecordedEnv(Schema):
    env_id: str


class Recorded(Schema):
    """The .json beside that file."""

    env_info: RecordedEnv
    episodes: Annotated[list[RecordedEpisode], Field(min_length=1)]


class ActionStatistics(Schema):
    """Statistics of each of the seven action dimensions, in robot units."""

    q01: Seven
    q99: Seven
    mean: Seven
    std: Annotated[Seven, AfterValidator(not_negative)]
    min: Seven
    max: Seven
    mask: tuple[(bool,) * 7]

    @field_validator("q99")
    @classmethod
    def above_q01(cls, q99: tuple[float, ...], others: ValidationInfo) -> tuple[float, ...]:
        if any(low > high for low, high in zip(others.data.get("q01", q99), q99)):
            raise ValueError("at least q01 in every dimension")
        return q99


class DataSet(Schema):
    action: ActionStatistics


Statistics = Annotated[dict[str, DataSet], Field(min_length=1)]  # dataset_statistics.json


class Array(Schema):
    """An HDF5 dataset, described."""

    dtype: str
    shape: tuple[Whole, ...]


def array(dtype: str, shape: tuple[int, ...]) -> Any:
    """A schema for arrays of one dtype and shape."""

    def fits(found: Array) -> Array:
        if (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(f"{dtype} of shape {list(shape)}")
        return found

    return Annotated[Array, AfterValidator(fits)]


@functools.lru_cache(maxsize=1024)
def arrays_of(steps: int, width: int, height: int) -> type[Schema]:
    """A schema for the datasets of one episode: name -> description."""
    sizes = {"T": steps, "T + 1": steps + 1, "H": height, "W": width}

    def field(dtype: str, *shape: int | str) -> Any:
        return array(dtype, tuple(sizes.get(size, size) for size in shape))

    wanted = {name: (field(*layout), ...) for name, layout in TRAINED_ON.items()}
    wanted |= {name: (field(*layout) | None, None) for name, layout in (RECORDED | STATE_ARRAYS).items()}
    return create_model("Arrays", __base__=Schema, **wanted)
