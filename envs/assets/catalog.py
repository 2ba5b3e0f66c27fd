"""The 25 objects, 17 receptacles and 21 tables: names, bounding boxes, densities, and shapes of the built-in pack.

Names, bounding boxes and densities are those of RL4VLA's PutOnPlateInScene25 (arXiv 2505.19789). Shapes and colours are
our own. Lengths are metres, colours linear RGB in [0, 1], images uint8 [H, W, 3].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

TABLE_HEIGHT = 0.8695  # top of the published stage mesh in the workspace
ROBOT_BASE_POSITION = (0.147, 0.028, 0.870)  # in the world frame. The base has a yaw of 180 degrees
CAMERA_POSITION = (0.0, -0.16, 0.36)  # in the base frame
CAMERA_QUATERNION = (0.8992917, -0.09263245, 0.35892478, 0.23209205)  # wxyz, in the base frame
CAMERA_INTRINSICS = (623.588, 623.588, 319.501, 239.545)  # fx, fy, cx, cy at 640 x 480 (Logitech C920)
CAMERA_SIZE = (640, 480)  # width, height that the intrinsics belong to


@dataclass(frozen=True)
class Part:
    """One primitive shape. It fills the share `span` of its model's bounding box.

    Kinds that collide: box, cylinder, ball, and roll. A roll looks like a lying cylinder and collides as a box, so that
    it does not roll. Kinds that are only seen: turned (on a lathe, after `profile`), loaf (a box with round edges),
    patch and disc (a rectangle and an ellipse at the top of the span, without sides).
    """

    kind: str
    span: tuple[float, float, float, float, float, float]  # x0, x1, y0, y1, z0, z1 as fractions of the bounding box
    color: tuple[float, float, float]
    axis: str = "z"  # of a cylinder, roll or turned body
    profile: tuple[tuple[float, float], ...] = ()  # place along the axis and radius, both 0 to 1
    bend: float = 0.0  # of a turned body along x: how far its middle is moved along y, in shares of the model's width


@dataclass(frozen=True)
class Model:
    """One object or receptacle. `lower` and `upper` are the published bounding box in the model's own frame."""

    key: str
    name: str
    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    density: float  # kg/m^3
    parts: tuple[Part, ...] = ()  # that collide. Empty if the shapes come from files
    look: tuple[Part, ...] = ()  # that are seen. Empty if they are those that collide
    grasp: tuple[float, float] | None = None  # x, y in the model's frame where fingers fit, None for the box's centre

    @property
    def size(self) -> np.ndarray:
        """Edge lengths of the bounding box, float64 [3]."""
        return np.asarray(self.upper) - np.asarray(self.lower)


ORANGE, TAN, YELLOW, CREAM = (0.95, 0.35, 0.03), (0.75, 0.45, 0.17), (0.95, 0.75, 0.05), (0.95, 0.85, 0.6)
RED, DARK_RED, PINK, PURPLE = (0.8, 0.03, 0.03), (0.4, 0.02, 0.03), (0.9, 0.35, 0.45), (0.3, 0.06, 0.4)
GREEN, DARK_GREEN, TEAL, BROWN = (0.10, 0.50, 0.08), (0.03, 0.22, 0.05), (0.02, 0.4, 0.4), (0.25, 0.11, 0.03)
BLUE, SKY, WHITE, BLACK = (0.03, 0.10, 0.6), (0.25, 0.55, 0.85), (0.9, 0.9, 0.9), (0.02, 0.02, 0.02)
GREY, STEEL = (0.4, 0.4, 0.42), (0.55, 0.57, 0.6)
CRUST, EARTH, MAGENTA, GOLD = (0.55, 0.26, 0.07), (0.38, 0.24, 0.09), (0.65, 0.03, 0.3), (0.8, 0.5, 0.1)
POT, LEAF, PULP = (0.6, 0.2, 0.08), (0.06, 0.36, 0.06), (0.95, 0.3, 0.12)
FUR, LEAD, ICE, LIME = (0.33, 0.15, 0.04), (0.16, 0.16, 0.17), (0.62, 0.72, 0.78), (0.6, 0.72, 0.12)


Color = tuple[float, float, float]

# profiles of turned bodies, from one end of the axis to the other
ROUND = ((0, 0), (0.067, 0.5), (0.25, 0.866), (0.5, 1), (0.75, 0.866), (0.933, 0.5), (1, 0))
SAUSAGE = ((0, 0), (0.02, 0.5), (0.1, 0.88), (0.25, 1), (0.75, 1), (0.9, 0.88), (0.98, 0.5), (1, 0))
STRAIGHT = ((0, 0), (0, 1), (1, 1), (1, 0))
BAND = ((0, 1.01), (1, 1.01))  # around a body of the same span
SLOPED = ((0, 0), (0, 1), (1, 0.8), (1, 0))
BEAKER_BAND = ((0, 0.94), (1, 1.02))
BANANA = ((0, 0), (0.02, 0.3), (0.15, 0.75), (0.4, 1), (0.65, 1), (0.85, 0.75), (0.97, 0.35), (1, 0.3))
ROUNDED = ((0, 0), (0, 0.9), (0.3, 1), (0.75, 1), (1, 0.92), (1, 0))
BOTTLE_Z = ((0, 0), (0, 0.92), (0.05, 1), (0.7, 1), (0.9, 0.7), (1, 0.45), (1, 0))
POTATO = ((0, 0), (0.05, 0.5), (0.22, 0.85), (0.45, 1), (0.75, 0.9), (0.93, 0.6), (1, 0))
GLASS_BAND = ((0, 0.97), (1, 1.0))
CUP = ((0, 0), (0, 0.8), (0.15, 0.95), (0.6, 1), (1, 1), (1, 0.9))
CARROT = ((0, 0), (0.02, 0.12), (0.3, 0.55), (0.6, 0.8), (0.88, 1), (0.97, 0.85), (1, 0.4), (1, 0))
CAN = ((0, 0), (0, 0.85), (0.07, 1), (0.93, 1), (1, 0.85), (1, 0))
BOTTLE = ((0, 0), (0, 0.9), (0.04, 1), (0.68, 1), (0.82, 0.75), (0.93, 0.4), (1, 0.36), (1, 0))
CONE = ((0, 0), (0, 1), (0.25, 1), (0.4, 0.55), (1, 0.3), (1, 0))
BEAKER = ((0, 0), (0, 0.74), (1, 1), (1, 0))
DOME = ((0, 0), (0, 0.97), (0.12, 1), (0.45, 0.9), (0.8, 0.55), (1, 0))
ONION = ((0, 0), (0.04, 0.35), (0.14, 0.75), (0.35, 1), (0.55, 0.92), (0.72, 0.6), (0.86, 0.25), (1, 0.1), (1, 0))
GLASS = ((0, 0.25), (0.1, 0.6), (0.35, 0.95), (0.6, 1), (1, 0.85), (1, 0))
FOOT = ((0, 0), (0, 1), (0.1, 1), (0.35, 0.35), (0.5, 0.2), (1, 0.2))
DISH = ((0, 0.7), (0.9, 1), (1, 0.96), (0.5, 0.68), (0.45, 0))  # a plate: a rim that slopes to a flat middle
BOWL = ((0, 0.5), (0.9, 1), (1, 0.95), (0.3, 0.6), (0.2, 0))
PAN = ((0, 0.85), (1, 1), (1, 0.9), (0.35, 0.82), (0.3, 0))
SLAB = ((0, 0), (0, 0.97), (0.6, 1), (1, 0.97), (1, 0))  # a flat round body


def _box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, color: Color) -> Part:
    return Part("box", (x0, x1, y0, y1, z0, z1), color)


def _cylinder(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, color: Color) -> Part:
    return Part("cylinder", (x0, x1, y0, y1, z0, z1), color)


def _roll(axis: str, x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, color: Color) -> Part:
    return Part("roll", (x0, x1, y0, y1, z0, z1), color, axis)


def _ball(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, color: Color) -> Part:
    return Part("ball", (x0, x1, y0, y1, z0, z1), color)


def _turned(
    axis: str,
    x0: float,
    x1: float,
    y0: float,
    y1: float,
    z0: float,
    z1: float,
    color: Color,
    profile: tuple[tuple[float, float], ...] = ROUND,
    bend: float = 0.0,
) -> Part:
    return Part("turned", (x0, x1, y0, y1, z0, z1), color, axis, profile, bend)


def _loaf(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, color: Color) -> Part:
    return Part("loaf", (x0, x1, y0, y1, z0, z1), color)


def _patch(x0: float, x1: float, y0: float, y1: float, z: float, color: Color) -> Part:
    return Part("patch", (x0, x1, y0, y1, 0, z), color)


def _disc(x0: float, x1: float, y0: float, y1: float, z: float, color: Color) -> Part:
    return Part("disc", (x0, x1, y0, y1, 0, z), color)


def _patches(color: Color, z: float, *spans: tuple[float, float, float, float]) -> tuple[Part, ...]:
    return tuple(_patch(*span, z, color) for span in spans)


def _around(count: int, radius: float) -> tuple[tuple[float, float], ...]:
    """Places at regular angles around the middle."""
    angles = np.arange(count) * 2 * np.pi / count
    return tuple((0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)) for angle in angles)


def _discs(color: Color, z: float, radius: float, *middles: tuple[float, float]) -> tuple[Part, ...]:
    return tuple(_disc(x - radius, x + radius, y - radius, y + radius, z, color) for x, y in middles)


# index order = published split: 0-15 train, 16-24 test
# fmt: off
OBJECTS: tuple[Model, ...] = (
    Model("001_carrot_simpler", "carrot", (-0.064146, -0.016275, -0.017784), (0.054168, 0.015944, 0.02342), 1044,
        (_box(0.0, 0.3, 0.2, 0.8, 0, 0.6, ORANGE), _box(0.3, 0.85, 0, 1, 0, 0.8, ORANGE),
        _box(0.85, 1, 0.3, 0.7, 0.2, 1, GREEN)),
        look=(_turned("x", 0, 0.88, 0, 1, 0, 0.8, ORANGE, CARROT), _turned("x", 0.84, 1, 0.15, 0.5, 0.2, 0.9, GREEN),
        _turned("x", 0.84, 0.98, 0.45, 0.85, 0.3, 1, GREEN), _turned("x", 0.86, 1, 0.4, 0.7, 0.1, 0.6, DARK_GREEN),)),
    Model("002_kitchen shovel_1", "kitchen shovel", (-0.028514, -0.061222, -0.012314), (0.028577, 0.087642, 0.00891),
        557, (_box(0, 1, 0, 0.32, 0, 0.35, GREY), _box(0.3, 0.7, 0.3, 1, 0, 1, DARK_RED)), grasp=(0.0, 0.02),
        look=(_box(0, 1, 0, 0.32, 0, 0.35, STEEL), _turned("y", 0.42, 0.58, 0.28, 0.5, 0.1, 0.5, STEEL, STRAIGHT),
        _turned("y", 0.3, 0.7, 0.4, 1, 0, 1, DARK_RED, SAUSAGE),)),
    Model("003_bread_1", "bread", (-0.022195, -0.022384, -0.014578), (0.022278, 0.022476, 0.014546), 526,
        (_box(0, 1, 0, 1, 0, 0.75, TAN), _box(0.1, 0.9, 0.1, 0.9, 0.7, 1, BROWN)),
        look=(_loaf(0, 1, 0, 1, 0, 0.97, CRUST), _turned("y", 0.16, 0.3, 0.22, 0.78, 0.6, 0.95, CREAM),
        _turned("y", 0.43, 0.57, 0.15, 0.85, 0.7, 1, CREAM), _turned("y", 0.7, 0.84, 0.22, 0.78, 0.6, 0.95, CREAM),)),
    Model("004_plastic bottle_1", "plastic bottle", (-0.017176, -0.052353, -0.017914), (0.018893, 0.069187, 0.021117),
        1916, (_roll("y", 0, 1, 0, 0.75, 0, 1, SKY), _roll("y", 0.3, 0.7, 0.74, 0.9, 0.25, 0.65, WHITE),
        _roll("y", 0.25, 0.75, 0.9, 1, 0.2, 0.7, BLUE)),
        look=(_turned("y", 0, 1, 0, 0.9, 0, 1, SKY, BOTTLE), _turned("y", 0, 1, 0.2, 0.48, 0, 1, WHITE, BAND),
        _turned("y", 0.27, 0.73, 0.9, 1, 0.27, 0.73, BLUE, STRAIGHT),)),
    Model("005_7up can_1", "7up can", (-0.016542, -0.031393, -0.016354), (0.016558, 0.029607, 0.016746), 790,
        (_roll("y", 0, 1, 0.06, 0.94, 0, 1, GREEN), _roll("y", 0.1, 0.9, 0, 1, 0.1, 0.9, STEEL)),
        look=(_turned("y", 0, 1, 0.04, 0.96, 0, 1, GREEN, CAN), _turned("y", 0.1, 0.9, 0, 1, 0.1, 0.9, STEEL, STRAIGHT),
        _turned("z", 0.28, 0.72, 0.36, 0.62, 0, 1, RED, STRAIGHT),
        _turned("x", 0, 1, 0.36, 0.62, 0.28, 0.72, RED, STRAIGHT),)),
    Model("006_zuchinni_1", "zuchinni", (-0.061465, -0.018381, -0.012294), (0.04864, 0.012328, 0.013661), 715,
        (_box(0, 0.9, 0.1, 0.9, 0, 1, DARK_GREEN), _box(0.9, 1, 0.35, 0.65, 0.3, 0.7, TAN),
        _box(0.1, 0.8, 0.35, 0.65, 0.99, 1.01, GREEN)),
        look=(_turned("x", 0, 0.93, 0, 0.85, 0, 1, DARK_GREEN, SAUSAGE, 0.15),
        _turned("x", 0.9, 1, 0.28, 0.6, 0.3, 0.7, LIME, STRAIGHT),
        _turned("x", 0.08, 0.82, 0.3, 0.55, 0.6, 1.01, GREEN, ROUND, 0.15),)),
    Model("007_ketchup bottle_1", "ketchup bottle", (-0.0104, -0.03743, -0.010421), (0.010409, 0.043878, 0.010417),
        500, (_roll("y", 0, 1, 0, 0.75, 0, 1, RED), _roll("y", 0.2, 0.8, 0.75, 1, 0.2, 0.8, WHITE)),
        look=(_turned("y", 0, 1, 0, 0.78, 0, 1, RED, BOTTLE),
        _turned("y", 0.12, 0.88, 0.72, 1, 0.12, 0.88, WHITE, CONE),
        _turned("y", 0, 1, 0.2, 0.42, 0, 1, WHITE, BAND),)),
    Model("008_watering can_1", "watering can", (-0.044345, -0.020049, -0.019221), (0.067933, 0.020622, 0.029642),
        1591, (_box(0.12, 0.65, 0, 1, 0, 0.75, TEAL), _box(0.65, 1, 0.4, 0.6, 0.3, 0.5, TEAL),
        _box(0.92, 1, 0.3, 0.7, 0.25, 0.7, STEEL), _box(0, 0.12, 0.4, 0.6, 0.2, 0.75, TEAL),
        _box(0.2, 0.55, 0.4, 0.6, 0.75, 1, STEEL)),
        look=(_turned("z", 0.12, 0.65, 0, 1, 0, 0.75, TEAL, SLOPED),
        _turned("x", 0.6, 1, 0.38, 0.62, 0.25, 0.55, TEAL, STRAIGHT),
        _turned("x", 0.9, 1, 0.25, 0.75, 0.2, 0.72, STEEL, SLOPED), _box(0, 0.05, 0.4, 0.6, 0.15, 0.75, TEAL),
        _box(0.05, 0.2, 0.4, 0.6, 0.15, 0.25, TEAL), _box(0.05, 0.2, 0.4, 0.6, 0.65, 0.75, TEAL),
        _box(0.2, 0.25, 0.4, 0.6, 0.6, 1, STEEL), _box(0.52, 0.57, 0.4, 0.6, 0.6, 1, STEEL),
        _box(0.2, 0.57, 0.4, 0.6, 0.93, 1, STEEL),
        _disc(0.18, 0.59, 0.12, 0.88, 0.76, LEAD),)),
    Model("009_pipe_1", "pipe", (-0.01733, -0.036932, -0.01733), (0.01733, 0.036932, 0.01733), 1116,
        (_roll("y", 0, 1, 0, 0.25, 0, 1, STEEL), _roll("y", 0.1, 0.9, 0.2, 0.8, 0.1, 0.9, GREY),
        _roll("y", 0, 1, 0.75, 1, 0, 1, STEEL)),
        look=(_turned("y", 0, 1, 0, 0.22, 0, 1, STEEL, STRAIGHT),
        _turned("y", 0.15, 0.85, 0.2, 0.8, 0.15, 0.85, GREY, STRAIGHT),
        _turned("y", 0, 1, 0.78, 1, 0, 1, STEEL, STRAIGHT),
        _turned("y", 0.22, 0.78, -0.004, 1.004, 0.22, 0.78, BLACK, STRAIGHT),)),
    Model("010_toy bear_1", "toy bear", (-0.020858, -0.021149, -0.026055), (0.021693, 0.017456, 0.030326), 667,
        (_box(0.05, 0.95, 0.1, 1, 0, 0.6, BROWN), _box(0.15, 0.85, 0.15, 0.95, 0.6, 0.95, TAN),
        _box(0, 1, 0.3, 0.6, 0.35, 0.5, BROWN), _box(0.1, 0.3, 0.4, 0.6, 0.9, 1, BROWN),
        _box(0.7, 0.9, 0.4, 0.6, 0.9, 1, BROWN), _box(0.3, 0.7, 0, 0.16, 0.65, 0.8, CREAM)),
        look=(_turned("z", 0.1, 0.9, 0.15, 1, 0, 0.62, FUR), _turned("z", 0.12, 0.88, 0.1, 0.9, 0.48, 0.97, FUR),
        _turned("y", 0.04, 0.34, 0.4, 0.7, 0.78, 1, FUR), _turned("y", 0.66, 0.96, 0.4, 0.7, 0.78, 1, FUR),
        _turned("z", 0, 0.28, 0.2, 0.5, 0.22, 0.5, FUR), _turned("z", 0.72, 1, 0.2, 0.5, 0.22, 0.5, FUR),
        _turned("y", 0.3, 0.7, 0.02, 0.5, 0.55, 0.78, CREAM), _turned("z", 0.25, 0.75, 0.1, 0.7, 0.1, 0.5, CREAM),
        _turned("y", 0.42, 0.58, 0, 0.2, 0.66, 0.75, BLACK), _turned("y", 0.24, 0.36, 0.08, 0.3, 0.75, 0.84, BLACK),
        _turned("y", 0.64, 0.76, 0.08, 0.3, 0.75, 0.84, BLACK),)),
    Model("011_fast food cup_1", "fast food cup", (-0.012405, -0.012441, -0.021972), (0.012401, 0.012368, 0.031721),
        500, (_cylinder(0, 1, 0, 1, 0, 0.7, RED), _cylinder(0.05, 0.95, 0.05, 0.95, 0.7, 0.78, WHITE),
        _box(0.45, 0.6, 0.45, 0.6, 0.78, 1, WHITE)),
        look=(_turned("z", 0, 1, 0, 1, 0, 0.72, RED, BEAKER), _turned("z", 0, 1, 0, 1, 0.7, 0.78, WHITE, STRAIGHT),
        _turned("z", 0.45, 0.6, 0.45, 0.6, 0.78, 1, WHITE, STRAIGHT),
        _turned("z", 0.06, 0.94, 0.06, 0.94, 0.28, 0.48, YELLOW, BEAKER_BAND),)),
    Model("012_plant_1", "plant", (-0.022002, -0.021402, -0.041142), (0.018943, 0.021147, 0.031418), 1051,
        (_cylinder(0.1, 0.9, 0.1, 0.9, 0, 0.45, TAN), _box(0, 1, 0.25, 0.75, 0.5, 0.85, GREEN),
        _box(0.25, 0.75, 0, 1, 0.45, 1, DARK_GREEN)),
        look=(_turned("z", 0.1, 0.9, 0.1, 0.9, 0, 0.45, POT, BEAKER),
        _turned("z", 0, 0.55, 0.1, 0.9, 0.42, 0.85, GREEN),
        _turned("z", 0.45, 1, 0.1, 0.9, 0.42, 0.8, GREEN), _turned("z", 0.2, 0.8, 0, 0.6, 0.45, 0.9, LEAF),
        _turned("z", 0.2, 0.8, 0.4, 1, 0.45, 1, LEAF),)),
    Model("013_banana_1", "banana", (-0.053817, -0.026072, -0.009194), (0.053817, 0.013978, 0.009194), 500,
        (_box(0.0, 0.3, 0.0, 0.55, 0, 1, YELLOW), _box(0.25, 0.75, 0.4, 1, 0, 1, YELLOW),
        _box(0.7, 0.96, 0.0, 0.55, 0, 1, YELLOW), _box(0.96, 1, 0, 0.25, 0.2, 0.8, BROWN)), grasp=(0.0, 0.002),
        look=(_turned("x", 0, 0.97, -0.05, 0.45, 0, 1, YELLOW, BANANA, 0.52),
        _turned("x", 0.93, 1, 0.07, 0.27, 0.2, 0.8, BROWN, STRAIGHT),
        _turned("x", 0, 0.05, 0.1, 0.28, 0.3, 0.7, BROWN),)),
    Model("014_hamburger_1", "hamburger", (-0.02503, -0.026089, -0.018934), (0.024251, 0.024906, 0.022287), 863,
        (_cylinder(0.05, 0.95, 0.05, 0.95, 0, 0.3, TAN), _cylinder(0.03, 0.97, 0.03, 0.97, 0.3, 0.5, BROWN),
        _cylinder(0.04, 0.96, 0.04, 0.96, 0.5, 0.58, GREEN), _cylinder(0.06, 0.94, 0.06, 0.94, 0.58, 0.85, TAN),
        _cylinder(0.2, 0.8, 0.2, 0.8, 0.85, 1, TAN)),
        look=(_turned("z", 0.02, 0.98, 0.02, 0.98, 0, 0.28, GOLD, ROUNDED),
        _turned("z", 0.02, 0.98, 0.02, 0.98, 0.26, 0.47, BROWN, ROUNDED),
        _turned("z", 0, 1, 0, 1, 0.44, 0.52, GREEN, STRAIGHT),
        _turned("z", 0.05, 0.95, 0.05, 0.95, 0.5, 0.58, RED, STRAIGHT),
        _turned("z", 0.02, 0.98, 0.02, 0.98, 0.56, 1, GOLD, DOME),)),
    Model("015_golf ball_1", "golf ball", (-0.015288, -0.0153, -0.01529), (0.015288, 0.0153, 0.01529), 500,
        (_ball(0, 1, 0, 1, 0, 1, WHITE),),
        look=(_turned("z", 0, 1, 0, 1, 0, 1, WHITE),)),
    Model("016_BBQ sauce_1", "BBQ sauce", (-0.026546, -0.01622, -0.02861), (0.026459, 0.016241, 0.048556), 1057,
        (_box(0, 1, 0, 1, 0, 0.65, DARK_RED), _box(0.25, 0.75, 0.2, 0.8, 0.65, 0.85, DARK_RED),
        _box(0.3, 0.7, 0.25, 0.75, 0.85, 1, BLACK), _box(0.1, 0.9, -0.02, 1.02, 0.15, 0.5, YELLOW)),
        look=(_turned("z", 0, 1, 0, 1, 0, 0.75, DARK_RED, BOTTLE_Z),
        _turned("z", 0.28, 0.72, 0.22, 0.78, 0.7, 0.87, DARK_RED, STRAIGHT),
        _turned("z", 0.26, 0.74, 0.2, 0.8, 0.85, 1, BLACK, STRAIGHT),
        _turned("z", 0, 1, 0, 1, 0.15, 0.48, YELLOW, BAND),)),
    Model("017_travel cup_1", "travel cup", (-0.019803, -0.040252, -0.017219), (0.031988, 0.045575, 0.017189), 1018,
        (_roll("y", 0, 0.66, 0, 0.85, 0, 1, TEAL), _roll("y", 0.03, 0.63, 0.85, 1, 0.05, 0.95, BLACK),
        _box(0.66, 1, 0.2, 0.7, 0.4, 0.6, TEAL)), grasp=(-0.003, 0.0),
        look=(_turned("y", 0, 0.66, 0, 0.85, 0, 1, MAGENTA, STRAIGHT),
        _turned("y", 0.02, 0.64, 0.84, 1, 0.04, 0.96, BLACK, CAN),
        _box(0.9, 1, 0.2, 0.7, 0.4, 0.6, MAGENTA), _box(0.6, 0.92, 0.2, 0.32, 0.4, 0.6, MAGENTA),
        _box(0.6, 0.92, 0.58, 0.7, 0.4, 0.6, MAGENTA), _turned("y", 0, 0.66, 0.62, 0.72, 0, 1, WHITE, BAND),)),
    Model("018_pepper_1", "pepper", (-0.022081, -0.022534, -0.02278), (0.022081, 0.022534, 0.02278), 835,
        (_cylinder(0, 1, 0, 1, 0.1, 0.75, RED), _cylinder(0.15, 0.85, 0.15, 0.85, 0, 0.85, RED),
        _box(0.42, 0.58, 0.42, 0.58, 0.85, 1, GREEN)),
        look=(_turned("z", 0, 0.62, 0, 0.62, 0, 0.86, RED), _turned("z", 0.38, 1, 0, 0.62, 0, 0.86, RED),
        _turned("z", 0, 0.62, 0.38, 1, 0, 0.86, RED), _turned("z", 0.38, 1, 0.38, 1, 0, 0.86, RED),
        _turned("z", 0.36, 0.64, 0.36, 0.64, 0.72, 0.84, GREEN, STRAIGHT),
        _turned("z", 0.43, 0.57, 0.43, 0.57, 0.8, 1, GREEN, STRAIGHT),)),
    Model("019_nonstop can_1", "nonstop can", (-0.017359, -0.017381, -0.042844), (0.017399, 0.017377, 0.042476), 1248,
        (_cylinder(0, 1, 0, 1, 0.04, 0.96, BLUE), _cylinder(0.1, 0.9, 0.1, 0.9, 0, 1, STEEL)),
        look=(_turned("z", 0, 1, 0, 1, 0.02, 0.98, BLUE, CAN), _turned("z", 0.1, 0.9, 0.1, 0.9, 0, 1, STEEL, STRAIGHT),
        _turned("z", 0, 1, 0, 1, 0.4, 0.62, WHITE, BAND),)),
    Model("020_potato_1", "potato", (-0.024426, -0.03702, -0.022543), (0.024596, 0.037041, 0.022047), 1355,
        (_box(0.02, 0.98, 0.15, 0.85, 0.1, 0.9, TAN), _box(0.12, 0.88, 0, 1, 0.2, 0.8, TAN),
        _box(0.12, 0.88, 0.2, 0.8, 0, 1, TAN)),
        look=(_turned("y", 0.02, 1, 0, 0.96, 0, 0.97, EARTH, POTATO), _turned("y", 0.0, 0.8, 0.3, 1, 0.05, 1, EARTH),
        _turned("y", 0.3, 0.42, 0.3, 0.4, 0.8, 0.985, BROWN), _turned("y", 0.55, 0.67, 0.55, 0.65, 0.8, 0.985, BROWN),
        _turned("y", 0.3, 0.42, 0.7, 0.8, 0.8, 0.97, BROWN),)),
    Model("021_baguette_1", "baguette", (-0.017872, -0.070771, -0.012416), (0.02046, 0.068207, 0.013337), 1367,
        (_box(0.05, 0.95, 0.08, 0.92, 0, 0.85, TAN), _box(0.2, 0.8, 0, 1, 0.05, 0.7, BROWN),
        _box(0.2, 0.8, 0.2, 0.8, 0.85, 1, CREAM)),
        look=(_turned("y", 0, 1, 0, 1, 0, 0.97, CRUST, SAUSAGE), _turned("x", 0.2, 0.8, 0.15, 0.22, 0.7, 1, CREAM),
        _turned("x", 0.2, 0.8, 0.35, 0.42, 0.7, 1, CREAM), _turned("x", 0.2, 0.8, 0.56, 0.63, 0.7, 1, CREAM),
        _turned("x", 0.2, 0.8, 0.77, 0.84, 0.7, 1, CREAM),)),
    Model("022_champagne glass_1", "champagne glass", (-0.014222, -0.014222, -0.054144),
        (0.014222, 0.014222, 0.031337), 500, (_cylinder(0, 1, 0, 1, 0, 0.05, SKY),
        _cylinder(0.35, 0.65, 0.35, 0.65, 0.05, 0.45, SKY), _cylinder(0.05, 0.95, 0.05, 0.95, 0.45, 1, CREAM)),
        look=(_turned("z", 0, 1, 0, 1, 0, 0.46, ICE, FOOT), _turned("z", 0.02, 0.98, 0.02, 0.98, 0.42, 1, ICE, GLASS),
        _turned("z", 0, 1, 0, 1, 0.55, 0.8, GOLD, GLASS_BAND),)),
    Model("023_kitchen spoon_1", "kitchen spoon", (-0.02477, -0.076108, -0.00142), (0.024772, 0.050176, 0.015787),
        500, (_box(0, 1, 0.65, 1, 0, 0.4, STEEL), _box(0.36, 0.64, 0, 0.66, 0, 1, BLACK)), grasp=(0.0, -0.02),
        look=(_turned("y", 0, 1, 0.6, 1, 0, 0.4, STEEL), _disc(0.14, 0.86, 0.66, 0.94, 0.41, GREY),
        _turned("y", 0.42, 0.58, 0.4, 0.68, 0.1, 0.6, STEEL, STRAIGHT),
        _turned("y", 0.36, 0.64, 0, 0.46, 0, 1, BLACK, SAUSAGE),)),
    Model("024_onion_1", "onion", (-0.025607, -0.031256, -0.025675), (0.025328, 0.030985, 0.02549), 1137,
        (_cylinder(0.03, 0.97, 0.1, 0.9, 0.15, 0.8, PURPLE), _cylinder(0.15, 0.85, 0.2, 0.8, 0, 0.9, PURPLE),
        _box(0.42, 0.58, 0.8, 1, 0.4, 0.6, CREAM), _box(0.42, 0.58, 0.0, 0.2, 0.4, 0.6, CREAM),
        _box(0.44, 0.56, 0.44, 0.56, 0.9, 1, GREEN)),
        look=(_turned("y", 0, 1, 0.06, 1, 0, 1, PURPLE, ONION),
        _turned("y", 0.4, 0.6, 0, 0.12, 0.4, 0.6, CREAM, STRAIGHT),
        _turned("y", 0.42, 0.58, 0.92, 1, 0.42, 0.58, CREAM, STRAIGHT),)),
    Model("025_cup_1", "cup", (-0.02215, -0.022167, -0.001195), (0.03651, 0.022121, 0.036034), 1018,
        (_cylinder(0, 0.755, 0, 1, 0, 1, WHITE), _box(0.74, 1, 0.4, 0.6, 0.2, 0.85, WHITE),
        _cylinder(0.06, 0.69, 0.08, 0.92, 0.9, 1.01, BROWN)), grasp=(0.0, 0.0),
        look=(_turned("z", 0, 0.755, 0, 1, 0, 0.99, WHITE, CUP), _disc(0.05, 0.7, 0.07, 0.93, 1, BROWN),
        _box(0.92, 1, 0.4, 0.6, 0.25, 0.8, WHITE), _box(0.7, 0.94, 0.4, 0.6, 0.66, 0.8, WHITE),
        _box(0.7, 0.94, 0.4, 0.6, 0.25, 0.39, WHITE),)),
)
# fmt: on

# index order = published split: 0 train, 1-16 test
# fmt: off
RECEPTACLES: tuple[Model, ...] = (
    Model("001_plate_simpler", "plate", (-0.055, -0.055, 0.0), (0.055, 0.055, 0.006), 1003,
        (_cylinder(0, 1, 0, 1, 0, 0.9, (0.75, 0.85, 0.2)),
        _cylinder(0.15, 0.85, 0.15, 0.85, 0, 1, (0.6, 0.72, 0.12))),
        look=(_turned("z", 0, 1, 0, 1, 0, 1, (0.75, 0.85, 0.2), DISH), _disc(0.15, 0.85, 0.15, 0.85, 0.7, LIME))),
    Model("002_cloth_1", "cloth", (-0.052668, -0.054186, -0.00186), (0.057332, 0.055814, 0.007514), 6975,
        (_box(0, 1, 0, 1, 0, 1, PINK),),
        look=(_box(0, 1, 0, 1, 0, 0.97, PINK), *_patches(WHITE, 1, (0.08, 0.14, 0, 1), (0.86, 0.92, 0, 1),
        (0, 1, 0.08, 0.14), (0, 1, 0.86, 0.92)),)),
    Model("003_carpet_1", "carpet", (-0.054271, -0.047153, -0.00115), (0.055729, 0.047066, 0.002593), 2815,
        (_box(0, 1, 0, 1, 0, 0.9, DARK_RED), _box(0.15, 0.85, 0.15, 0.85, 0, 1, TAN)),
        look=(_box(0, 1, 0, 1, 0, 0.95, DARK_RED), _patch(0.12, 0.88, 0.12, 0.88, 0.97, TAN),
        _patch(0.2, 0.8, 0.2, 0.8, 0.985, DARK_RED),
        _disc(0.32, 0.68, 0.32, 0.68, 1, TAN),)),
    Model("004_newspaper_1", "newspaper", (-0.041165, -0.056247, -4.3e-05), (0.040317, 0.059925, 0.0041), 2278,
        (_box(0, 1, 0, 1, 0, 0.9, WHITE), _box(0.1, 0.9, 0.7, 0.85, 0, 1, BLACK),
        _box(0.1, 0.45, 0.1, 0.6, 0, 1, GREY)),
        look=(_box(0, 1, 0, 1, 0, 0.97, WHITE), _patch(0.08, 0.92, 0.8, 0.92, 1, BLACK),
        _patch(0.08, 0.45, 0.42, 0.72, 1, GREY),
        *_patches(GREY, 1, *((x, x + 0.37, y, y + 0.05) for x in (0.08, 0.55) for y in (0.06, 0.17, 0.28)),
        *((0.55, 0.92, y, y + 0.05) for y in (0.39, 0.5, 0.61))),)),
    Model("005_sheet metal_1", "sheet metal", (-0.055458, -0.047227, -0.001946), (0.055341, 0.047104, 0.001294), 2389,
        (_box(0, 1, 0, 1, 0, 1, STEEL),),
        look=(_box(0, 1, 0, 1, 0, 0.97, STEEL), *_discs(LEAD, 1, 0.04, (0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9)),
        _patch(0.2, 0.8, 0.47, 0.53, 1, GREY),)),
    Model("006_drawing tablet_1", "drawing tablet", (-0.056342, -0.042009, -0.002881), (0.056457, 0.042009, 0.000709),
        2868, (_box(0, 1, 0, 1, 0, 0.9, BLACK), _box(0.15, 0.95, 0.1, 0.9, 0, 1, GREY)),
        look=(_box(0, 1, 0, 1, 0, 0.97, BLACK), _patch(0.2, 0.95, 0.08, 0.92, 1, GREY),
        *_discs(WHITE, 1, 0.035, (0.1, 0.25), (0.1, 0.5), (0.1, 0.75)),)),
    Model("007_tomato slice_1", "tomato slice", (-0.055, -0.055, -0.002171), (0.055, 0.055, 0.002171), 3089,
        (_cylinder(0, 1, 0, 1, 0, 0.9, RED), _cylinder(0.2, 0.8, 0.2, 0.8, 0, 1, ORANGE)),
        look=(_turned("z", 0, 1, 0, 1, 0, 0.95, RED, SLAB), *_discs(PULP, 0.98, 0.13, *_around(5, 0.27)),
        *_discs(CREAM, 1, 0.04, *_around(5, 0.27)),)),
    Model("008_pizza_1", "pizza", (-0.054532, -0.054193, -0.002682), (0.055468, 0.055807, 0.003863), 3862,
        (_cylinder(0, 1, 0, 1, 0, 0.85, TAN), _cylinder(0.1, 0.9, 0.1, 0.9, 0, 0.95, YELLOW),
        _box(0.3, 0.45, 0.3, 0.45, 0, 1, RED), _box(0.55, 0.7, 0.55, 0.7, 0, 1, RED)),
        look=(_turned("z", 0, 1, 0, 1, 0, 1, CRUST, DISH), _disc(0.09, 0.91, 0.09, 0.91, 0.92, YELLOW),
        *_discs(RED, 0.97, 0.09, *_around(5, 0.26), (0.5, 0.5)), *_discs(GREEN, 0.98, 0.03, *_around(4, 0.14)),)),
    Model("009_flat bowl_1", "flat bowl", (-0.055, -0.055, -0.004884), (0.055, 0.055, 0.007062), 4847,
        (_cylinder(0, 1, 0, 1, 0, 1, SKY), _cylinder(0.12, 0.88, 0.12, 0.88, 0.2, 1.005, BLUE)),
        look=(_turned("z", 0, 1, 0, 1, 0, 1, SKY, BOWL), _disc(0.22, 0.78, 0.22, 0.78, 0.35, BLUE),)),
    Model("010_gramophone disk_1", "gramophone disk", (-0.055, -0.055, -0.001328), (0.055, 0.055, 0.001328), 2193,
        (_cylinder(0, 1, 0, 1, 0, 0.9, BLACK), _cylinder(0.35, 0.65, 0.35, 0.65, 0, 1, RED)),
        look=(_turned("z", 0, 1, 0, 1, 0, 0.95, BLACK, SLAB), _disc(0.1, 0.9, 0.1, 0.9, 0.96, LEAD),
        _disc(0.16, 0.84, 0.16, 0.84, 0.97, BLACK),
        _disc(0.34, 0.66, 0.34, 0.66, 0.98, RED), _disc(0.47, 0.53, 0.47, 0.53, 1, WHITE),)),
    Model("011_frying pan_1", "frying pan", (-0.054997, -0.048902, -0.002667), (0.055003, 0.061098, 0.005808), 5104,
        (_cylinder(0, 1, 0, 1, 0, 1, BLACK), _cylinder(0.1, 0.9, 0.1, 0.9, 0.1, 1.01, GREY)),
        look=(_turned("z", 0.06, 0.94, 0, 0.88, 0, 1, BLACK, PAN), _disc(0.13, 0.87, 0.07, 0.81, 0.36, LEAD),
        _box(0.44, 0.56, 0.86, 1, 0.5, 1, BLACK),)),
    Model("012_mouse pad_1", "mouse pad", (-0.053899, -0.054489, 0.000196), (0.056101, 0.055511, 0.006574), 3332,
        (_box(0, 1, 0, 1, 0, 1, BLUE),),
        look=(_box(0, 1, 0, 1, 0, 0.97, BLACK), _patch(0.04, 0.96, 0.04, 0.96, 1, BLUE),)),
    Model("013_cutting board_1", "cutting board", (-0.063114, -0.054989, -0.001338), (0.063114, 0.054989, 0.001338),
        3107, (_box(0, 1, 0, 1, 0, 1, TAN),),
        look=(_box(0, 1, 0, 1, 0, 0.95, TAN),
        *_patches(CRUST, 0.98, *((0.0, 1.0, y, y + 0.02) for y in (0.2, 0.45, 0.7))),
        _disc(0.82, 0.94, 0.43, 0.57, 1, BLACK),)),
    Model("014_chess board_1", "chess board", (-0.055, -0.055, -0.003), (0.055, 0.055, 0.003), 6368,
        (_box(0, 1, 0, 1, 0, 0.95, WHITE), _box(0, 0.5, 0, 0.5, 0, 1, BLACK), _box(0.5, 1, 0.5, 1, 0, 1, BLACK)),
        look=(_box(0, 1, 0, 1, 0, 0.97, WHITE),
        *_patches(BLACK, 1, *((i / 4, (i + 1) / 4, j / 4, (j + 1) / 4)
        for i in range(4) for j in range(1 - i % 2, 4, 2))))),
    Model("015_manhole cover_1", "manhole cover", (-0.055, -0.055, -0.002247), (0.055, 0.055, 0.002247), 3743,
        (_cylinder(0, 1, 0, 1, 0, 0.9, GREY), _box(0.2, 0.8, 0.45, 0.55, 0, 1, BLACK),
        _box(0.45, 0.55, 0.2, 0.8, 0, 1, BLACK)),
        look=(_turned("z", 0, 1, 0, 1, 0, 0.95, GREY, SLAB), _disc(0.08, 0.92, 0.08, 0.92, 0.97, LEAD),
        _disc(0.14, 0.86, 0.14, 0.86, 0.98, GREY),
        *_patches(LEAD, 1, (0.2, 0.8, 0.46, 0.54), (0.46, 0.54, 0.2, 0.8), (0.28, 0.36, 0.28, 0.72),
        (0.64, 0.72, 0.28, 0.72)),)),
    Model("016_envelope_1", "envelope", (-0.054999, -0.040242, -0.001289), (0.055001, 0.039758, 0.001691), 1824,
        (_box(0, 1, 0, 1, 0, 0.9, CREAM), _box(0.8, 0.95, 0.7, 0.95, 0, 1, RED)),
        look=(_box(0, 1, 0, 1, 0, 0.95, CREAM), _patch(0.8, 0.95, 0.7, 0.93, 1, RED),
        *_patches(GREY, 1, (0.3, 0.7, 0.42, 0.47), (0.3, 0.7, 0.3, 0.35)),
        _patch(0.05, 0.25, 0.8, 0.85, 1, GREY),)),
    Model("017_notepad_1", "notepad", (-0.055, -0.04, -0.002), (0.055, 0.04, 0.002), 3087,
        (_box(0, 1, 0, 1, 0, 0.9, YELLOW), _box(0, 0.08, 0, 1, 0, 1, RED)),
        look=(_box(0, 1, 0, 1, 0, 0.95, YELLOW), _patch(0, 0.12, 0, 1, 1, RED),
        *_patches(SKY, 1, *((x, x + 0.025, 0.05, 0.95) for x in (0.25, 0.4, 0.55, 0.7, 0.85))),)),
)
# fmt: on


@dataclass(frozen=True)
class Table:
    """One table image: published key and name, and the painting of the built-in one."""

    key: str
    name: str
    mix: float  # weight of the paired texture in the texture settings
    pattern: str = ""  # plain | wood | boards | tiles | stone | speckle | grass | bands, empty for a photograph
    color: tuple[int, int, int] = (0, 0, 0)
    second: tuple[int, int, int] = (0, 0, 0)
    backdrop: tuple[int, int, int] = (0, 0, 0)

    @property
    def texture(self) -> str:
        """Key of the paired texture, which has the same number."""
        return f"{self.key[:3]}.png"


# index order = published split: 0-15 train, 16-20 test
# fmt: off
TABLES: tuple[Table, ...] = (
    Table("001_table_simpler.png", "table", 0.0, "wood", (176, 140, 98), (150, 112, 74), (96, 88, 80)),
    Table("002_blue plastic table_1.png", "blue plastic table", 1.0, "plain", (66, 112, 176), (52, 92, 150),
        (200, 200, 196)),
    Table("003_TV cabinet_1.png", "TV cabinet", 1.0, "wood", (92, 62, 46), (70, 44, 32), (188, 180, 168)),
    Table("004_picnic table_1.png", "picnic table", 1.0, "boards", (186, 146, 96), (120, 84, 48), (84, 116, 62)),
    Table("005_dest_1.png", "dest", 1.0, "wood", (206, 178, 140), (186, 152, 112), (58, 62, 72)),
    Table("006_table_1.png", "table", 1.0, "speckle", (208, 206, 198), (168, 164, 156), (120, 96, 74)),
    Table("007_yellow desk_1.png", "yellow desk", 1.0, "plain", (222, 182, 74), (204, 160, 52), (92, 96, 108)),
    Table("008_table_2.png", "table", 1.0, "tiles", (196, 188, 176), (146, 136, 124), (66, 52, 44)),
    Table("009_table_3.png", "table", 1.0, "boards", (134, 96, 66), (104, 72, 48), (214, 206, 194)),
    Table("010_table_4.png", "table", 1.0, "speckle", (110, 112, 116), (82, 84, 90), (180, 174, 160)),
    Table("011_table_5.png", "table", 1.0, "stone", (226, 224, 222), (164, 162, 166), (28, 26, 26)),
    Table("012_pink table_1.png", "pink table", 1.0, "plain", (222, 158, 172), (206, 134, 152), (236, 228, 222)),
    Table("013_table_6.png", "table", 1.0, "wood", (142, 106, 82), (112, 80, 58), (152, 170, 186)),
    Table("014_grass table_1.png", "grass table", 1.0, "grass", (94, 138, 60), (62, 104, 38), (150, 186, 214)),
    Table("015_table_7.png", "table", 1.0, "tiles", (96, 128, 148), (140, 164, 178), (54, 58, 60)),
    Table("016_coloful desk_1.png", "coloful desk", 1.0, "bands", (212, 122, 76), (84, 140, 156), (238, 230, 208)),
    Table("017_glass table_1.png", "glass table", 1.0, "stone", (164, 196, 200), (198, 222, 224), (74, 86, 92)),
    Table("018_green table_1.png", "green table", 1.0, "plain", (70, 128, 96), (54, 108, 78), (214, 212, 200)),
    Table("019_pink desk_1.png", "pink desk", 1.0, "tiles", (226, 150, 176), (240, 190, 206), (112, 84, 104)),
    Table("020_stone table_1.png", "stone table", 1.0, "stone", (132, 128, 122), (96, 92, 88), (58, 70, 52)),
    Table("021_dining table_2.png", "dining table", 1.0, "wood", (118, 70, 38), (86, 46, 22), (222, 214, 196)),
)
# fmt: on


@functools.lru_cache(maxsize=64)
def resized(image_of: Callable[[Any], np.ndarray], which: Any, width: int, height: int) -> np.ndarray:
    """`image_of(which)` at another size, area-averaged if it shrinks: uint8 [height, width, 3], read-only."""
    image = image_of(which)
    if image.shape[:2] != (height, width):
        shrinks = image.shape[0] > height and image.shape[1] > width
        kind = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((width, height), kind)).copy()
        image.flags.writeable = False
    return image
