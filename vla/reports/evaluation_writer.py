"""When an evaluation writes its page: while it runs, and when it is stopped. The rule is that of writer.py.

A module of its own, because the page of an evaluation imports plotly, which the start of a training run does not.
"""

import time
from collections.abc import Callable
from pathlib import Path

from vla.files.whole import write_whole
from vla.reports.evaluation_page import evaluation_page
from vla.reports.page import State
from vla.reports.writer import PageWriter, cause_in_words
from vla.text import counted


class EvaluationWriter(PageWriter):
    """Keeps report.html of an evaluation until write_report() writes the finished one.

    Args:
        results_so_far: the content of results.json from the episodes that have ended, or None before the first.
        total: number of episodes.
        resume_command: continues the evaluation.
    """

    def __init__(
        self,
        folder: Path,
        results_so_far: Callable[[], dict | None],
        about: dict,
        published: dict[str, dict],
        total: int,
        resume_command: str,
    ):
        super().__init__(folder)
        self.results_so_far, self.about, self.published = results_so_far, about, published
        self.total, self.resume_command = total, resume_command
        self.done, self.phase, self.reason = 0, "running", ""

    def update(self, done: int) -> None:
        """So many episodes have ended."""
        self.done = done
        self.write_if_due()

    def stop(self, reason: str) -> None:
        """The evaluation was asked to end. Its episodes are kept."""
        self._end("stopped", reason)

    def finish(self) -> None:
        """write_report() writes the page from now on."""
        self.phase = "finished"

    def broken_off(self, cause: BaseException) -> None:
        """An error or a second Ctrl-C ends the evaluation."""
        self._end("failed", cause_in_words(cause))

    def _end(self, phase: str, reason: str) -> None:
        if self.phase == "running":
            self.phase, self.reason = phase, reason
            self.write()

    def draw(self) -> None:
        words = f"{self.done} of {counted(self.total, 'episode')}"
        state = State(self.phase, words, time.time(), self.reason, self.resume_command, silent_after=self.silence())
        page = evaluation_page(self.folder, self.results_so_far(), self.about, self.published, state)
        write_whole(self.folder / "report.html", page)
