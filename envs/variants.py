"""The env ids of the family as data, and the arithmetic of their start states. Importing this needs no simulator.

An episode id names one start state. It is a mixed-radix number. Its digits are, from the slowest to the fastest,
(object, [extra], receptacle, table, placement, yaw), as in RL4VLA (arXiv 2505.19789). An extra digit that stands for a
second receptacle comes after the first receptacle. Main-v3 train has 16 objects x 1 receptacle x 16 tables x
784 placements x 4 yaws = 802,816 start states. All numbers in this file are the published ones.

`protocol="rlinf"` decodes like RLinf (arXiv 2510.06710). `envs/put_on_plate.py` lists all differences.

One id in eight is held out: training never gets it, and evaluation gets nothing else. All streams of ids depend on
their arguments only, so any number of ranks and workers sees the same episodes.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

OBJ_SETS = ("train", "test", "all")
PROTOCOLS = ("rl4vla", "rlinf")
ASSET_PACKS = ("builtin", "bridge")
MASK64 = (1 << 64) - 1
HELD_OUT_SHARE = 8  # one id in eight


@dataclass(frozen=True)
class Grid:
    """Start positions: every choice of grid points that are far enough apart, with the object's point slowest.

    The bodies are object and receptacle. Some ids have a third: a distractor, or the place that the object is moved to.
    """

    points: tuple[tuple[float, float], ...]  # m, world x, y
    heights: tuple[float, ...]  # m, of each body, which falls from there onto the table at 0.8695
    gaps: tuple[float, ...]  # m that distances must exceed: object-receptacle[, third-receptacle, third-object]
    rlinf_heights: tuple[float, ...] | None = None  # m, if RLinf has other ones


@dataclass(frozen=True)
class Extra:
    """The digit that only some ids have. It chooses a texture, a wording, an arm pose or a second body.

    A second body has the index (local index of the first + skip + digit + 1) modulo `modulus`.
    """

    kind: str  # texture | wording | arm | object | receptacle
    count: int
    first: int = 0
    modulus: int = 0
    skip: int = 0


@dataclass(frozen=True)
class Episodes:
    """The start states of one obj_set of one env id: a range for each digit of the episode id."""

    objects: range = range(0, 16)
    receptacles: range = range(0, 1)
    tables: range = range(0, 16)
    grids: tuple[Grid, ...] = ()
    yaws_deg: tuple[float, ...] = (0.0, 45.0, 90.0, 135.0)
    extra: Extra | None = None
    moves: bool = False  # the object is moved to the third point during the episode


@dataclass(frozen=True)
class Variant:
    """One env id: a row of VARIANTS."""

    env_id: str
    sets: dict[str, Episodes]
    texture_on: str | None = None  # foreground (robot and objects) | whole (image)
    texture_mix: float = 0.0


def _points(cells: Iterable[tuple[int, int]]) -> tuple[tuple[float, float], ...]:
    """World x, y of grid cells (i, j), which are 3 cm apart. Cell (0, 0) is at (-0.235, -0.075).

    The formula is the published code's. Some distances are 0.15 up to rounding, which decides whether they are > 0.15.
    """
    return tuple(((i / 5 * 2 - 1) * 0.075 - 0.16, (j / 5 * 2 - 1) * 0.075 + 0.0) for i, j in cells)


SQUARE = _points(itertools.product(range(6), range(6)))
RING = _points(cell for cell in itertools.product(range(-1, 7), range(-1, 7)) if {-1, 6} & set(cell))
GRID = Grid(SQUARE, (0.95, 0.95), (0.070,), rlinf_heights=(0.90, 0.90))
GRID_HIGH = replace(GRID, rlinf_heights=None)
GRID_RING = Grid(RING, (0.95, 0.95), (0.070,))
GRID_OBJECTS = Grid(SQUARE, (0.95, 0.92, 1.0), (0.070, 0.070, 0.15))
GRID_RECEPTACLES = Grid(SQUARE, (1.0, 0.92, 0.96), (0.070, 0.150, 0.070))
RING_YAWS = (-22.5, -67.5, -112.5, -157.5)

WORDINGS = (  # 0 is for training, 1 to 16 are the test set, and no set reaches the last four
    "put {object} on {receptacle}",
    "Place the {object} on the {receptacle}",
    "set {object} on {receptacle}",
    "move the {object} to the {receptacle}",
    "Take the {object} and put it on the {receptacle}",
    "pick up {object} and set it down on {receptacle}",
    "please put the {object} on the {receptacle}",
    "Put {object} onto {receptacle}.",
    "place the {object} onto the {receptacle} surface",
    "Make sure {object} is on {receptacle}.",
    "on the {receptacle}, put the {object}",
    "put the {object} where the {receptacle} is",
    "Move the {object} from the table to the {receptacle}",
    "Move {object} so it\u2019s on {receptacle}.",
    "Can you put {object} on {receptacle}?",
    "{object} on the {receptacle}, please.",
    "the {object} should be placed on the {receptacle}.",
    "Lay the {object} down on the {receptacle}.",
    "could you place {object} over {receptacle}",
    "position the {object} atop the {receptacle}",
    "Arrange for the {object} to be resting on {receptacle}.",
)


@functools.cache
def arm_offsets() -> tuple[tuple[float, ...], ...]:
    """Offsets (rad) that EEPose-v1 adds to the six start angles: zeros, then 14,375 combinations, the waist slowest."""
    small = (-0.15, -0.08, 0.0, 0.08, 0.15)
    wrist = (-0.6, -0.3, 0.0, 0.3, 0.6)
    offsets = [(0.0,) * 6]
    for angles in itertools.product(small, small, small, small, small, wrist):
        if abs(angles[1] + angles[2]) <= 0.25:
            offsets.append(angles)
    return tuple(offsets)


def _sets(train: Episodes, test: dict, all_: dict | None = None) -> dict[str, Episodes]:
    """The three object sets. `test` and `all_` hold what differs from `train`, and `all_` defaults to `test`."""
    every = test if all_ is None else all_
    return {"train": train, "test": replace(train, **test), "all": replace(train, **every)}


def _extra_sets(kind: str, count: int) -> dict[str, Episodes]:
    """Choice 0 is for training, choices 1 to `count` are the test set."""
    grid = GRID_HIGH if kind == "arm" else GRID
    train = Episodes(grids=(grid,), extra=Extra(kind, 1))
    test = dict(extra=Extra(kind, count, first=1))
    every = dict(extra=Extra(kind, count + 1))
    return _sets(train, test, every)


MAIN = Episodes(grids=(GRID,))
UNSEEN_OBJECTS, EVERY_OBJECT = range(16, 25), range(0, 25)
UNSEEN_TABLES, EVERY_TABLE = range(16, 21), range(0, 21)
FIRST = range(0, 1)
TEXTURES = _extra_sets("texture", 16)
NAME = "PutOnPlateInScene25"

# one row per env id: the ranges of each object set, and how the image is changed
VARIANTS: dict[str, Variant] = {
    variant.env_id: variant
    for variant in (
        Variant(
            f"{NAME}Main-v3",
            _sets(
                MAIN, dict(objects=UNSEEN_OBJECTS, tables=UNSEEN_TABLES), dict(objects=EVERY_OBJECT, tables=EVERY_TABLE)
            ),
        ),
        Variant(f"{NAME}Single-v1", _sets(replace(MAIN, objects=FIRST, tables=FIRST), {})),
        Variant(
            f"{NAME}MainCarrot-v3",
            _sets(replace(MAIN, tables=FIRST), dict(objects=UNSEEN_OBJECTS), dict(objects=EVERY_OBJECT)),
        ),
        Variant(
            f"{NAME}MainImage-v3",
            _sets(replace(MAIN, objects=FIRST), dict(tables=UNSEEN_TABLES), dict(tables=EVERY_TABLE)),
        ),
        # vision
        Variant(f"{NAME}VisionImage-v1", _sets(MAIN, dict(tables=UNSEEN_TABLES), dict(tables=EVERY_TABLE))),
        Variant(f"{NAME}VisionTexture03-v1", TEXTURES, "foreground", 0.3),
        Variant(f"{NAME}VisionTexture05-v1", TEXTURES, "foreground", 0.5),
        Variant(f"{NAME}VisionWhole03-v1", TEXTURES, "whole", 0.3),
        Variant(f"{NAME}VisionWhole05-v1", TEXTURES, "whole", 0.5),
        # semantics
        Variant(f"{NAME}Carrot-v1", _sets(MAIN, dict(objects=UNSEEN_OBJECTS), dict(objects=EVERY_OBJECT))),
        Variant(f"{NAME}Plate-v1", _sets(MAIN, dict(receptacles=range(1, 17)), dict(receptacles=range(0, 17)))),
        Variant(f"{NAME}Instruct-v1", _extra_sets("wording", 16)),
        Variant(
            f"{NAME}MultiCarrot-v1",
            _sets(
                Episodes(grids=(GRID_OBJECTS,), extra=Extra("object", 15, 0, 16)),
                dict(objects=UNSEEN_OBJECTS, extra=Extra("object", 8, 16, 9, skip=16)),
                dict(objects=EVERY_OBJECT, extra=Extra("object", 24, 0, 25)),
            ),
        ),
        Variant(
            f"{NAME}MultiPlate-v1",
            _sets(  # all 21 tables in every set, as published
                Episodes(grids=(GRID_RECEPTACLES,), tables=EVERY_TABLE, extra=Extra("receptacle", 16, 0, 17)),
                dict(receptacles=range(1, 17), extra=Extra("receptacle", 15, 1, 16)),
                dict(receptacles=range(0, 17), extra=Extra("receptacle", 16, 0, 17)),
            ),
        ),
        # execution
        Variant(
            f"{NAME}Position-v1",
            _sets(
                replace(MAIN, grids=(GRID_HIGH,)),
                dict(grids=(GRID_RING,), yaws_deg=RING_YAWS),
                dict(grids=(GRID_HIGH, GRID_RING), yaws_deg=MAIN.yaws_deg + RING_YAWS),
            ),
        ),
        Variant(f"{NAME}EEPose-v1", _extra_sets("arm", 14_375)),
        Variant(f"{NAME}PositionChangeTo-v1", _sets(Episodes(grids=(GRID_OBJECTS,)), dict(moves=True))),
    )
}


@dataclass(frozen=True)
class StartState:
    """One decoded episode id. Positions are in metres in the world frame, before anything has fallen."""

    episode_id: int
    obj_set: str
    object_index: int
    receptacle_index: int
    table_index: int
    object_position: tuple[float, float, float]
    receptacle_position: tuple[float, float, float]
    object_yaw: float  # radians, of a second object as well. Receptacles start unrotated
    distractor: tuple[str, int] | None = None  # ("object" | "receptacle", index)
    distractor_position: tuple[float, float, float] | None = None
    moves_to: tuple[float, float, float] | None = None  # where the object is moved to during the episode
    texture_index: int | None = None
    wording_index: int = 0
    arm_offset: tuple[float, ...] = (0.0,) * 6  # radians, added to the start angles


def lookup(env_id: str, obj_set: str) -> Episodes:
    """The ranges of one object set. Raises ValueError for an unknown id or set."""
    if env_id not in VARIANTS:
        near = difflib.get_close_matches(env_id, VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown env_id {env_id!r}: did you mean {near!r}? Known: {', '.join(VARIANTS)}.")
    sets = VARIANTS[env_id].sets
    if obj_set not in sets:
        raise ValueError(f"unknown obj_set {obj_set!r} for {env_id}: use one of {', '.join(sets)}.")
    return sets[obj_set]


def check_protocol(protocol: str) -> str:
    """The name itself. Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}.")
    return protocol


@functools.cache
def placements(grid: Grid) -> tuple[tuple[int, ...], ...]:
    """Indices of points (object, receptacle[, third]) that are far enough apart.

    On the 6 x 6 grid these are 784 pairs, or 2,104 triples.
    """
    points = [np.array(point) for point in grid.points]
    distance = np.array([[np.linalg.norm(a - b) for b in points] for a in points])  # [P, P]
    object_receptacle = distance > grid.gaps[0]
    if len(grid.gaps) == 1:
        chosen = np.argwhere(object_receptacle)
    else:
        receptacle_third = distance > grid.gaps[1]
        object_third = distance > grid.gaps[2]
        # axes: object, receptacle, third
        chosen = np.argwhere(object_receptacle[:, :, None] & receptacle_third[None] & object_third[:, None])
    return tuple(tuple(int(i) for i in row) for row in chosen)


def radices(episodes: Episodes) -> dict[str, int]:
    """The radix of each digit of an episode id by name, slowest first."""
    digits = {"object": len(episodes.objects), "receptacle": len(episodes.receptacles)}
    if episodes.extra is not None:
        digits["extra"] = episodes.extra.count
        if episodes.extra.kind != "receptacle":
            digits["receptacle"] = digits.pop("receptacle")  # moves to the end
    digits["table"] = len(episodes.tables)
    digits["placement"] = sum(len(placements(grid)) for grid in episodes.grids)
    digits["yaw"] = len(episodes.yaws_deg)
    return digits


def num_start_states(env_id: str, obj_set: str) -> int:
    """The number of episode ids."""
    return math.prod(radices(lookup(env_id, obj_set)).values())


def bodies_needed(env_id: str, obj_set: str) -> list[tuple[str, int]]:
    """(kind, index) of every object and receptacle in any episode. Objects come first, each kind by index."""
    episodes = lookup(env_id, obj_set)
    needed = {"object": set(episodes.objects), "receptacle": set(episodes.receptacles)}
    extra = episodes.extra
    if extra is not None and extra.kind in needed:
        needed[extra.kind] |= set(range(extra.first, extra.first + extra.modulus))
    return [(kind, index) for kind in needed for index in sorted(needed[kind])]


def check_in_range(env_id: str, obj_set: str, episode_id: int, total: int) -> int:
    """The id as an int. Raises ValueError unless it is one of 0 to total - 1."""
    if int(episode_id) != episode_id or not 0 <= episode_id < total:
        raise ValueError(f"episode id {episode_id} is out of range: {env_id} {obj_set} has ids 0 to {total - 1}.")
    return int(episode_id)


def decode(env_id: str, obj_set: str, episode_id: int, protocol: str = "rl4vla") -> StartState:
    """The start state that an episode id names."""
    episodes = lookup(env_id, obj_set)
    check_protocol(protocol)
    digits: dict[str, int] = {}
    rest = check_in_range(env_id, obj_set, episode_id, num_start_states(env_id, obj_set))
    for name, radix in reversed(radices(episodes).items()):
        rest, digits[name] = divmod(rest, radix)
    positions = _positions(episodes.grids, digits["placement"], protocol)
    start = StartState(
        episode_id=int(episode_id),
        obj_set=obj_set,
        object_index=episodes.objects[digits["object"]],
        receptacle_index=episodes.receptacles[digits["receptacle"]],
        table_index=episodes.tables[digits["table"]],
        object_position=positions[0],
        receptacle_position=positions[1],
        object_yaw=float(np.deg2rad(episodes.yaws_deg[digits["yaw"]])),
        moves_to=positions[2] if episodes.moves else None,
    )
    if episodes.extra is None:
        return start
    return _with_extra(start, episodes.extra, digits, positions, protocol)


def _positions(grids: tuple[Grid, ...], placement: int, protocol: str) -> list[tuple[float, float, float]]:
    """World positions of object, receptacle and perhaps a third body. `placement` counts through all grids."""
    for grid in grids:
        count = len(placements(grid))
        if placement < count:
            break
        placement -= count
    heights = grid.heights
    if protocol == "rlinf" and grid.rlinf_heights is not None:
        heights = grid.rlinf_heights
    return [(*grid.points[point], height) for point, height in zip(placements(grid)[placement], heights)]


def _with_extra(start: StartState, extra: Extra, digits: dict, positions: list, protocol: str) -> StartState:
    """Add what the extra digit stands for."""
    digit = digits["extra"]
    if extra.kind == "texture":  # RLinf uses the table's own texture
        return replace(start, texture_index=start.table_index if protocol == "rlinf" else extra.first + digit)
    if extra.kind == "wording":
        return replace(start, wording_index=extra.first + digit)
    if extra.kind == "arm":
        return replace(start, arm_offset=arm_offsets()[extra.first + digit])
    index = digits[extra.kind]
    other = (index + extra.skip + digit + 1) % extra.modulus
    if other == index:
        # Fault of the published code: in MultiCarrot test one distractor in eight is the object itself, which then is
        # alone at the third point. RLinf keeps the fault. Here the distractor is the body that no digit stands for.
        if protocol == "rlinf":
            return replace(start, object_position=positions[2])
        other = (index + extra.skip) % extra.modulus
    return replace(start, distractor=(extra.kind, extra.first + other), distractor_position=positions[2])


# ---------------------------------------------------------------------------------------------------------------------
# which episodes are for training, which for evaluation
# ---------------------------------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """A 64-bit mixing function: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def is_held_out(episode_id: int) -> bool:
    """Whether this start state is kept for evaluation."""
    return splitmix64(episode_id) % HELD_OUT_SHARE == 0


def _random_ids(key: tuple[int, ...], total: int) -> Iterator[int]:
    """Endless random ids in [0, total) that depend on `key` only. The modulo bias is below total / 2^64."""
    state = 0
    for word in key:
        state = splitmix64(state ^ (word & MASK64))
    for attempt in range(1 << 62):
        yield splitmix64(state ^ splitmix64(attempt)) % total


def train_episode_id(total: int, seed: int, env_index: int, counter: int) -> int:
    """Training episode number `counter` of env `env_index`, counted over all ranks. It is never a held-out id."""
    for episode_id in _random_ids((seed, env_index, counter), total):
        if not is_held_out(episode_id):
            return episode_id
    raise AssertionError("unreachable: seven ids in eight are for training")


def eval_episode_ids(env_id: str, obj_set: str, num_episodes: int) -> list[int]:
    """The first `num_episodes` of one fixed sequence of distinct held-out ids.

    A longer list begins with every shorter one.

    Raises:
        ValueError: fewer ids are held out.
    """
    total = num_start_states(env_id, obj_set)
    if num_episodes > total // (2 * HELD_OUT_SHARE):  # perhaps too many: count
        available = sum(map(is_held_out, range(total)))
        if num_episodes > available:
            raise ValueError(
                f"{num_episodes} evaluation episodes are too many: {env_id} {obj_set} holds out "
                f"{available}, so ask for fewer."
            )
    key = zlib.crc32(f"{env_id}:{obj_set}".encode())
    chosen: dict[int, None] = {}  # keeps the order
    for episode_id in _random_ids((key,), total):
        if len(chosen) == num_episodes:
            break
        if is_held_out(episode_id):
            chosen[episode_id] = None
    return list(chosen)
