"""The engine of all pages: templates that escape every value, and files as data URLs.

    text = render("run.html", title="my run", ...)
    write_whole(folder / "report.html", text)

A page needs no other file and no network. Its Content-Security-Policy allows only the scripts of the templates, which
carry a number that is drawn for each page. Names, instructions and flags of strangers are text, whatever they contain.
"""

import base64
import datetime
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import jinja2
from markupsafe import Markup

from vla.text import counted, one_line

TEMPLATES = Path(__file__).parent / "templates"
INLINE_BYTES = 12 * 2**20  # of videos in one page. The rest are links to the files beside it
RELOAD_SECONDS = 30  # of a page whose run or evaluation goes on
KINDS = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".png": "image/png"}


def time_text(seconds: float) -> str:
    """A moment in local time. seconds: since 1970."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


@dataclass(frozen=True)
class State:
    """How far a run or an evaluation has come. It stands below the title of its page.

    Args:
        phase: running, stopped, failed, finished or unknown.
        words: how far it is.
        now: when the page is written, in seconds since 1970.
        reason: who stopped it, or the error.
        resume_command: continues it. continues: the sentence above that command.
        silent_after: a page of something that runs says after so many seconds that it may have been killed. hint: what
            it says then.
    """

    phase: str
    words: str
    now: float
    reason: str = ""
    resume_command: str = ""
    continues: str = "This command continues it:"
    silent_after: float = 3600.0
    hint: str = ""

    @property
    def reload_seconds(self) -> int:
        return RELOAD_SECONDS if self.phase == "running" else 0

    @property
    def written(self) -> str:
        return time_text(self.now)


def printable(value: object) -> object:
    """What a template writes for a value. A text becomes one line of printable characters, and None becomes nothing."""
    if value is None:
        return ""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=printable,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, *, title: str, with_charts: bool, state: State | None = None, **values: object) -> str:
    """The text of a page.

    Args:
        template: a file of vla/reports/templates that extends base.html.
        with_charts: whether the page holds charts, and so plotly's script (4.8 MB).
        state: of a run or an evaluation. While it runs, the page loads its newest version now and then.
        values: what else the template names.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    of_base = dict(title=title, state=state, reload_seconds=state.reload_seconds if state else 0)
    of_base |= dict(plotly=plotly_script() if with_charts else "", nonce=secrets.token_urlsafe(16))
    return ENVIRONMENT.get_template(template).render(**of_base, **values)


@lru_cache(maxsize=1)
def plotly_script() -> Markup:
    """The text of plotly's script, such that it ends no <script> element."""
    path = Path(find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"  # without importing plotly
    return Markup(path.read_text(encoding="utf-8").replace("</script", "<\\/script"))


def data_url(path: Path) -> Markup:
    """A URL that holds the content of an image or a video.

    >>> data_url(Path("a.txt"))
    Traceback (most recent call last):
    KeyError: '.txt'
    """
    kind = KINDS[path.suffix]
    return Markup(f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")


@dataclass
class Media:
    """The videos of one page. They are in the page until it holds `room` bytes of them, and links beyond.

    Args:
        folder: where the page will be. Links are relative to it.
    """

    folder: Path
    room: int = INLINE_BYTES
    linked: list[str] = field(default_factory=list)
    held: int = 0

    @property
    def held_mib(self) -> int:
        return round(self.held / 2**20)

    def source(self, path: Path) -> str:
        """The URL of a video."""
        size = path.stat().st_size
        if size <= self.room:
            self.room -= size
            self.held += size
            return data_url(path)
        name = path.relative_to(self.folder).as_posix()
        self.linked.append(name)
        return jinja2.filters.do_urlencode(name)

    def poster(self, path: Path | None) -> str:
        """The URL of the image that is shown before a video plays. "" without the file."""
        return data_url(path) if path is not None and path.is_file() else ""


def origin_of(description: dict) -> dict[str, str]:
    """How something was made, by the names that a page shows: command, commit, machine, versions.

    Args:
        description: see vla.logger.describe_run(). Older ones lack some of it.
    """
    changed = " with uncommitted changes" if description.get("uncommitted_changes") else ""
    version = description.get("version")
    versions = {**({"SoloVLA": version} if version else {}), **description.get("versions", {})}
    facts = {
        "command": description.get("command", ""),
        "started": description.get("started", ""),
        "machine": f"{counted(description.get('num_ranks', 1), 'rank')} on {description.get('device', 'unknown')}",
        "commit": f"{description.get('commit', 'unknown')}{changed}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return {name: value for name, value in facts.items() if value}
