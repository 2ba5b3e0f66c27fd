"""Schemas of files and flags. A value that does not fit raises an error of one sentence.

    schemas/flags.py           ranges of flags, as annotated types
    schemas/engines.py         DeepSpeed configs
    schemas/runs.py            run folders and checkpoints
    schemas/policies.py        model and adapter folders
    schemas/evaluations.py     what evaluate.py writes and reads again
    schemas/demonstrations.py  recorded demonstrations
    schemas/lerobot.py         data sets in LeRobot's format
    schemas/assets.py          published assets
    schemas/hub.py             models and data sets on the Hugging Face Hub, and the files that are fetched from it
    schemas/lock.py            one writer per folder
    schemas/pixels.py          the images that a policy reads

A schema is a pydantic model or an annotated type. `vla` and `envs` may import this package, which imports neither.

    state = read_json(folder / "state.json", State, remedy="copy the whole checkpoint again")
    check_flags(args)  # every field of a dataclass against its annotation

Both raise UserError. Its sentence names the file and key (or the flag), the value found and the value wanted.
"""

import dataclasses
import functools
import json
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

MAX_JSON_BYTES = 64 * 2**20  # a larger file is refused before it is read
MAX_SHOWN = 60  # characters of a value that a sentence quotes


class UserError(ValueError):
    """Wrong input. The text is one sentence that names the fault and the remedy."""


class CommonError(UserError):
    """Wrong input that every rank of this machine finds, so that one of them is enough to say it."""


class Schema(BaseModel):
    """Base of the models here. Other keys than those of the schema are kept and not checked."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


# ---------------------------------------------------------------------- checking
@functools.cache
def adapter_of(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def check(schema: Any, value: Any, source: str, remedy: str = "", key: str = "") -> Any:
    """Turn a value from JSON into an object of the schema.

    Args:
        source: what holds the value, such as a file's path. The sentence begins with it.
        remedy: what the reader can do. The sentence ends with it.
        key: place of the value in the source, if it is only a part of it.

    Raises:
        UserError: the value does not fit. Types are strict: "8" and true are not numbers.
    """
    try:
        return adapter_of(schema).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise UserError(file_sentence(error, source, remedy, key)) from None


def check_flags(flags: Any) -> None:
    """Check every field of a dataclass of flags against its annotation.

    Raises:
        UserError: a flag does not fit. The sentence names the first one, the value found and the value wanted.
    """
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    try:
        adapter_of(type(flags)).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, value = first["loc"][0], values[first["loc"][0]]
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        raise UserError(
            f"--{name} {shown if shown == shown.strip() != '' else repr(shown)} must be {wanted(first)}"
        ) from None


def file_sentence(error: ValidationError, source: str, remedy: str, key: str = "") -> str:
    """pydantic's first finding about a file, or about one key of the file, as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in ([key] if key else []) + list(first["loc"]))
    if first["type"] == "missing":
        said = f"{source} has no {key}"
    elif not key:
        said = f"{source} holds {quoted(first['input'])}, but it must be {wanted(first)}"
    else:
        said = f"{source} has {key} {quoted(first['input'])}, but it must be {wanted(first)}"
    return f"{said}: {remedy}" if remedy else said


def quoted(value: Any) -> str:
    """A value as JSON, shortened to MAX_SHOWN characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


WANTED: dict[str, Callable[[dict], str]] = {
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']:g}",
    "greater_than": lambda ctx: f"above {ctx['gt']:g}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:g}",
    "less_than": lambda ctx: f"below {ctx['lt']:g}",
    "literal_error": lambda ctx: ctx["expected"],
    "finite_number": lambda ctx: "a finite number",
    "int_type": lambda ctx: "a whole number",
    "int_parsing": lambda ctx: "a whole number",
    "int_from_float": lambda ctx: "a whole number",
    "float_type": lambda ctx: "a number",
    "float_parsing": lambda ctx: "a number",
    "bool_type": lambda ctx: "true or false",
    "bool_parsing": lambda ctx: "true or false",
    "string_type": lambda ctx: "text",
    "list_type": lambda ctx: "a list",
    "tuple_type": lambda ctx: "a list",
    "dict_type": lambda ctx: "an object with keys",
    "model_type": lambda ctx: "an object with keys",
    "model_attributes_type": lambda ctx: "an object with keys",
    "too_short": lambda ctx: f"at least {ctx['min_length']} long",
    "too_long": lambda ctx: f"at most {ctx['max_length']} long",
    "json_invalid": lambda ctx: "text without broken characters",
    "extra_forbidden": lambda ctx: "left out",
    "string_too_short": lambda ctx: "text that is not empty",
    "string_pattern_mismatch": lambda ctx: "text without null characters",
}


def wanted(finding: dict) -> str:
    """The value that a pydantic finding asks for, in words that follow "must be"."""
    context = finding.get("ctx", {})
    if finding["type"] == "value_error":  # raised by our own validator, in such words
        return str(context["error"])
    if finding["type"] in WANTED:
        return WANTED[finding["type"]](context)
    return finding["msg"].removeprefix("Input should be ").removeprefix("a valid ")


# ---------------------------------------------------------------------- reading
def is_taken(folder: Path, apart_from: Collection[str] = ()) -> bool:
    """Whether a folder is no place for something new: it is a file, or holds more than files of these names."""
    if not folder.exists():
        return False
    return not folder.is_dir() or any(path.name not in apart_from for path in folder.iterdir())


def require_file(path: Path, remedy: str) -> None:
    """Raise UserError unless this is a regular file. Reading a pipe would wait, and a folder cannot be read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file: {remedy}")


def read_json(path: Path, schema: Any, remedy: str) -> Any:
    """Read a JSON file as an object of the schema.

    Raises:
        UserError: the file is missing, is not JSON, has a key twice, or holds a value that does not fit the schema.
    """
    require_file(path, remedy)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {size} bytes, and at most {MAX_JSON_BYTES} are read: {remedy}")
    return check(schema, parse_json(path.read_bytes(), str(path), remedy), str(path), remedy)


def parse_json(content: bytes, source: str, remedy: str) -> Any:
    """JSON as Python objects. Raises UserError if it is not JSON, or if an object has a key twice."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twin = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{source} has the key {twin!r} twice: {remedy}")
        return found

    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=without_twins)
    except UnicodeDecodeError:
        raise UserError(f"{source} is not UTF-8 text: {remedy}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply: {remedy}") from None
    except UserError:
        raise
    except ValueError as error:  # json.JSONDecodeError, or a whole number of thousands of digits
        what = "is empty" if not content.strip() else f"is not valid JSON ({error})"
        raise UserError(f"{source} {what}: {remedy}") from None
