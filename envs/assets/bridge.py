"""The published pack: meshes and photographs of RL4VLA (arXiv 2505.19789), read from where a user downloads them to.

    carrot/more_carrot  more_plate  more_table     Hugging Face data set RLinf/maniskill_assets
    robots/widowx                                  ManiSkill's asset widowx250s
    tasks/bridge_v2_real2sim_dataset/stages        ManiSkill's asset bridge_v2_real2sim

Each of the three is looked for in `asset_dir`, in `asset_dir/data`, and in ManiSkill's own folder (`$MS_ASSET_DIR`,
else `~/.maniskill`, and its `data`). Nothing is downloaded and nobody is asked; what is missing is listed.

Every file is looked into before SAPIEN gets it: SAPIEN's loaders print and go on, or take the process with them.
"""

from __future__ import annotations

import functools
import io
import os
import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import sapien
from PIL import Image
from sapien.physx import PhysxMaterial

from envs.assets.catalog import OBJECTS, RECEPTACLES, TABLES, Model, Table, resized
from schemas import UserError, check, parse_json
from schemas.assets import Accessor, BodyEntry, Gltf, TableEntry, View

REMEDY = "fetch what is missing with `python doctor.py --download`"
STAGE = "stages/bridge_table_1_v1.glb"
STAGE_POSITION = (2.0634, 2.8313, 0.0)
STAGE_QUATERNION = (0.707, 0.707, 0, 0)  # as published, not quite a unit one
VISUALS = ("textured.obj", "textured.dae", "textured.glb")  # in the published order of preference
MAX_PIXELS = 8192 * 8192  # of a picture; the published ones have 640 x 480, textures 4096 x 4096
ARM_SHINE = dict(specular=0.9, roughness=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# where things are
# ---------------------------------------------------------------------------------------------------------------------


def search_folders(asset_dir: str | None) -> list[Path]:
    """Where the three parts may lie, in order."""
    own = Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill")
    roots = [own] if asset_dir is None else [Path(asset_dir).expanduser(), own]
    return [folder for root in roots for folder in (root, root / "data")]


def find_part(part: str, folders: list[Path]) -> Path:
    """The first folder that has `part`; where none has, the place it would have in the first."""
    return next((folder / part for folder in folders if (folder / part).is_dir()), folders[0] / part)


class Layout:
    """Paths of all files, missing or not."""

    def __init__(self, asset_dir: str | None):
        if asset_dir is not None and not Path(asset_dir).expanduser().is_dir():
            raise ValueError(f"asset_dir {asset_dir!r} is not a folder: give the one that holds carrot/ and robots/.")
        folders = search_folders(asset_dir)
        self.carrot = find_part("carrot", folders)
        self.robot = find_part("robots/widowx", folders)
        self.stage = find_part("tasks/bridge_v2_real2sim_dataset", folders) / STAGE
        self.databases = {kind: self.carrot / f"more_{kind}" / "model_db.json" for kind in ("carrot", "plate", "table")}

    def visual(self, folder: Path, default: str) -> Path:
        return next((folder / name for name in VISUALS if (folder / name).is_file()), folder / default)

    def missing(self) -> list[str]:
        """Every file that is not there, in words that can be copied."""
        wanted = [*self.databases.values(), self.stage, *self._robot_files()]
        for kind, models in (("carrot", OBJECTS), ("plate", RECEPTACLES)):
            for i, model in enumerate(models):
                folder = self.carrot / f"more_{kind}" / model.key
                visual = self.visual(folder, "textured.glb" if i else "textured.dae")
                wanted += [folder / "collision.obj", visual, *_dae_pictures(visual)]
        for table in TABLES:
            wanted += [self.carrot / "more_table/imgs" / table.key, self.carrot / "more_table/textures" / table.texture]
        return [str(path) for path in wanted if not path.is_file()]

    def _robot_files(self) -> list[Path]:
        """The URDF and what it names."""
        urdf = self.robot / "wx250s.urdf"
        files = [urdf, self.robot / "wx250s.srdf", self.robot / "interbotix_black.png"]
        if urdf.is_file():
            text = re.sub(r"<!--.*?-->", "", read_text(urdf), flags=re.DOTALL)
            names = sorted(set(re.findall(r'<mesh\s+filename="([^"]+)"', text)))
            files += [named_by(urdf, name, self.robot) for name in names]
        return files


def _dae_pictures(path: Path) -> list[Path]:
    if path.suffix != ".dae" or not path.is_file():
        return []
    names = re.findall(r"<init_from>([^<]+\.\w+)</init_from>", read_text(path))
    return [named_by(path, name, path.parent) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# looking into files
# ---------------------------------------------------------------------------------------------------------------------


def _bad(path: Path, why: str) -> RuntimeError:
    return RuntimeError(f"asset {path} is damaged ({why}): delete it and {REMEDY}.")


def read_bytes(path: Path) -> bytes:
    """The file, or one clear sentence."""
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise RuntimeError(f"asset {path} may not be read by this user: change its permissions.") from error


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise _bad(path, "not a text") from error


def parsed(path: Path, content: bytes, schema: Any) -> Any:
    """JSON of an asset as an object of the schema, or one clear sentence."""
    source, remedy = f"asset {path} is damaged: it", f"delete it and {REMEDY}"
    try:
        return check(schema, parse_json(content, source, remedy), source, remedy)
    except UserError as error:
        raise RuntimeError(f"{error}.") from error


def read_database(path: Path, entry: type, keys: list[str]) -> dict:
    """A model_db.json that has the published entries in the published order."""
    database = parsed(path, read_bytes(path), dict[str, entry])
    if list(database) != keys:
        raise _bad(path, f"not the {len(keys)} published entries")
    return database


def named_by(path: Path, name: str, root: Path) -> Path:
    """A file that another one names, which must lie below `root`: a published asset reads nothing of its user's."""
    place = Path(os.path.normpath(path.parent / name))
    if not place.is_relative_to(os.path.normpath(root)) or not name.isprintable() or ":" in name or "\\" in name:
        raise _bad(path, f"it names {name!r}, which is not in its folder")
    return place


@functools.cache
def checked(path: Path) -> str:
    """The path as text, once the file is known to be whole."""
    checks = {
        ".obj": _check_obj,
        ".stl": _check_stl,
        ".glb": _check_glb,
        ".dae": _check_dae,
        ".urdf": _xml,
        ".png": _check_picture,
        ".jpg": _check_picture,
    }
    try:
        if path.suffix not in checks:
            raise ValueError("a file of no known kind")
        checks[path.suffix](path)
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise _bad(path, str(error) or type(error).__name__) from error
    return str(path)


def _check_obj(path: Path) -> None:
    lines = read_text(path).splitlines()
    vertices = [line.split()[1:4] for line in lines if line.startswith("v ")]
    corners = [corner.split("/")[0] for line in lines if line.startswith("f ") for corner in line.split()[1:]]
    points = np.array(vertices, dtype=np.float64).reshape(-1, 3)
    index = np.array(corners, dtype=np.int64)
    if len(points) < 4 or not len(index) or not np.isfinite(points).all():
        raise ValueError("no solid")
    if np.abs(index).max() > len(points) or not index.all():
        raise ValueError("a face names a vertex that is not there")
    for line in lines:
        if line.startswith("mtllib "):
            _check_material(named_by(path, line.split(maxsplit=1)[1].strip(), path.parent))


def _check_material(path: Path) -> None:
    """The pictures that an .obj's materials name; meshes of one robot share a picture one folder up."""
    if not path.exists():  # many published ones lack theirs, and are grey
        return
    for line in read_text(path).splitlines():
        words = line.split(maxsplit=1)
        if len(words) == 2 and words[0].lower().startswith(("map_", "bump", "disp", "decal", "refl")):
            named_by(path, words[1].split()[-1], path.parent.parent)


def _check_stl(path: Path) -> None:
    data = read_bytes(path)
    (count,) = struct.unpack_from("<I", data, 80)
    if len(data) != 84 + 50 * count or count == 0:
        raise ValueError(f"{len(data)} bytes for {count} triangles")
    triangles = np.frombuffer(data, np.dtype([("corners", "<f4", (4, 3)), ("flags", "<u2")]), offset=84)
    if not np.isfinite(triangles["corners"]).all():
        raise ValueError("a corner that is no number")


def _xml(path: Path) -> ElementTree.Element:
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # which could name other files, or grow without end
        raise ValueError("XML with a document type")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"no XML: {error}") from error


def _check_dae(path: Path) -> None:
    root = _xml(path)
    arrays = [element for element in root.iter() if element.tag.endswith("float_array")]
    if not arrays:
        raise ValueError("no geometry")
    for array in arrays:
        values = np.array((array.text or "").split(), dtype=np.float64)
        if str(len(values)) != array.get("count") or not np.isfinite(values).all():
            raise ValueError(f"array {array.get('id')} is not {array.get('count')} numbers")
    for picture in _dae_pictures(path):
        checked(picture)


def _check_glb(path: Path) -> None:
    """Header, chunks, and that every accessor and picture lies inside its buffer (glTF 2.0)."""
    data = read_bytes(path)
    magic, version, length = struct.unpack_from("<4sII", data)
    if magic != b"glTF" or version != 2 or length != len(data):
        raise ValueError(f"not a whole glTF 2 file of {len(data)} bytes")
    size, kind = struct.unpack_from("<I4s", data, 12)
    start = 20 + size
    binary_size, _ = struct.unpack_from("<I4s", data, start)
    binary = data[start + 8 : start + 8 + binary_size]
    if kind != b"JSON" or len(binary) != binary_size:
        raise ValueError("broken chunks")
    scene = parsed(path, data[20:start], Gltf)
    views = scene.bufferViews
    if any(view.byteOffset + view.byteLength > len(binary) for view in views):
        raise ValueError("a buffer view beyond the end")
    for accessor in scene.accessors:
        _check_accessor(accessor, views, binary)
    for image in scene.images:
        view = views[image.bufferView]
        _decode_picture(binary[view.byteOffset : view.byteOffset + view.byteLength])


def _check_accessor(accessor: Accessor, views: list[View], binary: bytes) -> None:
    kinds = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
    width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}[accessor.type]
    kind = np.dtype(kinds[accessor.componentType])
    view = views[accessor.bufferView]
    stride = view.byteStride or width * kind.itemsize
    if accessor.byteOffset + stride * (accessor.count - 1) + width * kind.itemsize > view.byteLength:
        raise ValueError("an accessor beyond its buffer view")
    if kind.kind == "f" and stride == width * kind.itemsize:
        values = np.frombuffer(binary, kind, accessor.count * width, view.byteOffset + accessor.byteOffset)
        if not np.isfinite(values).all():
            raise ValueError("a coordinate that is no number")


def _check_picture(path: Path) -> None:
    _decode_picture(read_bytes(path))


def _decode_picture(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))  # PIL starts other programs for some formats
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # whatever PIL raises for a broken picture
        raise ValueError(f"no picture: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# the pack
# ---------------------------------------------------------------------------------------------------------------------


class BridgeAssets:
    """What `BuiltinAssets` offers, from files."""

    name = "bridge"
    arm_shine = ARM_SHINE

    def __init__(self, asset_dir: str | None):
        try:
            self.layout = Layout(asset_dir)
            missing = self.layout.missing()
        except PermissionError as error:
            raise RuntimeError(
                f"asset folder {error.filename} may not be read by this user: change its permissions."
            ) from error
        if missing:
            raise RuntimeError(f"asset pack 'bridge' lacks {len(missing)} files: {'; '.join(missing)}: {REMEDY}.")
        self.objects = self._models("carrot", OBJECTS)
        self.receptacles = self._models("plate", RECEPTACLES)
        self.tables = self._tables()

    def _models(self, kind: str, known: tuple[Model, ...]) -> tuple[Model, ...]:
        database = read_database(self.layout.databases[kind], BodyEntry, [model.key for model in known])
        return tuple(
            Model(key, entry.name, entry.bbox.min, entry.bbox.max, entry.density, grasp=model.grasp)
            for (key, entry), model in zip(database.items(), known)
        )

    def _tables(self) -> tuple[Table, ...]:
        database = read_database(self.layout.databases["table"], TableEntry, [table.key for table in TABLES])
        return tuple(Table(key, entry.name, entry.mix) for key, entry in database.items())

    @functools.cached_property
    def robot_urdf(self) -> str:
        for path in self.layout._robot_files():
            if path.suffix in (".urdf", ".obj", ".stl", ".png"):
                checked(path)
        return str(self.layout.robot / "wx250s.urdf")

    def picture(self, index: int, width: int, height: int) -> np.ndarray:
        """Table photograph, uint8 [height, width, 3], read-only."""
        return resized(_photograph, self.layout.carrot / "more_table/imgs" / self.tables[index].key, width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """Texture picture, uint8 [height, width, 3], read-only."""
        path = self.layout.carrot / "more_table/textures" / self.tables[index].texture
        return resized(_photograph, path, width, height)

    def add_stage(self, builder) -> None:
        """The table. It is never seen, the photograph takes its place, but it hides what is behind it."""
        pose, path = sapien.Pose(q=STAGE_QUATERNION), checked(self.layout.stage)
        builder.add_nonconvex_collision_from_file(path, pose=pose)
        builder.add_visual_from_file(path, pose=pose)
        builder.initial_pose = sapien.Pose(STAGE_POSITION)

    def add_model(self, builder, model: Model) -> None:
        """Collision pieces and visual of one object or receptacle. Friction 1.0/1.0 (stock SIMPLER: 0.5)."""
        kind = "carrot" if model in self.objects else "plate"
        folder = self.layout.carrot / f"more_{kind}" / model.key
        builder.add_multiple_convex_collisions_from_file(
            checked(folder / "collision.obj"), material=PhysxMaterial(1.0, 1.0, 0.0), density=model.density
        )
        builder.add_visual_from_file(checked(self.layout.visual(folder, "textured.glb")))


def _photograph(path: Path) -> np.ndarray:
    """uint8 [480, 640, 3], read-only."""
    try:
        picture = _decode_picture(read_bytes(path))
    except ValueError as error:
        raise _bad(path, str(error)) from error
    picture = np.ascontiguousarray(picture)
    if picture.shape != (480, 640, 3):
        raise _bad(path, f"{picture.shape[1]} x {picture.shape[0]} instead of 640 x 480")
    picture.flags.writeable = False
    return picture
