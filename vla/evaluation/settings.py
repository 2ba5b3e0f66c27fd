"""The 16 settings of the published protocol (arXiv 2505.19789, 2510.06710), and what `--settings` means.

A setting is an env id and an object set, written without the family's name: "Carrot-v1:test". Five change what is seen,
seven what is meant, three what has to be done; "Carrot-v1:train" is the training distribution. What is published as
"average of OOD" is the mean of all 16; the mean of the 15 is another number.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from schemas import UserError

FAMILY = "PutOnPlateInScene25"
OBJ_SETS = ("train", "test", "all")

# columns of the published table, in its order
GROUPS = {
    "in_distribution": ("Carrot-v1:train",),
    "vision": (
        "VisionImage-v1:test",
        "VisionTexture03-v1:test",
        "VisionTexture05-v1:test",
        "VisionWhole03-v1:test",
        "VisionWhole05-v1:test",
    ),
    "semantic": (
        "Carrot-v1:test",
        "Plate-v1:test",
        "Instruct-v1:test",
        "MultiCarrot-v1:train",
        "MultiCarrot-v1:test",
        "MultiPlate-v1:train",
        "MultiPlate-v1:test",
    ),
    "execution": ("Position-v1:test", "EEPose-v1:test", "PositionChangeTo-v1:test"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


@dataclass(frozen=True)
class Setting:
    """What one row of the table is about."""

    name: str
    env_id: str
    obj_set: str


def parse_settings(words: Collection[str], family_ids: Collection[str], instruction: str | None) -> list[Setting]:
    """Words of `--settings` -> settings, each once, in the order in which they are named.

    Args:
        words: "all" (the 16), a group, a setting ("Carrot-v1:test"; the family's name may stand before it), or with an
            instruction the id of any other ManiSkill env.
        family_ids: the env ids of the family, in full.

    Raises:
        UserError: a word that is none of these, with the one that was probably meant.
    """
    chosen: dict[str, Setting] = {}
    for word in words:
        short = word.removeprefix(FAMILY)
        group = {"all": tuple(GROUP_OF)}.get(word) or GROUPS.get(word.replace("-", "_"), (short,))
        for name in group:
            env_id, _, obj_set = name.rpartition(":")
            if FAMILY + env_id in family_ids and obj_set in OBJ_SETS:
                chosen[name] = Setting(name, FAMILY + env_id, obj_set)
            elif instruction is not None and ":" not in name.rpartition("-v")[2]:
                chosen[name] = Setting(name, name, "train")
            else:
                raise UserError(unknown_setting(word, short, family_ids))
    if not chosen:
        raise UserError("--settings names nothing: use all, a group such as vision, or Carrot-v1:test")
    return list(chosen.values())


def unknown_setting(word: str, short: str, family_ids: Collection[str]) -> str:
    """One sentence: what is wrong with the word, and what was probably meant."""
    every = [f"{env_id.removeprefix(FAMILY)}:{obj_set}" for env_id in family_ids for obj_set in OBJ_SETS]
    known = [*GROUP_OF, *(name for name in every if name not in GROUP_OF), "all", *GROUPS]
    if f"{short}:test" in every:
        return f"--settings {word} lacks its object set: use {short}:train, {short}:test or {short}:all"
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(short.lower(), lowered, n=1, cutoff=0.4)
    hint = f"did you mean {lowered[near[0]]}?" if near else "use all, a group such as vision, or Carrot-v1:test"
    return f"--settings {word} is unknown: {hint}"
