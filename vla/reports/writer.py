"""When a run writes its page: at its start, while it goes on, and however it ends.

While it goes on, a writing waits until PATIENCE times the seconds of the last one have passed. So all of them
together take less than 1 % of its time, however many iterations, videos and evaluations there are. At the start and at
the end they are written at once.
"""

import json
import sys
import time
from pathlib import Path

from vla.distributed import lost_rank
from vla.reports.plots import plot_progress
from vla.reports.run_page import write_run_page
from vla.reports.run_record import read_run
from vla.text import error_text, without_keys

PATIENCE = 100


class PageWriter:
    """Writes the report of a folder whenever that is due. Rank 0 has one.

    A page that cannot be written ends nothing: the first failure prints one line, and later ones are silent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.due = 0.0  # on the clock of time.perf_counter()
        self.seconds = 0.0  # of the last writing
        self.has_warned = False

    def draw(self) -> None:
        """Write the page and what belongs to it."""
        raise NotImplementedError

    def write_if_due(self) -> None:
        if time.perf_counter() >= self.due:
            self.write()

    def write(self) -> None:
        """Write now. The seconds that it takes decide when the next writing is due."""
        start = time.perf_counter()
        try:
            self.draw()
        except Exception as failure:  # a disk that is full, or a fault in the page: the run is worth more
            self.warn(failure)
        now = time.perf_counter()
        self.seconds = now - start
        self.due = now + PATIENCE * self.seconds

    def silence(self) -> float:
        """Seconds after which a reader should wonder whether the run still goes on."""
        return 3600.0 + 3 * PATIENCE * self.seconds

    def warn(self, failure: Exception) -> None:
        if not self.has_warned:
            self.has_warned = True
            print(f"warning: {self.folder / 'report.html'} is not up to date ({error_text(failure)})", file=sys.stderr)


def cause_in_words(cause: BaseException) -> str:
    """What a page says about the error that ended its run."""
    if isinstance(cause, KeyboardInterrupt):
        return "Ctrl-C ended the run at once"
    if lost_rank(cause):
        return "another rank ended. The terminal's output says why"
    return without_keys(f"{type(cause).__name__}: {error_text(cause)}")


class ReportWriter(PageWriter):
    """Keeps report.html, progress.png and sessions.jsonl of a training run."""

    def __init__(self, run_dir: Path, start_iteration: int):
        super().__init__(run_dir)
        self.iteration, self.ended = start_iteration, False

    def begin(self) -> None:
        """The run starts or resumes."""
        self._note("started")
        self.write()
        self.due = 0.0  # the first page has nothing to draw, so its cost says nothing about the next one's

    def update(self, iteration: int) -> None:
        """The run has logged something after so many iterations."""
        self.iteration = iteration
        self.write_if_due()

    def finish(self) -> None:
        """The run has done what it should."""
        self._end("finished")

    def stop(self, reason: str) -> None:
        """The run was asked to end, by a signal or a file, and has saved itself."""
        self._end("stopped", reason)

    def broken_off(self, cause: BaseException) -> None:
        """An error or a second Ctrl-C ends the run. Nothing happens if it has already ended in another way."""
        self._end("failed", cause_in_words(cause))

    def _end(self, event: str, reason: str = "") -> None:
        if not self.ended:
            self.ended = True
            self._note(event, reason)
            self.write()

    def _note(self, event: str, reason: str = "") -> None:
        """Append an event to sessions.jsonl."""
        line = {"event": event, "time": time.time(), "iteration": self.iteration, "reason": reason}
        try:
            with (self.folder / "sessions.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as failure:
            self.warn(failure)

    def draw(self) -> None:
        record = read_run(self.folder)
        if record.lines or record.evaluations or self.ended:
            plot_progress(record)
        write_run_page(record, time.time(), self.silence())
