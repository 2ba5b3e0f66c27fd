"""The 16 settings of the published protocol (arXiv 2505.19789, 2510.06710), and what `--settings` means.

A setting is an env id and an object set, written without the family's name: "Carrot-v1:test". "Carrot-v1:train" is the
training distribution. Five of the others change the image, seven the instruction's meaning, and three the motion that
is needed. The published "average of OOD" is the mean of all 16 settings. The mean of the 15 is another number.
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
    """One row of the table."""

    name: str
    env_id: str
    obj_set: str


def parse_settings(words: Collection[str], family_ids: Collection[str], instruction: str | None) -> list[Setting]:
    """The settings that the words of `--settings` name, each once, in the order in which they are named.

    Args:
        words: "all" (the 16), a group, or a setting such as "Carrot-v1:test", with or without the family's name. With
            an instruction, a word can also be the id of any other ManiSkill env.
        family_ids: the env ids of the family, in full.

    Raises:
        UserError: a word is none of these. The sentence has the word that was probably meant.
    """
    chosen: dict[str, Setting] = {}
    for word in words:
        for name in names_of(word):
            setting = find_setting(name, family_ids, instruction)
            if setting is None:
                raise UserError(unknown_setting(word, name, family_ids))
            chosen[name] = setting
    if not chosen:
        raise UserError("--settings names nothing: use all, a group such as vision, or Carrot-v1:test")
    return list(chosen.values())


def names_of(word: str) -> tuple[str, ...]:
    """The names of the settings that a word stands for.

    >>> names_of("execution")
    ('Position-v1:test', 'EEPose-v1:test', 'PositionChangeTo-v1:test')
    >>> names_of("PutOnPlateInScene25Carrot-v1:test")
    ('Carrot-v1:test',)
    """
    if word == "all":
        return tuple(GROUP_OF)
    group = word.replace("-", "_")
    if group in GROUPS:
        return GROUPS[group]
    return (word.removeprefix(FAMILY),)


def find_setting(name: str, family_ids: Collection[str], instruction: str | None) -> Setting | None:
    """The setting of this name, or None. With an instruction, the name can also be any env's id."""
    env_id, _, obj_set = name.rpartition(":")
    if FAMILY + env_id in family_ids and obj_set in OBJ_SETS:
        return Setting(name, FAMILY + env_id, obj_set)
    has_obj_set = ":" in name.rpartition("-v")[2]  # a colon in front of the version names a module
    if instruction is not None and not has_obj_set:
        return Setting(name, name, "train")
    return None


def unknown_setting(word: str, short: str, family_ids: Collection[str]) -> str:
    """One sentence: what is wrong with the word, and which word was probably meant."""
    every = [f"{env_id.removeprefix(FAMILY)}:{obj_set}" for env_id in family_ids for obj_set in OBJ_SETS]
    known = [*GROUP_OF, *(name for name in every if name not in GROUP_OF), "all", *GROUPS]
    if f"{short}:test" in every:
        return f"--settings {word} lacks its object set: use {short}:train, {short}:test or {short}:all"
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(short.lower(), lowered, n=1, cutoff=0.4)
    hint = f"did you mean {lowered[near[0]]}?" if near else "use all, a group such as vision, or Carrot-v1:test"
    return f"--settings {word} is unknown: {hint}"
