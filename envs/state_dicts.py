"""States of an env in ManiSkill's form: nested dicts of float32 tensors [1, n]. `envs/gym_env.py` fills them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from envs import variants

BODIES = ("object", "receptacle", "distractor")  # names under `actors`
BODY_DIM = 13  # position, quaternion (wxyz), linear and angular velocity
DIGITS, RADIX = 3, 1 << 20  # an episode id in numbers that a float32 holds exactly


def merged(present: dict, given: dict, at: str = "") -> dict:
    """The state `present` with the entries that `given` has, which may be of shape [n] or [1, n].

    Raises:
        ValueError: an entry is unknown, of another size or not finite.
    """
    if not isinstance(given, dict):
        raise ValueError(
            f"the state's entry {at.rstrip('/') or 'itself'} must be a dict, as get_state_dict() gives it."
        )
    for name in given.keys() - present.keys():
        raise ValueError(f"the state has {at}{name}, which this env does not know: it is of another env.")
    result = {}
    for name, old in present.items():
        if name not in given:
            result[name] = old
        elif isinstance(old, dict):
            result[name] = merged(old, given[name], f"{at}{name}/")
        else:
            result[name] = _checked(given[name], old.shape[1], at + name)
    return result


def _checked(value: np.ndarray | torch.Tensor, size: int, name: str) -> torch.Tensor:
    """A copy of one entry, float32 [1, size]. Raises ValueError where it has another size or is not finite."""
    tensor = torch.as_tensor(value, dtype=torch.float32).reshape(1, -1).clone()
    if tensor.shape[1] != size:
        raise ValueError(f"the state's {name} has {tensor.shape[1]} numbers, not {size}: it is of another env.")
    if not tensor.isfinite().all():
        raise ValueError(f"the state's {name} has numbers that are not finite (NaN or infinite).")
    return tensor


def unflattened(like: dict, vector: np.ndarray | torch.Tensor) -> dict:
    """The nested state of a flat one, which `get_state()` gives as float32 [1, n]. `like`: a state of this env."""
    total = sum(entry.shape[1] for entry in _entries(like))
    flat = _checked(vector, total, "vector")
    parts = iter(flat.split([entry.shape[1] for entry in _entries(like)], dim=1))

    def filled(state: dict) -> dict:
        return {name: filled(entry) if isinstance(entry, dict) else next(parts) for name, entry in state.items()}

    return filled(like)


def equal(one: dict, other: dict) -> bool:
    """Whether two states of one env are the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(_entries(one), _entries(other), strict=True))


def _entries(state: dict) -> Iterator[torch.Tensor]:
    for entry in state.values():
        if isinstance(entry, dict):
            yield from _entries(entry)
        else:
            yield entry


def arrays(state: dict, at: str = "") -> dict[str, np.ndarray]:
    """The entries of a state by their path, such as "actors/object": float32 [n] each."""
    found = {}
    for name, entry in state.items():
        if isinstance(entry, dict):
            found |= arrays(entry, f"{at}{name}/")
        else:
            found[at + name] = entry[0].numpy()
    return found


def row(numbers: object) -> torch.Tensor:
    """Numbers as an entry of a state, float32 [1, n]."""
    return torch.as_tensor(np.asarray(numbers, np.float32)).reshape(1, -1)


def episode_numbers(start: variants.StartState) -> torch.Tensor:
    """What names an episode: index of its object set and digits of its id, the lowest first. float32 [1, 4]."""
    digits = [start.episode_id // RADIX**k % RADIX for k in range(DIGITS)]
    return row([variants.OBJ_SETS.index(start.obj_set), *digits])


def episode_of(env_id: str, protocol: str, numbers: torch.Tensor) -> variants.StartState:
    """The inverse of `episode_numbers`. Raises ValueError where the numbers name no episode of this env."""
    set_index, *digits = numbers[0].tolist()
    if set_index not in range(len(variants.OBJ_SETS)) or any(digit not in range(RADIX) for digit in digits):
        raise ValueError(f"the state's task/episode is {numbers[0].tolist()}, which names no episode of {env_id}.")
    episode_id = sum(int(digit) * RADIX**k for k, digit in enumerate(digits))
    return variants.decode(env_id, variants.OBJ_SETS[int(set_index)], episode_id, protocol)


def has_distractor(env_id: str) -> bool:
    """Whether episodes of this id can have a second object or receptacle."""
    sets = variants.VARIANTS[env_id].sets.values()
    return any(episodes.extra is not None and episodes.extra.kind in ("object", "receptacle") for episodes in sets)
