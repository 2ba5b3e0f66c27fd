"""What a policy's folder knows about itself, so that nobody has to type it: solovla.json.

save_policy() writes the file: model type, statistics, chunk size, and the world that the policy was made in. For a
folder without it, keys of config.json tell the model type where they can. Flags that are given win.
"""

import json
from pathlib import Path
from typing import NamedTuple

from schemas import UserError, check, parse_json
from schemas.flags import edition_before, edition_now
from schemas.hub import small_folder
from schemas.policies import About
from vla import VERSION
from vla.files.tensors import COPY_AGAIN, read_small
from vla.models.tiny import TINY_PRESETS

ABOUT = "solovla.json"
OF_MODEL = ("model_type", "unnorm_key", "chunk_size", "max_prompt_length", "image_resize", "oft_stop_token", "dtype")
OF_WORLD = (
    "env_id",
    "instruction",
    "image_size",
    "sim_freq",
    "asset_pack",
    "protocol",
    "hulls",
    "edition",
    "max_episode_steps",
)
DECIDED = ("model_type", "chunk_size")  # another value could not be what the weights were trained for
# other flags that should have the value of the folder -> how a sentence says a value
SHOWN = {
    "unnorm_key": "statistics of {}",
    "image_resize": "image_resize {}",
    "oft_stop_token": "oft_stop_token {}",
    "env_id": "env {}",
    "image_size": "{0[0]} x {0[1]} pixels",
    "sim_freq": "{} Hz physics",
    "asset_pack": "{} assets",
    "protocol": "protocol {}",
    "hulls": "{} hulls",
    "edition": "edition {} of the builtin pack",
    "max_episode_steps": "{} steps an episode",
}


class Known(NamedTuple):
    """Flags that a folder knows."""

    source: str  # the file that knows them, as sentences name it
    flags: dict
    is_sure: bool  # whether DECIDED flags must agree


# ---------------------------------------------------------------------- writing
def world_of(
    *,
    env_id: str,
    instruction: str | None,
    image_size: tuple[int, int],
    sim_freq: int,
    asset_pack: str,
    protocol: str,
    hulls: str,
    max_episode_steps: int,
    control: str,
) -> dict:
    """The entry `world` of solovla.json, from a script's flags. control: ManiSkill's control mode."""
    world = {"env_id": env_id, "instruction": instruction, "image_size": list(image_size), "sim_freq": sim_freq}
    world |= {"asset_pack": asset_pack, "protocol": protocol, "hulls": hulls if asset_pack == "bridge" else None}
    world |= {"edition": edition_now(world), "max_episode_steps": max_episode_steps}
    return world | {"control": control}


def about_bytes(model: dict, world: dict | None) -> bytes:
    """The content of solovla.json. model: the flags in OF_MODEL. world: of world_of(), or None."""
    return (json.dumps({"version": VERSION, **model, "world": world}, indent=2) + "\n").encode()


# ---------------------------------------------------------------------- reading
def read_about(folder: Path) -> About | None:
    """The content of solovla.json, or None for a folder without one. Raises UserError if a value does not fit."""
    path = folder / ABOUT
    if not path.is_file():
        return None
    remedy = "delete the file, and give the flags yourself"
    return check(About, parse_json(read_small(path), str(path), remedy), str(path), remedy)


def known_flags(path: str, source: str = "", *, offline: bool = False) -> Known | None:
    """What a folder, a model on the Hub or a tiny preset knows about itself. None if it knows nothing.

    Args:
        source: the flag that names it, such as --model_path.
        offline: whether the Hub is not asked, so that only its cache is looked at.

    Raises:
        UserError: the Hub has no such model, or a file is not what it should be.
    """
    if path in TINY_PRESETS:
        chunk_size = TINY_PRESETS[path].get("chunk_size")
        return Known(path, {"model_type": "openvla_oft", "chunk_size": chunk_size}, False) if chunk_size else None
    folder = small_folder(path, source, offline=offline)
    if about := read_about(folder):
        values = about.model_dump()
        world = values.pop("world") or {}
        found = {name: values[name] for name in OF_MODEL} | {name: world[name] for name in OF_WORLD if name in world}
        return Known(f"{path}/{ABOUT}", {name: value for name, value in found.items() if value is not None}, True)
    guessed = from_config(folder)
    return Known(f"{path}/config.json", guessed, False) if guessed else None


def from_config(folder: Path) -> dict:
    """Flags that config.json gives away. The published OpenVLA-OFT often has the config.json of an OpenVLA.

    A chunk_size is that of an OpenVLA-OFT that we saved. Others name the model in model_type or in architectures. With
    the statistics of one data set, unnorm_key is its name.
    """
    if not (folder / "config.json").is_file():
        return {}
    config = parse_json(read_small(folder / "config.json"), str(folder / "config.json"), COPY_AGAIN)
    if not isinstance(config, dict):  # read_folder() says so
        return {}
    found = {}
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    if config.get("chunk_size") or any("oft" in str(name).lower() for name in names):
        found["model_type"] = "openvla_oft"
    if isinstance(config.get("chunk_size"), int):
        found["chunk_size"] = config["chunk_size"]
    keys = set(config.get("norm_stats") or ())
    if (beside := folder / "dataset_statistics.json").is_file():
        keys |= set(parse_json(read_small(beside), str(beside), COPY_AGAIN) or ())
    if len(keys) == 1:
        found["unnorm_key"] = keys.pop()
    return found


def edition_of(folder: Path, flags: dict) -> dict:
    """{"edition": number} of the policy in `folder` that a run with these flags made, or {}."""
    about = read_about(folder)
    return {"edition": about.world.edition} if about and about.world else edition_before(flags)


# ---------------------------------------------------------------------- comparing
def without_foreign_world(flags: dict, env_id: str, family: str) -> dict:
    """The flags of a folder, for a run whose env is given: without the world of an env of another kind."""
    mine, theirs = env_id, flags.get("env_id", env_id)
    if mine == theirs:
        return flags
    dropped = ("env_id", "instruction") if mine.startswith(family) and theirs.startswith(family) else OF_WORLD
    return {name: value for name, value in flags.items() if name not in dropped}


def check_known(known: Known, used: dict) -> None:
    """Raise UserError if a flag contradicts what the weights were trained for. used: the flags of the run."""
    for name in DECIDED if known.is_sure else ():
        if name in known.flags and name in used and used[name] != known.flags[name]:
            raise UserError(
                f"--{name} {used[name]}, but {known.source} says {known.flags[name]}: leave the flag out, or name "
                "another folder"
            )


def differences(known: Known, used: dict) -> str | None:
    """A line about a policy that acts in another world than its own, or None."""
    used = used | {"edition": edition_now(used)}
    compared = SHOWN.keys() & known.flags.keys() & used.keys()
    if used["edition"] is None:
        compared -= {"edition"}  # it is another pack or another task, which is said
    if used.get("asset_pack") != "bridge":
        compared -= {"hulls"}  # there are no meshes
    differing = [name for name in SHOWN if name in compared and plain(used[name]) != plain(known.flags[name])]
    if not differing:
        return None
    made, here = (", ".join(SHOWN[name].format(values[name]) for name in differing) for values in (known.flags, used))
    return f"note    the policy was made with {made}, and is used here with {here}: do not compare its success"


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
