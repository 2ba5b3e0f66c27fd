"""The task to copy: the commands at its top, and its rewards."""

import re
import shlex

import pytest
from conftest import ROOT
from launching import metrics, python

from envs import make_envs

TASK = ROOT / "examples" / "my_task.py"
ENV_ID = "examples.my_task:PushToSquare-v1"


def commands() -> list[list[str]]:
    """The words of each command in the docstring of the example."""
    text = TASK.read_text().split('"""')[1].replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ {4}python (.*)$", text, re.M)]


@pytest.mark.full
@pytest.mark.slow
def test_the_commands_at_the_top_train_and_evaluate(tmp_path):
    train, evaluate = commands()
    run_dir = tmp_path / "run"
    small = "--num_envs 2 --num_steps 8 --max_episode_steps 4 --num_minibatches 2 --micro_batch_size 8".split()
    small += "--critic_warmup_iterations 0 --num_iterations 1 --eval_freq 1 --save_freq 1 --image_size 32 32".split()
    run = python(*train, *small, "--run_dir", run_dir)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = metrics(run_dir)
    assert line["rollout/rewards"] > 0.2  # the dense reward, which pays in every step
    words = [str(run_dir) if word == "runs/my_task" else word for word in evaluate]
    run = python(*words, "--temperature", "1", "--num_envs", "2", "--output", tmp_path / "evaluation")
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "evaluation" / "results.json").exists()


def test_the_documentation_shows_the_same_commands():
    page = (ROOT / "docs" / "environments.md").read_text().replace("\\\n", " ")
    for command in commands():
        assert command in [shlex.split(line) for line in re.findall(r"^python (.*)$", page, re.M)]


def test_the_file_is_short():
    assert len(TASK.read_text().split('"""', 2)[2].strip().splitlines()) <= 60


@pytest.mark.full
@pytest.mark.slow
def test_its_rewards_and_its_instruction():
    """The arm moves towards the cube, so the dense reward grows. Without it, nothing is paid before success."""
    towards = [[[0.05, 0.0, -0.03, 0.0, 0.0, 0.0, 1.0]]]
    found = {}
    for mode in (None, "dense", "normalized_dense"):
        with make_envs(ENV_ID, 1, instruction="push", image_size=(8, 8), reward_mode=mode) as envs:
            envs.reset([5])
            found[mode] = [envs.step(towards)[1].item() for _ in range(4)]
            env = envs._groups[0]._group.world.envs[0].env
            assert env.get_language_instruction() == ["push the red cube onto the green square"]
    assert found[None] == [0.0] * 4
    assert found["dense"] == sorted(found["dense"]) and 0 < found["dense"][0] < 3
    assert found["normalized_dense"] == pytest.approx([reward / 3 for reward in found["dense"]])
