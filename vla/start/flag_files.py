"""Flags in files: yaml presets, and the args.json of a resumed run. Types are strict, and errors name the file.

Values of a file never become words of a command line, so a file from a stranger cannot add a flag. Relative paths in a
file do not depend on the working directory. Those of a preset start at the repository, and those of a run at the
repository or at a folder above the run.
"""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from schemas import UserError, check, read_json, require_file
from schemas.flags import hulls_before
from vla import ROOT
from vla.models.tiny import TINY_PRESETS

# flags of files and folders that exist
INPUTS = ("model_path", "lora_path", "asset_dir", "demos", "deepspeed_config", "checkpoint", "compare", "resume")
OUTPUTS = ("run_dir", "export_dir", "output")  # flags of folders that a script makes
COMMAND_LINE_ONLY = ("config", "resume", "local_rank")
MAX_YAML_BYTES = 2**20
# the kinds of yaml values that a flag can have. None stands for all others, which are errors
PLAIN_TAGS = (None, *(f"tag:yaml.org,2002:{kind}" for kind in "null bool int float str seq map".split()))


@dataclasses.dataclass(frozen=True)
class Layer:
    """Flags of one file.

    Args:
        source: the file, as sentences name it.
        values: {flag: value}, not checked yet.
        folders: the folders where relative paths may start, in this order.
    """

    source: str
    values: dict[str, Any]
    folders: tuple[Path, ...]


# ---------------------------------------------------------------------- reading
class StrictLoader(yaml.SafeLoader):
    """Plain yaml: text, numbers, lists and keys. A key may occur once, and numbers are read as people mean them.

    YAML 1.1 reads 3e-5 as text, 010 as 8 and 1:40 as 100. Here the first is a number (as in YAML 1.2) and the other two
    are text, which no numeric flag takes. Aliases of lists are refused: a list that contains itself, or another one ten
    times, would have no end.
    """

    yaml_implicit_resolvers: typing.ClassVar = {}  # filled below
    yaml_constructors: typing.ClassVar = {
        tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in PLAIN_TAGS
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        mark = self.peek_event().start_mark if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if mark is not None and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, "an alias of a list is refused: write the list", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            known = key.replace("-", "_") if isinstance(key, str) else key
            if known in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(known)
        return super().construct_mapping(node, deep)


NUMBER = r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for tag, pattern, first in (
    ("bool", "true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "tTfFyYnNoO"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", rf"(?![-+]?0[0-9])(?:{NUMBER})", "-+.0123456789"),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def read_yaml(path: Path) -> dict:
    """Read a yaml file of `key: value` lines.

    Raises:
        UserError: the file is missing, is not UTF-8, is not yaml, has a key twice, or holds no keys with values.
    """
    require_file(path, "give the path of a yaml file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, but at most {MAX_YAML_BYTES} are read: give a yaml file of flags"
        )
    try:
        content = yaml.load(path.read_bytes().decode("utf-8"), StrictLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid yaml: {why(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `flag: value` lines, but {'is empty' if content is None else 'does not'}")
    return content


def why(error: Exception) -> str:
    """The finding of the yaml parser on one line, with its place."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split()) or "it is nested too deeply"
    tabs = " (yaml indents with spaces, not with tabs)" if "'\\t'" in problem else ""
    return f"line {mark.line + 1}: {problem}{tabs}"


def yaml_layer(name: str) -> Layer:
    """The flags in a file that --config names, relative to the working directory or else to the repository."""
    if not name.strip():
        raise UserError("--config is empty: give a yaml file, or leave the flag out")
    path = next((found for found in (Path(in_home(name)), ROOT / name) if found.exists()), None)
    if path is None:
        known = ", ".join(str(found.relative_to(ROOT)) for found in sorted((ROOT / "yaml").glob("*.yaml")))
        raise UserError(f"--config {name} does not exist: give another file, such as {known}")
    return Layer(name, read_yaml(path), (ROOT,))


def preset_values(names: Iterable[str]) -> dict[str, Any]:
    """{flag: value} of the files that --config names, with resolved paths. The later file wins."""
    values: dict[str, Any] = {}
    for name in names:
        layer = yaml_layer(name)
        flags = {str(key).replace("-", "_"): value for key, value in layer.values.items()}
        values |= {key: resolved(key, value, layer.folders) for key, value in flags.items()}
    return values


def saved_layer(run_dir: Path) -> Layer:
    """The flags of a run, without those that name a run."""
    path = run_dir / "args.json"
    if not path.is_file():
        raise UserError(f"--resume {run_dir} is not a run folder, since it has no args.json: give another one")
    saved = read_json(path, dict[str, Any], "copy the run folder again, or start a new run")
    saved |= hulls_before(saved)
    values = {name: value for name, value in saved.items() if name not in (*COMMAND_LINE_ONLY, "run_dir")}
    return Layer(str(path), values, (ROOT, *run_dir.resolve().parents))


# ---------------------------------------------------------------------- checking
def checked_values(layer: Layer, args_class: type, imported_env: str | None) -> dict[str, Any]:
    """{flag: value} of a layer, with the types of args_class and resolved paths.

    Args:
        imported_env: the env id on the command line. No other env id may import code.

    Raises:
        UserError: a key is unknown, a value does not fit its flag, or an env id would import code.
    """
    types = typing.get_type_hints(args_class, include_extras=True)
    values = {}
    for key, value in layer.values.items():
        name = str(key).replace("-", "_")
        check_name(str(key), name, types, layer.source)
        if name == "placement" and isinstance(value, dict):  # {env: 0-3, ...}, and yaml reads a single number as one
            value = [f"{role}={ranks}" for role, ranks in value.items()]
        value = check(types[name], value, layer.source, key=name)
        if name == "env_id" and ":" in value and value != imported_env:
            raise UserError(
                f"{layer.source} names env_id {value!r}, which imports code: give --env_id {value} yourself to allow it"
            )
        values[name] = resolved(name, value, layer.folders)
    return values


def check_name(key: str, name: str, known: Iterable[str], source: str) -> None:
    """Raise UserError for a key that is not a flag, or that only the command line may give."""
    if name in COMMAND_LINE_ONLY:
        raise UserError(f"{source}: {key!r} belongs on the command line, not in a file")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see --help for all flags"
        if other := script_that_knows(name):
            hint = f"it is a flag of {other}, so run that script or another preset"
        raise UserError(f"{source}: unknown key {key!r}, {hint}")


def script_that_knows(name: str) -> str | None:
    """The script that has this flag, found in the sources, since importing all scripts would take seconds."""
    for script in sorted(ROOT.glob("train_*.py")):
        if f"\n    {name}: " in script.read_text():
            return script.name
    return None


# ---------------------------------------------------------------------- paths
def in_home(path: str) -> str:
    """~/runs as /home/you/runs, which a shell does not expand in --run_dir=~/runs, in quotes and in files.

    Raises:
        UserError: there is no such home. A folder named ~ would be made, and `rm -r ~` would remove your home.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path} starts with a home folder that this machine does not know: write the whole path")
    return expanded


def resolved(name: str, value: Any, folders: Iterable[Path]) -> Any:
    """The value of a flag, with a relative path joined to the first of the folders in which it exists.

    The path stays relative if the working directory is the repository, so saved relative paths always start there.
    Names of tiny presets are not paths. A path that does not exist stays as it is.
    """
    if name in INPUTS and isinstance(value, tuple):
        return tuple(resolved(name, one, folders) for one in value)
    if name not in (*INPUTS, *OUTPUTS) or not isinstance(value, str) or value in TINY_PRESETS:
        return value
    value = in_home(value)
    for folder in folders if not Path(value).is_absolute() else ():
        if name in OUTPUTS or (folder / value).exists():
            return value if folder.resolve() == ROOT == Path.cwd() else str(folder.resolve() / value)
    return value
