"""The images of the pack `builtin`: 21 tables as the camera sees them, and 21 textures. Pillow and numpy paint them.

A table is painted in its own coordinates and seen through the camera, so grain and tiles get smaller with distance.
Where objects lie, contrast and detail are about those of the published photographs. `benchmarks/object_views.py
--tables` prints both. Lengths are metres, images uint8 [480, 640, 3].
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from envs.assets.catalog import (
    CAMERA_INTRINSICS,
    CAMERA_POSITION,
    CAMERA_QUATERNION,
    CAMERA_SIZE,
    ROBOT_BASE_POSITION,
    TABLE_HEIGHT,
    TABLES,
)
from envs.rotations import rotation_matrix

THICKNESS = 0.03  # m, of a table's top, whose front face is seen
RIM = 0.006  # m, of the darker line along a table's edges


def camera_axes() -> tuple[np.ndarray, np.ndarray]:
    """Where the camera is, float64 [3], and the directions of its x, y and z in the columns of a matrix [3, 3].

    SAPIEN's camera looks along +x, y is to the left and z is up. The world frame is meant.
    """
    base = np.diag([-1.0, -1.0, 1.0])  # a yaw of 180 degrees
    origin = np.asarray(ROBOT_BASE_POSITION) + base @ np.asarray(CAMERA_POSITION)
    return origin, base @ rotation_matrix(CAMERA_QUATERNION)


def points_at(level: float, width: int, height: int) -> np.ndarray:
    """World x, y where pixels' rays meet the plane z = level: float64 [height, width, 2]. NaN above the horizon."""
    origin, axes = camera_axes()
    fx, fy, cx, cy = CAMERA_INTRINSICS
    u = (np.arange(width) + 0.5) * CAMERA_SIZE[0] / width
    v = (np.arange(height) + 0.5) * CAMERA_SIZE[1] / height
    u, v = np.meshgrid(u, v)
    rays = np.stack([np.ones_like(u), -(u - cx) / fx, -(v - cy) / fy], axis=-1) @ axes.T
    looks_down = rays[..., 2] < -1e-6
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(looks_down, (level - origin[2]) / rays[..., 2], np.nan)
    return origin[:2] + distance[..., None] * rays[..., :2]


def _noise(random: np.random.RandomState, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise in [0, 1] with about `cells` bumps across, float32 [H, W]."""
    grid = (random.random_sample((cells + 1, cells + 1)) * 255).astype(np.uint8)
    smooth = Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255


def _field(random: np.random.RandomState, x: np.ndarray, y: np.ndarray, cell_x: float, cell_y: float) -> np.ndarray:
    """Smooth noise in [-1, 1] on a surface, with bumps of cell_x by cell_y metres: float [H, W] at x, y [H, W].

    It repeats after 64 cells.
    """
    grid = random.random_sample((64, 64)) * 2 - 1
    column, row = x / cell_x, y / cell_y
    i, j = np.floor(column), np.floor(row)
    s, t = column - i, row - j
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    i, j = i.astype(int) % 64, j.astype(int) % 64
    right, below = (i + 1) % 64, (j + 1) % 64
    return (grid[i, j] * (1 - s) + grid[right, j] * s) * (1 - t) + (
        grid[i, below] * (1 - s) + grid[right, below] * s
    ) * t


def _lines(position: np.ndarray, pitch: float, width: float) -> np.ndarray:
    """1 on lines of `width` metres at every `pitch`, 0 between them, with soft sides of 1 mm: float [H, W]."""
    from_line = np.abs(position / pitch - np.round(position / pitch)) * pitch
    return np.clip((width / 2 - from_line) / 0.001 + 0.5, 0, 1)


def _surface(kind: str, x: np.ndarray, y: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The share of a table's second colour at x, y (m), float [H, W]. Grain and boards run along y, the long side."""
    broad = _field(random, x, y, 0.11, 0.13)
    share = 0.12 * broad
    if kind == "wood":
        warp = 0.01 * broad
        share += 0.2 * _field(random, x + warp, y, 0.004, 0.15) + 0.25 * _field(random, x + warp, y, 0.016, 0.5)
    elif kind == "boards":
        tone = random.random_sample(64) * 0.5 - 0.25
        share += tone[np.floor(x / 0.09).astype(int) % 64] + 0.12 * _field(random, x, y, 0.005, 0.12)
        share += 0.4 * _lines(x, 0.09, 0.002)
    elif kind == "tiles":
        share += 0.35 * np.maximum(_lines(x, 0.12, 0.003), _lines(y, 0.12, 0.003)) + 0.1 * broad
    elif kind == "stone":
        vein = _field(random, x, y, 0.07, 0.09) + 0.5 * _field(random, x, y, 0.03, 0.03)
        share += 0.5 * np.clip(1 - 14 * np.abs(vein), 0, 1) * (0.6 + 0.4 * broad)
    elif kind == "speckle":
        share += 0.3 * np.clip(3 * _field(random, x, y, 0.006, 0.006) - 1.2, 0, 1)
    elif kind == "grass":
        share += 0.4 * _field(random, x, y, 0.004, 0.004) + 0.2 * _field(random, x, y, 0.012, 0.02)
    elif kind == "bands":
        share += 0.5 + 0.5 * np.sin(19 * (0.6 * x + 0.8 * y) + 0.5 * broad)
    return np.clip(share, -0.5, 1)


@functools.cache
def table_image(index: int) -> np.ndarray:
    """Table `index` as the camera sees it without robot and objects, uint8 [480, 640, 3], read-only.

    Robot and start positions are where x grows: the table ends in front of the robot, and the floor is seen below it.
    """
    table = TABLES[index]
    random = np.random.RandomState(1000 + index)
    width, height = CAMERA_SIZE
    points = np.nan_to_num(points_at(TABLE_HEIGHT, width, height), nan=9.0)  # 9 m is far off the table
    x, y = points[..., 0], points[..., 1]
    back, right, left = -0.45 - 0.14 * random.random_sample(), -0.27 - 0.1 * random.random_sample(), 0.6
    front = 0.03 + 0.015 * random.random_sample() - 0.06 * y  # not quite parallel to the robot
    inside = np.min([x - back, front - x, y - right, left - y], axis=0)  # m to the nearest edge
    share = _surface(table.pattern, x, y, random)[..., None]
    towards = random.random_sample() * 2 * np.pi  # where the light comes from
    slope = 0.35 + 0.3 * random.random_sample()  # of the brightness, per metre
    light = 1 + slope * (np.cos(towards) * (x + 0.16) + np.sin(towards) * y)
    color, second = np.asarray(table.color), np.asarray(table.second)
    surface = ((1 - share) * color + share * second) * np.clip(light, 0.8, 1.2)[..., None]
    surface *= np.where(inside < RIM, 0.82, 1.0)[..., None]
    wall = np.asarray(table.backdrop) * (0.85 + 0.25 * _noise(random, x.shape, 4)[..., None])
    image = np.where((inside > 0)[..., None], surface, wall)
    below = np.nan_to_num(points_at(TABLE_HEIGHT - THICKNESS, width, height), nan=9.0)
    ahead = (x > front) & (x < 2.0)  # the ray passes in front of the table
    floor = np.asarray(table.backdrop) * 0.55
    image[ahead] = floor * (0.9 + 0.2 * _noise(random, x.shape, 7)[ahead, None])
    face = ahead & (below[..., 0] < front)
    image[face] = color * 0.6
    image = np.clip(image, 0, 255).astype(np.uint8)
    image.flags.writeable = False
    return image


# ---------------------------------------------------------------------------------------------------------------------
# textures
# ---------------------------------------------------------------------------------------------------------------------


def _pattern(kind: str, x: np.ndarray, y: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The share of a texture's second colour at x, y (m), float [H, W] in [0, 1]. Strong, as the published ones are."""
    coarse, fine = _noise(random, x.shape, 12), _noise(random, x.shape, 160)
    if kind == "wood":
        return 0.5 + 0.35 * np.sin(180 * y + 14 * coarse) + 0.3 * (fine - 0.5)
    if kind == "stone":
        return np.clip(1 - 9 * np.abs(_noise(random, x.shape, 18) - 0.5), 0, 1) * 0.8 + 0.2 * fine
    if kind == "checker":
        return ((np.floor(x / 0.06) + np.floor(y / 0.06)) % 2) * 0.8 + 0.2 * fine
    if kind == "stripes":
        return (np.floor(y / 0.05) % 2) * 0.7 + 0.3 * fine
    if kind == "grass":
        return 0.6 * fine + 0.4 * _noise(random, x.shape, 60)
    if kind == "speckle":
        return (fine > 0.62) * 0.8 + 0.2 * coarse
    return 0.6 * coarse + 0.2 * fine


@functools.cache
def texture_image(index: int) -> np.ndarray:
    """Texture `index`, flat, uint8 [480, 640, 3], read-only. Texture 0 is paired with mix 0."""
    random = np.random.RandomState(2000 + index)
    kinds = ("wood", "stone", "checker", "stripes", "grass", "speckle", "plain")
    y, x = np.meshgrid(np.linspace(0, 0.48, 480), np.linspace(0, 0.64, 640), indexing="ij")
    share = np.clip(_pattern(kinds[index % len(kinds)], x, y, random), 0, 1)[..., None]
    first, second = random.randint(30, 226, size=3), random.randint(30, 226, size=3)
    image = ((1 - share) * first + share * second).astype(np.uint8)
    image.flags.writeable = False
    return image
