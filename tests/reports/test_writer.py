"""When a run writes its page: below 1 % of its time, at every kind of end, and never at the run's expense."""

import json
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from launching import python
from run_folders import ppo_folder

from vla.distributed import UserError
from vla.evaluation.statistics import assemble
from vla.reports import writer as writer_module
from vla.reports.evaluation_writer import EvaluationWriter
from vla.reports.run_record import read_run
from vla.reports.writer import PATIENCE, ReportWriter


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self, monkeypatch, cost: float):
        self.now, self.cost, self.writings = 1000.0, cost, []
        monkeypatch.setattr(writer_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(writer_module, "plot_progress", lambda record: None)
        monkeypatch.setattr(writer_module, "write_run_page", self.write)

    def write(self, record, now: float, silent_after: float) -> None:
        self.writings.append(self.now)
        self.now += self.cost


@pytest.mark.parametrize("iteration_seconds", [0.1, 3.0, 1000.0])
def test_all_writings_together_take_below_one_percent(tmp_path, monkeypatch, iteration_seconds):
    """Whatever an iteration and a writing take. The first and the last page come on top."""
    clock = Clock(monkeypatch, cost=2.0)
    writer = ReportWriter(ppo_folder(tmp_path / "run"), 0)
    writer.begin()
    for iteration in range(1, 300):
        clock.now += iteration_seconds
        writer.update(iteration)
    first, *while_it_runs = clock.writings
    assert first == 1000.0 and while_it_runs
    assert 2.0 * (len(while_it_runs) - 1) < (clock.now - while_it_runs[0]) / 100
    if iteration_seconds > 2.0 * PATIENCE:  # after every iteration, since that costs nothing
        assert len(while_it_runs) == 299


def test_the_first_result_is_shown_at_once(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, cost=2.0)
    writer = ReportWriter(ppo_folder(tmp_path / "run"), 0)
    writer.begin()
    writer.update(0)
    writer.update(1)
    assert len(clock.writings) == 2


@pytest.mark.parametrize(
    "end, event, reason",
    [
        (lambda writer: writer.finish(), "finished", ""),
        (lambda writer: writer.stop("SIGTERM"), "stopped", "SIGTERM"),
        (lambda writer: writer.broken_off(KeyboardInterrupt()), "failed", "Ctrl-C ended the run at once"),
        (lambda writer: writer.broken_off(UserError("too\nbig hf_abcdefgh1234")), "failed", "UserError: too big ***"),
        (
            lambda writer: writer.broken_off(RuntimeError("gloo: Connection closed by peer")),
            "failed",
            "another rank ended. The terminal's output says why",
        ),
    ],
)
def test_however_a_run_ends_its_page_says_so(tmp_path, end, event, reason):
    folder = ppo_folder(tmp_path / "run")
    writer = ReportWriter(folder, 4)
    writer.begin()
    end(writer)
    assert writer.ended and (folder / "progress.png").stat().st_size > 0
    writer.broken_off(RuntimeError("while it ends"))  # the first end counts
    lines = [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]
    assert [(line["event"], line["iteration"]) for line in lines] == [("started", 4), (event, 4)]
    assert lines[-1]["reason"] == reason and read_run(folder).phase == event
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert f'class="pill {event}"' in text and "data-reload" not in text


@pytest.mark.parametrize("name", ["report.html.partial", "partial_progress.png", "sessions.jsonl"])
def test_a_full_disk_ends_no_run_and_warns_once(tmp_path, capfd, name):
    folder = ppo_folder(tmp_path / "run")
    (folder / name).symlink_to("/dev/full")
    writer = ReportWriter(folder, 0)
    writer.begin()
    writer.update(1)
    writer.finish()
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"warning: {folder}/report.html is not up to date (") and "No space left" in said


def test_a_fault_in_the_page_ends_no_run(tmp_path, monkeypatch, capfd):
    def broken(*values) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(writer_module, "write_run_page", broken)
    writer = ReportWriter(ppo_folder(tmp_path / "run"), 0)
    writer.begin()
    writer.finish()
    assert capfd.readouterr().err.count("a fault") == 1


def test_a_page_is_whole_or_the_one_before(tmp_path):
    folder = ppo_folder(tmp_path / "run")
    writer = ReportWriter(folder, 0)
    writer.begin()
    before = (folder / "report.html").read_text()
    (folder / "report.html.partial").symlink_to("/dev/full")
    writer.update(1)
    assert (folder / "report.html").read_text() == before


def test_a_training_run_starts_without_importing_plotly():
    """That takes a second or two. The first page has no chart, so only the first result needs it."""
    program = "import sys, train_ppo, train_grpo, train_sft; print(sorted({'plotly', 'kaleido'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------------- an evaluation
ABOUT = {"name": "my_run<script>", "command": "evaluate.py", "num_ranks": 1, "device": "cpu", "commit": "c"}
EPISODE = {"success_at_end": 1.0, "return": 1.0, "episode_len": 4.0, "reward": 0.25, "seconds": 1.0}
EPISODES = [{"episode_id": number, "success_once": float(number > 0)} | EPISODE for number in range(4)]


def evaluation_writer(folder, episodes: list[dict]) -> EvaluationWriter:
    def results_so_far() -> dict | None:
        return assemble({0.0: {"Carrot-v1:test": episodes}}, ABOUT) if episodes else None

    return EvaluationWriter(folder, results_so_far, ABOUT, {}, 8, f"python evaluate.py --output {folder} --resume")


def test_an_evaluation_shows_what_has_ended(tmp_path):
    episodes: list[dict] = []
    writer = evaluation_writer(tmp_path, episodes)
    writer.update(0)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No episode has ended yet." in text and "0 of 8 episodes" in text and "data-reload" in text
    episodes += EPISODES
    writer.due = 0.0
    writer.update(4)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "4 of 8 episodes" in text and "75.0 [30.1, 95.4]" in text and 'class="pill running"' in text
    assert "my_run&lt;script&gt;" in text and "my_run<script>" not in text


@pytest.mark.parametrize(
    "end, phase, reason",
    [
        (lambda writer: writer.stop("SIGTERM"), "stopped", "SIGTERM asked it to stop."),
        (lambda writer: writer.broken_off(KeyboardInterrupt()), "failed", "Ctrl-C ended the run at once"),
    ],
)
def test_a_stopped_evaluation_says_so_and_how_to_continue(tmp_path, end, phase, reason):
    writer = evaluation_writer(tmp_path, EPISODES)
    writer.update(4)
    end(writer)
    writer.broken_off(RuntimeError("while it ends"))  # the first end counts
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'class="pill {phase}"' in text and reason in text and "data-reload" not in text
    assert f"python evaluate.py --output {tmp_path} --resume" in text and "4 of 8 episodes" in text


def test_the_page_of_a_finished_evaluation_is_left_alone(tmp_path):
    writer = evaluation_writer(tmp_path, EPISODES)
    writer.finish()
    writer.broken_off(RuntimeError("after the end"))
    assert not (tmp_path / "report.html").exists()


def test_a_page_of_an_evaluation_that_cannot_be_written_ends_nothing(tmp_path, capfd):
    (tmp_path / "report.html.partial").symlink_to("/dev/full")
    writer = evaluation_writer(tmp_path, EPISODES)
    writer.update(1)
    writer.stop("SIGTERM")
    assert capfd.readouterr().err.count("is not up to date") == 1


# ---------------------------------------------------------------------- through run_main
PROGRAM = """
    import os, signal, sys, time
    from pathlib import Path
    from vla.distributed import run_main
    from vla.logger import Logger, describe_run
    from vla.training.preemption import StopRequest

    def main(how):
        logger = Logger(Path(sys.argv[1]), True, 3)
        stop = StopRequest(Path(sys.argv[1]))
        logger.describe(describe_run({"seed": 0, "num_eval_episodes": 2}, {"num_iterations": 3}, 1))
        logger.write(1, 10, {"train/loss": 1.0}, [{"success_once": 0.0, "return": 0.5}] * 2, 10)
        if how == "error":
            raise ValueError("a fault in the run")
        if how == "signal":
            signal.raise_signal(signal.SIGTERM)
            list(stop.until_requested(range(3)))
            stop.end("saved", logger.close)
        logger.close()

    run_main(main, lambda: sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, code, event, reason",
    [
        ("signal", 75, "stopped", "SIGTERM"),
        ("error", 1, "failed", "ValueError: a fault in the run"),
        ("", 0, "finished", ""),
    ],
)
def test_a_run_tells_its_page_how_it_ended(tmp_path, how, code, event, reason):
    folder = tmp_path / "run"
    run = python("-c", textwrap.dedent(PROGRAM), folder, how)
    assert run.returncode == code, run.stderr
    record = read_run(folder)
    assert (record.phase, record.reason, record.iteration) == (event, reason, 1)
    assert f'class="pill {event}"' in (folder / "report.html").read_text() and (folder / "progress.png").exists()
    assert ("a fault in the run" in run.stderr) == (how == "error")
