"""Rotations as quaternions wxyz and as matrices, in plain numpy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def matrix_entries(w: Any, x: Any, y: Any, z: Any) -> tuple:
    """The nine entries, row by row, of the rotation matrix of a unit quaternion wxyz. Numbers or arrays."""
    return (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )


def rotation_matrix(q: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a unit quaternion wxyz. `envs/kinematics.py` has it for many."""
    return np.array(matrix_entries(*q)).reshape(3, 3)


def yaw_quaternion(yaw: float) -> list[float]:
    """Quaternion wxyz of a turn by `yaw` (rad) about the vertical."""
    return [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]
