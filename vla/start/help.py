"""The text of --help, made from the source of a script's Args.

    # ---- rollout                        title of a group
    num_envs: flags.Envs = 128            a flag with its type and its default
    "Parallel envs over all ranks."       what --help says of it

Classes and docstrings are read with `ast`, since Python keeps no docstrings of fields.
"""

import argparse
import ast
import inspect
import re
import shutil
import textwrap
import types
import typing
from typing import Any

MAX_COLUMNS = 120  # wider lines are hard to read
NAME_COLUMNS = 28  # a longer flag has a line of its own
NO_BREAK = "\u00a0"  # a space where no line is broken
TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT"}


class Layout(argparse.RawDescriptionHelpFormatter):
    """A column of flags and a column of texts. Words such as openvla-tiny are not broken at the hyphen."""

    def __init__(self, prog: str):
        columns = min(shutil.get_terminal_size().columns, MAX_COLUMNS)
        super().__init__(prog, max_help_position=NAME_COLUMNS, width=columns - 1)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def help_text(args_class: type, defaults: Any, description: str) -> str:
    """What --help prints: usage, summary and commands of the script, and all flags in groups.

    Args:
        defaults: an instance of args_class. With --config or --resume it holds the values of those files.
        description: the script's docstring. Its first two paragraphs are shown.
    """
    summary = "\n\n".join(description.split("\n\n")[:2])
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--help] [--flag value ...]", description=summary, formatter_class=Layout, add_help=False
    )
    kinds = typing.get_type_hints(args_class)
    for title, helps in flag_groups(args_class).items():
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            is_switch = kinds[name] is bool
            names = [f"--{name}", f"--no_{name}"] if is_switch else [f"--{name}"]
            said = f"{text} {shown_default(getattr(defaults, name))}".strip().replace("%", "%%")
            value = dict(action="store_true") if is_switch else dict(metavar=value_name(kinds[name]))
            group.add_argument(*names, help=said, **value)
    return parser.format_help().replace(NO_BREAK, " ")


def flag_groups(args_class: type) -> dict[str, dict[str, str]]:
    """{title: {flag: its docstring}} in the order of the source. A flag above the first title has the title ""."""
    source = textwrap.dedent(inspect.getsource(args_class))
    lines, body = source.splitlines(), ast.parse(source).body[0].body
    groups: dict[str, dict[str, str]] = {}
    title, seen = "", 0
    for field, following in zip(body, [*body[1:], None]):
        if not isinstance(field, ast.AnnAssign):
            continue
        for line in lines[seen : field.lineno]:
            if comment := re.match(r"    # ---- (.+)", line):
                title = comment[1]
        seen = field.lineno
        has_docstring = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        text = " ".join(following.value.value.split()) if has_docstring else ""
        groups.setdefault(title, {})[field.target.id] = text
    return groups


def value_name(kind: Any) -> str:
    """How the value of a flag is written: INT, {train,test,all}, INT INT, TEXT ... None is not shown."""
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(map(str, parts))}}}"
    if typing.get_origin(kind) is tuple:
        return f"{value_name(parts[0])} ..." if parts[-1] is Ellipsis else " ".join(map(value_name, parts))
    return value_name(parts[0]) if parts else TYPE_NAMES[kind]  # parts: of `float | None`


def shown_default(value: Any) -> str:
    """(default: 640 480), or nothing for None and (): the text of the flag says what happens then."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        value = "on" if value else "off"
    words = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"(default: {words})".replace(" ", NO_BREAK)
