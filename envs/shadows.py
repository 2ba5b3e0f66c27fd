"""Soft shadows on the table, straight below what casts them, so that an image shows how high a thing is.

They belong to the pack `builtin`. A shadow is a function of a pose: an ellipse around the footprint of a box, dark and
small where the box touches the table, wider and fainter the higher it is. It falls on the table image and on
receptacles, which lie flat, and on nothing else.

The arithmetic is written once, for plain numbers, numpy arrays and tensors alike. So one env and the batch on a GPU
give the same values to the last bit. Lengths are metres in the world frame.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from envs.assets.catalog import CAMERA_INTRINSICS, CAMERA_SIZE, TABLE_HEIGHT, Model
from envs.assets.paint import camera_axes

DARKEST = 0.5  # share of the light that a shadow takes away in its middle, on the table
HALF_AS_DARK = 0.06  # m above the table at which it is half as dark
SPREAD = 1.6  # area of the ellipse in multiples of the footprint's
NEAR = 0.05  # m of depth that is nearer than any table
SOFT, SOFTER = 0.006, 0.25  # m that it is wider on the table, and by which share of the height it grows

Number = Any  # float, or tensor [N]
Eye = tuple[tuple[float, float, float], ...]  # a matrix [3, 3]
# middle and half edges of the tips in the frames of the left and the right finger
TIPS = tuple(((0.0275, side * 0.0055, 0.0), (0.0155, 0.0055, 0.0135)) for side in (-1, 1))


class Spot(NamedTuple):
    """A shadow in an image: where d(u, v) = (slope_u du + slope_v dv)^2 + (dv / tall)^2 is below 1, in pixels.

    du and dv are from the middle (u, v). The spot reaches `wide` and `tall` pixels from there.
    """

    u: Number
    v: Number
    slope_u: Number
    slope_v: Number
    wide: Number
    tall: Number
    darkness: Number  # the share of the light that it takes away in the middle


def spot_of(pose: tuple[Number, ...], middle: tuple[Number, ...], half: tuple[Number, ...], eye: Eye) -> Spot:
    """The shadow of a box.

    Args:
        pose: p, q (wxyz) of its frame, seven numbers in float64.
        middle: three numbers, its middle in that frame.
        half: three numbers, its half edges.
        eye: where the image sees the table.
    """
    px, py, pz, w, x, y, z = pose
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    at_x, at_y, at_z = (p + r[0] * middle[0] + r[1] * middle[1] + r[2] * middle[2] for p, r in zip((px, py, pz), rows))
    (a, b, c), (d, e, f), (g, h, i) = ((r[0] * half[0], r[1] * half[1], r[2] * half[2]) for r in rows)
    height = at_z - abs(g) - abs(h) - abs(i) - TABLE_HEIGHT
    height = (height + abs(height)) / 2  # not below 0
    blur = SOFT + SOFTER * height
    # the matrix of the ellipse on the table, like a covariance
    xx = SPREAD * (a * a + b * b + c * c) + blur * blur
    xy = SPREAD * (a * d + b * e + c * f)
    yy = SPREAD * (d * d + e * e + f * f) + blur * blur
    # the middle in the image, and how far it moves with x and y
    (a, b, c), (d, e, f), (g, h, i) = eye
    depth = g * at_x + h * at_y + i
    u, v = (a * at_x + b * at_y + c) / depth, (d * at_x + e * at_y + f) / depth
    ux, uy, vx, vy = (a - u * g) / depth, (b - u * h) / depth, (d - v * g) / depth, (e - v * h) / depth
    uu = ux * ux * xx + 2 * ux * uy * xy + uy * uy * yy
    uv = ux * vx * xx + (ux * vy + uy * vx) * xy + uy * vy * yy
    vv = vx * vx * xx + 2 * vx * vy * xy + vy * vy * yy
    slope = 1 / (uu - uv * uv / vv) ** 0.5
    seen = (at_z > TABLE_HEIGHT) * (depth > NEAR)  # nothing that has fallen off, or lies behind the camera
    return Spot(u, v, slope, -slope * uv / vv, uu**0.5, vv**0.5, seen * DARKEST / (1 + height / HALF_AS_DARK))


def box_of(model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Middle and half edges of a model's bounding box in its own frame."""
    lower, upper = np.asarray(model.lower), np.asarray(model.upper)
    return tuple(((lower + upper) / 2).tolist()), tuple(((upper - lower) / 2).tolist())


@functools.lru_cache(maxsize=8)
def eye_of(width: int, height: int) -> Eye:
    """The matrix that takes (x, y, 1) on the table to (u, v, 1) times the depth, in pixels of an image of this size."""
    origin, axes = camera_axes()
    fx, fy, cx, cy = CAMERA_INTRINSICS
    sx, sy = width / CAMERA_SIZE[0], height / CAMERA_SIZE[1]
    to_image = np.array([[cx * sx, -fx * sx, 0], [cy * sy, 0, -fy * sy], [1, 0, 0]]) @ axes.T
    down = to_image @ [-origin[0], -origin[1], TABLE_HEIGHT - origin[2]]
    return tuple(map(tuple, np.column_stack([to_image[:, :2], down]).tolist()))


def light(u: np.ndarray, v: np.ndarray, spot: Spot) -> np.ndarray:
    """The share of the light that a shadow leaves at pixels: float32 [..., H, W].

    u and v: float32 [W] and [H, 1], the middles of the pixels. The spot's numbers may have the shape [N, 1, 1].
    """
    dv = v - spot.v
    across = (u - spot.u) * spot.slope_u + dv * spot.slope_v
    tall = dv / spot.tall
    inside = ((1 - tall * tall) - across * across).clip(0)
    return 1 - inside * inside * spot.darkness


def darken(image: np.ndarray, ids: np.ndarray, foreground: np.ndarray, flat: list[int], spot: Spot) -> None:
    """Draw a shadow onto the table and onto what lies flat on it.

    Args:
        image: uint8 [H, W, 3], which is changed.
        ids: integers [H, W], what each pixel shows.
        foreground: bool [H, W], robot and objects.
        flat: the ids of what lies flat.
        spot: the shadow.
    """
    height, width = ids.shape
    left, right = max(int(spot.u - spot.wide), 0), min(int(spot.u + spot.wide) + 1, width)
    top, bottom = max(int(spot.v - spot.tall), 0), min(int(spot.v + spot.tall) + 1, height)
    if not spot.darkness or left >= right or top >= bottom:
        return
    u, v = _middles(width), _middles(height)[:, None]
    window = slice(top, bottom), slice(left, right)
    share = light(u[left:right], v[top:bottom], spot)
    upright, ids = foreground[window], ids[window]
    for number in flat:
        upright = upright & (ids != number)
    np.copyto(share, 1, where=upright)
    part = image[window]
    for channel in range(3):  # faster than broadcasting to the three of them
        part[..., channel] = part[..., channel] * share


@functools.lru_cache(maxsize=16)
def _middles(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32) + np.float32(0.5)


def darkened(images: torch.Tensor, upright: torch.Tensor, spot: Spot) -> torch.Tensor:
    """`darken` of N images, uint8 [N, H, W, 3], but not where upright, bool [N, H, W], is set.

    The spot's numbers are tensors [N].
    """
    height, width = images.shape[1:3]
    u = torch.from_numpy(_middles(width)).to(images.device)
    v = torch.from_numpy(_middles(height)).to(images.device)[:, None]
    share = light(u, v, Spot(*(number.float()[:, None, None] for number in spot)))
    return (images * torch.where(upright, 1, share)[..., None]).to(torch.uint8)
