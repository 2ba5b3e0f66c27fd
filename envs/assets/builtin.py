"""The asset pack `builtin`, made by code: nothing has to be downloaded.

It has a WidowX-shaped arm of boxes, objects and receptacles of a few primitive shapes each, table images and textures.
Link offsets and joint limits are those of the WidowX-250s. Lengths are metres, colours linear RGB in [0, 1], images
uint8 [H, W, 3].
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sapien
from PIL import Image
from sapien.physx import PhysxMaterial

from envs.assets.catalog import (
    CAMERA_INTRINSICS,
    CAMERA_POSITION,
    CAMERA_QUATERNION,
    CAMERA_SIZE,
    OBJECTS,
    RECEPTACLES,
    ROBOT_BASE_POSITION,
    TABLE_HEIGHT,
    TABLES,
    Model,
    Part,
    resized,
)
from envs.rotations import rotation_matrix
from envs.scratch import scratch_folder

# ---------------------------------------------------------------------------------------------------------------------
# the arm
# ---------------------------------------------------------------------------------------------------------------------

PI = 3.141592653589793
# name, parent, type, origin (x, y, z), axis, lower, upper
JOINTS = (
    ("waist", "base_link", "shoulder_link", "revolute", (0, 0, 0.072), (0, 0, 1), -PI, PI),
    (
        "shoulder",
        "shoulder_link",
        "upper_arm_link",
        "revolute",
        (0, 0, 0.03865),
        (0, 1, 0),
        -1.8849555921538759,
        1.9896753472735358,
    ),
    (
        "elbow",
        "upper_arm_link",
        "upper_forearm_link",
        "revolute",
        (0.04975, 0, 0.25),
        (0, 1, 0),
        -2.1467549799530254,
        1.6057029118347832,
    ),
    ("forearm_roll", "upper_forearm_link", "lower_forearm_link", "revolute", (0.175, 0, 0), (1, 0, 0), -PI, PI),
    (
        "wrist_angle",
        "lower_forearm_link",
        "wrist_link",
        "revolute",
        (0.075, 0, 0),
        (0, 1, 0),
        -1.7453292519943295,
        2.1467549799530254,
    ),
    ("wrist_rotate", "wrist_link", "gripper_link", "revolute", (0.065, 0, 0), (1, 0, 0), -PI, PI),
    # ee_arm 0.043 + fingers 0.023 along the tool. The fixed links between them carry nothing and are left out.
    ("left_finger", "gripper_link", "left_finger_link", "prismatic", (0.066, 0, 0), (0, 1, 0), 0.015, 0.037),
    ("right_finger", "gripper_link", "right_finger_link", "prismatic", (0.066, 0, 0), (0, -1, 0), 0.015, 0.037),
    ("ee_gripper", "gripper_link", "ee_gripper_link", "fixed", (0.093575, 0, 0), (1, 0, 0), 0, 0),
)
# link -> mass (kg), whether it collides, boxes (x0, x1, y0, y1, z0, z1) in metres in the link's frame
LINKS = {
    "base_link": (0.538736, False, ((-0.10, 0.02, -0.06, 0.06, 0.0, 0.0716),)),
    "shoulder_link": (0.480879, False, ((-0.05, 0.02, -0.035, 0.035, 0.0, 0.0525),)),
    "upper_arm_link": (
        0.430811,
        False,
        (
            (-0.0144, 0.03, -0.022, 0.022, -0.0144, 0.03),
            (-0.0144, 0.03, -0.022, 0.022, 0.03, 0.265),
            (0.03, 0.061, -0.03, 0.03, 0.235, 0.265),
        ),
    ),
    "upper_forearm_link": (0.234589, False, ((-0.0144, 0.175, -0.0212, 0.0212, -0.0212, 0.0212),)),
    "lower_forearm_link": (
        0.220991,
        True,
        ((0.0, 0.06, -0.0245, 0.0245, -0.0245, 0.0245), (0.06, 0.086, -0.03, 0.03, -0.016, 0.016)),
    ),
    "wrist_link": (0.084957, True, ((-0.0, 0.060, -0.02, 0.02, -0.02, 0.035),)),
    # the motor, then the wide bar on which the fingers slide
    "gripper_link": (
        0.112124,
        True,
        ((0.0, 0.043, -0.02, 0.02, -0.02, 0.0352), (0.043, 0.054, -0.052, 0.052, -0.0145, 0.0145)),
    ),
    # a thick root, then the thinner tip. The inner face is 11 mm inside the joint coordinate.
    "left_finger_link": (
        0.016246,
        True,
        ((-0.012, 0.012, -0.011, 0.005, -0.0145, 0.0145), (0.012, 0.043, -0.011, 0.0, -0.0135, 0.0135)),
    ),
    "right_finger_link": (
        0.016246,
        True,
        ((-0.012, 0.012, -0.005, 0.011, -0.0145, 0.0145), (0.012, 0.043, 0.0, 0.011, -0.0135, 0.0135)),
    ),
    "ee_gripper_link": (0.001, False, ()),
}
LINK_COLORS = {
    "left_finger_link": "0.035 0.035 0.04 1",
    "right_finger_link": "0.035 0.035 0.04 1",
    "gripper_link": "0.06 0.06 0.065 1",
}
LINK_COLOR = "0.045 0.045 0.05 1"
FROM_X_AXIS = {  # wxyz of the turn of SAPIEN's cylinder, which is along x, to another axis
    "x": [1, 0, 0, 0],
    "y": [0.70710678, 0, 0, 0.70710678],
    "z": [0.70710678, 0, -0.70710678, 0],
}
TOUCHING_NEIGHBOURS = (  # not joined to each other, but in contact by construction
    ("gripper_link", "lower_forearm_link"),
    ("left_finger_link", "right_finger_link"),
    ("wrist_link", "left_finger_link"),
    ("wrist_link", "right_finger_link"),
)


def _link_xml(name: str) -> str:
    """One link: its boxes as visuals and, if it collides, as collision shapes. Its inertia is that of one solid box."""
    mass, collides, boxes = LINKS[name]
    tiny_box = (-0.01, 0.01, -0.01, 0.01, -0.01, 0.01)
    bounds = np.asarray(boxes if boxes else (tiny_box,)).reshape(-1, 3, 2)
    lower, upper = bounds[:, :, 0].min(axis=0), bounds[:, :, 1].max(axis=0)
    squares = (upper - lower) ** 2
    ixx, iyy, izz = mass / 12 * (squares.sum() - squares)  # solid box: m/12 (b^2 + c^2)
    color = LINK_COLORS.get(name, LINK_COLOR)
    shapes = []
    for box in boxes:
        low, high = np.asarray(box).reshape(3, 2).T
        shape = f'{_origin((low + high) / 2)}<geometry><box size="{_numbers(high - low)}"/></geometry>'
        shapes.append(f'<visual>{shape}<material name="{name}"><color rgba="{color}"/></material></visual>')
        if collides:
            shapes.append(f"<collision>{shape}</collision>")
    inertia = f'<inertia ixx="{ixx:.9f}" ixy="0" ixz="0" iyy="{iyy:.9f}" iyz="0" izz="{izz:.9f}"/>'
    inertial = f'<inertial>{_origin((lower + upper) / 2)}<mass value="{mass}"/>{inertia}</inertial>'
    return f'<link name="{name}">{"".join(shapes)}{inertial}</link>'


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6f}" for value in values)


def _origin(xyz: Iterable[float]) -> str:
    return f'<origin rpy="0 0 0" xyz="{_numbers(xyz)}"/>'


def _joint_xml(
    name: str,
    parent: str,
    child: str,
    kind: str,
    origin: tuple[float, float, float],
    axis: tuple[float, float, float],
    lower: float,
    upper: float,
) -> str:
    """One row of JOINTS."""
    limit = f'<limit effort="100" lower="{lower}" upper="{upper}" velocity="3.14"/>' if kind != "fixed" else ""
    ends = f'<parent link="{parent}"/><child link="{child}"/>'
    return f'<joint name="{name}" type="{kind}"><axis xyz="{_numbers(axis)}"/>{limit}{_origin(origin)}{ends}</joint>'


def robot_urdf_text() -> str:
    """The arm as URDF, with the real link offsets, joint names, limits and finger geometry. The rest are boxes."""
    links = "".join(_link_xml(name) for name in LINKS)
    joints = "".join(_joint_xml(*joint) for joint in JOINTS)
    return f'<robot name="widowx_boxes">{links}{joints}</robot>\n'


def robot_srdf_text() -> str:
    """Pairs of links that may overlap. The loader finds this file by its name, next to the URDF."""
    pairs = "".join(f'<disable_collisions link1="{a}" link2="{b}" reason="Default"/>' for a, b in TOUCHING_NEIGHBOURS)
    return f'<robot name="widowx_boxes">{pairs}</robot>\n'


def _write_once(path: Path, text: str) -> None:
    """Write the file unless it has this text already. The write is atomic, because many processes start together."""
    if path.exists() and path.read_text() == text:
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


# ---------------------------------------------------------------------------------------------------------------------
# images
# ---------------------------------------------------------------------------------------------------------------------


def _table_points() -> np.ndarray:
    """World x, y where each pixel's ray meets the table plane, float64 [480, 640, 2]. NaN above the horizon."""
    width, height = CAMERA_SIZE
    fx, fy, cx, cy = CAMERA_INTRINSICS
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    # SAPIEN's camera looks along +x, y is to the left and z is up
    rays = np.stack([np.ones_like(u), -(u - cx) / fx, -(v - cy) / fy], axis=-1)
    base = np.diag([-1.0, -1.0, 1.0])  # a yaw of 180 degrees
    rays = rays @ (base @ rotation_matrix(CAMERA_QUATERNION)).T
    origin = np.asarray(ROBOT_BASE_POSITION) + base @ np.asarray(CAMERA_POSITION)
    looks_down = rays[..., 2] < -1e-6
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(looks_down, (TABLE_HEIGHT - origin[2]) / rays[..., 2], np.nan)
    return origin[:2] + distance[..., None] * rays[..., :2]


def _noise(random: np.random.RandomState, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise in [0, 1] with about `cells` bumps across, float32 [H, W]."""
    grid = (random.random_sample((cells + 1, cells + 1)) * 255).astype(np.uint8)
    smooth = Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255


def _pattern(kind: str, x: np.ndarray, y: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The share of the second colour at surface coordinates x, y (m), float [H, W] in [0, 1]."""
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
def _table_image(index: int) -> np.ndarray:
    """Table `index` as the camera sees it without robot and objects, uint8 [480, 640, 3], read-only."""
    table = TABLES[index]
    random = np.random.RandomState(1000 + index)
    points = _table_points()
    back, right, left, _ = 0.24 + 0.14 * random.random_sample(4)  # m to the edges, which differ from table to table
    x = np.nan_to_num(points[..., 0], nan=9.0)  # 9 m is far off the table
    y = np.nan_to_num(points[..., 1], nan=9.0)
    on_table = (x > -0.16 - back - 0.05) & (x < 0.3) & (y > -right - 0.03) & (y < left + 0.03)
    share = np.clip(_pattern(table.pattern, x, y, random), 0, 1)[..., None]
    light = np.clip(1.05 - 0.35 * np.hypot(x + 0.16, y)[..., None], 0.7, 1.05)  # falls off from the middle
    surface = ((1 - share) * np.asarray(table.color) + share * np.asarray(table.second)) * light
    wall = np.asarray(table.backdrop) * (0.75 + 0.25 * _noise(random, x.shape, 5)[..., None])
    image = np.clip(np.where(on_table[..., None], surface, wall), 0, 255).astype(np.uint8)
    image.flags.writeable = False
    return image


@functools.cache
def _texture_image(index: int) -> np.ndarray:
    """Texture `index`, flat, uint8 [480, 640, 3], read-only. Texture 0 is paired with mix 0."""
    random = np.random.RandomState(2000 + index)
    kinds = ("wood", "stone", "checker", "stripes", "grass", "speckle", "plain")
    y, x = np.meshgrid(np.linspace(0, 0.48, 480), np.linspace(0, 0.64, 640), indexing="ij")
    share = np.clip(_pattern(kinds[index % len(kinds)], x, y, random), 0, 1)[..., None]
    first, second = random.randint(30, 226, size=3), random.randint(30, 226, size=3)
    image = ((1 - share) * first + share * second).astype(np.uint8)
    image.flags.writeable = False
    return image


# ---------------------------------------------------------------------------------------------------------------------
# the pack
# ---------------------------------------------------------------------------------------------------------------------


class BuiltinAssets:
    """The pack `builtin`. One instance serves all envs of a process."""

    name = "builtin"
    arm_shine: dict[str, float] | None = None
    objects = OBJECTS
    receptacles = RECEPTACLES
    tables = TABLES

    def __init__(self) -> None:
        self._materials: dict[tuple, sapien.render.RenderMaterial] = {}

    @functools.cached_property
    def robot_urdf(self) -> str:
        """Path of the arm's URDF. It is in a cache folder of this user, because ManiSkill reads robots from files.

        Its name says what is in it. Two versions of this code on one machine would otherwise take each other's arm.
        """
        srdf, urdf = robot_srdf_text(), robot_urdf_text()
        place = scratch_folder() / f"widowx_boxes_{hashlib.sha256((srdf + urdf).encode()).hexdigest()[:16]}.urdf"
        _write_once(place.with_suffix(".srdf"), srdf)
        _write_once(place, urdf)
        return str(place)

    def table_image(self, index: int, width: int, height: int) -> np.ndarray:
        """The image behind robot and objects, uint8 [height, width, 3], read-only."""
        return resized(_table_image, index, width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """The texture of a table, uint8 [height, width, 3], read-only."""
        return resized(_texture_image, index, width, height)

    def add_stage(self, builder: sapien.ActorBuilder) -> None:
        """Add the table, without a visual: the table image covers everything but robot and objects."""
        builder.add_box_collision(pose=sapien.Pose([0, 0, TABLE_HEIGHT - 0.05]), half_size=[1.5, 1.5, 0.05])

    def add_model(self, builder: sapien.ActorBuilder, model: Model) -> None:
        """Add an object or receptacle. Friction is 1.0 as in RL4VLA (stock SIMPLER has 0.5)."""
        friction = PhysxMaterial(static_friction=1.0, dynamic_friction=1.0, restitution=0.0)
        for part in model.parts:
            self._add_part(builder, model, part, friction)

    def _material(self, color: tuple[float, float, float]) -> sapien.render.RenderMaterial:
        if color not in self._materials:
            material = sapien.render.RenderMaterial(base_color=[*color, 1.0])
            material.roughness, material.specular, material.metallic = 0.8, 0.2, 0.0
            self._materials[color] = material
        return self._materials[color]

    def _add_part(self, builder: sapien.ActorBuilder, model: Model, part: Part, friction: PhysxMaterial) -> None:
        """Add collision shape and visual of one part."""
        span = np.asarray(part.span).reshape(3, 2)
        lower = np.asarray(model.lower) + span[:, 0] * model.size
        upper = np.asarray(model.lower) + span[:, 1] * model.size
        half = (upper - lower) / 2
        pose = sapien.Pose((lower + upper) / 2)
        solid = dict(material=friction, density=model.density)
        material = self._material(part.color)
        if part.kind == "box":
            builder.add_box_collision(pose=pose, half_size=half, **solid)
            builder.add_box_visual(pose=pose, half_size=half, material=material)
            return
        if part.kind == "ball":
            builder.add_sphere_collision(pose=pose, radius=half.min(), **solid)
            builder.add_sphere_visual(pose=pose, radius=half.min(), material=material)
            return
        along = "xyz".index(part.axis)
        half_length = half[along]
        radius = np.delete(half, along).min()
        turned = sapien.Pose(pose.p, FROM_X_AXIS[part.axis])
        if part.kind == "roll":
            builder.add_box_collision(pose=pose, half_size=half, **solid)
        else:
            builder.add_cylinder_collision(pose=turned, radius=radius, half_length=half_length, **solid)
        builder.add_cylinder_visual(pose=turned, radius=radius, half_length=half_length, material=material)
