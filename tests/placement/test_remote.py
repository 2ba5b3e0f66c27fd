"""Envs of another rank are the same envs."""

import os
import signal
import threading

import pytest
import torch
from sameness import same
from wires import two_wires

from envs import make_envs
from envs.remote import NoEnvs, RemoteEnvs, ServedEnvs, Service
from schemas import UserError
from schemas.pixels import Pixels, resize
from vla.placement.place import PairLine

WORLD = dict(image_size=(32, 24), sim_freq=20, max_episode_steps=3, auto_reset=True, privileged=True)
PIXELS = Pixels((16, 16), "tensor")
MAIN = "PutOnPlateInScene25Main-v3"


def actions(t: int, n: int) -> torch.Tensor:
    return torch.rand(n, 2, 7, generator=torch.Generator().manual_seed(t)) * 0.1


def shrunk(obs: dict) -> dict:
    return obs | {"image": resize(obs["image"], *PIXELS)}


@pytest.fixture
def remote():
    """Envs with two halves behind a wire, and what serves them."""
    wires = two_wires()
    service = Service(
        make_envs(MAIN, 3, pipeline_stages=2, **WORLD),
        PairLine(wires[0], 1),
        PIXELS,
        lambda **settings: make_envs(MAIN, **WORLD | settings),
    )
    thread = threading.Thread(target=service.calls, daemon=True)
    thread.start()
    yield RemoteEnvs(PairLine(wires[1], 0)), service, thread
    service.close()


def turns(envs, decisions: int) -> list:
    seen = []
    for t, half, rows, obs, outcome in envs.pipeline(range(decisions + 1)):
        seen.append((t, half, obs, outcome))
        if t < decisions:
            envs.step_async(actions(t, 3)[rows], half)
    return seen


def test_a_pipeline_shows_what_it_shows_at_home(remote):
    envs, _, thread = remote
    with make_envs(MAIN, 3, pipeline_stages=2, **WORLD) as home:
        assert (envs.num_envs, envs.halves, envs.repeats) == (home.num_envs, home.halves, home.repeats)
        assert same(envs.reset(), shrunk(home.reset()))
        ours, theirs = turns(envs, 4), turns(home, 4)
        assert any(outcome is not None and len(outcome.infos["ended"]) for *_, outcome in theirs)
        for (t, half, obs, outcome), (their_t, their_half, their_obs, their_outcome) in zip(ours, theirs, strict=True):
            assert (t, half) == (their_t, their_half) and same(obs, shrunk(their_obs))
            if their_outcome is not None:
                infos = dict(their_outcome.infos)
                infos["final_observation"] = shrunk(infos["final_observation"])
                expected = their_outcome._replace(obs=shrunk(their_outcome.obs), infos=infos)
                assert same(outcome._asdict(), expected._asdict())
        states = home.state_dict()
        assert [state["episode_id"] for state in envs.state_dict()] == [state["episode_id"] for state in states]
        assert same(envs.load_state_dict(states), shrunk(home.load_state_dict(states)))
    envs.close()
    thread.join(10)
    assert not thread.is_alive()


def test_further_envs_and_errors_cross_the_wire(remote):
    envs, service, thread = remote
    envs.reset()
    with envs.open(1, True, num_envs=2, auto_reset=False) as evaluated:
        assert evaluated.reset([5, 6])["image"].shape == (2, 16, 16, 3)
        outcome = evaluated.step(actions(0, 2))
        assert outcome.rewards.shape == (2, 2) and outcome.infos["states"].shape[:2] == (2, 2)
    assert 1 not in service.opened
    with envs.open(2, False, num_envs=1) as shown:  # for people
        assert shown.reset([5])["image"].shape == (1, 24, 32, 3)
    with pytest.raises(RuntimeError, match=r"the rank that simulates reports: .*episode ids"):
        envs.reset([1])
    envs.step_async(torch.full((1, 2, 7), torch.nan), 0)
    with pytest.raises(UserError, match="actions must be finite"):
        envs.step_wait(0)
    envs.end(75)
    thread.join(10)


def test_ranks_without_turns_follow_the_run():
    wires = two_wires()
    served = ServedEnvs(Service(make_envs(MAIN, 2, **WORLD), PairLine(wires[0], 1), PIXELS))
    envs = RemoteEnvs(PairLine(wires[1], 0), keeps_states=False)
    obs = envs.reset()
    assert same(served.reset(), obs) and not list(served.pipeline(range(3))) and not served.halves
    assert envs.state_dict() == [] and len(served.state_dict()) == 2  # each state is saved once
    envs.close()
    served.close()
    nothing = NoEnvs()
    assert nothing.reset() is None and not list(nothing.pipeline(range(3))) and nothing.state_dict() == []


def test_a_worker_that_is_lost_behind_the_wire_is_replaced_and_the_rollout_goes_on():
    """Its envs' decision is dropped, as it would be at home, and the next ones count."""
    wires = two_wires()
    served = make_envs(MAIN, 2, num_env_workers=2, **WORLD | {"privileged": False})
    service = Service(served, PairLine(wires[0], 1), PIXELS)
    thread = threading.Thread(target=service.calls, daemon=True)
    thread.start()
    envs = RemoteEnvs(PairLine(wires[1], 0))
    envs.reset()
    outcomes = []
    with pytest.warns(RuntimeWarning, match="worker"):
        for t, half, _, _, outcome in envs.pipeline(range(4)):
            outcomes += [] if outcome is None else [outcome]
            if t == 1:
                os.kill(served.workers[1].process.pid, signal.SIGKILL)
            if t < 3:
                envs.step_async(actions(t, 2), half)
    assert [outcome.infos["dropped"].tolist() for outcome in outcomes] == [[False] * 2, [False, True], [False] * 2]
    assert outcomes[2].infos["valid"].any(dim=1).all() and served.num_restarts == 1
    assert len(envs.state_dict()) == 2
    envs.close()
    thread.join(10)
    service.close()
