"""A set in ManiSkill's trajectory format, written in LeRobot's."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from envs import episodes
from envs.demonstrations import Demos, EpisodeReader
from envs.lerobot import statistics
from envs.lerobot.layout import (
    ACTION_NAMES,
    CAMERA,
    COLUMNS,
    DATA_MIB,
    EPISODES,
    FILES_PER_CHUNK,
    INFO,
    OWN,
    STATE,
    STATISTICS,
    TASK_INDEX,
    TASKS,
    VERSION,
    VIDEO_MIB,
    place,
    whole_folder,
    write_json,
)
from envs.lerobot.videos import PIXEL_FORMATS, VideoFile, check_size
from envs.registration import CONTROL_FREQ
from schemas import UserError, parse_json
from schemas.demonstrations import ENV_STATES, PICTURES, RECORDED, TRAINED_ON
from schemas.lerobot import DATA_PATH, VIDEO_PATH

MANISKILL_FREQ = 20  # Hz, the control rate of ManiSkill's own tasks
ROBOT = "widowx"
COPIED = ("trajectory.json", "dataset_statistics.json", "recipe.json")  # into meta/solovla
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")  # int64, which every set has


def write_set(source: Path, target: Path, images: str = "video") -> dict:
    """Write a finished set in LeRobot's format, whole or not at all.

    Args:
        images: video (mp4 files, H.264), lossless (mp4 files, H.264 in RGB without loss) or png (PNG files in the
            rows).

    Returns the content of meta/info.json.

    Raises:
        UserError: the source is no finished set, the target exists, or the disk is full.
    """
    with whole_folder(target) as folder:
        demos = Demos(source)
        width, height = demos.recipe["image_size"]
        check_size(images, width, height)
        remedy = f"make {source} again"
        about = parse_json((source / "trajectory.json").read_bytes(), f"{source}/trajectory.json", remedy)
        default = CONTROL_FREQ if episodes.in_family(demos.recipe["env_id"] or "") else MANISKILL_FREQ
        writer = SetWriter(folder, demos.reader, images, about.get("fps", default))
        for entry in tqdm(demos.episodes, "episodes", leave=False, disable=None):
            arrays = demos.reader.read(f"traj_{entry.episode_id}", entry.elapsed_steps, TRAINED_ON | RECORDED)
            writer.add(f"traj_{entry.episode_id}", entry.elapsed_steps, entry.instruction, arrays[2])
        info = writer.finish()
        for name in COPIED:
            if (source / name).exists():
                shutil.copy(source / name, folder / OWN / name)
    return info


class SetWriter:
    """Adds episodes to the files of a set."""

    def __init__(self, folder: Path, reader: EpisodeReader, images: str, fps: float):
        self.folder, self.reader, self.images, self.fps = folder, reader, images, fps
        self.width, self.height = reader.image_size
        self.num_frames = 0
        self.tasks: dict[str, int] = {}  # instruction -> its number
        self.rows: list[dict] = []  # of meta/episodes
        self.gathered: dict[str, list[np.ndarray]] = {}  # feature -> the values of each episode
        self.levels = np.zeros((3, 256), np.int64)  # of all images
        self.features: dict[str, dict] = {}  # of meta/info.json, known after the first episode
        self._data: pq.ParquetWriter | None = None
        self._num_data, self._num_videos = 0, 0  # files that are complete
        self._video: VideoFile | None = None
        (folder / OWN).mkdir(parents=True)
        self._rest = h5py.File(folder / OWN / "rest.h5", "w")

    def add(self, name: str, steps: int, instruction: str, images: h5py.Dataset) -> None:
        """Add one episode of T steps: group `name` of the source, and its images [T + 1, H, W, 3]."""
        group = self.reader.file[name]
        values = self._values(group, steps, self.tasks.setdefault(instruction, len(self.tasks)))
        if not self.features:
            self.features = self._described(values)
        if values.keys() | {CAMERA} != self.features.keys():
            raise UserError(f"{self.reader.path} has other arrays in {name} than in its first episode: make it again")
        row = self._add_images(images, steps)
        counts, pictures = row.pop("levels"), row.pop("pictures")
        self._add_rows(values, pictures, row)
        self._add_rest(name, group)
        described = {key: statistics.of_numbers(each) for key, each in values.items()}
        described[CAMERA] = statistics.of_levels(counts, steps)
        for key, each in values.items():
            self.gathered.setdefault(key, []).append(each)
        self.levels += counts
        flat = {f"stats/{key}/{kind}": each for key, found in described.items() for kind, each in found.items()}
        self.rows.append({"episode_index": len(self.rows), "tasks": [instruction], "length": steps} | row | flat)
        self.num_frames += steps

    def _values(self, group: h5py.Group, steps: int, task: int) -> dict[str, np.ndarray]:
        """The columns of an episode without its images: feature -> [T] or [T, D]."""
        values = {key: group[column.dataset][:] for key, column in COLUMNS.items() if column.dataset in group}
        if "action" not in values:  # a set that was made elsewhere
            values["action"] = values["expert_actions"]
        if "next.terminated" in values and "next.truncated" in values:
            values["next.done"] = values["next.terminated"] | values["next.truncated"]
        state = joint_positions(group)
        if state is not None:
            values[STATE] = state[:steps]
        number = np.arange(steps)
        values["timestamp"] = (number / self.fps).astype(np.float32)
        indices = (number, np.full(steps, len(self.rows)), self.num_frames + number, np.full(steps, task))
        return values | dict(zip(INDEX_COLUMNS, indices))

    def _described(self, values: dict[str, np.ndarray]) -> dict[str, dict]:
        """The features of meta/info.json."""
        found = {}
        for key, each in values.items():
            width = each.shape[1] if each.ndim == 2 else 1
            names = ACTION_NAMES if key in ("action", "expert_actions") else None
            found[key] = {"dtype": str(each.dtype), "shape": [width], "names": names}
        camera = {"shape": [self.height, self.width, 3], "names": ["height", "width", "channels"]}
        if self.images == "png":
            return found | {CAMERA: {"dtype": "image"} | camera}
        facts = {
            "video.height": self.height,
            "video.width": self.width,
            "video.codec": "h264",
            "video.pix_fmt": PIXEL_FORMATS[self.images],
            "video.is_depth_map": False,
            "video.fps": self.fps,
            "video.channels": 3,
            "has_audio": False,
        }
        return found | {CAMERA: {"dtype": "video"} | camera | {"info": facts}}

    def _add_images(self, images: h5py.Dataset, steps: int) -> dict:
        """Write the images before each step. Returns the episode's columns about them, `levels` and `pictures`."""
        counts, pictures = np.zeros((3, 256), np.int64), []
        if self.images != "png" and self._video is None:
            path = self.folder / VIDEO_PATH.format(video_key=CAMERA, **place(self._num_videos))
            self._video = VideoFile(path, self.images, self.fps, self.width, self.height)
        first = self._video.num_frames if self._video else 0
        for step in range(steps):
            image = self.reader.array(images, step)
            counts += statistics.levels(image)
            if self._video:
                self._video.add(image)
            else:
                pictures.append({"bytes": as_png(image), "path": None})
        row = {"levels": counts, "pictures": pictures}
        if self._video:
            row |= {f"videos/{CAMERA}/{key}": number for key, number in place(self._num_videos).items()}
            row[f"videos/{CAMERA}/from_timestamp"] = first / self.fps
            row[f"videos/{CAMERA}/to_timestamp"] = (first + steps) / self.fps
            if self._video.is_full(VIDEO_MIB * 2**20):
                self._close_video()
        return row

    def _close_video(self) -> None:
        self._video.close()
        self._video = None
        self._num_videos += 1

    def _add_rows(self, values: dict[str, np.ndarray], pictures: list[dict], row: dict) -> None:
        """Write the episode's rows as one row group, and note in `row` where they are."""
        arrays = {key: as_arrow(each) for key, each in values.items()}
        if pictures:
            arrays[CAMERA] = pa.array(pictures, IMAGE_TYPE)
        table = pa.table(arrays)
        path = self.folder / DATA_PATH.format(**place(self._num_data))
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, table.schema)
        self._data.write_table(table)
        row |= {f"data/{key}": number for key, number in place(self._num_data).items()}
        row["dataset_from_index"], row["dataset_to_index"] = self.num_frames, self.num_frames + len(table)
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        if path.stat().st_size >= DATA_MIB * 2**20:
            self._close_data()

    def _close_data(self) -> None:
        self._data.close()
        self._data = None
        self._num_data += 1

    def _add_rest(self, name: str, group: h5py.Group) -> None:
        """Keep what the rows and images leave out: the last image, the states of the world, attributes."""
        rest = self._rest.create_group(name, track_order=True)
        rest.attrs.update(group.attrs)
        in_rows = {column.dataset for column in COLUMNS.values()}
        for path, dataset in self.reader.datasets(name):
            if path == PICTURES:
                rest.create_dataset(path, data=dataset[-1:], compression="gzip", compression_opts=1)
            elif path not in in_rows:
                group.copy(dataset, rest, path)

    def finish(self) -> dict:
        """Complete all files. Returns the content of meta/info.json."""
        if self._video:
            self._close_video()
        if self._data:
            self._close_data()
        self._rest.close()
        whole = {key: statistics.of_numbers(np.concatenate(parts)) for key, parts in self.gathered.items()}
        whole[CAMERA] = statistics.of_levels(self.levels, self.num_frames)
        write_json(self.folder / STATISTICS, whole)
        write_tasks(self.folder / TASKS, list(self.tasks))
        path = self.folder / EPISODES.format(**place(0))
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), path)
        info = {
            "codebase_version": VERSION,
            "robot_type": ROBOT,
            "total_episodes": len(self.rows),
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_MIB,
            "video_files_size_in_mb": VIDEO_MIB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA_PATH,
            "video_path": None if self.images == "png" else VIDEO_PATH,
            "features": self.features,
        }
        write_json(self.folder / INFO, info)
        return info


def joint_positions(group: h5py.Group) -> np.ndarray | None:
    """The robot's joint positions, float32 [T + 1, J], where the set has them.

    They are obs/agent/qpos, or part of the state of the only articulation: pose (7), velocities (6), positions (J),
    their velocities (J).
    """
    if "obs/agent/qpos" in group:
        return group["obs/agent/qpos"][:].astype(np.float32)
    articulations = group.get(f"{ENV_STATES}/articulations", {})
    if len(articulations) != 1:
        return None
    (state,) = (each[:] for each in articulations.values())
    num_joints = (state.shape[1] - 13) // 2
    return state[:, 13 : 13 + num_joints].astype(np.float32)


def as_png(image: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def as_arrow(values: np.ndarray) -> pa.Array:
    """A column of numbers [T], or of lists of D numbers [T, D]."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def write_tasks(path: Path, instructions: list[str]) -> None:
    """Write meta/tasks.parquet: task_index, with the instructions as the index that pandas reads."""
    numbers = list(range(len(instructions)))
    texts = {"name": None, "field_name": TASK_INDEX, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    layout = {
        "index_columns": [TASK_INDEX],
        "column_indexes": [],
        "columns": [column | {"metadata": None}, texts],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(numbers, pa.int64()), TASK_INDEX: pa.array(instructions, pa.string())})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(layout)}), path)
