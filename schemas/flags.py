"""Ranges of flags, as annotated types: `learning_rate: flags.NonNegative = 1e-4` in a script's Args.

NaN and infinity fit none of them. The upper ends are far above what any machine holds. They refuse at once a value that
would run out of memory minutes later.
"""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo

# ---- numbers
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # at least one
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]  # 0 switches it off
Seed = Annotated[int, Field(ge=0, lt=2**31)]
LocalRank = Annotated[int, Field(ge=-1, lt=2**16)]

# ---- the world
Envs = Annotated[int, Field(ge=1, le=2**16)]  # RLinf's largest runs have some hundreds
Episodes = Annotated[int, Field(ge=1, le=100_000)]
Processes = Annotated[int, Field(ge=0, le=1024)]
EpisodeSteps = Annotated[int, Field(ge=1, le=100_000)]
Hertz = Annotated[int, Field(ge=5, le=10_000, multiple_of=5)]  # Hz, where control is at 5 Hz
Pixels = Annotated[int, Field(ge=1, le=4096)]
GroupSize = Annotated[int, Field(ge=2, le=2**16)]  # a group of one has no other member to compare with


def hulls_before(world: dict) -> dict:
    """{"hulls": "cpu"} for a saved world of the published meshes that has no such entry, else {}.

    Before version 0.4.0, all simulation on CPUs had the hulls of PhysX's CPU simulation.
    """
    of_cpu = world.get("asset_pack") == "bridge" and world.get("sim_backend", "physx_cpu") == "physx_cpu"
    return {"hulls": "cpu"} if of_cpu and "hulls" not in world else {}


def those_of_before(hulls: str | None, info: ValidationInfo) -> str | None:
    """The value of `hulls` in a schema that has `asset_pack` above it."""
    return hulls or hulls_before(info.data).get("hulls")


SavedHulls = Annotated[Literal["gpu", "cpu"] | None, AfterValidator(those_of_before), Field(validate_default=True)]

# The edition of the builtin pack: how it looks and, at 100 Hz, how it moves. Before version 0.4.0 it was 1.
BUILTIN_EDITION = 2


def edition_now(world: dict) -> int | None:
    """The edition of a world that is made now. None in another pack, and in envs with an `instruction` of their own."""
    return BUILTIN_EDITION if world.get("asset_pack") == "builtin" and world.get("instruction") is None else None


def edition_before(world: dict) -> dict:
    """{"edition": 1} for a saved world of the builtin pack that has no such entry, else {}."""
    return {"edition": 1} if edition_now(world) and "edition" not in world else {}


def that_of_before(edition: int | None, info: ValidationInfo) -> int | None:
    """The value of `edition` in a schema that has `asset_pack` above it."""
    return edition or edition_before(info.data).get("edition")


SavedEdition = Annotated[
    Annotated[int, Field(ge=1)] | None, AfterValidator(that_of_before), Field(validate_default=True)
]


# ---- the model
LoraRank = Annotated[int, Field(ge=0, le=4096)]  # the layers of a 7B model are 4096 wide, so a higher rank is not low
LoraAlpha = Annotated[int, Field(ge=1, le=10**6)]
Chunk = Annotated[int, Field(ge=1, le=128)]  # published models have 8
PromptLength = Annotated[int, Field(ge=1, le=2048)]

# ---- text and lists, which are never empty (an unset variable of a shell would be)
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\x00]*$")]


def plain(name: str) -> str:
    """Check a name by the rules that wandb and swanlab have in common for projects."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,100}", name):
        raise ValueError("a name of at most 100 letters, digits and _ . + -")
    return name


Name = Annotated[str, AfterValidator(plain)]
ENV_ID = re.compile(r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*:)?[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)  # module:Id or Id


def identifier(env_id: str) -> str:
    """Check an env id, which names folders and is shown in pages: not a path, not a sentence."""
    if not ENV_ID.fullmatch(env_id):
        raise ValueError("an id such as PickCube-v1 or my_module:MyTask-v1")
    return env_id


EnvId = Annotated[str, AfterValidator(identifier)]
Item = TypeVar("Item")
NonEmpty = Annotated[tuple[Item, ...], Field(min_length=1)]
