"""Triangle meshes of what is seen in the pack `builtin`: round bodies of few triangles, with smooth normals.

A mesh has vertices float64 [V, 3] in metres, unit normals [V, 3] and triangles int [T, 3], seen from outside
counterclockwise. All parts of one colour are one mesh, because each mesh of a scene costs about 5 us per image.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from envs.assets.catalog import ROUND, STRAIGHT, Color, Model, Part

SIDES = 12  # of a round body
WIDE, NARROW = 0.035, 0.01  # m, radii above and below which a body has 24 and 8
CREASE = np.cos(np.radians(50))  # a profile that turns more sharply has an edge there


class Mesh(NamedTuple):
    vertices: np.ndarray
    normals: np.ndarray
    triangles: np.ndarray


def meshes_of(model: Model) -> dict[Color, Mesh]:
    """What is seen of an object or receptacle: one mesh per colour."""
    by_color: dict[Color, list[Mesh]] = {}
    for part in model.look or model.parts:
        by_color.setdefault(part.color, []).append(_mesh_of(model, part))
    return {color: _joined(meshes) for color, meshes in by_color.items()}


def ply_text(mesh: Mesh) -> str:
    """The mesh as a PLY file. SAPIEN repeats the vertices of other formats, and three times as many cost time."""
    lines = ["ply", "format ascii 1.0", f"element vertex {len(mesh.vertices)}"]
    lines += [f"property float {name}" for name in ("x", "y", "z", "nx", "ny", "nz")]
    lines += [f"element face {len(mesh.triangles)}", "property list uchar int vertex_indices", "end_header"]
    for (x, y, z), (a, b, c) in zip(mesh.vertices, mesh.normals):
        lines.append(f"{x:.7f} {y:.7f} {z:.7f} {a:.5f} {b:.5f} {c:.5f}")
    lines += [f"3 {a} {b} {c}" for a, b, c in mesh.triangles]
    return "\n".join(lines) + "\n"


def _joined(meshes: list[Mesh]) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    triangles = [mesh.triangles + start for mesh, start in zip(meshes, starts)]
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.normals for mesh in meshes]),
        np.concatenate(triangles),
    )


def _mesh_of(model: Model, part: Part) -> Mesh:
    """One part in its model's frame."""
    span = np.asarray(part.span).reshape(3, 2)
    lower = np.asarray(model.lower) + span[:, 0] * model.size
    upper = np.asarray(model.lower) + span[:, 1] * model.size
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    along = "xyz".index(part.axis)
    if part.kind in ("cylinder", "roll", "ball"):  # as round as the body that collides
        half[np.arange(3) != along] = np.delete(half, along).min()
    if part.kind == "ball":
        half[:] = half.min()
    if part.kind == "box":
        unit = _box()
    elif part.kind == "patch":
        unit = _patch()
    elif part.kind == "disc":
        unit = _disc()
    elif part.kind == "loaf":
        unit = _loaf()
    elif part.kind == "ball":
        unit = _turned(ROUND, along, half)
    else:
        unit = _turned(part.profile or STRAIGHT, along, half)
    vertices, normals = unit.vertices * half, unit.normals / half
    if part.bend:  # along x, in the direction of y, in shares of the model's width
        place = unit.vertices[:, 0]
        vertices[:, 1] += part.bend * model.size[1] * (1 - place**2)
        normals[:, 0] += normals[:, 1] * 2 * part.bend * model.size[1] * place / half[0]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return Mesh(middle + vertices, normals, _facing_out(vertices, normals, unit.triangles))


def _facing_out(vertices: np.ndarray, normals: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """The triangles with corners in the order that agrees with the normals, without those of no area."""
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    across = np.cross(b - a, c - a)
    inward = (across * normals[triangles].mean(axis=1)).sum(axis=1) < 0
    turned = np.where(inward[:, None], triangles[:, ::-1], triangles)
    return turned[np.linalg.norm(across, axis=1) > 1e-12]


def _box() -> Mesh:
    """A cube from -1 to 1."""
    vertices, normals, triangles = [], [], []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            corner = np.insert(np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]), axis, sign, axis=1)
            triangles += [(4 * len(vertices), 4 * len(vertices) + 1, 4 * len(vertices) + 2)]
            triangles += [(4 * len(vertices), 4 * len(vertices) + 2, 4 * len(vertices) + 3)]
            vertices.append(corner)
            normals.append(np.tile(sign * np.eye(3)[axis], (4, 1)))
    return Mesh(np.concatenate(vertices), np.concatenate(normals), np.array(triangles))


def _patch() -> Mesh:
    """The upper face of a cube alone: paint on a surface, without sides that show as dots."""
    corners = np.array([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
    return Mesh(corners, np.tile([0.0, 0, 1], (4, 1)), np.array([[0, 1, 2], [0, 2, 3]]))


def _disc() -> Mesh:
    """The upper end of a standing cylinder alone."""
    angle = np.arange(2 * SIDES) * np.pi / SIDES
    rim = np.stack([np.cos(angle), np.sin(angle), np.ones_like(angle)], axis=1)
    count = len(rim)
    fan = [(0, i, i + 1) for i in range(1, count - 1)]
    return Mesh(rim, np.tile([0.0, 0, 1], (count, 1)), np.array(fan))


def _turned(profile: tuple[tuple[float, float], ...], along: int, half: np.ndarray) -> Mesh:
    """A body turned on a lathe, from -1 to 1 in all directions. Sharp turns of its profile are edges.

    Args:
        profile: (place along the axis, 0 to 1, and radius, 0 to 1) of points.
        along: the axis, 0 to 2.
        half: half edges (m) of the box that the body will fill, which decide what is sharp.
    """
    points = np.asarray(profile, float)
    points[:, 0] = points[:, 0] * 2 - 1
    steps = np.diff(points, axis=0)
    sized = steps * [half[along], np.delete(half, along).mean()]
    sized /= np.linalg.norm(sized, axis=1, keepdims=True)
    outward = np.stack([-steps[:, 1], steps[:, 0]], axis=1)  # of each piece, in the cube
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    radius = np.delete(half, along).mean()
    sides = 2 * SIDES if radius > WIDE else SIDES if radius > NARROW else 8
    angle = np.arange(sides) * 2 * np.pi / sides
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    order = [along, (along + 1) % 3, (along + 2) % 3]
    smooth = [sized[k] @ sized[k + 1] > CREASE for k in range(len(steps) - 1)]
    rings, triangles = [], []  # a ring: place and radius, and the direction of its normals in the profile's plane
    for k, (point, following) in enumerate(itertools.pairwise(points)):
        if k == 0 or not smooth[k - 1]:
            rings.append((point, outward[k]))
        rings.append((following, outward[k] + outward[k + 1] if k < len(smooth) and smooth[k] else outward[k]))
        corner = (len(rings) - 2) * sides + np.arange(sides)
        beside = (len(rings) - 2) * sides + (np.arange(sides) + 1) % sides
        triangles.append(np.stack([corner, beside, beside + sides], axis=1))
        triangles.append(np.stack([corner, beside + sides, corner + sides], axis=1))
    vertices, normals = np.empty((len(rings), sides, 3)), np.empty((len(rings), sides, 3))
    for k, (point, normal) in enumerate(rings):
        vertices[k, :, order[0]], vertices[k][:, order[1:]] = point[0], point[1] * circle
        normals[k, :, order[0]], normals[k][:, order[1:]] = normal[0], normal[1] * circle
    return Mesh(vertices.reshape(-1, 3), normals.reshape(-1, 3), np.concatenate(triangles))


def _loaf(rings: int = 9, roundness: float = 0.6) -> Mesh:
    """A box with rounded edges: the superellipsoid |x|^p + |y|^p + |z|^p = 1 with p = 2 / roundness."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings)[:, None]
    longitude = (np.arange(SIDES) * 2 * np.pi / SIDES)[None]

    def power(value: np.ndarray, exponent: float) -> np.ndarray:
        return np.sign(value) * np.abs(value) ** exponent

    def surface(exponent: float) -> np.ndarray:
        flat = power(np.cos(latitude), exponent)
        x, y = flat * power(np.cos(longitude), exponent), flat * power(np.sin(longitude), exponent)
        z = power(np.sin(latitude), exponent) * np.ones_like(longitude)
        return np.stack([x, y, z], axis=-1).reshape(-1, 3)

    first = (np.arange(rings - 1)[:, None] * SIDES + np.arange(SIDES)).ravel()
    following = (np.arange(rings - 1)[:, None] * SIDES + (np.arange(SIDES) + 1) % SIDES).ravel()
    triangles = [[first, following, following + SIDES], [first, following + SIDES, first + SIDES]]
    triangles = np.concatenate([np.stack(corner, axis=1) for corner in triangles])
    return Mesh(surface(roundness), surface(2 - roundness), triangles)
