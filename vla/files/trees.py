"""Saves Python values in files that cannot run code: tensors as safetensors, everything around them as JSON.

A file that torch.save wrote with `pickle` can run code when it is read, so no file of a run folder is read that way. A
value consists of dicts, lists, tuples, numbers, texts, None, tensors and numpy arrays. It is restored bit for bit.

    [{"episode_id": 7, "actions": array}]  ->  tensor "0", metadata {"tree": '[{"dict": [["episode_id", 7], ...'}
"""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from schemas import UserError, require_file
from vla.files.tensors import save_tensors
from vla.text import error_text

REMEDY = "delete its checkpoint to fall back to the one before"
BLOCK = 4 * 2**20  # bytes that a checksum reads at once
# the parts of a numpy array in files that torch.save wrote before format 3: data, no code from the file
ARRAY_PARTS = [
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    np.ndarray,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    np.dtypes.BoolDType,
    bytes,
]


def save_tree(tree: Any, path: Path) -> None:
    """Write a value. Raises TypeError if it contains an object of another kind."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encoded(tree, tensors))
    save_tensors(tensors or {"empty": torch.zeros(0)}, path, metadata={"tree": text})


def encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON. Its tensors and arrays are added to `tensors`, under the names that the JSON uses for them."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # a NamedTuple keeps its names
        value = value._asdict()
    if isinstance(value, dict):
        return {"dict": [[encoded(key, tensors), encoded(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [encoded(entry, tensors) for entry in value]}
    if isinstance(value, list):
        return [encoded(entry, tensors) for entry in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        name = str(len(tensors))
        tensors[name] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        return {kind: name}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved")


def load_tree(path: Path) -> Any:
    """Read a value that save_tree() wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    require_file(path, REMEDY)
    try:
        with safe_open(path, framework="pt") as file:
            return decoded(json.loads((file.metadata() or {})["tree"]), file)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error_text(error)}): {REMEDY}") from error


def decoded(value: Any, file: safe_open) -> Any:
    """The inverse of encoded()."""
    if isinstance(value, list):
        return [decoded(entry, file) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decoded(key, file): decoded(entry, file) for key, entry in content}
    if kind == "tuple":
        return tuple(decoded(entry, file) for entry in content)
    if kind not in ("tensor", "array"):
        raise ValueError(f"{kind!r} is unknown")
    tensor = file.get_tensor(content)
    return tensor if kind == "tensor" else tensor.numpy()


def load_old_tree(path: Path) -> Any:
    """Read such a value from a file of torch.save, without running code from it.

    Raises:
        UserError: the file is missing or damaged, or it holds more than data.
    """
    require_file(path, REMEDY)
    try:
        with torch.serialization.safe_globals(ARRAY_PARTS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, because the file can have any content
        raise UserError(f"{path} is damaged, or holds more than data: {REMEDY}") from error


def checksum(path: Path) -> int:
    """CRC-32 of a file's content. It detects a flipped bit, and reads 2 to 3 GB/s on one core."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


@contextlib.contextmanager
def sentences(what: str, remedy: str = REMEDY):
    """Turn the errors of reading a damaged file into one sentence that names the file."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{what} is damaged ({error_text(error)}): {remedy}") from error
