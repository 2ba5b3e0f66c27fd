"""When a run writes its page and its plot: at its start, while it goes on, and however it ends.

While the run goes on, a writing waits until PATIENCE times the seconds of the last one have passed. So all of them
together take less than 1 % of the run's time, however many iterations, films and evaluations there are. At the start
and at the end they are written at once.
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


class ReportWriter:
    """Keeps report.html, progress.png and sessions.jsonl of a run. Rank 0 has one.

    A page that cannot be written ends no run: the first failure prints one line, and later ones are silent.
    """

    def __init__(self, run_dir: Path, start_iteration: int):
        self.run_dir, self.iteration = run_dir, start_iteration
        self.due = 0.0  # on the clock of time.perf_counter()
        self.seconds = 0.0  # of the last writing
        self.ended = self.has_warned = False

    def begin(self) -> None:
        """The run starts or resumes."""
        self._note("started")
        self._write()
        self.due = 0.0  # the first page has nothing to draw, so its cost says nothing about the next one's

    def update(self, iteration: int) -> None:
        """The run has logged something after so many iterations."""
        self.iteration = iteration
        if time.perf_counter() >= self.due:
            self._write()

    def finish(self) -> None:
        """The run has done what it should."""
        self._end("finished")

    def stop(self, reason: str) -> None:
        """The run was asked to end, by a signal or a file, and has saved itself."""
        self._end("stopped", reason)

    def broken_off(self, cause: BaseException) -> None:
        """An error or a second Ctrl-C ends the run. Nothing happens if it has already ended in another way."""
        if isinstance(cause, KeyboardInterrupt):
            self._end("failed", "Ctrl-C ended the run at once")
        elif lost_rank(cause):
            self._end("failed", "another rank ended. The terminal's output says why")
        else:
            self._end("failed", without_keys(f"{type(cause).__name__}: {error_text(cause)}"))

    def _end(self, event: str, reason: str = "") -> None:
        if not self.ended:
            self.ended = True
            self._note(event, reason)
            self._write()

    def _note(self, event: str, reason: str = "") -> None:
        """Append an event to sessions.jsonl."""
        line = {"event": event, "time": time.time(), "iteration": self.iteration, "reason": reason}
        try:
            with (self.run_dir / "sessions.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as failure:
            self._warn(failure)

    def _write(self) -> None:
        """Write the plot and the page. Their seconds decide when the next ones are due."""
        start = time.perf_counter()
        try:
            record = read_run(self.run_dir)
            if record.lines or record.evaluations or self.ended:
                plot_progress(record)
            write_run_page(record, time.time(), self._silence())
        except Exception as failure:  # a disk that is full, or a fault in the page: the run is worth more
            self._warn(failure)
        now = time.perf_counter()
        self.seconds = now - start
        self.due = now + PATIENCE * self.seconds

    def _silence(self) -> float:
        """Seconds after which a reader should wonder whether the run still goes on."""
        return 3600.0 + 3 * PATIENCE * self.seconds

    def _warn(self, failure: Exception) -> None:
        if not self.has_warned:
            self.has_warned = True
            print(f"warning: {self.run_dir / 'report.html'} is not up to date ({error_text(failure)})", file=sys.stderr)
