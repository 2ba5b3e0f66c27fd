"""When an object counts as grasped and as placed, and what that is worth: the rules of RL4VLA.

Each rule stands here twice: in plain numbers for one env (`envs/put_on_plate.py`), and below that as a function of
tensors for N rows, one per env (`envs/gpu/simulation.py`). For one env, plain numbers are ten times as fast. Tests show
that both give the same results. Units are metres and newtons in the world frame. Every device works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

GRASP_MIN_FORCE = 0.5  # N per finger
GRASP_MIN_COSINE = math.cos(math.radians(85))  # between the force on a finger and its opening direction
GRASP_STREAK = 5  # control steps in a row
ON_MIN_FORCE = 0.03  # N between object and receptacle
ON_XY_SLACK, ON_Z_SLACK = 0.01, 0.05  # m
REWARD_GRASP, REWARD_STREAK, REWARD_SUCCESS = 0.1, 0.1, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# grasped, and on the receptacle
# ---------------------------------------------------------------------------------------------------------------------


def pressed_open(opening: np.ndarray, force: np.ndarray) -> bool:
    """Whether a finger is pushed outwards hard enough.

    opening: the unit vector [3] in which the finger opens. force: of the object on the finger, [3].
    """
    size = np.linalg.norm(force)
    return bool(size >= GRASP_MIN_FORCE and opening @ force >= GRASP_MIN_COSINE * size)


def pressed_open_rows(opening: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
    """Whether fingers are pushed outwards hard enough: bool [N].

    opening: unit vectors [N, 3] in which the fingers open. force: of the object on each finger, [N, 3].
    """
    size = torch.linalg.vector_norm(force, dim=-1)
    outwards = (opening * force).sum(-1)
    return (size >= GRASP_MIN_FORCE) & (outwards >= GRASP_MIN_COSINE * size)


def over_receptacle(
    obj: np.ndarray, receptacle: np.ndarray, object_half: np.ndarray, receptacle_half: np.ndarray
) -> bool:
    """Whether an object is above its receptacle and low enough, of positions and half edges [3]."""
    offset = obj - receptacle
    near = np.linalg.norm(offset[:2]) <= receptacle_half.max() + ON_XY_SLACK
    low = offset[2] - receptacle_half[2] - object_half[2] <= ON_Z_SLACK
    return bool(near and offset[2] > 0 and low)


def over_receptacle_rows(
    obj: torch.Tensor, receptacle: torch.Tensor, object_half: torch.Tensor, receptacle_half: torch.Tensor
) -> torch.Tensor:
    """Whether objects are above their receptacles and low enough: bool [N], of positions and half edges [N, 3]."""
    offset = obj - receptacle
    distance = torch.linalg.vector_norm(offset[:, :2], dim=-1)
    height = offset[:, 2]
    gap = height - receptacle_half[:, 2] - object_half[:, 2]
    near = distance <= receptacle_half.amax(-1) + ON_XY_SLACK
    return near & (height > 0) & (gap <= ON_Z_SLACK)


def touches(force: np.ndarray) -> bool:
    """Whether an object presses on its receptacle, of the force [3]."""
    return bool(np.linalg.norm(force) > ON_MIN_FORCE)


def touches_rows(force: torch.Tensor) -> torch.Tensor:
    """Whether objects press on their receptacles: bool [N] of forces [N, 3]."""
    return torch.linalg.vector_norm(force, dim=-1) > ON_MIN_FORCE


# ---------------------------------------------------------------------------------------------------------------------
# reward
# ---------------------------------------------------------------------------------------------------------------------


def potential_of(grasped_once: bool, streak_once: bool, success: bool) -> float:
    """The sum of all rewards that these flags are worth. A reward is its increase in a control step."""
    potential = REWARD_GRASP * float(grasped_once) + REWARD_STREAK * float(streak_once)
    return potential + REWARD_SUCCESS * float(success and grasped_once)


def potential_of_rows(grasped_once: torch.Tensor, streak_once: torch.Tensor, success: torch.Tensor) -> torch.Tensor:
    """The same of flags bool [N]: float64 [N]."""
    potential = REWARD_GRASP * grasped_once.double() + REWARD_STREAK * streak_once.double()
    return potential + REWARD_SUCCESS * (success & grasped_once).double()


@dataclass
class Latches:
    """Flags and counters of N rows that last for an episode, [N] each. One env has them as attributes."""

    grasped_once: torch.Tensor  # bool
    streak: torch.Tensor  # int64, control steps in a row with the object grasped
    streak_once: torch.Tensor  # bool
    potential: torch.Tensor  # float64

    @classmethod
    def zeros(cls, count: int, device: torch.device | str) -> Latches:
        return cls(
            grasped_once=torch.zeros(count, dtype=torch.bool, device=device),
            streak=torch.zeros(count, dtype=torch.int64, device=device),
            streak_once=torch.zeros(count, dtype=torch.bool, device=device),
            potential=torch.zeros(count, dtype=torch.float64, device=device),
        )

    def clear(self, rows: torch.Tensor) -> None:
        """Reset the rows in which an episode begins. rows: a bool mask [N] or indices."""
        for values in vars(self).values():
            values[rows] = 0

    def update(self, grasped: torch.Tensor, success: torch.Tensor) -> torch.Tensor:
        """Account for one control step with grasped and success bool [N].

        Returns the rewards, float64 [N]: the increase of the potential.
        """
        self.streak = torch.where(grasped, self.streak + 1, 0)
        self.grasped_once = self.grasped_once | grasped
        self.streak_once = self.streak_once | (self.streak >= GRASP_STREAK)
        potential = potential_of_rows(self.grasped_once, self.streak_once, success)
        rewards = potential - self.potential
        self.potential = potential
        return rewards


# ---------------------------------------------------------------------------------------------------------------------
# the state for critics
# ---------------------------------------------------------------------------------------------------------------------


def privileged_state(
    tool: np.ndarray,
    qpos: np.ndarray,
    obj: np.ndarray,
    receptacle: np.ndarray,
    half_sizes: np.ndarray,
    flags: tuple[bool, bool, bool, int],
) -> np.ndarray:
    """The state for a critic, which a policy does not see: float32 [45]. Poses are p, q (wxyz) in the world frame.

    tool, obj and receptacle are poses [7], qpos is [8], half_sizes [2, 3]. In this order:

    poses of tool, object and receptacle                        3 x 7
    joint positions                                             8
    half sizes of object and receptacle                         6
    offsets from tool to object, from object to receptacle      6
    grasped now, ever, long enough, and for how many steps      4
    """
    from_each_other = (obj[:3] - tool[:3], receptacle[:3] - obj[:3])
    parts = (tool, obj, receptacle, qpos, half_sizes.ravel(), *from_each_other, flags)
    return np.concatenate(parts, dtype=np.float32, casting="unsafe")


def privileged_state_rows(
    tool: torch.Tensor,
    qpos: torch.Tensor,
    obj: torch.Tensor,
    receptacle: torch.Tensor,
    half_sizes: torch.Tensor,
    flags: torch.Tensor,
) -> torch.Tensor:
    """The same of N rows, float32 [N, 45].

    tool, obj and receptacle are poses [N, 7], qpos is [N, 8], half_sizes [N, 2, 3] and flags [N, 4].
    """
    from_each_other = (obj[:, :3] - tool[:, :3], receptacle[:, :3] - obj[:, :3])
    return torch.cat([tool, obj, receptacle, qpos, half_sizes.flatten(1), *from_each_other, flags], dim=1).float()
