"""What a person sees in the terminal: first line, progress, last lines, and errors below the launcher's words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from launching import python

from vla.closing import closing_lines
from vla.logger import OF_LABELS, Logger, describe_run
from vla.training.preemption import StopRequest

# stands in for DeepSpeed's launcher: it starts a rank, waits for its end, and then says what nobody wants to read last
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
code = rank.wait()
time.sleep(0.3)
print("Killing subprocess", flush=True)
sys.exit(code)
"""
ERROR = """
from vla.distributed import UserError, run_main
def main(args):
    raise {error}
run_main(main, lambda: None)
"""


def launched(rank: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a rank's program below the stand-in, with both streams in one."""
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", rank]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "last"),
    [("UserError('give another --seed')", 2, "error: give another --seed"), ("KeyError('x')", 1, "KeyError: 'x'")],
)
def test_an_error_is_the_last_thing_on_the_screen(error, code, last):
    run = launched(ERROR.format(error=error))
    assert run.returncode == code and run.stdout.splitlines()[-1] == last, run.stdout
    assert run.stdout.count(last) == 1 and run.stdout.splitlines()[0] == "Killing subprocess"


@pytest.mark.slow
def test_with_debugging_an_error_is_said_at_once_with_its_traceback():
    run = launched(ERROR.format(error="UserError('give another --seed')"), SOLOVLA_DEBUG="1")
    assert run.stdout.startswith("Traceback") and run.stdout.splitlines()[-1] == "Killing subprocess"


@pytest.mark.slow
def test_the_other_rank_does_not_repeat_a_traceback():
    """It waits, so that the launcher ends it. Without a launcher that does so, it speaks after a few seconds."""
    run = launched(ERROR.format(error="KeyError('x')"), RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_PORT="29999")
    assert run.returncode == 1 and run.stdout.count("KeyError: 'x'") == 1


def test_unbuffered_output_is_not_held_back(tmp_path):
    """`python -u`, as the launcher starts ranks: a line is in the pipe before anything else happens."""
    words = "import sys; from vla.distributed import steady_streams; steady_streams(); print('first'); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "first\n"
    process.communicate(timeout=300)


@pytest.mark.parametrize(
    "script", ["train_ppo.py", "train_grpo.py", "train_sft.py", "train_eyes.py", "evaluate.py", "collect_demos.py"]
)
def test_the_first_line_comes_before_the_packages(script):
    text = (ROOT / script).read_text()
    first = text.index(f'print("{script} starts: loading packages')
    assert all(first < text.index(f"\n{line}") for line in ("import torch", "from envs", "from vla") if line in text)


@pytest.mark.full
def test_only_the_first_rank_says_what_starts():
    for rank, lines in (("0", 2), ("1", 1)):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": "29999"}
        run = python("train_ppo.py", "--seed", "-1", env=env)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == lines and "--seed -1" in run.stderr


# ---------------------------------------------------------------------- a run
def finished_run(folder: Path, files: tuple[str, ...] = ()) -> Logger:
    """A logger that has described a run and evaluated it twice. `files` are in its folder."""
    logger = Logger(folder, True, 2)
    flags = {"seed": 0, "num_eval_episodes": 16, "env_id": "PutOnPlateInScene25Single-v1", "obj_set": "train"}
    flags |= {"eval_temperature": 1.0, "num_iterations": 2, "instruction": None, "logger_backends": ("tensorboard",)}
    logger.describe(describe_run(flags, {}, 2))
    for iteration, success in ((0, 0.5), (2, 0.75)):
        logger.write_evaluation(iteration, 4096 * iteration, {"success_once": success, "num_episodes": 16, "return": 1})
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return logger


FILES = ("report.html", "videos/before_after.mp4", "videos/eval_000002.mp4", "metrics.jsonl")
FILES += ("checkpoints/iteration_000002/policy/config.json",)


def test_the_last_lines_name_every_file_that_a_user_wants_to_open(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_ppo.py"])
    run = tmp_path / "my run"
    finished_run(run, FILES).close()
    lines = capsys.readouterr().out.splitlines()[-12:]
    assert lines == [
        "before      success 0.500 [0.28, 0.72] on 16 held-out episodes, return 1.000, after 0 env steps",
        "after       success 0.750 [0.51, 0.90] on 16 held-out episodes, return 1.000, after 8192 env steps",
        f"run folder  {run}",
        f"page        {run}/report.html",
        f"plot        {run}/progress.png",
        f"video       {run}/videos/before_after.mp4",
        f"metrics     {run}/metrics.jsonl",
        f"checkpoint  {run}/checkpoints/iteration_000002",
        f"policy      {run}/checkpoints/iteration_000002/policy",
        f"evaluate    python evaluate.py --checkpoint '{run}' --settings PutOnPlateInScene25Single-v1:train "
        "--temperature 1",
        f"curves      tensorboard --logdir {tmp_path}",
        f"resume      deepspeed --num_gpus 2 train_ppo.py --resume '{run}' --num_iterations 4",
    ]


def test_a_run_with_one_evaluation_names_its_video(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "eval_000000.mp4").touch()
    one = {"global_step": 0, "eval/success_once": 0.5, "eval/num_episodes": 16, "eval/return": 1.0}
    lines = closing_lines(tmp_path, "train_ppo.py", 1, {}, [one], "env steps")
    assert [line.split()[0] for line in lines] == ["before", "run", "video"]
    assert lines[-1] == f"video       {tmp_path}/videos/eval_000000.mp4"


def test_a_stopped_run_says_the_same_and_how_to_continue(tmp_path, capsys):
    logger = finished_run(tmp_path, FILES)
    with pytest.raises(SystemExit) as stop:
        StopRequest(tmp_path).end("it is complete", logger.close)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 75 and lines[-1] == f"{tmp_path}/stop: it is complete"
    assert lines[-2].endswith(f"--resume {tmp_path}") and f"page        {tmp_path}/report.html" in lines


def test_a_cloning_run_names_the_folder_of_its_policy(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").touch()
    flags = {"export_dir": None, "env_id": "PickCube-v1", "instruction": "pick the cube", "eval_temperature": 0.6}
    lines = closing_lines(tmp_path, "train_sft.py", 1, flags, [], "decisions")
    assert lines == [
        f"run folder  {tmp_path}",
        f"policy      {tmp_path}/export",
        f"evaluate    python evaluate.py --checkpoint {tmp_path} --settings PickCube-v1 --temperature 0.6",
    ]


def test_progress_of_cloning_shows_what_cloning_improves(tmp_path):
    logger = Logger(tmp_path, True, 4, step_name="decisions", progress=OF_LABELS)
    metrics = {"train/loss": 1.25, "train/token_accuracy": 0.625, "train/action_l1": 0.0625}
    logger.write(1, 320, metrics, [], 0, "update 10 of 40")
    (line,) = (tmp_path / "progress.log").read_text().splitlines()
    assert "loss 1.2500  token accuracy 0.625  action L1 0.0625" in line and line.endswith("(update 10 of 40)")
    assert "success" not in line and "steps/s" not in line


def test_the_bar_says_which_stage_is_on(tmp_path):
    logger = Logger(tmp_path, True, 4)
    for name, word in (("rollout", "rollout"), ("update", "update"), ("eval", "evaluation")):
        with logger.timer(name):
            assert logger.bar.desc.startswith(word)


def test_one_rank_is_one(tmp_path, capsys):
    logger = Logger(tmp_path, True, 4)
    logger.describe(describe_run({"seed": 0, "num_eval_episodes": 1}, {}, 1))
    assert f"{tmp_path}: 1 rank on " in capsys.readouterr().out
