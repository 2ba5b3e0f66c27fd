"""Which start states an env id has, whether it is of the PutOnPlateInScene25 family or any other of ManiSkill's.

A family's ids are those of `envs/variants.py`. For another env an episode id is the seed of ManiSkill's reset. One rule
holds out one id in eight for evaluation in both. Pure Python: importing this imports no simulator.
"""

from __future__ import annotations

import difflib
import zlib

from envs import variants
from schemas.flags import ENV_ID

NUM_SEEDS = 2**31 - 1  # ManiSkill's seeds are 0 .. 2^31 - 2
FAMILY = "PutOnPlateInScene25"


def in_family(env_id: str) -> bool:
    return env_id in variants.VARIANTS


def check_id(env_id: str) -> None:
    """Raise ValueError unless this is an identifier: ids become names of folders and modules."""
    if not ENV_ID.fullmatch(env_id):
        raise ValueError(
            f"env_id {env_id[:100]!r} is no id: give one such as 'PickCube-v1', or 'my_module:MyTask-v1' where "
            "importing my_module registers it."
        )


def check_env_id(env_id: str, obj_set: str, instruction: str | None) -> None:
    """One sentence for what can be known of an id without ManiSkill's registry."""
    check_id(env_id)
    if in_family(env_id):
        variants.lookup(env_id, obj_set)
        if instruction is not None:
            raise ValueError(f"{env_id} writes its own instructions: leave instruction={instruction!r} out.")
        return
    near = difflib.get_close_matches(env_id, variants.VARIANTS, n=1, cutoff=0.8)
    if near or FAMILY in env_id:
        variants.lookup(env_id, obj_set)  # says which id was meant
    if not instruction or not instruction.strip():
        raise ValueError(
            f"env_id {env_id!r} is not of the {FAMILY} family ({', '.join(variants.VARIANTS)}): any other ManiSkill id "
            "needs an instruction, such as --instruction 'pick up the cube'."
        )
    if obj_set != "train":
        raise ValueError(f"obj_set {obj_set!r} is a choice of the {FAMILY} family: leave it at 'train' for {env_id}.")


def num_start_states(env_id: str, obj_set: str = "train") -> int:
    """How many episode ids there are: 0 to this number - 1."""
    return variants.num_start_states(env_id, obj_set) if in_family(env_id) else NUM_SEEDS


def check_episode_id(env_id: str, obj_set: str, episode_id: int) -> int:
    """The id as an int, or one clear sentence."""
    total = num_start_states(env_id, obj_set)
    if int(episode_id) != episode_id or not 0 <= episode_id < total:
        raise ValueError(f"episode id {episode_id} is out of range: {env_id} {obj_set} has ids 0 to {total - 1}.")
    return int(episode_id)


def start_state(env_id: str, obj_set: str, episode_id: int, protocol: str) -> variants.StartState | int:
    """What an env's `start_episode` takes: the decoded id, or the seed itself."""
    return variants.decode(env_id, obj_set, episode_id, protocol) if in_family(env_id) else episode_id


def eval_episode_ids(env_id: str, obj_set: str, num_episodes: int) -> list[int]:
    """The first `num_episodes` of one fixed sequence of distinct held-out ids; a longer list begins with a shorter."""
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
    """All that the policy can be told in an env: the family's own sentences, or the one that is given."""
    if not in_family(env_id):
        return {instruction} - {None}
    from envs.assets.catalog import OBJECTS, RECEPTACLES  # imports sapien

    found, told = variants.lookup(env_id, obj_set), range(0, 1)
    if found.extra is not None and found.extra.kind == "wording":
        told = range(found.extra.first, found.extra.first + found.extra.count)
    return {
        variants.WORDINGS[i].format(object=OBJECTS[j].name, receptacle=RECEPTACLES[k].name)
        for i in told
        for j in found.objects
        for k in found.receptacles
    }


def instructions(env_id: str, obj_set: str, episode_ids: list[int]) -> list[str]:
    """What the policy is told in these episodes of the family, found without simulating; the same in both packs."""
    from envs.assets.catalog import OBJECTS, RECEPTACLES  # imports sapien

    starts = [variants.decode(env_id, obj_set, episode_id) for episode_id in episode_ids]
    return [
        variants.WORDINGS[start.wording_index].format(
            object=OBJECTS[start.object_index].name, receptacle=RECEPTACLES[start.receptacle_index].name
        )
        for start in starts
    ]
