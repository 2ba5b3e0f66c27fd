"""The vector env's machinery: half-batches, workers that fail, other ManiSkill envs behind the same contract."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from launching import python
from made_up import busy_actions
from sameness import as_saved, same

import envs as world
from envs import local, processes, variants, workers
from envs.vector import VectorEnv
from schemas.pixels import Pixels, resize
from vla.evaluation.episodes import is_lost, lost_in_words, run_batch
from vla.evaluation.vector_env import VectorEnv as Needed

MAIN = "PutOnPlateInScene25Main-v3"
SMALL = dict(image_size=(48, 48), sim_freq=100)
CUBE = "PickCube-v1"
TINY = dict(image_size=(24, 16), instruction="pick up the cube")


def make(num_envs: int, *args, **kwargs):
    return world.make_envs(MAIN, num_envs, *args, **(SMALL | kwargs))


def rows(result, half: slice):
    """The results that a step of all envs has for the envs in `half`."""
    obs, rewards, terminations, truncations, infos = result
    kept = [m for m, i in enumerate(infos["ended"].tolist()) if half.start <= i < half.stop]
    final = infos["final_observation"]
    return (
        {key: value[half] for key, value in obs.items()},
        rewards[half],
        terminations[half],
        truncations[half],
        {
            "valid": infos["valid"][half],
            "dropped": infos["dropped"][half],
            "lost": infos["lost"][half],
            "ended": infos["ended"][kept] - half.start,
            "final_observation": {
                "image": final["image"][kept],
                "task_description": [final["task_description"][m] for m in kept],
            },
            "episode": {key: value[kept] for key, value in infos["episode"].items()},
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# workers
# ---------------------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds: float = 600) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_workers_end_when_the_parent_is_killed():
    code = (
        "import envs, time\n"
        f"v = envs.make_envs({MAIN!r}, 1, image_size=(16, 16), sim_freq=100, num_env_workers=1)\n"
        "print(v._groups[0].pid, flush=True)\ntime.sleep(60)"
    )
    with warm.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.kill()
    assert wait_for(lambda: not alive(worker))


# ---------------------------------------------------------------------------------------------------------------------
# reset of some
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_env_workers", [0, 2])
def test_some_envs_are_reset_while_the_others_go_on(num_env_workers):
    actions = busy_actions(3, 8, seed=8)
    with make(3, num_env_workers=num_env_workers, seed=1, image_size=(16, 16)) as envs:
        with pytest.raises(RuntimeError, match="before reset"):
            envs.reset(env_indices=[1])
        first = envs.reset([20, 21, 20])
        assert torch.equal(first["image"][0], first["image"][2])  # a group of two
        plain = [envs.step(actions[:, t : t + 4]) for t in (0, 4)]
        envs.reset([20, 21, 20])
        envs.step(actions[:, :4])
        obs = envs.reset([21], env_indices=[2])
        assert torch.equal(obs["image"][2], first["image"][1]) and torch.equal(
            obs["image"][:2], plain[0][0]["image"][:2]
        )
        shifted = actions[:, 4:].copy()
        shifted[2] = actions[1, :4]
        result = envs.step(shifted)
        assert same(rows(result, slice(0, 2)), rows(plain[1], slice(0, 2)))
        assert torch.equal(result[0]["image"][2], plain[0][0]["image"][1])  # as env 1 went from the same start
        envs.reset(env_indices=[2, 0])
        described = envs.describe()
        wanted = [variants.train_episode_id(envs.num_start_states, 1, i, 0) for i in (0, 2)]
        assert [described[0]["episode_id"], described[2]["episode_id"]] == wanted
        assert [state["elapsed_steps"] for state in described] == [0, 8, 0]
        for indices, ids, words in (
            ([0, 0], None, "distinct"),
            ([3], None, "between 0 and 2"),
            ([1], [1, 2], "2 episode ids for 1"),
        ):
            with pytest.raises(ValueError, match=words):
                envs.reset(ids, env_indices=indices)


# ---------------------------------------------------------------------------------------------------------------------
# two half-batches
# ---------------------------------------------------------------------------------------------------------------------


def test_half_batches_equal_whole_ones_and_wait_for_nobody():
    actions = busy_actions(5, 12, seed=6)
    kwargs = dict(auto_reset=True, max_episode_steps=5, seed=3)
    with make(5, **kwargs) as envs:
        assert envs.halves == [slice(0, 5)]
        start, wanted = envs.reset(), [envs.step(actions[:, t : t + 4]) for t in range(0, 12, 4)]
    with make(5, pipeline_stages=2, num_env_workers=2, **kwargs) as envs:
        assert envs.halves == [slice(0, 2), slice(2, 5)]
        assert same(envs.reset(), start)
        first, second = envs.halves
        envs.step_async(actions[first, :4], half=0)
        for t in range(0, 12, 4):
            envs.step_async(actions[second, t : t + 4], half=1)
            assert same(envs.step_wait(half=0), rows(wanted[t // 4], first))
            if t < 8:
                envs.step_async(actions[first, t + 4 : t + 8], half=0)
            assert same(envs.step_wait(half=1), rows(wanted[t // 4], second))

        # the policy goes on while one half's worker has not even begun, and so does the other half
        one = envs._groups[0].pid
        os.kill(one, signal.SIGSTOP)
        envs.step_async(actions[first, :4], half=0)
        envs.step_async(actions[second, :4], half=1)
        assert len(envs.step_wait(half=1)[1]) == 3
        os.kill(one, signal.SIGCONT)
        assert len(envs.step_wait(half=0)[1]) == 2


def test_half_batches_in_this_process_and_calls_in_the_wrong_order():
    actions = busy_actions(2, 2)
    with make(2) as envs:
        envs.reset([5, 6])
        wanted = envs.step(actions)
    with make(2, pipeline_stages=2) as envs:
        with pytest.raises(RuntimeError, match="reset"):
            envs.step_async(actions[:1], half=1)
        envs.reset([5, 6])
        with pytest.raises(RuntimeError, match="without a step_async"):
            envs.step_wait(half=1)
        with pytest.raises(ValueError, match=r"num_envs=1, chunk_size, 7"):
            envs.step_async(actions, half=1)
        with pytest.raises(ValueError, match="half 2 does not exist"):
            envs.step_async(actions[:1], half=2)
        envs.step_async(actions[1:], half=1)
        with pytest.raises(RuntimeError, match="twice"):
            envs.step_async(actions[1:], half=1)
        calls = (envs.reset, envs.describe, envs.state_dict, lambda: envs.step(actions))
        for call in calls:
            with pytest.raises(RuntimeError, match=r"half 1 is in its step: call step_wait"):
                call()
        assert same(envs.step_wait(half=1), rows(wanted, slice(1, 2)))
        envs.step_async(actions[:1])
        assert same(envs.step_wait(), rows(wanted, slice(0, 1)))


def test_the_vector_env_is_what_vla_relies_on():
    """Same names, parameters and defaults as the protocol, which `vla` has because it must not import `envs`."""

    def parameters(method) -> list:
        return [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]

    methods = {name: method for name, method in vars(Needed).items() if inspect.isfunction(method) and name[0] != "_"}
    assert methods.keys() >= {"reset", "step", "pipeline", "step_async", "state_dict", "load_state_dict", "close"}
    for name, method in methods.items():
        assert parameters(getattr(VectorEnv, name)) == parameters(method), name
    with make(1) as envs:
        assert all(hasattr(envs, name) for name in Needed.__annotations__)


def test_a_pipeline_of_halves_is_step_by_step_the_same():
    """Outcomes come one turn later and a half that is given no actions rests, with one half and with two."""
    kwargs = dict(image_size=(16, 16), seed=2, max_episode_steps=4, auto_reset=True)
    actions = torch.as_tensor(busy_actions(3, 6)).view(3, 3, 2, 7)  # three decisions of two actions
    with make(3, **kwargs) as envs:
        first = envs.reset()
        wanted = [envs.step(actions[:, t]) for t in range(3)]
    for stages in (1, 2):
        with make(3, pipeline_stages=stages, **kwargs) as envs:
            envs.reset()
            turns = []
            for turn in envs.pipeline(range(4)):
                turns.append(turn)
                if turn.t < 3:
                    envs.step_async(actions[turn.rows, turn.t], turn.half)
            assert [(turn.t, turn.half) for turn in turns] == [(t, half) for t in range(4) for half in range(stages)]
            for turn in turns:
                if turn.t == 0:
                    assert turn.outcome is None
                    assert same(turn.obs, {key: value[turn.rows] for key, value in first.items()})
                else:
                    assert (
                        same(tuple(turn.outcome), rows(wanted[turn.t - 1], turn.rows)) and turn.obs is turn.outcome.obs
                    )
            # nothing is in flight, and the next rollout begins where this one ended
            again = list(envs.pipeline([0]))
            assert all(turn.outcome is None for turn in again)
            assert same(again[-1].obs, turns[-1].obs)


# ---------------------------------------------------------------------------------------------------------------------
# workers that die, raise or hang
# ---------------------------------------------------------------------------------------------------------------------


def test_workers_equal_in_process_and_a_killed_one_is_replaced():
    actions = busy_actions(3, 12, seed=3)
    chunks = [actions[:, t : t + 4] for t in range(0, 12, 4)] + [actions[:, 4:6]]
    kwargs = dict(auto_reset=True, max_episode_steps=6, seed=2, privileged=True)
    with make(3, **kwargs) as envs:
        total = envs.num_start_states
        start, undisturbed = envs.reset(), [envs.step(chunk) for chunk in chunks]
        third = [variants.train_episode_id(total, 2, i, 2) for i in range(3)]
        begun = envs.reset(third)
        restarted = envs.step(chunks[3])
    with make(3, num_env_workers=2, **kwargs) as envs:  # one env and two
        assert same(envs.reset(), start)
        assert same([envs.step(chunk) for chunk in chunks[:2]], undisturbed[:2]) and envs.num_restarts == 0
        assert undisturbed[1][3].all()  # all are in their second episode
        pids = [group.pid for group in envs._groups]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=r"(?s)envs 1 to 2 .* killed by SIGKILL.*2 episodes are dropped"):
            result = envs.step(chunks[2])
        assert same(rows(result, slice(0, 1)), rows(undisturbed[2], slice(0, 1)))  # the other worker notices nothing
        now, rewards, terminations, truncations, infos = result
        assert infos["dropped"].tolist() == [False, True, True] and envs.num_restarts == 1
        assert not (infos["valid"][1:].any() or rewards[1:].any() or (terminations | truncations)[1:].any())
        assert infos["ended"].numel() == 0 and rewards.shape == (3, 4)
        # each is at the start of the next episode of its stream, and goes on as if nothing had happened
        described = envs.describe()
        assert [state["episode_id"] for state in described[1:]] == third[1:]
        assert [state["elapsed_steps"] for state in described] == [4, 0, 0]
        assert same({key: value[1:] for key, value in now.items()}, {key: value[1:] for key, value in begun.items()})
        result = envs.step(chunks[3])
        assert same(rows(result, slice(1, 3)), rows(restarted, slice(1, 3)))
        assert same(rows(result, slice(0, 1)), rows(undisturbed[3], slice(0, 1))) and result[3][0]  # ended meanwhile
        assert envs.num_restarts == 1 and not result[4]["dropped"].any()
        pids = [group.pid for group in envs._groups]
    assert not any(map(alive, pids))


def test_evaluation_runs_in_the_workers_of_training():
    """Other envs take turns with the training's in its workers. Neither notices, until a worker is lost."""
    actions = busy_actions(3, 12, seed=3)
    chunks = [actions[:, t : t + 2] for t in range(0, 12, 2)]
    training = dict(auto_reset=True, max_episode_steps=5, seed=2)
    other = dict(image_size=(32, 24), max_episode_steps=3, obj_set="test", privileged=True)

    def evaluation(envs) -> list:
        return [envs.reset([5, 6]), *(envs.step(chunk[:2]) for chunk in chunks[:2])]

    with make(3, **training) as envs, make(2, **other) as beside:
        undisturbed, evaluated = [envs.reset(), *map(envs.step, chunks)], evaluation(beside)
    warm.run([sys.executable, "-c", ""])  # it has its files from now on
    files = set(os.listdir("/proc/self/fd"))
    envs = make(3, num_env_workers=2, **training)
    with make(2, beside=envs, num_env_workers=2, **other) as beside:
        pids = [worker.process.pid for worker in envs.workers]
        assert [group.pid for group in beside._groups] == pids
        assert same([envs.reset(), *map(envs.step, chunks[:2])], undisturbed[:3])
        assert same(evaluation(beside), evaluated)
        assert same(envs.step(chunks[2]), undisturbed[3])
        envs.step_async(chunks[3])  # a step that nobody has waited for yet
        assert same(evaluation(beside), evaluated) and same(envs.step_wait(), undisturbed[4])
        os.kill(pids[0], signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="killed by SIGKILL"):
            begun = beside.reset([5, 6])
        assert same(begun, evaluated[0]) and beside.num_restarts == 1
        with pytest.warns(RuntimeWarning, match="was lost while it simulated other envs"):
            infos = envs.step(chunks[4])[4]
        assert infos["dropped"].tolist() == [True, False, False] and envs.num_restarts == 1
        assert same([beside.step(chunk[:2]) for chunk in chunks[:2]], evaluated[1:])  # the loss was not its own
    with make(2, beside=envs, num_env_workers=2, **other) as again:  # as videos have it
        assert same(evaluation(again), evaluated)
    assert not envs.step(chunks[5])[4]["dropped"].any()
    envs.close()
    assert not any(map(alive, pids)) and set(os.listdir("/proc/self/fd")) == files


def test_workers_make_images_small_as_the_policy_would():
    """To the last bit, also those of episodes that have ended. Envs without pixels have the camera's images."""
    world = dict(max_episode_steps=2, auto_reset=True)
    chunks = [busy_actions(2, 2, seed) for seed in range(2)]
    with make(2, **world) as whole, make(2, num_env_workers=1) as host:
        large = [whole.reset()["image"]]
        for chunk in chunks:
            obs, *_, infos = whole.step(chunk)
            large += [obs["image"], infos["final_observation"]["image"]]
        for pixels in (Pixels((16, 24), "tensor"), Pixels((20, 20), "pil"), None):
            with make(2, host, pixels, num_env_workers=1, **world) as envs:
                small = [envs.reset()["image"]]
                for chunk in chunks:
                    obs, *_, infos = envs.step(chunk)
                    small += [obs["image"], infos["final_observation"]["image"]]
            want = large if pixels is None else [resize(image, *pixels) for image in large]
            assert all(map(torch.equal, small, want)) and len(small[2]) == 2


@pytest.fixture
def fault(tmp_path, monkeypatch) -> Path:
    """The file that makes workers fail (tests/helpers/faulty_worker.py)."""
    path = tmp_path / "fault"
    monkeypatch.setenv("SOLOVLA_TEST_FAULT", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "helpers"))
    monkeypatch.setattr(workers, "WORKER", "faulty_worker:main")
    return path


HANGS_HERE = """
import ctypes
from envs.local import LocalGroup

class Hangs:
    def step(self):
        ctypes.PyDLL(None).sleep(60)  # the interpreter's lock is held: no thread of Python's could do anything

group = LocalGroup.__new__(LocalGroup)
group._group, group._timeout = Hangs(), 1.0
group.start("step")
"""


def test_a_hang_in_this_process_ends_it_with_its_stack():
    run = python("-c", HANGS_HERE)
    assert run.returncode == 1  # else it would have slept to its end
    assert "Timeout" in run.stderr and "in step" in run.stderr and "in start" in run.stderr


class Slow:
    """A group that says which threads are in a simulator."""

    inside: ClassVar[list[int]] = []

    def __init__(self, *_):
        self.step()

    def step(self) -> int:
        self.inside.append(threading.get_ident())
        time.sleep(0.05)
        assert len(self.inside) == 1
        return self.inside.pop()

    close = step


def test_threads_use_the_simulator_of_a_process_one_at_a_time(monkeypatch):
    """In a hybrid placement one thread serves the rollout while another evaluates."""
    monkeypatch.setattr(local, "EnvGroup", Slow)
    monkeypatch.setattr(local, "_open_world", lambda *_: SimpleNamespace(device="cpu"))

    def use() -> int:
        group = local.LocalGroup(SimpleNamespace(image_shape=(8, 8, 3)), 0, 1, timeout=60.0)
        group.start("step")
        group.close()
        return group.finish()

    with ThreadPoolExecutor(3) as pool:
        assert len({used.result() for used in [pool.submit(use) for _ in range(3)]}) == 3


def test_hangs_raises_and_three_losses_in_a_row(fault):
    still = np.zeros((2, 3, 7), np.float32)
    with make(2, num_env_workers=1, max_episode_steps=3, worker_timeout=60) as envs:
        envs.reset([7, 8])
        start = envs.describe()
        # given ids: the same episode again; an env that rests has nothing to lose and goes on resting
        _, _, _, truncations, _ = envs.step(still)
        assert truncations.all()
        envs.reset([7, 8])
        envs.step(still[:, :1])
        envs._groups[0]._timeout = 1.5
        fault.write_text("hang")
        begin = time.monotonic()
        with pytest.warns(
            RuntimeWarning,
            match=r"(?s)envs 0 to 1 \(PutOnPlate\S+-v3, episodes 7, 8, process \d+\) gave no answer for 1.5 s, it hung "
            r"here:.*in advance_or_fail",
        ):
            infos = envs.step(still)[4]
        assert time.monotonic() - begin > 1.5
        fault.unlink()
        envs._groups[0]._timeout = 60
        assert infos["dropped"].all() and not infos["valid"].any() and envs.describe() == start
        # a loss found by describe(): the next step's actions were meant for lost episodes and are not executed
        os.kill(envs._groups[0].pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="SIGKILL"):
            assert envs.describe() == start
        _, _, _, _, infos = envs.step(still)
        assert infos["dropped"].all() and envs.describe() == start
        _, _, _, _, infos = envs.step(still)
        assert infos["valid"].all() and not infos["dropped"].any()  # a success: losses are counted anew
        assert envs.num_restarts == 2

        resting = envs.step(still)
        os.kill(envs._groups[0].pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="0 episodes are dropped"):
            after = envs.step(still)
        assert same(after, resting) and not after[4]["valid"].any()

        envs.reset([7, 8])
        pid = envs._groups[0].pid
        fault.write_text("crash")
        with pytest.warns(RuntimeWarning, match=r"(?s)killed by SIGSEGV.*in advance_or_fail"):
            assert envs.step(still)[4]["dropped"].all()
        fault.write_text("raise")
        with pytest.raises(RuntimeError, match=r"(?s)3 losses in a row.*envs 0 to 1.*Traceback.*ArithmeticError: made"):
            envs.step(still)
        assert not alive(pid)
    with pytest.raises(RuntimeError, match="closed"):
        envs.step(still)


def listening(process: int) -> set[str]:
    """Sockets of a process that somebody else could connect to: TCP and UDP ones, and those with a path."""
    held = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir() if link.exists() or link.is_symlink()}
    found = set()
    for kind, column in (("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9)):
        for line in Path(f"/proc/{process}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == ("0A" if kind.startswith("tcp") else "07"):  # LISTEN; unconnected
                found |= {f"{kind} {fields[1]}"} if f"socket:[{fields[column]}]" in held else set()
    for line in Path(f"/proc/{process}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and f"socket:[{fields[6]}]" in held:  # it has a name
            found.add(f"unix {fields[7]}")
    return found


def test_workers_listen_nowhere_and_ask_nobody(fault):
    """They talk over a socket pair that nobody else can open, and their standard input is empty."""
    import socket

    before = listening(os.getpid())  # of tests that this process ran earlier
    with socket.create_server(("127.0.0.1", 0)) as server:  # this would be found
        assert listening(os.getpid()) - before == {f"tcp 0100007F:{server.getsockname()[1]:04X}"}
    with make(2, num_env_workers=2) as envs:
        envs.reset()
        assert listening(os.getpid()) <= before
        assert not any(listening(group.pid) for group in envs._groups)
        assert all(os.readlink(f"/proc/{group.pid}/fd/0") == os.devnull for group in envs._groups)


def test_a_loss_in_reset_drops_nothing_and_skips_no_episode(fault):
    with make(1, num_env_workers=1, auto_reset=True, seed=5) as envs:
        envs.reset()
        envs.step(np.zeros((1, 1, 7)))
        os.kill(envs._groups[0].pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="0 episodes are dropped"):
            envs.reset()
        assert envs.describe()[0]["episode_id"] == variants.train_episode_id(envs.num_start_states, 5, 0, 1)
        infos = envs.step(np.zeros((1, 1, 7)))[4]
        assert infos["valid"].all() and not infos["dropped"].any()


def test_a_loss_in_a_reset_of_some_drops_the_others(fault):
    with make(2, num_env_workers=1) as envs:
        envs.reset([5, 6])
        envs.step(np.zeros((2, 1, 7)))
        os.kill(envs._groups[0].pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="2 episodes are dropped"):
            begun = envs.reset([700_000], env_indices=[1])  # another object than in the first episodes
        assert [(state["episode_id"], state["elapsed_steps"]) for state in envs.describe()] == [(5, 0), (700_000, 0)]
        obs, _, _, _, infos = envs.step(np.zeros((2, 1, 7)))
        assert infos["dropped"].all() and not infos["valid"].any()
        assert len(set(obs["task_description"])) == 2 and same(obs, begun)
        infos = envs.step(np.zeros((2, 1, 7)))[4]
        assert infos["valid"].all() and [state["elapsed_steps"] for state in envs.describe()] == [1, 1]


class Still:
    """An actor that does nothing."""

    def begin(self, episode_ids) -> None:
        self.count = len(episode_ids)

    def restart(self, env: int) -> None:
        pass

    def act(self, obs: dict, envs: VectorEnv) -> torch.Tensor:
        return torch.zeros(self.count, 2, 7)


@pytest.mark.parametrize(
    "kind", ["crash", "begin", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("nan", "hang"))]
)
def test_an_episode_that_loses_its_worker_again_and_again_is_given_up(fault, kind):
    """It is reported as lost, and the episodes beside it in the same worker are not."""
    fault.write_text(f"{kind} 8")
    with make(3, num_env_workers=1, max_episode_steps=4, worker_timeout=20 if kind == "hang" else 300) as envs:
        with pytest.warns(RuntimeWarning, match="Episode 8 has lost its worker 3 times"):
            episodes = run_batch(Still(), envs, [7, 8, 9])
        assert [(one["episode_id"], one["episode_len"], is_lost(one)) for one in episodes] == [
            (7, 4.0, False),
            (8, 0.0, True),
            (9, 4.0, False),
        ]
        assert [len(one["actions"]) for one in episodes] == [4, 0, 4] and not episodes[1]["success_once"]
        assert "8" in lost_in_words(episodes) and lost_in_words(episodes[:1]) == ""
        assert envs.num_restarts == 3
        # the next episodes are played as if nothing had happened
        fault.unlink()
        assert [one["episode_len"] for one in run_batch(Still(), envs, [8, 10, 11])] == [4.0] * 3


def test_a_simulation_that_gives_numbers_that_are_not_finite_says_so(monkeypatch):
    with make(1) as envs:
        envs.reset([7])
        (env,) = envs._groups[0]._group.world.envs
        monkeypatch.setattr(env, "privileged_state", lambda: np.full(45, np.nan, np.float32))
        with pytest.raises(RuntimeError, match=r"episode 7 of .* not finite, 1 actions after its start: use"):
            envs.step(np.zeros((1, 2, 7)))


def test_no_file_or_process_is_left_behind():
    warm.run([sys.executable, "-c", ""])  # it has its files from now on
    files = set(os.listdir("/proc/self/fd"))
    envs = make(1, num_env_workers=1)
    pid = envs._groups[0].pid
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(np.zeros((1, 1, 7)))
    assert alive(pid)  # a wrong call harms nobody
    server = Path(f"/proc/{processes.server_now().pid}")  # neither threads nor a rendering device can be forked
    assert len(list((server / "task").iterdir())) == 1 and "libvulkan" not in (server / "maps").read_text()
    envs.close()
    envs.close()
    assert not alive(pid) and set(os.listdir("/proc/self/fd")) == files


def test_a_server_that_is_killed_or_stopped_takes_its_workers_along_and_is_replaced(fault, monkeypatch):
    with make(2, num_env_workers=2) as envs:
        envs.reset([7, 8])
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(processes.server_now().pid, number)
        assert envs.step(np.zeros((2, 1, 7)))[4]["valid"].all() and envs.num_restarts == 0
        pids = [group.pid for group in envs._groups]
        os.kill(processes.server_now().pid, signal.SIGKILL)
        assert wait_for(lambda: not any(map(alive, pids)))
        with pytest.warns(RuntimeWarning, match="killed, since the process that starts workers .* has ended"):
            assert envs.step(np.zeros((2, 1, 7)))[4]["dropped"].all()
        monkeypatch.setattr(processes, "SERVER_SECONDS", 5.0)
        os.kill(processes.server_now().pid, signal.SIGSTOP)
        os.kill(envs._groups[0].pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="gave no answer for 5 s"):
            assert envs.step(np.zeros((2, 1, 7)))[4]["dropped"][0]
        assert [state["episode_id"] for state in envs.describe()] == [7, 8]
        os.kill(processes.server_now().pid, signal.SIGSTOP)
        with pytest.raises(processes.ProcessLost, match="gave no answer for 5 s"):  # START_SECONDS are for imports
            processes.Process("envs.workers:work", "solovla test")


def test_a_process_that_not_even_sigkill_ends_is_left_behind(monkeypatch):
    monkeypatch.setattr(processes, "BURY_SECONDS", 0.2)
    stuck, other = (processes.Process(workers.WORKER, "solovla test") for _ in range(2))
    os.kill(stuck.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(processes.Process, "_signal", lambda *_: None)  # as if a driver held it in the kernel
        stuck.bury()
    assert alive(stuck.pid)
    os.kill(stuck.pid, signal.SIGKILL)
    other.bury()


def test_devices_that_are_open_are_found(monkeypatch):
    monkeypatch.setattr(processes, "GPUS", ("/dev/full",))
    assert processes.open_devices() == []
    with open("/dev/full"):
        assert processes.open_devices() == ["/dev/full"]


@pytest.mark.full
def test_a_server_with_threads_starts_fresh_interpreters(tmp_path, monkeypatch):
    """A fork of several threads could inherit a lock that nobody unlocks."""
    busy = "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()\n"
    (tmp_path / "sitecustomize.py").write_text(busy)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "subprocess", subprocess)
    with make(1, num_env_workers=1) as envs:
        envs.reset()
        server, worker = processes.server_now().pid, envs._groups[0].pid
        assert len(os.listdir(f"/proc/{server}/task")) == 2
        assert b"envs.workers:worker_main" in Path(f"/proc/{worker}/cmdline").read_bytes()
        os.kill(worker, signal.SIGUSR1)
        assert envs.step(np.zeros((1, 1, 7)))[4]["valid"].all() and envs.num_restarts == 0
    assert not alive(worker) and not alive(server)


# ---------------------------------------------------------------------------------------------------------------------
# other ManiSkill envs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cube():
    with world.make_envs(CUBE, 1, **TINY) as envs:
        yield envs


def lift(length: int) -> np.ndarray:
    """Down, turned about z, gripper open and then closed; float32 [1, length, 7]."""
    actions = np.zeros((1, length, 7), np.float32)
    actions[..., 2], actions[..., 5], actions[:, : length // 2, 6] = -0.03, 0.04, 1.0
    return actions


def test_start_states_of_another_env_are_its_seeds(cube):
    assert cube.num_start_states == world.num_start_states(CUBE) == 2**31 - 1
    ids = world.eval_episode_ids(CUBE, "train", 200)
    assert len(set(ids)) == 200 and all(map(world.is_held_out, ids)) and min(ids) >= 0 and max(ids) < 2**31 - 1
    assert world.eval_episode_ids(CUBE, "train", 7) == ids[:7]
    assert world.eval_episode_ids("PushCube-v1", "train", 7) != ids[:7]
    with pytest.raises(ValueError, match="ids 0 to 2147483646"):
        cube.reset([2**31 - 1])


def test_another_env_keeps_the_contract(cube):
    """Against ManiSkill's own reset and step with pictures: the same pictures, states and flags."""
    import gymnasium as gym

    theirs = gym.make(
        CUBE,
        obs_mode="rgb",
        reward_mode="sparse",
        control_mode="pd_ee_delta_pose",
        sim_backend="physx_cpu",
        render_backend="cpu",
        sensor_configs=dict(width=24, height=16),
    ).unwrapped
    their_obs, _ = theirs.reset(seed=11, options=dict(reconfigure=True))
    obs = cube.reset([11])
    assert obs["task_description"] == ["pick up the cube"]
    np.testing.assert_array_equal(obs["image"], their_obs["sensor_data"]["base_camera"]["rgb"])
    actions = lift(4)
    obs, rewards, terminations, truncations, infos = cube.step(actions)
    for action in actions[0]:
        # the Panda's bounds are +-0.1 m and, with ManiSkill's minus sign, +-0.1 rad; its gripper opens at +1
        units = [*action[:3] / 0.1, *-action[3:6] / 0.1, 1 if action[6] > 0.5 else -1]
        their_obs, reward, *_ = theirs.step(np.asarray(units, np.float32)[None])
    np.testing.assert_array_equal(obs["image"], their_obs["sensor_data"]["base_camera"]["rgb"])
    np.testing.assert_allclose(cube.describe()[0]["state"], theirs.get_state()[0], atol=1e-6)
    assert not rewards.any() and not reward.any() and infos["valid"].all() and rewards.shape == (1, 4)
    assert not (terminations.any() or truncations.any()) and cube.describe()[0]["elapsed_steps"] == 4
    theirs.close()


@pytest.mark.parametrize("axis", range(6))
def test_actions_are_metres_and_radians(cube, axis):
    cube.reset([3])
    before = cube.describe()[0]
    actions = np.zeros((1, 8, 7), np.float32)
    actions[..., axis], actions[..., 6] = 0.02, 1.0
    cube.step(actions)
    after = cube.describe()[0]
    moved = np.subtract(after["tcp_pose"][:3], before["tcp_pose"][:3])
    w, x, y, z = before["tcp_pose"][3:]
    (a, b, c, d) = after["tcp_pose"][3:]
    turned = 2 * np.array(
        [-a * x + b * w - c * z + d * y, -a * y + b * z + c * w - d * x, -a * z - b * y + c * x + d * w]
    )
    wanted = np.zeros(6)
    wanted[axis] = 0.16 * 0.4  # the drives lag behind the measured pose: about four tenths of the command
    np.testing.assert_allclose([*moved, *(turned * np.sign(a * w + b * x + c * y + d * z))], wanted, atol=0.012)
    assert after["qpos"][-1] > 0.035  # gripper open


def test_success_of_another_env_is_a_termination_and_gives_one(cube):
    """Reward is the increase of success; the task's own flag, switched by hand."""
    task = cube._groups[0]._group.world.envs[0]
    flags = iter([False, True])
    evaluate = task.env.evaluate
    cube.reset([3])
    task.env.evaluate = lambda: evaluate() | {"success": torch.tensor([next(flags)])}
    try:
        _, rewards, terminations, truncations, infos = cube.step(np.zeros((1, 4, 7)))
    finally:
        task.env.evaluate = evaluate
    assert rewards.tolist() == [[0, 1, 0, 0]] and terminations.all() and not truncations.any()
    assert infos["valid"].tolist() == [[True, True, False, False]]
    assert infos["episode"]["return"].tolist() == infos["episode"]["success_once"].tolist() == [1]


def test_a_chunk_costs_one_picture(cube, monkeypatch):
    from envs.maniskill_task import ManiSkillTask
    from envs.put_on_plate import PutOnPlateInScene

    taken = []
    for kind in (ManiSkillTask, PutOnPlateInScene):
        picture = kind.render_image
        monkeypatch.setattr(kind, "render_image", lambda env, picture=picture: taken.append(1) or picture(env))
    cube.reset([3])
    with make(2) as envs:
        envs.reset()
        taken.clear()
        envs.step(np.zeros((2, 8, 7)))
    assert len(taken) == 2
    cube.step(np.zeros((1, 8, 7)))
    assert len(taken) == 3


def test_an_episode_of_another_env_depends_on_nothing_before_it_and_resumes(cube):
    actions = lift(4)

    def play(envs):
        return [envs.reset([21]), envs.step(actions), envs.describe()]

    first = play(cube)
    cube.reset([4])
    cube.step(lift(3))
    assert same(play(cube), first)
    state, wanted = as_saved(cube.state_dict()), cube.step(actions)
    with world.make_envs(CUBE, 1, num_env_workers=1, **TINY) as envs:
        assert same(play(envs), first)
        envs.reset([5])
        assert same(envs.load_state_dict(state), first[1][0])
        assert same(envs.step(actions), wanted)
    with pytest.raises(ValueError, match="instruction="):
        cube.load_state_dict([{**state[0], "world": state[0]["world"] | {"instruction": "dance"}}])


def test_a_task_of_ones_own_needs_its_module_and_nothing_else(tmp_path):
    """`module:id` in a worker; the module stands in a folder on PYTHONPATH."""
    (tmp_path / "my_tasks.py").write_text(
        "from mani_skill.envs.tasks import PickCubeEnv\n"
        "from mani_skill.utils.registration import register_env\n"
        "@register_env('MyPick-v1', max_episode_steps=9)\n"
        "class MyPick(PickCubeEnv):\n"
        "    pass\n"
    )
    code = (
        "import envs\n"
        "with envs.make_envs('my_tasks:MyPick-v1', 1, instruction='mine', image_size=(8, 8), num_env_workers=1) as v:\n"
        "    v.reset(envs.eval_episode_ids('my_tasks:MyPick-v1', 'train', 1))\n"
        "    print(v.step([[[0.0] * 7]])[0]['task_description'])"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert out.stdout.strip() == "['mine']", out.stderr[-2000:]


@pytest.mark.parametrize(
    "code, said",
    [
        ("1 / 0", "ended in ZeroDivisionError (division by zero): `python -c 'import {}'` shows where."),
        ("raise SystemExit('no\\nlicence')", "ended in SystemExit (no licence)"),
        ("def broken(", "ended in SyntaxError"),
        ("import there_is_no_such_module", "No module named 'there_is_no_such_module', so add its folder"),
        ("pass", "unknown env_id '{}:Mine-v1'"),
    ],
)
def test_a_module_that_fails_is_one_sentence(tmp_path, monkeypatch, code, said):
    """The code of a task of one's own, whatever it does as it is imported."""
    name = f"own_task_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as caught:
        world.make_envs(f"{name}:Mine-v1", 1, **TINY)
    assert said.format(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(instruction=None), "needs an instruction"),
        (dict(instruction="  "), "needs an instruction"),
        (dict(env_id="PickCub-v1"), "did you mean 'PickCube-v1'"),
        (dict(env_id="nowhere:PickCube-v1"), "No module named 'nowhere'"),
        (dict(env_id="a/b"), "env_id 'a/b' is not an env id"),
        (dict(env_id="../tasks:Mine-v1"), "is not an env id: give one such as 'PickCube-v1'"),
        (dict(env_id="Cube\n-v1"), r"env_id 'Cube\\n-v1' is not an env id"),
        (dict(env_id=""), "env_id '' is not an env id"),
        (dict(env_id="MS-CartpoleBalance-v1"), "pd_ee_delta_pose"),
        (dict(env_id="PushT-v1"), r"actions of shape \(6,\)"),
        (dict(env_id="Empty-v1"), "reports no success"),
        (dict(obj_set="test"), "leave it at 'train'"),
        (dict(asset_pack="bridge"), "leave them out for PickCube-v1"),
        (dict(env_id=MAIN), "writes its own instructions"),
        (
            dict(env_id=MAIN, instruction=None, reward_mode="dense"),
            "has a reward of its own: leave reward_mode='dense'",
        ),
        (dict(reward_mode="shaped"), "unknown reward_mode 'shaped': use one of sparse, dense, normalized_dense"),
        (
            dict(env_id="PlugCharger-v1", reward_mode="dense"),
            "has no reward_mode 'dense', only none, sparse: leave it out",
        ),
        (dict(env_id=MAIN, instruction=None, pipeline_stages=3), "pipeline_stages=3"),
        (dict(env_id=MAIN, instruction=None, pipeline_stages=2), "num_envs=1"),
        (dict(env_id=MAIN, instruction=None, worker_timeout=0), "worker_timeout=0"),
    ],
)
def test_bad_arguments(change, words):
    arguments = dict(env_id=CUBE) | TINY | change
    with pytest.raises(ValueError, match=words) as caught:
        world.make_envs(arguments.pop("env_id"), 1, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_env_workers", [0, 1])
def test_missing_assets_are_one_sentence_and_no_question(tmp_path, num_env_workers):
    """With a standard input that would say yes, and ManiSkill's own switch that skips the question."""
    code = (
        "import envs\ntry:\n    envs.make_envs('PickSingleYCB-v1', 1, instruction='pick it up', image_size=(8, 8),"
        f" num_env_workers={num_env_workers})\n"
        "except RuntimeError as error:\n    print('SAID', error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        input="y\n" * 9,
        env=os.environ | {"MS_ASSET_DIR": str(tmp_path), "MS_SKIP_ASSET_DOWNLOAD_PROMPT": "1"},
    )
    said = [line for line in out.stdout.splitlines() if line.startswith("SAID")]
    assert len(said) == 1 and "ycb" in said[0], out.stderr[-2000:]
    assert said[0].endswith("run `python -m mani_skill.utils.download_asset PickSingleYCB-v1`.")
    assert not any(tmp_path.iterdir())


def test_what_is_there_before_the_first_env_is_not_searched_for_garbage():
    """And nothing else is kept: envs that were closed are garbage."""
    gc.unfreeze()
    with make(1):
        kept = gc.get_freeze_count()
        assert kept > 100_000
        with make(1):
            assert kept / 2 < gc.get_freeze_count() <= kept  # some of them may have ended since


def test_out_of_range_actions():
    with make(2, **SMALL) as envs:
        envs.reset()
        for index, value in (((1, 0, 2), 1.5), ((0, 1, 4), -1.6), ((1, 1, 0), 1e9)):
            actions = np.zeros((2, 2, 7))
            actions[index] = value
            with pytest.raises(ValueError, match=rf"actions\[{index[0]}, {index[1]}, {index[2]}\].*unnorm_key"):
                envs.step(actions)
        actions = np.zeros((2, 2, 7))
        actions[..., :3], actions[..., 3:6], actions[..., 6] = 1.0, np.pi / 2, 40.0
        assert envs.step(actions)[4]["valid"].all()
