"""Ranges of flags, as annotated types: `learning_rate: NonNegative = 1e-4` in a script's Args.

NaN and infinity fit none of them. The upper ends are far above what any machine holds: they refuse by arithmetic what
would end in a lack of memory minutes later.
"""

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field, StringConstraints

# ---- numbers
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # of things there is at least one of
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]  # 0 switches it off
Seed = Annotated[int, Field(ge=0, lt=2**31)]
LocalRank = Annotated[int, Field(ge=-1, lt=2**16)]

# ---- the world
Envs = Annotated[int, Field(ge=1, le=2**16)]  # RLinf's largest runs have some hundreds
Episodes = Annotated[int, Field(ge=1, le=100_000)]
Processes = Annotated[int, Field(ge=0, le=1024)]
EpisodeSteps = Annotated[int, Field(ge=1, le=100_000)]
Hertz = Annotated[int, Field(ge=5, le=10_000, multiple_of=5)]  # Hz; control is at 5 Hz
Pixels = Annotated[int, Field(ge=1, le=4096)]
GroupSize = Annotated[int, Field(ge=2, le=2**16)]  # a group of one has nothing to be compared with

# ---- the model
LoraRank = Annotated[int, Field(ge=0, le=4096)]  # a 7B model's layers are 4096 wide: more would be no low rank
LoraAlpha = Annotated[int, Field(ge=1, le=10**6)]
Chunk = Annotated[int, Field(ge=1, le=128)]  # published models have 8
PromptLength = Annotated[int, Field(ge=1, le=2048)]

# ---- texts and lists: none of them is empty, as an unset variable of a shell is
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\x00]*$")]


def plain(name: str) -> str:
    """What wandb and swanlab both take as a project's name."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,100}", name):
        raise ValueError("a name of at most 100 letters, digits and _ . + -")
    return name


Name = Annotated[str, AfterValidator(plain)]
ENV_ID = re.compile(r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*:)?[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)  # module:Id or Id


def identifier(env_id: str) -> str:
    """Folders are named after it and it is shown in pages, so it is no path and no sentence."""
    if not ENV_ID.fullmatch(env_id):
        raise ValueError("an id such as PickCube-v1 or my_module:MyTask-v1")
    return env_id


EnvId = Annotated[str, AfterValidator(identifier)]
Item = TypeVar("Item")
NonEmpty = Annotated[tuple[Item, ...], Field(min_length=1)]
