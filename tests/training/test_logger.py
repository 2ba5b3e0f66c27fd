"""What the logger keeps when a run is broken off or its disk is full, and what it gives away."""

import json
import re
import sys

import pytest
from conftest import ROOT

from vla.distributed import UserError
from vla.files.run_lines import read_lines
from vla.logger import Logger, describe_run
from vla.reports.plots import plot_progress
from vla.reports.run_record import read_run
from vla.text import without_places


def test_a_full_disk_while_logging_ends_in_a_sentence(tmp_path):
    logger = Logger(tmp_path / "run", True, 2)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with logger.timer("rollout"):
        pass
    with pytest.raises(UserError, match=r"No space left on device.*--resume"):
        logger.write(1, 10, {}, [], 10)


def test_an_evaluation_before_a_preempted_first_iteration_is_not_lost(tmp_path):
    logger = Logger(tmp_path, True, 2)
    logger.write_evaluation(0, 0, {"success_once": 0.25, "num_episodes": 8})
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


@pytest.mark.parametrize(
    "key", ["hf_abcdefgh12345678", "sk-proj-abcdefgh1234", "ghp_abcdefgh12345678", "0123456789abcdef" * 2 + "01234567"]
)
def test_keys_and_places_are_kept_nowhere(monkeypatch, key):
    monkeypatch.setattr(
        sys, "argv", ["train_ppo.py", "--model_path", "/home/me/models/openvla-7b", "--instruction", key]
    )
    flags = {"seed": 0, "model_path": "/home/me/models/openvla-7b", "instruction": key, "image_size": (96, 96)}
    description = describe_run(flags, {}, 1)
    assert key not in description["command"]
    kept = json.dumps(without_places(description) | {"commit": ""})
    assert key not in kept and "/home" not in kept and '"model_path": ".../models/openvla-7b"' in kept
    url = without_places({"args": {}, "command": "train_ppo.py --instruction https://me:secret@host/path --x 3/4"})
    assert url["command"] == "train_ppo.py --instruction https://***@host/path --x 3/4"


def test_what_is_kept_of_runs_names_no_machine():
    """In results/ and in the cards of the shipped policies: no path of a home or a temporary folder, no event files."""
    files = [path for folder in ("results", "checkpoints", "benchmarks/results") for path in (ROOT / folder).rglob("*")]
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".md", ".yaml")]
    assert len(texts) > 100 and not [path for path in files if "tfevents" in path.name]
    for path in texts:
        found = re.search(r"(?<![\w.])/(?:home|root|tmp|work|mnt|scratch|users)/\w+|hf_\w{20}", path.read_text(), re.I)
        assert found is None, f"{path}: {found and found[0]}"


# ---------------------------------------------------------------------- lines that are cut
LINES = b'{"iteration": 1, "global_step": 10, "eval/success_once": 0.5}\n'
CUT = [
    b'{"iteration": 2, "glo',
    b'{"iteration": 2, "global_step": 20}',
    b"\x00\x00\n",
    b"[]\n",
    b"3\n",
    b"\xff\n",
    b"\n",
    b'{"iteration": "2", "global_step": 20}\n',
    b'{"iteration": NaN, "global_step": 20}\n',
    b'{"global_step": 20}\n',
]


@pytest.mark.parametrize("cut", CUT)
def test_lines_that_are_cut_are_left_out(tmp_path, capsys, cut):
    for name in ("metrics", "evaluations"):
        (tmp_path / f"{name}.jsonl").write_bytes(LINES + cut)
        assert [line["iteration"] for line in read_lines(tmp_path / f"{name}.jsonl")] == [1]
    assert plot_progress(read_run(tmp_path)).stat().st_size > 0
    assert capsys.readouterr().err == ""  # the last one: as a killed run leaves it
    (tmp_path / "metrics.jsonl").write_bytes(cut + (b"" if cut.endswith(b"\n") else b"\n") + LINES)
    found = read_lines(tmp_path / "metrics.jsonl")
    assert found[-1]["iteration"] == 1
    assert len(found) == 2 or "1 damaged lines" in capsys.readouterr().err


@pytest.mark.parametrize("cut", CUT)
def test_a_resumed_run_sets_damaged_lines_aside(tmp_path, cut):
    second = b'{"iteration": 2, "global_step": 20}\n'
    (tmp_path / "metrics.jsonl").write_bytes(cut.rstrip(b"\n") + b"\n" + LINES + second)
    Logger(tmp_path, True, 4, 1, 10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == LINES
    assert second in (tmp_path / "metrics.lost.jsonl").read_bytes()


def test_a_run_whose_evaluations_are_gone_still_ends_well(tmp_path, capsys):
    Logger(tmp_path, True, 1).close()
    said = capsys.readouterr().out
    assert "video" not in said and "progress.png" in said and "before" not in said and "evaluate" not in said
