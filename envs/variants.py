"""The env ids as data, and the arithmetic of start states. Pure Python and numpy: no simulator here.

An episode id names one start state. It is a mixed-radix number; from the slowest digit to the fastest:
(object, [extra], receptacle, table, grid pair, yaw), as in RL4VLA (arXiv 2505.19789). Main-v3 train has
16 objects x 1 receptacle x 16 tables x 784 grid pairs x 4 yaws = 802,816 of them.

One id in sixteen is held out: training streams never give it, evaluation gives nothing else. All streams are functions
of their arguments alone, so any number of ranks and workers sees the same episodes.
"""

from __future__ import annotations

import difflib
import functools
import zlib
from dataclasses import dataclass

import numpy as np

OBJ_SETS = ("train", "test", "all")
MASK64 = (1 << 64) - 1
HELD_OUT_SHARE = 16  # one id in sixteen


@dataclass(frozen=True)
class Poses:
    """Where object and receptacle start: ordered pairs of distinct grid points that are far enough apart."""

    points: tuple[tuple[float, float], ...]
    min_distance: float
    yaws_deg: tuple[float, ...]
    object_z: float = 0.95  # both fall from here onto the table at 0.8695
    receptacle_z: float = 0.95


@dataclass(frozen=True)
class Episodes:
    """What one obj_set of one env id ranges over; a digit of the episode id per field, slowest first."""

    objects: range
    extras: range | None  # second object or receptacle, where the variant has one
    receptacles: range
    tables: range
    poses: Poses


@dataclass(frozen=True)
class Variant:
    """One env id: a row of VARIANTS."""

    env_id: str
    sets: dict[str, Episodes]
    template: str = "put {object} on {receptacle}"


def _square_grid(center: tuple[float, float], half_edge: float, count: int) -> tuple[tuple[float, float], ...]:
    """`count` x `count` points, x slow and y fast (the published order)."""
    steps = [2 * half_edge * i / (count - 1) - half_edge for i in range(count)]
    return tuple((center[0] + dx, center[1] + dy) for dx in steps for dy in steps)


GRID = Poses(points=_square_grid((-0.16, 0.0), 0.075, 6), min_distance=0.070, yaws_deg=(0.0, 45.0, 90.0, 135.0))

VARIANTS: dict[str, Variant] = {
    variant.env_id: variant
    for variant in (
        Variant(
            "PutOnPlateInScene25Main-v3",
            {
                "train": Episodes(range(0, 16), None, range(0, 1), range(0, 16), GRID),
                "test": Episodes(range(16, 25), None, range(0, 1), range(16, 21), GRID),
                "all": Episodes(range(0, 25), None, range(0, 1), range(0, 21), GRID),
            },
        ),
    )
}


@dataclass(frozen=True)
class StartState:
    """One decoded episode id; positions in metres, world frame, before anything has fallen."""

    episode_id: int
    object_index: int
    extra_index: int | None
    receptacle_index: int
    table_index: int
    object_position: tuple[float, float, float]
    receptacle_position: tuple[float, float, float]
    object_yaw: float  # radians; receptacles start unrotated


def lookup(env_id: str, obj_set: str) -> Episodes:
    """The row's ranges, or one clear sentence."""
    if env_id not in VARIANTS:
        near = difflib.get_close_matches(env_id, VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown env_id {env_id!r}: did you mean {near!r}? Known: {', '.join(VARIANTS)}.")
    sets = VARIANTS[env_id].sets
    if obj_set not in sets:
        raise ValueError(f"unknown obj_set {obj_set!r} for {env_id}: use one of {', '.join(sets)}.")
    return sets[obj_set]


@functools.cache
def grid_pairs(poses: Poses) -> tuple[tuple[int, int], ...]:
    """Indices (object point, receptacle point) of all ordered pairs far enough apart; 784 on the 6 x 6 grid."""
    points = np.asarray(poses.points)
    distance = np.linalg.norm(points[:, None] - points[None, :], axis=-1)
    return tuple((int(i), int(j)) for i, j in zip(*np.nonzero(distance > poses.min_distance)))


def radices(episodes: Episodes) -> tuple[int, ...]:
    """Sizes of the digits of an episode id, slowest first."""
    extra = () if episodes.extras is None else (len(episodes.extras),)
    poses = (len(grid_pairs(episodes.poses)), len(episodes.poses.yaws_deg))
    return (len(episodes.objects), *extra, len(episodes.receptacles), len(episodes.tables), *poses)


def num_start_states(env_id: str, obj_set: str) -> int:
    """How many episode ids there are."""
    count = 1
    for radix in radices(lookup(env_id, obj_set)):
        count *= radix
    return count


def check_episode_id(env_id: str, obj_set: str, episode_id: int) -> int:
    """The id as an int, or one clear sentence."""
    total = num_start_states(env_id, obj_set)
    if int(episode_id) != episode_id or not 0 <= episode_id < total:
        raise ValueError(f"episode id {episode_id} is out of range: {env_id} {obj_set} has ids 0 to {total - 1}.")
    return int(episode_id)


def decode(env_id: str, obj_set: str, episode_id: int) -> StartState:
    """Episode id -> what stands where."""
    episodes = lookup(env_id, obj_set)
    rest = check_episode_id(env_id, obj_set, episode_id)
    digits = []
    for radix in reversed(radices(episodes)):
        rest, digit = divmod(rest, radix)
        digits.append(digit)
    yaw, pair, table, receptacle, *extra, obj = digits
    poses = episodes.poses
    object_point, receptacle_point = grid_pairs(poses)[pair]
    return StartState(
        episode_id=int(episode_id),
        object_index=episodes.objects[obj],
        extra_index=episodes.extras[extra[0]] if extra else None,
        receptacle_index=episodes.receptacles[receptacle],
        table_index=episodes.tables[table],
        object_position=(*poses.points[object_point], poses.object_z),
        receptacle_position=(*poses.points[receptacle_point], poses.receptacle_z),
        object_yaw=float(np.deg2rad(poses.yaws_deg[yaw])),
    )


# ---------------------------------------------------------------------------------------------------------------------
# which episodes are for training, which for evaluation
# ---------------------------------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """A 64-bit mixing function (Steele, Lea, Flood 2014, the finaliser of SplitMix64)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def is_held_out(episode_id: int) -> bool:
    """Whether this start state is kept for evaluation."""
    return splitmix64(episode_id) % HELD_OUT_SHARE == 0


def _draws(key: tuple[int, ...], total: int):
    """Endless ids in [0, total) as a function of `key` alone. The modulo bias is below total / 2^64."""
    state = 0
    for word in key:
        state = splitmix64(state ^ (word & MASK64))
    for attempt in range(1 << 62):
        yield splitmix64(state ^ splitmix64(attempt)) % total


def train_episode_id(total: int, seed: int, env_index: int, counter: int) -> int:
    """Episode number `counter` of global env `env_index`; never a held-out id."""
    for episode_id in _draws((seed, env_index, counter), total):
        if not is_held_out(episode_id):
            return episode_id
    raise AssertionError("unreachable: fifteen ids in sixteen are for training")


def eval_episode_ids(env_id: str, obj_set: str, num_episodes: int) -> list[int]:
    """The first `num_episodes` of one fixed sequence of distinct held-out ids; a longer list begins with a shorter."""
    total = num_start_states(env_id, obj_set)
    key = zlib.crc32(f"{env_id}:{obj_set}".encode())
    if num_episodes > total // (2 * HELD_OUT_SHARE) and num_episodes > (
        available := sum(map(is_held_out, range(total)))
    ):
        raise ValueError(
            f"{num_episodes} evaluation episodes wanted, but {env_id} {obj_set} holds out {available}: ask for fewer."
        )
    chosen: dict[int, None] = {}  # keeps order
    for episode_id in _draws((key,), total):
        if len(chosen) == num_episodes:
            break
        if is_held_out(episode_id):
            chosen[episode_id] = None
    return list(chosen)
