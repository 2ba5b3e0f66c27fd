"""compute_gae and ppo_loss against a brute-force sum and against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from losses import gae_of, split_flags
from losses import ppo_loss_of as loss_of

from envs.vector import Outcome
from train_ppo import (
    compute_gae,
    has_future,
    outcome_of_decision,
    policy_rate,
    ppo_loss,
    surrogate_units,
    used_advantages,
)
from vla.distributed import normalize
from vla.models.policy import PolicyInputs, PolicyOutput, fan_kl
from vla.training.rollout_buffer import MicroBatch

FLAGS = dict(
    logprob_level="action",
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    dual_clip=None,
    value_clip=0.2,
    huber_delta=10.0,
    vf_coef=1.0,
    ent_coef=0.0,
)


# ------------------------------------------------------------------ advantages
def gae_brute_force(rewards, values, valid, dones, final_values, next_value, gamma, lam):
    """One env. For every executed action: the O(K^2) sum of discounted deltas up to the end of its episode."""
    T, C = rewards.shape
    steps = []  # (t, c, value of what follows, last of its episode)
    for t in range(T):
        executed = [c for c in range(C) if valid[t, c]]
        for c in executed:
            steps.append([t, c, None, bool(dones[t]) and c == executed[-1]])
    for k, step in enumerate(steps):
        if step[3]:
            step[2] = float(final_values[step[0]])
        elif k + 1 < len(steps):
            step[2] = float(values[steps[k + 1][0], steps[k + 1][1]])
        else:
            step[2] = float(next_value)
    advantages = torch.zeros(T, C, dtype=torch.float64)
    for k, (t, c, _, _) in enumerate(steps):
        total, weight = 0.0, 1.0
        for u, d, following, last in steps[k:]:
            total += weight * (float(rewards[u, d]) + gamma * following - float(values[u, d]))
            weight *= gamma * lam
            if last:
                break
        advantages[t, c] = total
    return advantages


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_gae_equals_brute_force(T, N, C, auto_reset, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rewards, values, final_values, next_values = draw(T, N, C), draw(T, N, C), draw(T, N), draw(N)
    dones = torch.rand(T, N, generator=generator) < 0.4
    length = torch.randint(1, C + 1, (T, N), generator=generator)  # a done chunk may stop early
    valid = torch.arange(C)[None, None] < torch.where(dones, length, C)[..., None]
    if not auto_reset:  # after the first done nothing is executed any more
        over = torch.cat([torch.zeros(1, N, dtype=torch.bool), dones.cumsum(0).bool()[:-1]])
        valid, dones = valid & ~over[..., None], dones & ~over
    rewards = rewards * valid
    advantages, returns = gae_of(rewards, values, valid, dones, final_values, next_values, gamma, lam)
    for n in range(N):
        expected = gae_brute_force(
            rewards[:, n], values[:, n], valid[:, n], dones[:, n], final_values[:, n], next_values[n], gamma, lam
        )
        assert torch.allclose(advantages[:, n], expected, atol=1e-9)
    assert torch.allclose(returns, torch.where(valid, advantages + values, 0.0))


def test_which_ended_episodes_have_a_future():
    """One success, one cut episode, one that goes on."""
    terminations, truncations = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    for bootstrap, expected in (("truncation", [0, 1, 0]), ("always", [1, 1, 0]), ("never", [0, 0, 0])):
        assert has_future(terminations, truncations, bootstrap).tolist() == expected, bootstrap


def test_gae_by_hand():
    """gamma = lambda = 0.5, C = 1, two envs; env 0 is cut at t = 1 and bootstrapped with 4, env 1 succeeds at t = 1
    (0)."""
    rewards = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[2.0], [0.0]]])
    values = torch.tensor([[[1.0], [0.5]], [[2.0], [0.5]], [[1.0], [1.0]]])
    dones = torch.tensor([[False, False], [True, True], [False, False]])
    final_values = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
    advantages, returns = gae_of(
        rewards, values, torch.ones(3, 2, 1, dtype=torch.bool), dones, final_values, torch.tensor([2.0, 2.0]), 0.5, 0.5
    )
    # env 0: A2 = 2 + .5*2 - 1 = 2 (new episode); A1 = 0 + .5*4 - 2 = 0; A0 = 1 + .5*2 - 1 + .25*0 = 1
    # env 1: A2 = 0 + .5*2 - 1 = 0; A1 = 1 + 0 - .5 = .5; A0 = 0 + .5*.5 - .5 + .25*.5 = -.125
    assert advantages[..., 0].tolist() == [[1.0, -0.125], [0.0, 0.5], [2.0, 0.0]]
    assert returns[..., 0].tolist() == [[2.0, 0.375], [2.0, 1.0], [3.0, 1.0]]


def test_the_example_of_the_docstring():
    """One env, two decisions of one action, gamma = lambda = 1, the reward comes with the last action."""
    rewards, values = torch.tensor([0.0, 1.0]).view(2, 1, 1), torch.tensor([0.5, 0.75]).view(2, 1, 1)
    valid, dones = torch.ones(2, 1, 1, dtype=torch.bool), torch.tensor([[False], [True]])
    advantages, returns = gae_of(rewards, values, valid, dones, torch.zeros(2, 1), torch.zeros(1), 1.0, 1.0)
    assert advantages.flatten().tolist() == [0.5, 0.25] and returns.flatten().tolist() == [1.0, 1.0]
    assert "A_2 = 1 + 0 - 0.75 = 0.25 and A_1 = 0 + 0.75 - 0.5 + A_2 = 0.5" in compute_gae.__doc__


def test_gae_inside_a_chunk_by_hand():
    """One env, C = 3, gamma = lambda = 1: success at the second action of the first chunk; the third was never
    executed."""
    rewards = torch.tensor([[[0.1, 1.0, 0.0]], [[0.0, 0.0, 0.3]]])
    values = torch.tensor([[[0.5, 0.6, 9.0]], [[0.1, 0.2, 0.3]]])
    valid = torch.tensor([[[True, True, False]], [[True, True, True]]])
    advantages, returns = gae_of(
        rewards, values, valid, torch.tensor([[True], [False]]), torch.zeros(2, 1), torch.tensor([0.7]), 1.0, 1.0
    )
    # with gamma = lambda = 1 a return is the sum of rewards to the end, plus 0.7 where the rollout stops mid-episode
    assert torch.allclose(returns, torch.tensor([[[1.1, 1.0, 0.0]], [[1.0, 1.0, 1.0]]]))
    assert torch.allclose(advantages, torch.tensor([[[0.6, 0.4, 0.0]], [[0.9, 0.8, 0.7]]]))


def test_an_episode_lost_with_its_worker_is_cut_at_the_frame_it_was_lost_on():
    """gamma = lambda = 1: decision 1 was not executed; what precedes it is worth 0.2 + V(its frame) = 0.2 + 0.5."""
    rewards, values = torch.tensor([0.2, 0.0, 0.4]).view(3, 1, 1), torch.tensor([0.1, 0.5, 0.3]).view(3, 1, 1)
    valid, dones = torch.tensor([True, False, True]).view(3, 1, 1), torch.tensor([[False], [True], [False]])
    final_values = torch.tensor([[0.0], [0.5], [0.0]])
    _, returns = gae_of(rewards, values, valid, dones, final_values, torch.tensor([0.6]), 1.0, 1.0)
    assert torch.allclose(returns[:, 0, 0], torch.tensor([0.7, 0.0, 1.0]))


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_the_advantages_that_the_loss_reads_are_those_that_are_normalised(level):
    """The actions of a chunk differ, so that those that are not read would spoil mean and variance."""
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(5, 4, 3, generator=generator) + torch.tensor([0.0, 50.0, 90.0])
    valid = torch.rand(5, 4, 3, generator=generator) < 0.9
    valid[..., 0] = True
    used = used_advantages(valid, level)
    read = advantages.clone().requires_grad_()
    for t in range(5):
        mb = micro_batch(torch.zeros(4, 3, 7), torch.zeros(4, 3), read[t], torch.zeros(4, 3), valid[t])
        loss_of(
            torch.zeros(4, 3, 7),
            torch.zeros(4, 3, 7),
            torch.zeros(4, 3),
            mb,
            1.0,
            **FLAGS | {"logprob_level": level, "vf_coef": 0.0},
        )[0].backward()
    assert torch.equal(read.grad != 0, used)
    normalised = normalize(advantages, used)[used]
    assert normalised.mean().abs() < 1e-5 and normalised.std() == pytest.approx(1.0, abs=1e-4)


# ------------------------------------------------------------------ loss
def micro_batch(old_logprobs, old_values, advantages, returns, mask) -> MicroBatch:
    inputs = PolicyInputs(None, None, None)
    return MicroBatch(inputs, None, old_logprobs, old_values, advantages, returns, mask.float(), None, 1.0, True)


def spread_over_tokens(ratios: list[float], D: int = 7) -> torch.Tensor:
    """[B] ratios of an action -> log-ratios [B, 1, D] of its tokens."""
    return torch.tensor(ratios).log()[:, None, None].expand(-1, 1, D) / D


def test_policy_loss_by_hand_on_both_clip_sides():
    """Ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages 2, -2, 1, -1, 1 and clip 0.2."""
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], torch.tensor([2.0, -2.0, 1.0, -1.0, 1.0])[:, None]
    zeros = torch.zeros(5, 1)
    mb = micro_batch(torch.zeros(5, 1, 7), zeros, advantages, zeros, torch.ones(5, 1, dtype=torch.bool))
    loss, metrics = loss_of(spread_over_tokens(ratios), torch.zeros(5, 1, 7), zeros, mb, 5.0, **FLAGS)
    # -min(r A, clip(r) A): 1.2*2 = 2.4 clipped; 1.5*-2 = -3; 0.5*1 = 0.5; 0.8*-1 = -0.8 clipped; 1.1
    assert loss.item() == pytest.approx(-(2.4 - 3.0 + 0.5 - 0.8 + 1.1) / 5, abs=1e-6)
    assert metrics["train/actor/clip_fraction"].item() == pytest.approx(2 / 5)
    assert metrics["train/actor/clipped_ratio"].item() == pytest.approx((1.2 + 1.2 + 0.8 + 0.8 + 1.1) / 5, abs=1e-6)
    kl = sum(r - 1 - math.log(r) for r in ratios) / 5
    assert metrics["train/actor/approx_kl"].item() == pytest.approx(kl, abs=1e-6)


def test_ratio_one_gives_the_policy_gradient():
    """At the first micro batch the gradient is -A / count for every token of an action: no factor 7."""
    new = torch.zeros(2, 1, 7, requires_grad=True)
    mb = micro_batch(
        torch.zeros(2, 1, 7), torch.zeros(2, 1), torch.tensor([[3.0], [-1.0]]), torch.zeros(2, 1), torch.ones(2, 1) > 0
    )
    loss, _ = loss_of(new, torch.zeros(2, 1, 7), torch.zeros(2, 1), mb, 2.0, **FLAGS)
    loss.backward()
    assert torch.allclose(new.grad, torch.tensor([-1.5, 0.5])[:, None, None].expand(2, 1, 7))


def test_token_level_clips_every_token():
    """Seven tokens with ratio 1.5 and A = 1: each is clipped at 1.2 and their mean counts, not their sum."""
    new = torch.full((1, 1, 7), 1.5).log()
    mb = micro_batch(torch.zeros(1, 1, 7), torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1) > 0)
    flags = FLAGS | {"logprob_level": "token"}
    loss, metrics = loss_of(new, torch.zeros(1, 1, 7), torch.zeros(1, 1), mb, 1.0, **flags)
    assert loss.item() == pytest.approx(-1.2)
    assert metrics["train/actor/clip_fraction"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
@pytest.mark.parametrize("log_ratio", [100.0, -200.0, 3e38, math.inf, math.nan])
def test_no_ratio_makes_a_loss_or_a_gradient_that_is_not_finite(level, log_ratio):
    """An action whose ratio overflows, among others: alone if it was executed, and nothing at all if it was not."""
    executed = math.isfinite(log_ratio)
    new = torch.full((3, 2, 7), 0.01)
    new[1, 0] = log_ratio
    new.requires_grad_()
    mask = torch.ones(3, 2, dtype=torch.bool)
    for advantage, counts in ((2.0, executed), (-2.0, executed), (2.0, False), (-2.0, False)):
        mask[1, 0] = counts
        zeros, advantages = torch.zeros(3, 2), torch.full((3, 2), advantage)
        mb = micro_batch(torch.zeros(3, 2, 7), zeros, advantages, zeros, mask)
        for dual_clip in (None, 3.0):
            flags = FLAGS | {"logprob_level": level, "dual_clip": dual_clip}
            loss, metrics = loss_of(new, torch.zeros(3, 2, 7), zeros, mb, 6.0, **flags)
            (gradient,) = torch.autograd.grad(loss, new)
            assert all(math.isfinite(value) for value in metrics.values()), (advantage, counts)
            assert gradient.isfinite().all() and gradient[0].abs().min() > 0 and gradient[1, 0].abs().max() == 0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["token", "action", "chunk"]), st.integers(0, 999))
def test_ratios_within_the_limit_count_bit_for_bit_as_without_it(level, seed):
    """The same loss and gradient as from the formulas without a limit, where nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    new, old = (torch.randn(6, 3, 7, generator=generator) * 0.9 for _ in range(2))
    advantages, mask = torch.randn(6, 3, generator=generator), torch.rand(6, 3, generator=generator) < 0.8
    mask[:, 0], weights = True, mask.float()
    mb = micro_batch(old, torch.zeros(6, 3), advantages, torch.zeros(6, 3), mask)
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    flags = FLAGS | {"logprob_level": level}
    loss, _ = loss_of(ours, torch.zeros(6, 3, 7), torch.zeros(6, 3), mb, 11.0, **flags)
    log_ratio, weights = theirs - old, mask.float()
    if level == "token":
        advantages, weights = advantages[..., None], (weights / 7)[..., None].expand_as(log_ratio)
    else:
        log_ratio = log_ratio.sum(dim=-1)
    if level == "chunk":
        log_ratio = (log_ratio * (weights > 0)).sum(dim=1, keepdim=True)
        advantages, weights = advantages[:, :1], weights.sum(dim=1, keepdim=True)
    ratio = log_ratio.exp()
    expected = (torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * weights).sum() / 11.0
    assume(log_ratio.abs().max() < 20)  # one chunk in some thousands is beyond the limit
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, ours)[0], torch.autograd.grad(expected, theirs)[0])


def test_value_clip_and_huber_by_hand():
    """V_old 1, clip 0.2. V 1.5, R 2: clipped to 1.2, error 0.8 counts. V 0.9, R 0: error 0.9. V 30, R 0, no clip:
    linear part."""
    old, returns = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [0.0]])
    mb = micro_batch(torch.zeros(2, 1, 7), old, torch.zeros(2, 1), returns, torch.ones(2, 1) > 0)
    loss, metrics = loss_of(
        torch.zeros(2, 1, 7), torch.zeros(2, 1, 7), torch.tensor([[1.5], [0.9]]), mb, 2.0, **FLAGS | {"vf_coef": 0.5}
    )
    assert metrics["train/critic/value_loss"].item() == pytest.approx((0.8**2 / 2 + 0.9**2 / 2) / 2)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 / 2 + 0.9**2 / 2) / 2)
    assert metrics["train/critic/value_clip_ratio"].item() == pytest.approx(0.5)
    far = micro_batch(
        torch.zeros(1, 1, 7), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1) > 0
    )
    _, metrics = loss_of(
        torch.zeros(1, 1, 7), torch.zeros(1, 1, 7), torch.tensor([[30.0]]), far, 1.0, **FLAGS | {"value_clip": None}
    )
    assert metrics["train/critic/value_loss"].item() == pytest.approx(10.0 * (30.0 - 5.0))
    assert metrics["train/critic/value_clip_ratio"].item() == 0.0


def test_entropy_bonus_and_mask():
    """A masked action changes nothing; entropy lowers the loss by ent_coef times its mean over tokens."""
    mask = torch.tensor([[True], [False]])
    mb = micro_batch(torch.zeros(2, 1, 7), torch.zeros(2, 1), torch.tensor([[1.0], [77.0]]), torch.zeros(2, 1), mask)
    entropy = torch.tensor([2.0, 55.0])[:, None, None].expand(2, 1, 7)
    for level in ("action", "token"):
        flags = FLAGS | {"ent_coef": 0.1, "logprob_level": level}
        loss, metrics = loss_of(torch.zeros(2, 1, 7), entropy, torch.tensor([[0.0], [9.0]]), mb, 1.0, **flags)
        assert loss.item() == pytest.approx(-1.0 - 0.1 * 2.0)
        assert metrics["train/entropy_loss"].item() == pytest.approx(2.0)
        assert metrics["train/critic/value_loss"].item() == 0.0


def test_two_ranks_in_plain_arithmetic_equal_one():
    """Sums over 2 micro batches, averaged over 2 ranks, equal the loss of the whole, with uneven masks."""
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(8, 2, 7, generator=generator) * 0.1, torch.randn(8, 2, 7, generator=generator) * 0.1
    values, old_values, advantages, returns = (torch.randn(8, 2, generator=generator) for _ in range(4))
    mask = torch.rand(8, 2, generator=generator) < 0.7
    entropy = torch.rand(8, 2, 7, generator=generator)
    flags = FLAGS | {"ent_coef": 0.01}
    count = float(mask.sum())
    whole, whole_metrics = loss_of(
        new, entropy, values, micro_batch(old, old_values, advantages, returns, mask), count, **flags
    )
    parts, part_metrics = [], []
    for part in torch.arange(8).split(2):
        mb = micro_batch(old[part], old_values[part], advantages[part], returns[part], mask[part])
        loss, metrics = loss_of(new[part], entropy[part], values[part], mb, count / 2, **flags)
        parts.append(loss)
        part_metrics.append(metrics)
    assert (sum(parts) / 2).item() == pytest.approx(whole.item(), abs=1e-6)
    for tag, value in whole_metrics.items():
        assert sum(float(m[tag]) for m in part_metrics) / 2 == pytest.approx(float(value), abs=1e-6), tag


# ------------------------------------------------------------------ regularisers
def test_reference_kl_by_hand():
    """k3 per token: exp(d) - 1 - d with d = log reference - log new; a masked action does not count."""
    reference = torch.tensor([1.5, 9.0]).log()[:, None, None].expand(2, 1, 7)
    mask = torch.tensor([[True], [False]])
    zeros = torch.zeros(2, 1)
    mb = micro_batch(torch.zeros(2, 1, 7), zeros, zeros, zeros, mask)._replace(reference_logprobs=reference)
    new = torch.zeros(2, 1, 7, requires_grad=True)
    loss, metrics = loss_of(new, torch.zeros(2, 1, 7), zeros, mb, 1.0, **FLAGS | {"kl_coef": 0.1})
    expected = 0.5 - math.log(1.5)
    assert metrics["train/actor/reference_kl"].item() == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(0.1 * expected, abs=1e-6)
    loss.backward()  # d/dnew of k3 is 1 - reference / new = -0.5, a seventh of it per token
    assert torch.allclose(new.grad[0], torch.full((1, 7), -0.1 * 0.5 / 7)) and new.grad[1].abs().max() == 0
    off, without = loss_of(new, torch.zeros(2, 1, 7), zeros, mb, 1.0, **FLAGS)
    assert off.item() == 0 and "train/actor/reference_kl" not in without


@pytest.mark.parametrize("distance", [100.0, 3e38, math.inf, math.nan])
def test_no_reference_makes_a_loss_or_a_gradient_that_is_not_finite(distance):
    zeros, new = torch.zeros(2, 1), torch.zeros(2, 1, 7, requires_grad=True)
    reference = torch.tensor([0.1, distance])[:, None, None].expand(2, 1, 7)
    for counts in {math.isfinite(distance), False}:
        mask = torch.tensor([[True], [counts]])
        mb = micro_batch(torch.zeros(2, 1, 7), zeros, zeros, zeros, mask)._replace(reference_logprobs=reference)
        loss, metrics = loss_of(new, torch.zeros(2, 1, 7), zeros, mb, 2.0, **FLAGS | {"kl_coef": 0.1})
        (gradient,) = torch.autograd.grad(loss, new)
        assert math.isfinite(metrics["train/actor/reference_kl"]) and gradient.isfinite().all()


def test_fan_kl_by_hand():
    """Three bins at -1, 0, 1 with sigma 1: the Gaussian around the mode 0 has weights e^-1/2, 1, e^-1/2."""
    weights = [math.exp(-0.5), 1.0, math.exp(-0.5)]
    gauss = [w / sum(weights) for w in weights]
    policy = [0.2, 0.5, 0.3]
    expected = sum(p * math.log(p / g) for p, g in zip(policy, gauss))
    logprobs = torch.tensor([policy, gauss], dtype=torch.float64).log()
    found = fan_kl(logprobs, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 1.0)
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 3.0), st.integers(0, 999))  # torch's probabilities underflow below
def test_fan_kl_is_a_divergence_around_the_own_mode(sigma, seed):
    """At least 0; 0 for a Gaussian around its own mode, wherever that lies; equal to torch's KL of categoricals."""
    centers = torch.linspace(1, -1, 256, dtype=torch.float64)
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    modes = centers[logprobs.argmax(-1)]
    target = torch.distributions.Categorical(logits=-((centers - modes[:, None]) ** 2) / (2 * sigma**2))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), target)
    assert torch.allclose(fan_kl(logprobs, centers, sigma), expected, rtol=1e-6, atol=1e-9)
    assert (expected > 0).all() and fan_kl(target.logits, centers, sigma).abs().max() < 1e-9


def test_fan_enters_the_loss_of_the_policy():
    mask = torch.tensor([[True], [False]])
    zeros, tokens = torch.zeros(2, 1), torch.zeros(2, 1, 7)
    mb = micro_batch(tokens, zeros, zeros, zeros, mask)
    fan = torch.tensor([0.7, 99.0])[:, None, None].expand(2, 1, 7)
    flags = split_flags(FLAGS | {"fan_coef": 2.0}) | {"value_loss": {"value_clip": None, "huber_delta": 1.0}}
    loss, metrics = ppo_loss(PolicyOutput(tokens, tokens, zeros, fan), mb, **flags, vf_coef=1.0)
    assert loss.item() == pytest.approx(1.4) and metrics["train/actor/fan_kl"].item() == pytest.approx(0.7)


def test_what_came_of_a_decision():
    """Env 0 goes on, 1 is cut, 2 succeeds, 3 is lost with its worker: which V follows each, by --bootstrap."""
    outcome = Outcome(
        obs={},
        rewards=torch.tensor([[0.0], [0.0], [1.0], [0.0]]),
        terminations=torch.tensor([False, False, True, False]),
        truncations=torch.tensor([False, True, False, False]),
        infos={
            "valid": torch.tensor([[True], [True], [True], [False]]),
            "ended": torch.tensor([1, 2]),
            "final_observation": {"V": torch.tensor([5.0, 6.0])},
            "dropped": torch.tensor([False, False, False, True]),
        },
    )
    asked = []

    def value_of(obs):
        asked.append(obs)
        return obs["V"]

    decision_values, chunk_values = torch.arange(4.0), torch.full((4, 1), 9.0)
    for bootstrap, wanted in (("truncation", [0, 5, 0, 3]), ("always", [0, 5, 6, 3]), ("never", [0, 0, 0, 3])):
        fields = outcome_of_decision(outcome, decision_values, chunk_values, value_of, bootstrap)
        assert fields["final_values"].tolist() == wanted
        assert fields["dones"].tolist() == [False, True, True, True] and fields["values"] is chunk_values
    assert len(asked) == 2  # where nothing is bootstrapped the critic is not asked


def test_the_units_of_a_ratio():
    """Tokens, actions and chunks: one shape each, and weights that add up to the same."""
    log_ratio = torch.arange(12.0).view(1, 2, 6) / 10
    advantages, weights = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 3.0]])
    for level, shape in (("token", (1, 2, 6)), ("action", (1, 2)), ("chunk", (1, 1))):
        units = surrogate_units(log_ratio, advantages, weights, level)
        assert [tuple(unit.shape) for unit in units] == [shape] * 3
        assert float(units[0].sum()) == pytest.approx(6.6) and float(units[2].sum()) == pytest.approx(4.0)
    assert units[1].tolist() == [[2.0]]  # a chunk has the advantage of its first action


def test_the_rate_while_only_the_critic_learns():
    flags = dict(learning_rate=0.1, schedule="linear", critic_warmup_iterations=2)
    assert [policy_rate(i, 10, **flags) for i in (0, 1)] == [0.0, 0.0]
    assert policy_rate(5, 10, **flags) == pytest.approx(0.05)
