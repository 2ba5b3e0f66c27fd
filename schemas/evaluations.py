"""Files of evaluate.py: evaluation.json, episodes.jsonl and results.json, and benchmarks/published.yaml."""

import base64
import binascii
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from schemas import Schema
from schemas.flags import edition_before, hulls_before

Finite = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[int, Field(ge=0)]
ACTION_BYTES = 28  # float32 [7]


class Episode(Schema):
    """A line of episodes.jsonl."""

    setting: str
    temperature: Temperature
    episode_id: Number
    success_once: Rate
    success_at_end: Rate
    return_: Finite = Field(alias="return")
    episode_len: Annotated[float, Field(ge=0, le=10**6)]  # 0: it was lost
    reward: Finite
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    actions: str  # base64 of little-endian float32 [episode_len, 7]

    @field_validator("actions")
    @classmethod
    def has_one_action_per_step(cls, value: str, info: ValidationInfo) -> str:
        try:
            size = len(base64.b64decode(value, validate=True))
        except binascii.Error:
            raise ValueError("base64 of float32 numbers") from None
        if size != ACTION_BYTES * info.data.get("episode_len", -1):
            raise ValueError("7 numbers for each of episode_len steps")
        return value


# flags of the simulation, by name
World = Annotated[dict[str, Any], AfterValidator(lambda world: world | hulls_before(world) | edition_before(world))]


class Identity(Schema):
    """evaluation.json: what must stay the same when an evaluation is resumed."""

    policy: Literal["checkpoint", "expert", "idle"]
    weights: dict[str, str]  # file or preset -> size and checksum
    model: dict[str, Any]
    seed: Number
    world: World


class Outcome(Schema):
    episode_id: Number
    success_once: Rate


class SettingResult(Schema):
    outcomes: list[Outcome]


class Part(Schema):
    """Results at one temperature."""

    settings: dict[str, SettingResult]


class Results(Part):
    """The part of results.json that a comparison reads."""

    name: str
    temperature: Temperature
    world: World
    other_temperatures: dict[str, Part]

    @field_validator("other_temperatures")
    @classmethod
    def has_numbers_as_keys(cls, value: dict) -> dict:
        try:
            numbers = [float(key) for key in value]
        except ValueError:
            numbers = [math.nan]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("an object with temperatures as keys")
        return value


class GroupCounts(Schema):
    in_distribution: Number
    vision: Number
    semantic: Number
    execution: Number


class Published(Schema):
    """A row of benchmarks/published.yaml: counts of successes by group and, if they were published, by setting."""

    name: str
    source: str
    note: str
    metric: Literal["success_once", "success_at_end"]
    episodes_per_setting: Annotated[int, Field(ge=1)]
    successes: GroupCounts
    settings: dict[str, Number] | None = None


class RunFlags(Schema):
    """Flags in the args.json of a run that evaluate.py itself reads."""

    env_id: str | None = None
    critic: str = "hidden"
    value_learning_rate: float | None = None
    lora_rank: int = 0
    lora_path: str | None = None
    merge_lora: bool = False
