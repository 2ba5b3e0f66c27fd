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
from sapien.physx import PhysxMaterial

from envs.assets import paint, shapes
from envs.assets.catalog import OBJECTS, RECEPTACLES, STRAIGHT, TABLE_HEIGHT, TABLES, Color, Model, Part, resized
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
DARK, LIGHT, TIP = (0.04, 0.04, 0.045), (0.30, 0.31, 0.33), (0.50, 0.51, 0.53)
TUBE = ((0, 0.9), (0.05, 1), (0.95, 1), (1, 0.9))  # open ends, which are inside other shapes
# link -> what is seen of it: spans in metres in the link's frame. Dark and light links take turns, and the bar and the
# fingers are light. A link of one colour is one mesh
LINK_LOOKS = {
    "base_link": (Part("box", (-0.10, 0.02, -0.06, 0.06, 0.0, 0.0716), DARK),),
    "shoulder_link": (Part("box", (-0.05, 0.02, -0.035, 0.035, 0.0, 0.0525), DARK),),
    "upper_arm_link": (
        Part("turned", (-0.026, 0.026, -0.03, 0.03, -0.026, 0.026), LIGHT, "y", STRAIGHT),
        Part("turned", (-0.014, 0.014, -0.014, 0.014, 0.0, 0.25), LIGHT, "z", TUBE),
        Part("box", (0.0, 0.06, -0.018, 0.018, 0.238, 0.262), LIGHT),
    ),
    "upper_forearm_link": (
        Part("turned", (-0.026, 0.026, -0.03, 0.03, -0.026, 0.026), DARK, "y", STRAIGHT),
        Part("turned", (0.0, 0.175, -0.019, 0.019, -0.019, 0.019), LIGHT, "x", TUBE),
    ),
    "lower_forearm_link": (
        Part("turned", (0.0, 0.055, -0.0245, 0.0245, -0.0245, 0.0245), DARK, "x", STRAIGHT),
        Part("turned", (0.053, 0.093, -0.03, 0.03, -0.02, 0.02), DARK, "y", STRAIGHT),
    ),
    "wrist_link": (Part("box", (0.0, 0.060, -0.019, 0.019, -0.02, 0.033), LIGHT),),
    "gripper_link": (
        Part("box", (0.0, 0.043, -0.02, 0.02, -0.02, 0.0352), DARK),
        Part("box", (0.043, 0.054, -0.052, 0.052, -0.0145, 0.0145), TIP),
    ),
    "left_finger_link": (
        Part("box", (-0.012, 0.012, -0.011, 0.005, -0.0145, 0.0145), TIP),
        Part("box", (0.012, 0.043, -0.011, 0.0, -0.0135, 0.0135), TIP),
    ),
    "right_finger_link": (
        Part("box", (-0.012, 0.012, -0.005, 0.011, -0.0145, 0.0145), TIP),
        Part("box", (0.012, 0.043, 0.0, 0.011, -0.0135, 0.0135), TIP),
    ),
    "ee_gripper_link": (),
}
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


def _link_xml(name: str, mesh_files: dict[Color, str]) -> str:
    """One link: its meshes and, if it collides, its boxes. Its inertia is that of one solid box.

    mesh_files: the file of what is seen in each colour.
    """
    mass, collides, boxes = LINKS[name]
    tiny_box = (-0.01, 0.01, -0.01, 0.01, -0.01, 0.01)
    bounds = np.asarray(boxes if boxes else (tiny_box,)).reshape(-1, 3, 2)
    lower, upper = bounds[:, :, 0].min(axis=0), bounds[:, :, 1].max(axis=0)
    squares = (upper - lower) ** 2
    ixx, iyy, izz = mass / 12 * (squares.sum() - squares)  # solid box: m/12 (b^2 + c^2)
    parts = []
    for color, file in mesh_files.items():
        material = f'<material name="{name}_{len(parts)}"><color rgba="{_numbers(color)} 1"/></material>'
        parts.append(f'<visual><geometry><mesh filename="{file}"/></geometry>{material}</visual>')
    for box in boxes if collides else ():
        low, high = np.asarray(box).reshape(3, 2).T
        shape = f'{_origin((low + high) / 2)}<geometry><box size="{_numbers(high - low)}"/></geometry>'
        parts.append(f"<collision>{shape}</collision>")
    inertia = f'<inertia ixx="{ixx:.9f}" ixy="0" ixz="0" iyy="{iyy:.9f}" iyz="0" izz="{izz:.9f}"/>'
    inertial = f'<inertial>{_origin((lower + upper) / 2)}<mass value="{mass}"/>{inertia}</inertial>'
    return f'<link name="{name}">{"".join(parts)}{inertial}</link>'


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
    """The arm as URDF, with the real link offsets, joint names, limits and finger geometry. The rest is our own.

    The meshes that it names are written into the cache folder.
    """
    one_metre = dict(key="", name="", lower=(0, 0, 0), upper=(1, 1, 1), density=0)
    links = "".join(_link_xml(name, _mesh_files(Model(**one_metre, look=LINK_LOOKS[name]))) for name in LINKS)
    joints = "".join(_joint_xml(*joint) for joint in JOINTS)
    return f'<robot name="widowx_boxes">{links}{joints}</robot>\n'


def robot_srdf_text() -> str:
    """Pairs of links that may overlap. The loader finds this file by its name, next to the URDF."""
    pairs = "".join(f'<disable_collisions link1="{a}" link2="{b}" reason="Default"/>' for a, b in TOUCHING_NEIGHBOURS)
    return f'<robot name="widowx_boxes">{pairs}</robot>\n'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_once(path: Path, text: str) -> None:
    """Write the file unless it has this text already. The write is atomic, because many processes start together."""
    if path.exists() and path.read_text() == text:
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _mesh_files(model: Model) -> dict[Color, str]:
    """Files of what is seen of a model, one per colour. They are in the cache folder, named after their content."""
    files = {}
    for color, mesh in shapes.meshes_of(model).items():
        text = shapes.ply_text(mesh)
        path = scratch_folder() / f"mesh_{_digest(text)}.ply"
        _write_once(path, text)
        files[color] = str(path)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# the pack
# ---------------------------------------------------------------------------------------------------------------------


class BuiltinAssets:
    """The pack `builtin`. One instance serves all envs of a process."""

    name = "builtin"
    casts_shadows = True
    arm_shine: dict[str, float] | None = None
    objects = OBJECTS
    receptacles = RECEPTACLES
    tables = TABLES

    def __init__(self) -> None:
        self._materials: dict[tuple, sapien.render.RenderMaterial] = {}

    @functools.cached_property
    def robot_urdf(self) -> str:
        """Path of the arm's URDF. It is in a cache folder of this user, because ManiSkill reads robots from files.

        Files are named after their content, because programs of different versions share the folder.
        """
        urdf, srdf = robot_urdf_text(), robot_srdf_text()
        path = scratch_folder() / f"widowx_{_digest(urdf + srdf)}.urdf"
        _write_once(path.with_suffix(".srdf"), srdf)
        _write_once(path, urdf)
        return str(path)

    def table_image(self, index: int, width: int, height: int) -> np.ndarray:
        """The image behind robot and objects, uint8 [height, width, 3], read-only."""
        return resized(paint.table_image, index, width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """The texture of a table, uint8 [height, width, 3], read-only."""
        return resized(paint.texture_image, index, width, height)

    def add_stage(self, builder: sapien.ActorBuilder) -> None:
        """Add the table, without a visual: the table image covers everything but robot and objects."""
        builder.add_box_collision(pose=sapien.Pose([0, 0, TABLE_HEIGHT - 0.05]), half_size=[1.5, 1.5, 0.05])

    def add_model(self, builder: sapien.ActorBuilder, model: Model) -> None:
        """Add an object or receptacle. Friction is 1.0 as in RL4VLA (stock SIMPLER has 0.5)."""
        friction = PhysxMaterial(static_friction=1.0, dynamic_friction=1.0, restitution=0.0)
        for part in model.parts:
            self._add_collision(builder, model, part, friction)
        for color, path in _mesh_files(model).items():
            builder.add_visual_from_file(path, material=self._material(color))

    def _material(self, color: Color) -> sapien.render.RenderMaterial:
        if color not in self._materials:
            material = sapien.render.RenderMaterial(base_color=[*color, 1.0])
            material.roughness, material.specular, material.metallic = 0.8, 0.2, 0.0
            self._materials[color] = material
        return self._materials[color]

    def _add_collision(self, builder: sapien.ActorBuilder, model: Model, part: Part, friction: PhysxMaterial) -> None:
        span = np.asarray(part.span).reshape(3, 2)
        lower = np.asarray(model.lower) + span[:, 0] * model.size
        upper = np.asarray(model.lower) + span[:, 1] * model.size
        half = (upper - lower) / 2
        pose = sapien.Pose((lower + upper) / 2)
        solid = dict(material=friction, density=model.density)
        if part.kind in ("box", "roll"):
            builder.add_box_collision(pose=pose, half_size=half, **solid)
        elif part.kind == "ball":
            builder.add_sphere_collision(pose=pose, radius=half.min(), **solid)
        else:
            along = "xyz".index(part.axis)
            turned = sapien.Pose(pose.p, FROM_X_AXIS[part.axis])
            radius = np.delete(half, along).min()
            builder.add_cylinder_collision(pose=turned, radius=radius, half_length=half[along], **solid)
