"""The start states of an env id, be it of the PutOnPlateInScene25 family or any other ManiSkill env.

Each start state has an episode id. `envs/variants.py` numbers those of the family. For any other env, the episode id is
the seed of ManiSkill's reset. In both cases one id in eight is held out for evaluation. Importing this file imports no
simulator.
"""

from __future__ import annotations

import difflib
import itertools
import zlib

from envs import variants
from envs.assets.catalog import OBJECTS, RECEPTACLES, TABLES
from schemas.flags import ENV_ID

NUM_SEEDS = 2**31 - 1  # ManiSkill's seeds are 0 .. 2^31 - 2
FAMILY = "PutOnPlateInScene25"


def in_family(env_id: str) -> bool:
    return env_id in variants.VARIANTS


def check_id(env_id: str) -> None:
    """Raise ValueError unless this is an identifier, because ids become names of folders and modules."""
    if not ENV_ID.fullmatch(env_id):
        raise ValueError(
            f"env_id {env_id[:100]!r} is not an env id: give one such as 'PickCube-v1', or 'my_module:MyTask-v1' where "
            "importing my_module registers it."
        )


def check_env_id(env_id: str, obj_set: str, instruction: str | None) -> None:
    """Raise ValueError for an id that is wrong as far as this can be known without ManiSkill's registry."""
    check_id(env_id)
    if in_family(env_id):
        variants.lookup(env_id, obj_set)
        if instruction is not None:
            raise ValueError(f"{env_id} writes its own instructions: leave instruction={instruction!r} out.")
        return
    near = difflib.get_close_matches(env_id, variants.VARIANTS, n=1, cutoff=0.8)
    if near or FAMILY in env_id:
        variants.lookup(env_id, obj_set)  # raises an error that names the id that was probably meant
    if not instruction or not instruction.strip():
        raise ValueError(
            f"env_id {env_id!r} is not of the {FAMILY} family ({', '.join(variants.VARIANTS)}): any other ManiSkill id "
            "needs an instruction, such as --instruction 'pick up the cube'."
        )
    if obj_set != "train":
        raise ValueError(f"only the {FAMILY} family has obj_set {obj_set!r}: leave it at 'train' for {env_id}.")


def num_start_states(env_id: str, obj_set: str = "train") -> int:
    """The number of episode ids. They are 0 to this number - 1."""
    return variants.num_start_states(env_id, obj_set) if in_family(env_id) else NUM_SEEDS


def check_episode_id(env_id: str, obj_set: str, episode_id: int) -> int:
    """The id as an int. Raises ValueError where it is out of range."""
    return variants.check_in_range(env_id, obj_set, episode_id, num_start_states(env_id, obj_set))


def start_state(env_id: str, obj_set: str, episode_id: int, protocol: str) -> variants.StartState | int:
    """The argument of an env's `start_episode`: the decoded id, or the seed itself."""
    return variants.decode(env_id, obj_set, episode_id, protocol) if in_family(env_id) else episode_id


def eval_episode_ids(env_id: str, obj_set: str, num_episodes: int) -> list[int]:
    """The first `num_episodes` of one fixed sequence of distinct held-out ids.

    A longer list begins with every shorter one.
    """
    check_id(env_id)
    if in_family(env_id) or FAMILY in env_id:
        return variants.eval_episode_ids(env_id, obj_set, num_episodes)
    chosen: dict[int, None] = {}  # keeps order
    state, attempt = zlib.crc32(f"{env_id}:{obj_set}".encode()), 0
    while len(chosen) < num_episodes:
        episode_id = variants.splitmix64(variants.splitmix64(state) ^ variants.splitmix64(attempt)) % NUM_SEEDS
        attempt += 1
        if variants.is_held_out(episode_id):
            chosen[episode_id] = None
    return list(chosen)


def every_instruction(env_id: str, obj_set: str, instruction: str | None) -> set[str]:
    """All instructions that the policy can get in an env: the family's own, or the one that is given."""
    if not in_family(env_id):
        return set() if instruction is None else {instruction}
    ranges = variants.lookup(env_id, obj_set)
    wordings = range(0, 1)
    if ranges.extra is not None and ranges.extra.kind == "wording":
        wordings = range(ranges.extra.first, ranges.extra.first + ranges.extra.count)
    return {
        variants.WORDINGS[i].format(object=OBJECTS[j].name, receptacle=RECEPTACLES[k].name)
        for i, j, k in itertools.product(wordings, ranges.objects, ranges.receptacles)
    }


def instructions(env_id: str, obj_set: str, episode_ids: list[int]) -> list[str]:
    """The instructions of these episodes of the family, without simulating them. They are the same in both packs."""
    starts = [variants.decode(env_id, obj_set, episode_id) for episode_id in episode_ids]
    return [
        variants.WORDINGS[start.wording_index].format(
            object=OBJECTS[start.object_index].name, receptacle=RECEPTACLES[start.receptacle_index].name
        )
        for start in starts
    ]


def episode_facts(env_id: str, obj_set: str, episode_ids: list[int], instruction: str | None) -> dict[int, dict]:
    """What the env names about these episodes: {episode id: {fact: text}}, without simulating them.

    The facts are instruction, and in the family also object, receptacle and table. A table has its number in front,
    because several are called "table".

    >>> episode_facts("PutOnPlateInScene25Single-v1", "train", [7], None)[7]
    {'instruction': 'put carrot on plate', 'object': 'carrot', 'receptacle': 'plate', 'table': '001 table'}
    """
    if not in_family(env_id):
        return {episode_id: {"instruction": instruction} for episode_id in episode_ids}
    found = {}
    for episode_id, text in zip(episode_ids, instructions(env_id, obj_set, episode_ids)):
        start = variants.decode(env_id, obj_set, episode_id)
        table = TABLES[start.table_index]
        found[episode_id] = {
            "instruction": text,
            "object": OBJECTS[start.object_index].name,
            "receptacle": RECEPTACLES[start.receptacle_index].name,
            "table": f"{table.key[:3]} {table.name}",
        }
    return found
