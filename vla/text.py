"""Names and texts that others chose (folders, files, instructions), made safe for where they are shown.

They are data: in a plot no formula, in Markdown no table cell, tag or link of their own, in a result no place of one
machine. HTML is escaped by html.escape where it is written.
"""

import html
import re
from pathlib import Path
from typing import Any

from vla import ROOT

MAX_DRAWN = 80  # characters of a name in a plot
# passwords in addresses, and the forms that keys of known services have (wandb's is 40 hexadecimal digits)
KEY = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[\w-]{8,}|\b[0-9a-f]{40}\b"
)


def one_line(text: str) -> str:
    """Line breaks and other control characters as spaces, what UTF-8 cannot write as its code."""
    written = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in written)


def drawn(text: str) -> str:
    """For matplotlib, which reads what stands between two $ as a formula."""
    line = one_line(text)
    line = line if len(line) <= MAX_DRAWN else f"{line[:MAX_DRAWN]}..."
    return line.replace("$", r"\$")


def html_text(text: str) -> str:
    """For HTML: no tag, nor the end of an attribute."""
    return html.escape(one_line(text))


def markdown_text(text: str) -> str:
    """For Markdown, in a table cell too: no new cell, tag, link, picture or piece of code."""
    line = re.sub(r"([\\`|])", r"\\\1", one_line(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return line.replace("](", "]\\(")


def markdown_code(text: str) -> str:
    """As a piece of code in Markdown, fenced by more backticks than it holds in a row; a | is escaped for tables."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def without_keys(text: str) -> str:
    """A text without what would let its reader in somewhere."""
    return KEY.sub("***", text)


def without_machine(value: Any) -> Any:
    """Texts, also those inside lists and dicts, without where one machine keeps things.

    A path in the repository is written from there, one in the home folder from ~, of any other only the last two names
    stay: /scratch/me/runs/a -> .../runs/a.
    """
    if isinstance(value, dict):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine(item) for item in value]
    return re.sub(r"(?<![^\s=:'\"(])/[^\s'\"]+", shortened, one_line(value)) if isinstance(value, str) else value


def shortened(found: re.Match) -> str:
    """An absolute path as without_machine() writes it."""
    path = Path(found.group())
    for place, name in ((ROOT, ""), (Path.home(), "~")):
        if path != place and path.is_relative_to(place):
            return str(Path(name) / path.relative_to(place))
    return str(path) if len(path.parts) <= 3 else str(Path("...", *path.parts[-2:]))
