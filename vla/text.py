"""Makes texts that others chose (names, folders, instructions, error messages) safe for the place where they appear.

Such texts are data. They are not formulas in a plot, and not table cells, tags or links in Markdown. Results that are
published contain no paths of one machine. html_text() escapes HTML.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from vla import ROOT

MAX_DRAWN = 80  # characters of a name in a plot
# passwords in addresses, and the forms that keys of known services have (wandb's is 40 hexadecimal digits)
KEY = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[\w-]{8,}|\b[0-9a-f]{40}\b"
)


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "rank"), counted(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(text: str) -> str:
    """The text with a space for every line break or other control character. Lone surrogates become escapes.

    >>> one_line("two\\nlines")
    'two lines'
    """
    written = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in written)


def flag_in_words(value: object) -> str:
    """A flag's value as it is typed, or as a preset has it.

    >>> flag_in_words((96, 96)), flag_in_words(True), flag_in_words(None), flag_in_words([])
    ('96 96', 'true', 'none', 'none')
    """
    if isinstance(value, (list, tuple)):
        return " ".join(map(flag_in_words, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


def started_with(num_ranks: int) -> str:
    """What stands before a script in the command that starts it on one machine.

    >>> started_with(1), started_with(8)
    ('python', 'deepspeed --num_gpus 8')
    """
    return "python" if num_ranks == 1 else f"deepspeed --num_gpus {num_ranks}"


def error_text(error: Exception) -> str:
    """The message of an error in one line, or its type if it has no message.

    >>> error_text(ValueError("two\\n   lines")), error_text(KeyError())
    ('two lines', 'KeyError')
    """
    return " ".join(one_line(str(error)).split()) or type(error).__name__


def drawn(text: str) -> str:
    """The text for matplotlib, which would read a text between two $ as a formula. Long texts are cut."""
    line = one_line(text)
    line = line if len(line) <= MAX_DRAWN else f"{line[:MAX_DRAWN]}..."
    return line.replace("$", r"\$")


def html_text(text: str) -> str:
    """The text for HTML, inside an element or an attribute."""
    return html.escape(one_line(text))


def markdown_text(text: str) -> str:
    """The text for Markdown, also inside a table cell. It makes no new cell, tag, link, image or code."""
    line = re.sub(r"([\\`|])", r"\\\1", one_line(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return line.replace("](", "]\\(")


def markdown_code(text: str) -> str:
    """The text as code in Markdown. Its fence has more backticks than the text has in a row. A | is escaped for tables.

    >>> markdown_code("a|b")
    '`a\\\\|b`'
    """
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def without_keys(text: str) -> str:
    """The text with *** in place of passwords and access keys."""
    return KEY.sub("***", text)


def without_machine(value: Any) -> Any:
    """A text, or all texts inside lists and dicts, without paths of one machine.

    A path inside the repository is written relative to it, and one in the home folder relative to ~. Of any other path
    only the last two names remain: /scratch/me/runs/a becomes .../runs/a.
    """
    if isinstance(value, dict):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![^\s=:'\"(])/[^\s'\"]+", shortened, one_line(value))
    return value


def without_places(description: dict) -> dict:
    """A run's description for publication: without paths of one machine, and without access keys.

    The folder of a resumed run becomes runs/my_run, as in README.
    """
    place_flags, resumed = ("run_dir", "output", "local_rank"), "runs/my_run"
    args = {name: value for name, value in description["args"].items() if name not in place_flags}
    if isinstance(args.get("resume"), str):
        args["resume"] = resumed
    command = re.sub(rf" --(?:{'|'.join(place_flags)})(?:=| )(?:'[^']*'|\S+)", "", description["command"])
    command = re.sub(r" --resume(=| )(?!-)(?:'[^']*'|\S+)", rf" --resume\1{resumed}", command)
    args = {name: without_keys(value) if isinstance(value, str) else value for name, value in args.items()}
    kept = {name: value for name, value in description.items() if name not in ("defaults", "preset")}
    return without_machine(kept | {"args": args, "command": without_keys(command)})


def shortened(found: re.Match) -> str:
    """An absolute path, shortened as without_machine() says."""
    path = Path(found.group())
    for place, name in ((ROOT, ""), (Path.home(), "~")):
        if path != place and path.is_relative_to(place):
            return str(Path(name) / path.relative_to(place))
    return str(path) if len(path.parts) <= 3 else str(Path("...", *path.parts[-2:]))
