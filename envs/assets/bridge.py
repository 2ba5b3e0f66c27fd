"""The asset pack `bridge`: the published meshes and photographs of RL4VLA (arXiv 2505.19789), read from files.

    carrot/more_carrot  more_plate  more_table     Hugging Face data set RLinf/maniskill_assets
    robots/widowx                                  ManiSkill's asset widowx250s
    tasks/bridge_v2_real2sim_dataset/stages        ManiSkill's asset bridge_v2_real2sim

Each of these three is searched in `asset_dir`, in `asset_dir/data`, and in ManiSkill's own folder (`$MS_ASSET_DIR`, or
`~/.maniskill`, and its `data`). download.py fetches an `asset_dir` on the Hub. Nothing asks a question. An error names
missing files and the commands that fetch them.

Every file is checked before SAPIEN gets it, because SAPIEN's loaders print a message and continue, or end the process.
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
from envs.assets.download import assets_at, command_for, search_folders
from schemas import UserError, check, parse_json
from schemas.assets import Accessor, BodyEntry, Gltf, TableEntry, View

REMEDY = "fetch what is missing with `python doctor.py --download`"
STAGE = "stages/bridge_table_1_v1.glb"
STAGE_POSITION = (2.0634, 2.8313, 0.0)
STAGE_QUATERNION = (0.707, 0.707, 0, 0)  # wxyz, as published: not quite a unit quaternion
VISUALS = ("textured.obj", "textured.dae", "textured.glb")  # in the published order of preference
MAX_PIXELS = 8192 * 8192  # of an image. The published ones have 640 x 480, textures of meshes 4096 x 4096
MAX_NAMED = 3  # missing files that an error names
ARM_SHINE = dict(specular=0.9, roughness=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# places of files
# ---------------------------------------------------------------------------------------------------------------------


def find_part(part: str, folders: list[Path]) -> Path:
    """The place of `part` in the first folder that has it, or in the first folder of all."""
    for folder in folders:
        if (folder / part).is_dir():
            return folder / part
    return folders[0] / part


class Layout:
    """The paths of all files of the pack, whether they exist or not."""

    def __init__(self, asset_dir: str | None):
        """Raises ValueError where asset_dir is not a folder, and cannot be fetched from the Hub."""
        asset_dir = asset_dir and assets_at(asset_dir)
        if asset_dir is not None and not Path(asset_dir).expanduser().is_dir():
            raise ValueError(
                f"asset_dir {asset_dir!r} is not a folder: give the one that holds carrot/ and robots/, or "
                "RLinf/maniskill_assets, a data set on the Hub, which is fetched."
            )
        folders = search_folders(asset_dir)
        self.carrot = find_part("carrot", folders)
        self.robot = find_part("robots/widowx", folders)
        self.stage = find_part("tasks/bridge_v2_real2sim_dataset", folders) / STAGE
        self.databases = {kind: self.carrot / f"more_{kind}" / "model_db.json" for kind in ("carrot", "plate", "table")}

    def visual(self, folder: Path, default: str) -> Path:
        """The file with the look of a model, or `folder / default` if there is none."""
        for name in VISUALS:
            if (folder / name).is_file():
                return folder / name
        return folder / default

    def missing(self) -> list[str]:
        """The path of every file that does not exist."""
        needed = [*self.databases.values(), self.stage, *self._robot_files()]
        for kind, models in (("carrot", OBJECTS), ("plate", RECEPTACLES)):
            for i, model in enumerate(models):
                needed += self._model_files(kind, model, "textured.glb" if i else "textured.dae")
        for table in TABLES:
            needed.append(self.carrot / "more_table/imgs" / table.key)
            needed.append(self.carrot / "more_table/textures" / table.texture)
        return [str(path) for path in needed if not path.is_file()]

    def commands(self, missing: list[str]) -> list[str]:
        """The commands of others that fetch the parts to which these files belong."""
        parts = {"carrot": self.carrot, "robots/widowx": self.robot}
        parts["tasks/bridge_v2_real2sim_dataset"] = self.stage.parents[1]
        return [
            command_for(part, place.parent)
            for part, place in parts.items()
            if any(Path(path).is_relative_to(place) for path in missing)
        ]

    def _model_files(self, kind: str, model: Model, default_visual: str) -> list[Path]:
        folder = self.carrot / f"more_{kind}" / model.key
        visual = self.visual(folder, default_visual)
        return [folder / "collision.obj", visual, *_dae_images(visual)]

    def _robot_files(self) -> list[Path]:
        """The URDF and the files that it names."""
        urdf = self.robot / "wx250s.urdf"
        files = [urdf, self.robot / "wx250s.srdf", self.robot / "interbotix_black.png"]
        if urdf.is_file():
            text = re.sub(r"<!--.*?-->", "", read_text(urdf), flags=re.DOTALL)
            names = sorted(set(re.findall(r'<mesh\s+filename="([^"]+)"', text)))
            files += [named_by(urdf, name, self.robot) for name in names]
        return files


def _dae_images(path: Path) -> list[Path]:
    """The images that a .dae file names."""
    if path.suffix != ".dae" or not path.is_file():
        return []
    names = re.findall(r"<init_from>([^<]+\.\w+)</init_from>", read_text(path))
    return [named_by(path, name, path.parent) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# checks of files
# ---------------------------------------------------------------------------------------------------------------------


def _damaged(path: Path, reason: str) -> RuntimeError:
    return RuntimeError(f"asset {path} is damaged ({reason}): delete it and {REMEDY}.")


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises RuntimeError where this user may not read it."""
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise RuntimeError(f"asset {path} may not be read by this user: change its permissions.") from error


def read_text(path: Path) -> str:
    """The file's text. Raises RuntimeError where it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, "not a text") from error


def parsed(path: Path, content: bytes, schema: Any) -> Any:
    """JSON of an asset as an object of the schema. Raises RuntimeError where it does not fit."""
    source, remedy = f"asset {path} is damaged: it", f"delete it and {REMEDY}"
    try:
        return check(schema, parse_json(content, source, remedy), source, remedy)
    except UserError as error:
        raise RuntimeError(f"{error}.") from error


def read_database(path: Path, entry: type, keys: list[str]) -> dict:
    """A model_db.json. Raises RuntimeError unless it has the published entries in the published order."""
    database = parsed(path, read_bytes(path), dict[str, entry])
    if list(database) != keys:
        raise _damaged(path, f"not the {len(keys)} published entries")
    return database


def named_by(path: Path, name: str, root: Path) -> Path:
    """The path of a file that another file names. Raises RuntimeError unless it is below `root`.

    So an asset cannot make the simulator read other files of its user.
    """
    place = Path(os.path.normpath(path.parent / name))
    if not place.is_relative_to(os.path.normpath(root)) or not name.isprintable() or ":" in name or "\\" in name:
        raise _damaged(path, f"it names {name!r}, which is not in its folder")
    return place


@functools.cache
def checked(path: Path) -> str:
    """The path as text, after a check of the file. Raises RuntimeError where it is damaged."""
    checks = {
        ".obj": _check_obj,
        ".stl": _check_stl,
        ".glb": _check_glb,
        ".dae": _check_dae,
        ".urdf": _xml,
        ".png": _check_image,
        ".jpg": _check_image,
    }
    try:
        if path.suffix not in checks:
            raise ValueError("a file of an unknown kind")
        checks[path.suffix](path)
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    return str(path)


# The checks below raise ValueError, KeyError, IndexError, TypeError or struct.error for a damaged file.


def _check_obj(path: Path) -> None:
    lines = read_text(path).splitlines()
    vertices, corners = [], []
    for line in lines:
        if line.startswith("v "):
            vertices.append(line.split()[1:4])
        elif line.startswith("f "):
            corners += [corner.split("/")[0] for corner in line.split()[1:]]
    points = np.array(vertices, dtype=np.float64).reshape(-1, 3)
    index = np.array(corners, dtype=np.int64)
    if len(points) < 4 or not len(index) or not np.isfinite(points).all():
        raise ValueError("not a solid")
    if np.abs(index).max() > len(points) or not index.all():
        raise ValueError("a face names a vertex that does not exist")
    for line in lines:
        if line.startswith("mtllib "):
            _check_material(named_by(path, line.split(maxsplit=1)[1].strip(), path.parent))


def _check_material(path: Path) -> None:
    """Check the names of images in the materials of an .obj. Meshes of one robot share an image one folder up."""
    if not path.exists():  # many published models lack their materials, and are grey
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
        raise ValueError("a corner that is not finite")


def _xml(path: Path) -> ElementTree.Element:
    """The root of an XML file."""
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # which could name other files, or grow without end
        raise ValueError("XML with a document type")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML: {error}") from error


def _check_dae(path: Path) -> None:
    root = _xml(path)
    arrays = [element for element in root.iter() if element.tag.endswith("float_array")]
    if not arrays:
        raise ValueError("no geometry")
    for array in arrays:
        values = np.array((array.text or "").split(), dtype=np.float64)
        if str(len(values)) != array.get("count") or not np.isfinite(values).all():
            raise ValueError(f"array {array.get('id')} is not {array.get('count')} numbers")
    for image in _dae_images(path):
        checked(image)


def _check_glb(path: Path) -> None:
    """Check header and chunks, and that every accessor and image is inside its buffer (glTF 2.0)."""
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
        _decode_image(binary[view.byteOffset : view.byteOffset + view.byteLength])


def _check_accessor(accessor: Accessor, views: list[View], binary: bytes) -> None:
    component_types = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
    component = np.dtype(component_types[accessor.componentType])
    num_components = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}[accessor.type]
    element_size = num_components * component.itemsize
    view = views[accessor.bufferView]
    stride = view.byteStride or element_size
    end = accessor.byteOffset + stride * (accessor.count - 1) + element_size
    if end > view.byteLength:
        raise ValueError("an accessor beyond its buffer view")
    if component.kind == "f" and stride == element_size:
        first = view.byteOffset + accessor.byteOffset
        values = np.frombuffer(binary, component, accessor.count * num_components, first)
        if not np.isfinite(values).all():
            raise ValueError("a coordinate that is not finite")


def _check_image(path: Path) -> None:
    _decode_image(read_bytes(path))


def _decode_image(data: bytes) -> np.ndarray:
    """The pixels of a PNG or JPEG, uint8 [H, W, 3]."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))  # PIL starts other programs for some formats
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's errors for a broken image
        raise ValueError(f"not an image: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# the pack
# ---------------------------------------------------------------------------------------------------------------------


class BridgeAssets:
    """The pack `bridge`, with the interface of `envs.assets.AssetPack`."""

    name = "bridge"
    casts_shadows = False
    arm_shine = ARM_SHINE

    def __init__(self, asset_dir: str | None):
        """Read the databases.

        Raises:
            ValueError: asset_dir is not a folder.
            RuntimeError: files are missing, unreadable or damaged.
        """
        try:
            self.layout = Layout(asset_dir)
            missing = self.layout.missing()
        except PermissionError as error:
            raise RuntimeError(
                f"asset folder {error.filename} may not be read by this user: change its permissions."
            ) from error
        if missing:
            named = ", ".join(missing[:MAX_NAMED])
            if len(missing) > MAX_NAMED:
                named += f" and {len(missing) - MAX_NAMED} more"
            files = "1 file" if len(missing) == 1 else f"{len(missing)} files"
            others = " and ".join(f"`{command}`" for command in self.layout.commands(missing))
            raise RuntimeError(f"asset pack 'bridge' lacks {files} ({named}): {REMEDY}, or with {others}.")
        self.objects = self._models("carrot", OBJECTS)
        self.receptacles = self._models("plate", RECEPTACLES)
        self.tables = self._tables()

    def _models(self, kind: str, known: tuple[Model, ...]) -> tuple[Model, ...]:
        """The models of a database. Their grasps are those of the `known` ones."""
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
        """Path of the arm's URDF, after a check of all its files."""
        for path in self.layout._robot_files():
            if path.suffix in (".urdf", ".obj", ".stl", ".png"):
                checked(path)
        return str(self.layout.robot / "wx250s.urdf")

    def table_image(self, index: int, width: int, height: int) -> np.ndarray:
        """Photograph of a table, uint8 [height, width, 3], read-only."""
        path = self.layout.carrot / "more_table/imgs" / self.tables[index].key
        return resized(_photograph, path, width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """The texture of a table, uint8 [height, width, 3], read-only."""
        path = self.layout.carrot / "more_table/textures" / self.tables[index].texture
        return resized(_photograph, path, width, height)

    def add_stage(self, builder: sapien.ActorBuilder) -> None:
        """Add the table. The photograph takes its place in the image, but it hides what is behind it."""
        path = checked(self.layout.stage)
        pose = sapien.Pose(q=STAGE_QUATERNION)
        builder.add_nonconvex_collision_from_file(path, pose=pose)
        builder.add_visual_from_file(path, pose=pose)
        builder.initial_pose = sapien.Pose(STAGE_POSITION)

    def add_model(self, builder: sapien.ActorBuilder, model: Model) -> None:
        """Add an object or receptacle. Friction is 1.0 as in RL4VLA (stock SIMPLER has 0.5)."""
        kind = "carrot" if model in self.objects else "plate"
        folder = self.layout.carrot / f"more_{kind}" / model.key
        builder.add_multiple_convex_collisions_from_file(
            checked(folder / "collision.obj"), material=PhysxMaterial(1.0, 1.0, 0.0), density=model.density
        )
        builder.add_visual_from_file(checked(self.layout.visual(folder, "textured.glb")))


def _photograph(path: Path) -> np.ndarray:
    """A published photograph or texture, uint8 [480, 640, 3], read-only."""
    try:
        image = np.ascontiguousarray(_decode_image(read_bytes(path)))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if image.shape != (480, 640, 3):
        raise _damaged(path, f"{image.shape[1]} x {image.shape[0]} instead of 640 x 480")
    image.flags.writeable = False
    return image
