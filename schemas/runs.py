"""Run folders and checkpoints.

The files are args.json, run_from_iteration_*.json, state.json, metrics.jsonl, evaluations.jsonl, episodes/*.jsonl and
videos/*/clips.json.
"""

import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from schemas import Schema

Natural = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def flag(value: Any) -> Any:
    """A saved flag. It becomes words of a command line, where text that begins with - would be another flag."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and one.startswith("-"):
            raise ValueError("a value, not a flag")
        if isinstance(one, (list, dict)):
            raise ValueError("a number, text, true, false, null, or a list of these")
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError("a finite number")
    return value


def inside(name: str) -> str:
    """Name of a file below the folder that lists it."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or str(path) != name:
        raise ValueError("the name of a file below the checkpoint")
    return name


Pair = Field(min_length=2, max_length=2)
FileName = Annotated[str, AfterValidator(inside)]
FlagName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
# args.json: the flags of a run, by name
SavedFlags = dict[FlagName, Annotated[Any, AfterValidator(flag)]]


class Description(Schema):
    """run_from_iteration_*.json: the command, its flags and the machine."""

    command: str
    args: SavedFlags
    sizes: dict[str, Any]
    num_ranks: Annotated[int, Field(ge=1)]
    roles: list[Annotated[list[str], Pair]] | None = None  # of a placement: ranks, and what they do
    version: str | None = None  # of the code. Runs from before 0.3.0 have none
    commit: str
    uncommitted_changes: bool
    device: str
    started: str


class Header(Schema):
    """The format in state.json, which decides how the rest is read. The first files had none."""

    format: int = 1


class State(Schema):
    """state.json of a checkpoint."""

    format: int
    iteration: Natural
    global_step: Natural
    trained: dict[str, list[Natural]]  # shapes by parameter
    files: dict[FileName, Annotated[list[Natural], Pair]]  # size in bytes and CRC-32
    version: str | None = None  # of the code that wrote it. Checkpoints from before 0.3.0 have none
    base: dict[str, Any] | None = None  # digests of the model that training started from, see describe_base()
    adapter: dict[str, Any] | None = None  # adapter_config.json, without the path of its base


class OldState(State):
    """state.json of format 2, which had no checksums."""

    files: dict[FileName, Natural]  # size in bytes


# metadata of a shard: for every parameter, its first element in the shard and the optimizer's step
ShardIndex = dict[str, Annotated[list[Finite], Pair]]
# a line of metrics.jsonl or evaluations.jsonl
Line = dict[str, Finite]


Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Action = tuple[(Finite,) * 7]  # metres, radians, gripper


class Facts(Schema):
    """What the env names about an episode."""

    instruction: str | None = None
    object: str | None = None
    receptacle: str | None = None
    table: str | None = None


class HeldOutEpisode(Facts):
    """A line of episodes/eval_*.jsonl: one held-out episode of an evaluation, with the actions that were executed."""

    episode_id: Natural
    success_once: Rate
    success_at_end: Rate
    return_: Finite = Field(alias="return")
    episode_len: Annotated[int, Field(ge=0)]  # 0: it was lost
    reward: Finite
    actions: list[Action]

    @field_validator("actions")
    @classmethod
    def has_one_action_per_step(cls, value: list[Action], info: ValidationInfo) -> list[Action]:
        if len(value) != info.data.get("episode_len"):
            raise ValueError("one action for each of episode_len steps")
        return value


def plain_name(name: str) -> str:
    """Name of a file in the folder of the list."""
    if inside(name) != PurePosixPath(name).name:
        raise ValueError("the name of a file beside clips.json")
    return name


class Clip(Facts):
    """An item of clips.json: the video of one episode."""

    episode_id: Natural
    file: Annotated[str, AfterValidator(plain_name)]
    poster: Annotated[str, AfterValidator(plain_name)]
    outcome: Literal["success", "failed"]
    return_: Finite = Field(alias="return")
    episode_len: Annotated[int, Field(ge=1)]


Clips = list[Clip]


class Holder(Schema):
    """The lock of a run folder: the process that writes there."""

    host: str
    pid: Natural
    started: str


class Session(Schema):
    """A line of sessions.jsonl: a start of a run, or how it ended."""

    event: Literal["started", "stopped", "failed", "finished"]
    time: Finite  # seconds since 1970
    iteration: Natural
    reason: str = ""  # what asked it to stop, or the error


class Tracking(Schema):
    """tracking.json of a run folder: the id of the run at wandb and swanlab."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]{8,64}$")]
