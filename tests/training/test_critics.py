"""The critic that reads the simulator's state: what it learns, and that ranks and resuming change nothing."""

import copy

import numpy as np
import pytest
import torch

from envs import make_envs
from vla.files.trees import load_tree, save_tree
from vla.training import critics
from vla.training.critics import StateCritic

T, N, C, S = 6, 4, 2, 5
CPU = torch.device("cpu")


def critic_of(num_envs: int = N, **changes) -> StateCritic:
    flags = dict(value_learning_rate=3e-3, huber_delta=1.0, value_clip=None, critic_epochs=20) | changes
    return StateCritic(T, num_envs, C, S, CPU, 7, **flags)


def rollout(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of very different sizes, one of which never varies; returns that follow from them; who was executed."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(T, N, C, S, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 1.0, 0.0]) + 3.0
    returns = (states[..., 0] - 3.0).tanh() + (states[..., 1] - 3.0) / 100
    return states, returns, torch.rand(T, N, C, generator=generator) < 0.8


def stored(critic: StateCritic, t: int, envs: slice, states: torch.Tensor) -> torch.Tensor:
    return critic.chunk_values(t, envs, {"states": states}, torch.empty(0))


def fit(critic: StateCritic, seed: int, envs: slice = slice(None)) -> dict:
    states, returns, valid = (x[:, envs] for x in rollout(seed))
    values = torch.stack([stored(critic, t, slice(0, states.shape[1]), states[t]) for t in range(T)])
    return critic.fit(returns, values, valid, torch.Generator().manual_seed(seed))


def test_it_begins_with_one_value_and_learns_those_of_states_of_any_size():
    critic = critic_of()
    states, returns, _ = rollout(0)
    assert critic(states).unique().abs().item() < 0.1 and critic(states).shape == (T, N, C)
    losses = [fit(critic, seed)["train/critic/value_loss"] for seed in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    states, returns, _ = rollout(99)  # never seen
    assert ((critic(states) - returns) ** 2).mean() < 0.02 * returns.var()


def test_values_that_moved_further_than_the_clip_teach_no_more_and_are_counted():
    """Returns lie 1 above the one value that it begins with; what is logged is of the second pass."""
    for clip, share, loss in ((1e-4, 1.0, (1 - 1e-4) ** 2 / 2), (100.0, 0.0, None), (None, 0.0, None)):
        critic = critic_of(value_clip=clip, critic_epochs=2)
        states, _, valid = rollout(0)
        values = torch.stack([stored(critic, t, slice(0, N), states[t]) for t in range(T)])
        metrics = critic.fit(values + 1.0, values, valid, torch.Generator().manual_seed(0))
        assert metrics["train/critic/value_clip_ratio"] == share, clip
        if loss is None:
            assert metrics["train/critic/value_loss"] < 0.499
        else:
            assert metrics["train/critic/value_loss"] == pytest.approx(loss, abs=1e-6)
    reached = []
    for clip in (0.01, None):
        critic = critic_of(value_clip=clip)
        values = torch.stack([stored(critic, t, slice(0, N), states[t]) for t in range(T)])
        critic.fit(values + 1.0, values, valid, torch.Generator().manual_seed(0))
        reached.append(float((critic(states) - values)[valid].mean()))
    assert reached[0] < 0.7 * reached[1]  # Adam's momentum goes on for a while


def test_storing_gives_values_and_refuses_another_shape():
    critic = critic_of()
    fit(critic, 0)
    states = rollout(1)[0]
    assert torch.equal(stored(critic, 2, slice(1, 3), states[2, 1:3]), critic(states[2, 1:3]))
    assert torch.equal(critic.states[2, 1:3], states[2, 1:3])
    with pytest.raises(ValueError, match=r"holds \(2, 2, 5\), got \(2, 2, 4\)"):
        stored(critic, 2, slice(1, 3), states[2, 1:3, :, :4])


def test_what_it_normalises_by_is_the_mean_and_variance_of_all_that_was_executed():
    critic, seen = critic_of(), []
    for seed in range(3):
        fit(critic, seed)
        states, _, valid = rollout(seed)
        seen.append(states[valid].double())
    seen = torch.cat(seen)
    assert critic.count == len(seen)
    torch.testing.assert_close(critic.mean, seen.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(critic.squares / critic.count, seen.var(0, correction=0), rtol=1e-9, atol=1e-9)
    far = torch.full((S,), 1e6)
    assert critic._normalized(far).tolist() == [critics.LIMIT] * S


def test_two_ranks_are_as_one(monkeypatch):
    """Each rank has half of the envs and gathers the other's: both then hold what one rank with all envs holds."""
    whole, halves = critic_of(value_clip=0.1), [critic_of(N // 2, value_clip=0.1) for _ in range(2)]
    for seed in range(2):
        fit(whole, seed)
        states, returns, valid = rollout(seed)
        halved = (slice(0, 2), slice(2, 4))
        values = torch.cat([half(states[:, part]) for half, part in zip(halves, halved)], 1)
        parts = [tuple(x[:, part].numpy() for x in (states, returns, values, valid)) for part in halved]
        monkeypatch.setattr(critics, "all_gather_lists", lambda mine, parts=parts: parts)
        for number, half in enumerate(halves):
            fit(half, seed, slice(2 * number, 2 * number + 2))
        monkeypatch.undo()
    probe = rollout(5)[0]
    for half in halves:
        assert torch.equal(half(probe), whole(probe))


def test_it_goes_on_from_a_checkpoint_with_this_runs_rate(tmp_path):
    critic = critic_of()
    fit(critic, 0)
    save_tree(critic.state_dict(), tmp_path / "critic.safetensors")
    resumed, slower = critic_of(), critic_of(value_learning_rate=1e-5)
    for later in (resumed, slower):
        later.load_state_dict(load_tree(tmp_path / "critic.safetensors"))
    before = copy.deepcopy(slower.net.state_dict())
    for each in (critic, resumed, slower):
        fit(each, 1)
    probe = rollout(5)[0]
    assert torch.equal(resumed(probe), critic(probe))
    moved = [(slower.net.state_dict()[name] - before[name]).abs().max() for name in before]
    assert 0 < max(moved) < 1e-3  # at the old rate it would have moved by 3e-3 a step


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, size", [("PutOnPlateInScene25Single-v1", 46), pytest.param("PickCube-v1", 88, marks=pytest.mark.full)]
)
def test_states_come_with_observations(env_id, size):
    """Before each action, at the end of an episode, and at the beginning of the next."""
    kwargs = {} if env_id.startswith("PutOn") else {"instruction": "pick up the cube"}
    with make_envs(
        env_id, 2, image_size=(32, 24), sim_freq=100, max_episode_steps=3, auto_reset=True, privileged=True, **kwargs
    ) as envs:
        first = envs.reset()["state"]
        assert first.shape == (2, size) and first.dtype == torch.float32 and first.isfinite().all()
        down = np.tile(np.array([0, 0, -0.02, 0, 0, 0, 1], np.float32), (2, 2, 1))
        obs, _, _, _, infos = envs.step(down)
        assert infos["states"].shape == (2, 2, size) and torch.equal(infos["states"][:, 0], first)
        assert infos["states"][:, 1, -1].tolist() == pytest.approx([1 / 3] * 2)  # the share of the episode
        before = obs["state"]
        obs, _, _, truncations, infos = envs.step(down)
        assert truncations.all() and torch.equal(infos["states"][:, 0], before)
        final = infos["final_observation"]["state"]
        assert final.shape == (2, size) and (final[:, -1] == 1).all() and (obs["state"][:, -1] == 0).all()
        if env_id.startswith("PutOn"):
            heights = [state[:, 2] for state in (first, before, final)]
            assert (heights[0] > heights[1]).all() and (heights[1] > heights[2]).all()  # the tool goes down
    with make_envs(env_id, 1, image_size=(32, 24), sim_freq=100, **kwargs) as envs:
        assert "state" not in envs.reset()
