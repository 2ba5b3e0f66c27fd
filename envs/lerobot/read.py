"""A set in LeRobot's format, written in ManiSkill's trajectory format, which training reads.

Sets that SoloVLA wrote come back with everything. Of others, `action` is the label: 7 dimensions, which are the
translation in metres, the rotation as Euler angles in radians, and the gripper.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from envs.demonstrations import EpisodeReader, action_statistics
from envs.lerobot.layout import (
    CAMERA_FLAG,
    COLUMNS,
    EPISODES,
    INFO,
    OWN,
    TASK_INDEX,
    TASKS,
    place,
    whole_folder,
    write_json,
)
from envs.lerobot.videos import read_video
from envs.lerobot.write import COPIED
from envs.registration import CONTROL_MODE
from envs.vector import ACTION_LIMITS
from schemas import UserError, check, read_json, require_file
from schemas.demonstrations import MAX_STEPS, PICTURES, Instruction, Recipe
from schemas.flags import EpisodeSteps, Pixels
from schemas.lerobot import DATA_PATH, VIDEO_PATH, Info, Original

ROWS_AT_ONCE = 16  # rows with images in memory
NEEDED = "SoloVLA needs 7: translation in metres (3), Euler angles in radians (3), gripper (1)"


class Episode(NamedTuple):
    """One episode: its length, and the files that hold its rows and images."""

    steps: int
    data: tuple[int, int]  # chunk and file
    video: tuple[int, int] | None
    start: int  # its first frame in the video


def read_set(source: Path, target: Path, camera: str | None = None, gripper_closes: bool = False) -> int:
    """Write a LeRobot set in ManiSkill's trajectory format, whole or not at all. Returns the number of episodes.

    Args:
        camera: the feature that holds the images. None takes the only one.
        gripper_closes: a high value of the gripper closes it, in a set that was made elsewhere.

    Raises:
        UserError: it names what is missing, damaged or not as SoloVLA needs it, or the target exists.
    """
    found = LeRobotSet(source, camera)
    original = OriginalFiles(found) if (source / OWN).is_dir() else None
    columns = found.columns(gripper_closes)
    names = original.names if original else [f"traj_{number}" for number in range(len(found.episodes))]
    with whole_folder(target) as folder:
        with h5py.File(folder / "trajectory.h5", "w") as file:
            groups = [file.create_group(name, track_order=True) for name in names]
            ends = np.cumsum([episode.steps for episode in found.episodes])
            for group, end, episode in zip(groups, ends, found.episodes):
                for dataset, values in columns.items():
                    group[dataset] = values[end - episode.steps : end]
            write_images(found, groups)
            for group in groups if original else ():
                original.restore(group)
        if original:
            original.copy_files(folder)
        else:
            describe(found, columns, folder)
    return len(found.episodes)


def write_images(found: LeRobotSet, groups: list[h5py.Group]) -> None:
    """Write the images of each episode, uint8 [T + 1, H, W, 3]. The last one is there twice."""
    shape = (found.height, found.width, 3)
    datasets = [
        # one image per HDF5 chunk, because training reads images in any order
        group.create_dataset(
            PICTURES, (episode.steps + 1, *shape), np.uint8, chunks=(1, *shape), compression="gzip", compression_opts=1
        )
        for group, episode in zip(groups, found.episodes)
    ]
    total = found.info.total_frames
    for number, step, image in tqdm(found.images(), "images", total, leave=False, disable=None):
        datasets[number][step] = image
        if step == found.episodes[number].steps - 1:
            datasets[number][step + 1] = image


def describe(found: LeRobotSet, columns: dict[str, np.ndarray], folder: Path) -> None:
    """Write trajectory.json and dataset_statistics.json of a set that was made elsewhere."""
    entries = [
        {
            "episode_id": number,
            "control_mode": CONTROL_MODE,
            "elapsed_steps": episode.steps,
            "instruction": found.instructions[number],
        }
        for number, episode in enumerate(found.episodes)
    ]
    unknown = dict.fromkeys(("env_id", "obj_set", "asset_pack", "protocol", "sim_freq", "max_episode_steps"))
    content = {
        "episodes": entries,
        "source_type": "lerobot",
        "fps": found.info.fps,
        "recipe": unknown | {"image_size": [found.width, found.height]},
    }
    kept = columns["expert_actions"][columns["keep"]]
    statistics = action_statistics([kept]) | {"num_trajectories": len(entries)}
    write_json(folder / "trajectory.json", content)
    write_json(folder / "dataset_statistics.json", {found.name: statistics})


class OriginalFiles:
    """meta/solovla: what SoloVLA wrote beside LeRobot's own files."""

    def __init__(self, found: LeRobotSet):
        """Raises UserError where they do not belong to the rows around them."""
        self.folder = found.folder / OWN
        remedy = f"remove {self.folder} to read the set like any other, or write it again"
        content = read_json(self.folder / "trajectory.json", Original, remedy)
        if [entry.elapsed_steps for entry in content.episodes] != [episode.steps for episode in found.episodes]:
            raise UserError(f"{self.folder} is of other episodes, since the set was edited: {remedy}")
        recipe = check(Recipe, content.recipe, f"{self.folder}/trajectory.json recipe", remedy)
        if recipe.image_size != (found.width, found.height):
            raise UserError(f"{self.folder} is of images of another size, since the set was edited: {remedy}")
        self.names = [f"traj_{entry.episode_id}" for entry in content.episodes]
        self._reader = EpisodeReader(self.folder / "rest.h5", recipe.image_size, remedy)
        missing = sorted(set(self.names) - set(self._reader.file))
        if missing or len(set(self.names)) < len(self.names):
            raise UserError(
                f"{self.folder} lacks an episode ({', '.join(missing[:1]) or 'one is there twice'}): {remedy}"
            )

    def restore(self, group: h5py.Group) -> None:
        """Add to an episode what the rows leave out. Raises UserError where rest.h5 is damaged."""
        name = group.name.strip("/")
        try:
            group.attrs.update(self._reader.file[name].attrs)
            for path, dataset in self._reader.datasets(name):
                if path == PICTURES:
                    group[PICTURES][-1:] = dataset[...]
                elif path not in group:
                    self._reader.file.copy(dataset, group, path)
        except UserError:
            raise
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self._reader.path} is damaged at {name} ({error}): {self._reader.remedy}") from error

    def copy_files(self, folder: Path) -> None:
        for name in COPIED:
            if (self.folder / name).exists():
                require_file(self.folder / name, f"remove {self.folder / name}")
                shutil.copy(self.folder / name, folder / name)


class LeRobotSet:
    """A checked set.

    Attributes:
        info: meta/info.json. camera: the feature of the images, width, height: their size in pixels.
        episodes: in order. instructions: one text per episode.
    """

    def __init__(self, folder: Path, camera: str | None):
        self.folder, self.name = folder, folder.resolve().name
        self.remedy = f"copy {folder} again"
        self.info = read_json(folder / INFO, Info, self.remedy)
        self.camera = self._choose_camera(camera)
        self._is_video = self.info.features[self.camera].dtype == "video"
        self.height, self.width = self._image_size()
        self.episodes = self._read_episodes()
        self._files = sorted({episode.data for episode in self.episodes})
        self._check_rows()
        self.instructions = self._read_instructions()

    def _wrong(self, what: str, remedy: str = "") -> UserError:
        return UserError(f"{self.folder} {what}: {remedy or self.remedy}")

    def _choose_camera(self, asked: str | None) -> str:
        cameras = [key for key, each in self.info.features.items() if each.dtype in ("video", "image")]
        listed = ", ".join(cameras)
        if not cameras:
            raise self._wrong("has no camera, that is no feature of type video or image", "choose a set with images")
        if asked is None and len(cameras) > 1:
            raise self._wrong(f"has {len(cameras)} cameras", f"name one of {listed} with {CAMERA_FLAG}")
        if asked is not None and asked not in cameras:
            raise self._wrong(f"has no camera {asked}", f"give {CAMERA_FLAG} one of {listed}")
        return asked or cameras[0]

    def _image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels. Some sets put the channels first."""
        shape = self.info.features[self.camera].shape
        if len(shape) == 3 and shape[2] != 3 and shape[0] == 3:
            shape = (*shape[1:], 3)
        if len(shape) != 3 or shape[2] != 3:
            raise self._wrong(f"has images of shape {list(shape)} in {self.camera}", "choose a camera with colours")
        source = f"{self.folder / INFO} features.{self.camera}"
        return check(Pixels, shape[0], source), check(Pixels, shape[1], source)

    # ---------------------------------------------------------------------- tables
    def _open(self, path: Path) -> pq.ParquetFile:
        require_file(path, self.remedy)
        try:
            return pq.ParquetFile(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} is cut short or no parquet file: {self.remedy}") from error

    def _read(self, path: Path, names: list[str]) -> pa.Table:
        """These columns of a file. Raises UserError where one is missing, has gaps or is damaged."""
        file = self._open(path)
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}: {self.remedy}")
        if file.metadata.num_rows > MAX_STEPS:
            raise UserError(f"{path} has {file.metadata.num_rows} rows, more than {MAX_STEPS}: {self.remedy}")
        try:
            table = file.read(columns=names)
            table.validate(full=True)  # texts are UTF-8, lists end inside the file
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): {self.remedy}") from error
        for name in names:
            if table[name].null_count:
                raise UserError(f"{path} has gaps in the column {name}: {self.remedy}")
        return table

    def _numbers(self, table: pa.Table, name: str, path: Path) -> np.ndarray:
        """A column of whole numbers, int64 [N]."""
        if not pa.types.is_integer(table[name].type):
            raise UserError(f"{path} has {table[name].type} in the column {name}, not whole numbers: {self.remedy}")
        return table[name].to_numpy().astype(np.int64)

    def _read_episodes(self) -> list[Episode]:
        paths = sorted((self.folder / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise self._wrong(f"has no {EPISODES.format(**place(0))}")
        found = [episode for path in paths for episode in self._episodes_of(path, paths[0])]
        total = sum(episode.steps for episode in found)
        if (len(found), total) != (self.info.total_episodes, self.info.total_frames):
            raise self._wrong(
                f"lists {len(found)} episodes with {total} frames, and {INFO} says {self.info.total_episodes} with "
                f"{self.info.total_frames}"
            )
        return found

    def _episodes_of(self, path: Path, first: Path) -> Iterator[Episode]:
        """The episodes that one file of meta/episodes lists."""
        video = f"videos/{self.camera}"
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if self._is_video:
            names += [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
        table = self._read(path, names)
        whole = {name: self._numbers(table, name, path).tolist() for name in names if not name.endswith("timestamp")}
        seconds = table[names[-1]].to_pylist() if self._is_video else [0.0] * len(table)
        for row in range(len(table)):
            source = f"{path} row {row}"
            steps = check(EpisodeSteps, whole["length"][row], f"{source} length", self.remedy)
            data = (whole["data/chunk_index"][row], whole["data/file_index"][row])
            files = (whole[f"{video}/chunk_index"][row], whole[f"{video}/file_index"][row]) if self._is_video else None
            if min(*data, *(files or data)) < 0 or not 0 <= seconds[row] < 1e9:
                raise UserError(f"{source} names a file or a time that cannot be: {self.remedy}")
            yield Episode(steps, data, files, round(seconds[row] * self.info.fps))

    def _data_path(self, files: tuple[int, int]) -> Path:
        return self.folder / DATA_PATH.format(chunk_index=files[0], file_index=files[1])

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows, in order."""
        return pa.chunked_array([chunk for files in self._files for chunk in self._chunks(files, name)])

    def _chunks(self, files: tuple[int, int], name: str) -> list[pa.Array]:
        return self._read(self._data_path(files), [name])[name].chunks

    def _check_rows(self) -> None:
        """Raise UserError unless the rows are those of the episodes, in their order."""
        listed = np.repeat(np.arange(len(self.episodes)), [episode.steps for episode in self.episodes])
        if [episode.data for episode in self.episodes] != sorted(episode.data for episode in self.episodes):
            raise self._wrong("has episodes that are not in the order of their files")
        rows = self._column("episode_index").to_numpy()
        if len(rows) != len(listed):
            raise self._wrong(f"has {len(rows)} rows in data/, and its episodes have {len(listed)}")
        if not np.array_equal(rows, listed):
            at = int(np.flatnonzero(rows != listed)[0])
            raise self._wrong(f"has a row of episode {rows[at]} in data/ where one of episode {listed[at]} belongs")

    def _read_instructions(self) -> list[str]:
        """The instruction of each episode, that is of its first row."""
        path = self.folder / TASKS
        names = self._open(path).schema_arrow.names
        text = next((name for name in (TASK_INDEX, "task") if name in names), TASK_INDEX)
        table = self._read(path, ["task_index", text])
        if not pa.types.is_string(table[text].type) and not pa.types.is_large_string(table[text].type):
            raise UserError(f"{path} has {table[text].type} in the column {text}, not texts: {self.remedy}")
        texts = dict(zip(self._numbers(table, "task_index", path).tolist(), table[text].to_pylist()))
        starts = np.cumsum([0] + [episode.steps for episode in self.episodes[:-1]])
        chosen = self._column("task_index").to_numpy()[starts].tolist()
        unknown = sorted(set(chosen) - texts.keys())
        if unknown:
            raise UserError(f"{path} has no task {unknown[0]}, but data/ names it: {self.remedy}")
        return [check(Instruction, texts[number], f"{path} task {number}", self.remedy) for number in chosen]

    def columns(self, gripper_closes: bool) -> dict[str, np.ndarray]:
        """The arrays of all rows by the names of HDF5: float32 [M, 7], or [M] for the others.

        Raises:
            UserError: there is no column of labels as training needs them.
        """
        own = "expert_actions" in self.info.features
        if not own and "action" not in self.info.features:
            raise self._wrong("has no feature action", NEEDED)
        found = {}
        for key, column in COLUMNS.items():
            if key in self.info.features and (own or key != "action"):
                found[column.dataset] = self._values(key, column.dtype, column.width)
        if not own:
            actions = self._values("action", "float32", 7)
            found["expert_actions"] = with_our_gripper(actions, gripper_closes)
        found.setdefault("keep", np.ones(self.info.total_frames, bool))
        labels = found["expert_actions"]
        if not found["keep"].any():
            raise self._wrong("keeps no step of any episode")
        if not (np.abs(labels) <= ACTION_LIMITS).all():  # false for NaN, too
            raise self._wrong("has actions out of range (1 m and pi/2 rad per step at most)", NEEDED)
        return found

    def _values(self, name: str, dtype: str, width: int) -> np.ndarray:
        column = self._column(name)
        is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        is_bool = pa.types.is_boolean(column.type.value_type if is_list else column.type)
        if is_bool != (dtype == "bool") or is_list != (width > 1):
            raise self._wrong(f"has {column.type} in the feature {name}, it must be {dtype} with {width} dimensions")
        if not is_list:
            return column.to_numpy().astype(dtype)
        sizes = pc.list_value_length(column).to_numpy()
        if len(sizes) and (sizes != width).any():
            raise self._wrong(f"has {sizes[sizes != width][0]} dimensions in the feature {name}", NEEDED)
        flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        return flat.astype(dtype).reshape(-1, width)

    # ---------------------------------------------------------------------- images
    def images(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """All images: episode, step and uint8 [H, W, 3]. Raises UserError where one is missing or damaged."""
        if self._is_video:
            for files in sorted({episode.video for episode in self.episodes}):
                yield from self._video_images(files)
        else:
            yield from self._row_images()

    def _video_images(self, files: tuple[int, int]) -> Iterator[tuple[int, int, np.ndarray]]:
        chosen = [number for number, episode in enumerate(self.episodes) if episode.video == files]
        waiting = iter(sorted((self.episodes[number].start, number) for number in chosen))
        path = self.folder / VIDEO_PATH.format(video_key=self.camera, chunk_index=files[0], file_index=files[1])
        start, number = next(waiting)
        for frame, image in enumerate(read_video(path, self.width, self.height, self.info.fps, self.remedy)):
            if frame < start:
                continue
            yield number, frame - start, image
            if frame - start == self.episodes[number].steps - 1:
                start, number = next(waiting, (None, None))
                if number is None:
                    return
                if start <= frame:
                    raise UserError(f"{path} holds two episodes at one time, of which one is {number}: {self.remedy}")
        raise UserError(f"{path} ends before episode {number} does: {self.remedy}")

    def _row_images(self) -> Iterator[tuple[int, int, np.ndarray]]:
        places = ((number, step) for number, episode in enumerate(self.episodes) for step in range(episode.steps))
        for files in self._files:
            path = self._data_path(files)
            file = self._open(path)
            column = file.schema_arrow.field(self.camera).type if self.camera in file.schema_arrow.names else None
            if column is None or not pa.types.is_struct(column) or column.get_field_index("bytes") < 0:
                raise UserError(f"{path} has no images in the column {self.camera}: {self.remedy}")
            try:
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=[self.camera]):
                    for cell in batch.column(0).to_pylist():
                        number, step = next(places)
                        yield number, step, self._decoded(cell, f"{path} episode {number} step {step}")
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): {self.remedy}") from error

    def _decoded(self, cell: dict | None, source: str) -> np.ndarray:
        """An image uint8 [H, W, 3] from a PNG or JPEG file."""
        try:
            with Image.open(io.BytesIO(cell["bytes"]), formats=("PNG", "JPEG")) as image:
                if image.size != (self.width, self.height):
                    raise UserError(f"{source} has an image of {image.size[0]} x {image.size[1]} pixels: {self.remedy}")
                return np.asarray(image.convert("RGB"))
        except (TypeError, OSError, SyntaxError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{source} has no readable image: {self.remedy}") from error


def with_our_gripper(actions: np.ndarray, closes: bool) -> np.ndarray:
    """Actions float32 [M, 7] whose gripper is 1 to open and 0 to close. A gripper that goes below 0 is of [-1, 1]."""
    gripper = np.clip(actions[:, 6:], -1.0, 1.0)
    opens = (gripper + 1) / 2 if (gripper < 0).any() else gripper
    return np.concatenate([actions[:, :6], 1 - opens if closes else opens], axis=1)
