"""What the logger keeps when a run is broken off or its disk is full."""

import pytest

from vla.distributed import UserError
from vla.logger import Logger, read_lines, without_places


def test_a_full_disk_while_logging_ends_in_a_sentence(tmp_path):
    logger = Logger(tmp_path / "run", True, 2)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with logger.timer("rollout"):
        pass
    with pytest.raises(UserError, match=r"No space left on device.*--resume"):
        logger.write(1, 10, {}, [], 10)


def test_an_evaluation_before_a_preempted_first_iteration_is_not_lost(tmp_path):
    logger = Logger(tmp_path, True, 2)
    logger.write_evaluation(0, 0, {"success_once": 0.25})
    resumed = Logger(tmp_path, True, 2)
    for iteration in (1, 2):
        with resumed.timer("rollout"):
            pass
        resumed.write(iteration, 10 * iteration, {"train/loss": 1.0}, [], 10)
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert first["eval/success_once"] == 0.25 and first["eval/global_step"] == 0 and "eval/success_once" not in second
    shown = (tmp_path / "progress.log").read_text().splitlines()
    assert len(shown) == 2 and "iteration 2/2" in shown[1] and "20 env steps" in shown[1]


def test_a_note_stands_in_the_line_of_its_iteration(tmp_path):
    logger = Logger(tmp_path, True, 2)
    logger.write(1, 10, {}, [], 10, "only the critic learns")
    logger.write(2, 20, {}, [], 10)
    first, second = (tmp_path / "progress.log").read_text().splitlines()
    assert first.endswith("(only the critic learns)") and "critic" not in second


def test_env_steps_per_second_are_those_of_all_that_is_no_evaluation(tmp_path, monkeypatch):
    """10 s: 4 of evaluation, 1 of rollout, 1 of update, 4 of what no timer sees. 60 env steps in 6 s."""
    now = [0.0]
    monkeypatch.setattr("vla.logger.time.perf_counter", lambda: now[0])
    logger = Logger(tmp_path, True, 1)
    for name, seconds in (("eval", 4.0), ("rollout", 1.0), ("update", 1.0)):
        with logger.timer(name):
            now[0] += seconds
    now[0] += 4.0
    logger.write(1, 60, {}, [], 60)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["time/iteration"] == 10.0 and line["time/env_steps_per_second"] == 10.0


def test_what_is_kept_names_no_place_of_one_machine():
    command = "train_ppo.py --local_rank=0 --config a.yaml --run_dir somewhere/run --output=somewhere/out --seed 1"
    description = {"args": {"run_dir": "somewhere/run", "local_rank": 0, "seed": 1}, "command": command, "commit": "c"}
    kept = {"args": {"seed": 1}, "command": "train_ppo.py --config a.yaml --seed 1", "commit": "c"}
    assert without_places(description) == kept
    description = {"args": {"resume": "/tmp/a/run", "seed": 1}, "command": "train_ppo.py --resume /tmp/a/run --seed 1"}
    description["args"]["model_path"] = "/scratch/me/models/openvla-7b"
    places = {"resume": "runs/my_run", "seed": 1, "model_path": ".../models/openvla-7b"}
    kept = {"args": places, "command": "train_ppo.py --resume runs/my_run --seed 1"}
    assert without_places(description) == kept
