"""Group advantages, weights and the GRPO loss against brute force and numbers worked by hand; learning on two arms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import gae_of, grpo_loss_of, ppo_loss_of

from envs.vector import Outcome, Turn
from train_grpo import (
    UPDATE_METRICS,
    compute_group_advantages,
    episode_weights,
    fill_dead_groups,
    grpo_loss,
    live_groups,
    means_of_trained,
    rollout,
    rows_to_act,
    teaching_decisions,
)
from vla.models.policy import PolicyInputs, PolicyOutput
from vla.training.rollout_buffer import MicroBatch, RolloutBuffer, minibatches, only_teaching

FLAGS = dict(logprob_level="token", clip_ratio_low=0.2, clip_ratio_high=0.28, dual_clip=None, ent_coef=0.0)


def micro_batch(old_logprobs, advantages, weights, old_values=None, returns=None) -> MicroBatch:
    zeros = torch.zeros_like(advantages)
    inputs = PolicyInputs(None, None, None)
    return MicroBatch(
        inputs,
        None,
        old_logprobs,
        zeros if old_values is None else old_values,
        advantages,
        zeros if returns is None else returns,
        weights,
        None,
        1.0,
        True,
    )


# ------------------------------------------------------------------ advantages
def test_group_advantages_by_hand():
    """Returns 1, 0, 0, 0 and 0.1 four times. Mean .25, unbiased std .5; the second group teaches nothing."""
    returns, ended = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1]), torch.ones(8, dtype=torch.bool)
    advantages, live = compute_group_advantages(returns, ended, 4, "mean", "std")
    assert live.tolist() == [True, False]
    assert advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], abs=1e-5)
    centered = compute_group_advantages(returns, ended, 4, "mean", "none")[0]
    assert centered[:2].tolist() == pytest.approx([0.75, -0.25])
    others = compute_group_advantages(returns, ended, 4, "leave_one_out", "none")[0]  # 1 - 0 and 0 - 1/3
    assert others[:2].tolist() == pytest.approx([1.0, -1 / 3])


def test_an_episode_that_did_not_end_is_left_out_of_its_group():
    """Groups of 4: one member of the first was begun anew too late; of the second one is left; of the third none."""
    returns = torch.tensor([1.0, 0.0, 0.3, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    ended = torch.tensor([1, 1, 0, 1] + [1, 0, 0, 0] + [0] * 4 + [1] * 4).bool()
    advantages, live = compute_group_advantages(returns, ended, 4, "mean", "std")
    assert live.tolist() == [True, False, False, True]
    std = (2 / 3 * 1 / 3) ** 0.5 * 1.5**0.5  # of 1, 0, 0, unbiased
    expected = [2 / 3 / std, -1 / 3 / std, 0.0, -1 / 3 / std] + [0.0] * 8 + [1.5, -0.5, -0.5, -0.5]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    others = compute_group_advantages(returns, ended, 4, "leave_one_out", "none")[0]
    assert others[:4].tolist() == pytest.approx([1.0, -0.5, 0.0, -0.5])


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 6), st.sampled_from(["mean", "leave_one_out"]), st.booleans(), st.integers(0, 999)
)
def test_group_advantages_equal_brute_force(groups, size, baseline, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randint(0, 3, (groups * size,), generator=generator).double() / 10
    ended = torch.ones(len(returns), dtype=torch.bool)
    ours, live = compute_group_advantages(returns, ended, size, baseline, "std" if scale else "none")
    for g in range(groups):
        members = returns[g * size : (g + 1) * size].tolist()
        average = sum(members) / size
        std = (sum((x - average) ** 2 for x in members) / (size - 1)) ** 0.5
        assert bool(live[g]) == (len(set(members)) > 1)
        for m, x in enumerate(members):
            others = members[:m] + members[m + 1 :]
            expected = x - (average if baseline == "mean" else sum(others) / len(others))
            expected = expected / (std + 1e-6) if scale else expected
            assert float(ours[g * size + m]) == pytest.approx(expected if live[g] else 0.0, abs=1e-9)


class Scripted:
    """Two groups of two envs, chunks of one action, three decisions: env 0 succeeds at once, the others are cut at the
    end; the worker of env 3 is lost in decision 1 and its episode, begun anew, does not end."""

    halves, num_envs = [slice(0, 4)], 4
    t = -1

    def pipeline(self, decisions):
        for t in decisions:
            outcome = self.step_wait(0) if self.t == t - 1 >= 0 else None
            yield Turn(t, 0, self.halves[0], self.reset([]), outcome)

    def reset(self, episode_ids):
        return {"image": torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "task_description": list("abcd")}

    def __init__(self):
        self.actions = []

    def step_async(self, actions, part):
        self.t += 1
        self.actions.append(actions)

    def step_wait(self, part):
        first, last = self.t == 0, self.t == 2
        valid = torch.tensor([[first], [True], [True], [self.t != 1]])
        terminations = torch.tensor([first, False, False, False])
        truncations = torch.tensor([False, last, last, False])
        dropped = torch.tensor([False, False, False, self.t == 1])
        ended = (terminations | truncations).nonzero()[:, 0]
        infos = {"valid": valid, "dropped": dropped, "lost": torch.zeros_like(dropped), "ended": ended}
        infos["episode"] = {"success_once": terminations[ended].float()}
        rewards = torch.where(valid, torch.tensor([[1.0], [0.0], [0.0], [0.3]]), 0.0)
        return Outcome(self.reset([]), rewards, terminations, truncations, infos)


class Actor:
    """Its tokens are the noise. It remembers in which envs it acted."""

    def __init__(self):
        self.acted = []

    def prepare(self, obs):
        self.acted.append("".join(obs["task_description"]))
        ids = torch.zeros(len(obs["image"]), 5, dtype=torch.int64)
        return PolicyInputs(obs["image"], ids, ids > 0)

    def act(self, inputs, temperature, draw):
        return draw.long(), torch.zeros(draw.shape), torch.zeros(len(draw), 1)

    def decode(self, tokens):
        return tokens.float()


def test_an_episode_begun_anew_too_late_to_end_is_no_failure():
    """Its actions have no weight, nobody is compared with it, and it is in no statistics."""
    buffer, noise = RolloutBuffer(3, 4, 1, (8, 8), 5), torch.arange(84.0).view(3, 4, 1, 7)
    envs, actor = Scripted(), Actor()
    episodes = rollout(actor, envs, [7, 7, 9, 9], range(4), noise, 1.0, buffer)
    assert [episode["success_once"] for episode in episodes] == [1.0, 0.0, 0.0]
    assert buffer.dones.any(dim=0).tolist() == [True, True, True, False]
    assert buffer.valid[..., 0].tolist() == [
        [True, True, True, False],
        [False, True, True, False],
        [False, True, True, True],
    ]
    assert live_groups(buffer, 2).tolist() == [True, False]
    # env 0 has ended after the first decision: the others get the noise that they had beside it
    assert actor.acted == ["abcd", "bcd", "bcd"]
    assert torch.equal(buffer.tokens[:, 1:], noise.long()[:, 1:]) and torch.equal(envs.actions[2][1:], noise[2, 1:])
    assert not envs.actions[2][0].any()


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_the_policy_acts_in_all_running_envs_with_four_batch_sizes(running):
    """A GPU records a graph per size, and keeps four."""
    chosen = rows_to_act(torch.tensor(running)).tolist()
    assert {row for row, runs in enumerate(running) if runs} <= set(chosen)
    assert chosen == sorted(set(chosen)) and chosen[-1] < len(running)
    sizes = {len(rows_to_act(torch.arange(len(running)) < k)) for k in range(1, len(running) + 1)}
    assert len(chosen) in sizes and len(sizes) <= 4
    assert len(chosen) - sum(running) < math.ceil(len(running) / 4)


@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 0.0), (0.01, 0.0, 0.0), (0.0, 0.1, 0.0)])
def test_decisions_without_a_gradient_are_left_out_and_nothing_changes(coefficients):
    """Loss and gradient of a pass over all decisions are those over the teaching ones, to rounding."""
    T, N, C, M, generator = 4, 8, 2, 2, torch.Generator().manual_seed(3)
    flags = dict(zip(("ent_coef", "kl_coef", "fan_coef"), coefficients))
    advantages = torch.randn(N, generator=generator)[None, :, None].repeat(T, 1, C)
    advantages[:, ::2] = 0.0  # half of the groups are dead
    weights = torch.rand(T, N, C, generator=generator)
    weights[2:, :3] = 0.0
    teaching = teaching_decisions(advantages, weights, **flags)
    old, reference, shift = (torch.randn(T, N, C, 7, generator=generator) * 0.1 for _ in range(3))
    spread = torch.randn(T, N, C, 7, generator=generator)

    def pass_over(chosen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        sizes = dict(num_envs=N, num_minibatches=M, micro_batch_size=3)
        steps = minibatches(weights, 0, torch.Generator().manual_seed(0), **sizes)
        if chosen is not None:
            steps = only_teaching(steps, chosen, micro_batch_size=3)
        parameter, total, used = torch.zeros(T, N, C, 7, requires_grad=True), 0.0, 0
        for total_weight, parts in steps:
            for index in parts:
                used += len(index)
                of = [x.flatten(0, 1)[index] for x in (parameter, old, advantages, weights, reference, spread, shift)]
                mb = MicroBatch(None, None, of[1], None, of[2], None, of[3], of[4], total_weight, False)
                new = PolicyOutput(of[0] * of[5] + of[1] + of[6], (of[0] + 1) * of[5], None, None)
                surrogate = dict(logprob_level="token", clip_ratio_low=0.2, clip_ratio_high=0.2, dual_clip=None)
                total = total + grpo_loss(new, mb, surrogate=surrogate, regularizers=flags)[0]
        return total, torch.autograd.grad(total, parameter)[0], used

    (loss, gradient, used), (lean_loss, lean_gradient, lean) = pass_over(None), pass_over(teaching)
    assert loss.item() == pytest.approx(lean_loss.item(), abs=1e-6)
    assert torch.allclose(gradient, lean_gradient, atol=1e-7) and gradient.abs().max() > 1e-3
    assert lean <= 0.6 * used if not any(coefficients) else lean == used
    means = means_of_trained({"train/loss": 0.5, "train/actor/approx_kl": 0.5}, share=0.25)
    assert means == {"train/loss": 0.5, "train/actor/approx_kl": 2.0}


# ------------------------------------------------------------------ weights and loss
def test_episode_weights_by_hand():
    """Two episodes, of 1 and 3 executed actions: an action weighs 1 and 1/3, or 1 each without length_norm."""
    valid = torch.tensor([[[True, False], [True, True]], [[False, False], [True, False]]])  # [T, N, C]
    assert episode_weights(valid, True).tolist() == [
        [[1.0, 0.0], [pytest.approx(1 / 3), pytest.approx(1 / 3)]],
        [[0.0, 0.0], [pytest.approx(1 / 3), 0.0]],
    ]
    assert episode_weights(valid, False).sum() == 4


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["token", "action", "chunk"]),
    st.integers(0, 999),
)
def test_loss_equals_brute_force_over_episodes(N, T, C, level, seed):
    """Mean over episodes of the mean over their executed units, however they end, cut into micro batches."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T * C + 1, (N,), generator=generator)
    valid = (torch.arange(T * C)[:, None] < length).view(T, C, N).permute(0, 2, 1)  # [T, N, C]
    new, old = (torch.randn(T, N, C, 7, generator=generator, dtype=torch.float64) * 0.2 for _ in range(2))
    advantages = torch.randn(N, generator=generator, dtype=torch.float64)
    total = 0.0
    for n in range(N):
        losses = []
        for t in range(T):
            executed = [c for c in range(C) if valid[t, n, c]]
            ratios = [[float((new - old)[t, n, c, d]) for d in range(7)] for c in executed]
            if level == "token":
                units = [(r, 1 / 7) for ratio in ratios for r in ratio]
            elif level == "action":
                units = [(sum(ratio), 1.0) for ratio in ratios]
            else:
                units = [(sum(sum(ratio) for ratio in ratios), float(len(executed)))] if executed else []
            for log_ratio, weight in units:
                rho = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
                clipped = min(max(rho, 0.8), 1.28)
                losses.append(weight * -min(rho * float(advantages[n]), clipped * float(advantages[n])))
        total += sum(losses) / int(length[n])
    weights = episode_weights(valid, True).double()
    keep = valid.any(-1).flatten().nonzero()[:, 0]
    ours = 0.0
    for part in keep.split(3):
        rows = (advantages[None, :, None] * valid).flatten(0, 1)[part]
        mb = micro_batch(old.flatten(0, 1)[part], rows, weights.flatten(0, 1)[part])
        flags = FLAGS | {"logprob_level": level}
        ours += float(
            grpo_loss_of(new.flatten(0, 1)[part], torch.zeros_like(new).flatten(0, 1)[part], mb, N, **flags)[0]
        )
    assert ours == pytest.approx(total / N, abs=1e-6)  # weights are fp32


def test_dual_clip_by_hand():
    """A = -1, ratio 5: the clipped surrogate lets 5 through, dual_clip 3 stops at 3. A = 1 is not touched."""
    new = torch.tensor([5.0, 5.0]).log()[:, None, None].expand(2, 1, 7) / 7
    mb = micro_batch(torch.zeros(2, 1, 7), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
    flags = FLAGS | {"logprob_level": "action"}
    loss, metrics = grpo_loss_of(new, torch.zeros(2, 1, 7), mb, 2.0, **flags)
    assert float(loss) == pytest.approx((5.0 - 1.28) / 2, abs=1e-5)
    loss, metrics = grpo_loss_of(new, torch.zeros(2, 1, 7), mb, 2.0, **flags | {"dual_clip": 3.0})
    assert float(loss) == pytest.approx((3.0 - 1.28) / 2, abs=1e-5)
    assert float(metrics["train/actor/dual_clip_fraction"]) == 0.5
    assert set(UPDATE_METRICS) == set(metrics)


def test_dead_groups_are_filled_by_live_ones():
    buffer, spare = (RolloutBuffer(2, 6, 1, (4, 4), 3) for _ in range(2))
    buffer.fields["rewards"][0, :, 0] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # groups of 2: dead, live, dead
    spare.fields["rewards"][0, :, 0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])  # only the last lives
    buffer.dones[1] = spare.dones[1] = True
    fill_dead_groups(buffer, spare, 2)
    assert buffer.rewards[0, :, 0].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert live_groups(buffer, 2).tolist() == [True, True, False]


# ------------------------------------------------------------------ learning: two arms, no simulator
class TwoArms:
    """7 tokens of 2 arms each and a critic that knows nothing: reward 1 with .9 or .1 for the first token's arm."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = torch.zeros(7, 2, requires_grad=True)
        self.value = torch.zeros(1, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits, self.value], lr=0.05)

    def pull(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = self.logits.detach().softmax(-1).expand(n, 7, 2).reshape(-1, 2)
        arms = torch.multinomial(probabilities, 1, generator=self.generator).view(n, 1, 7)
        chance = torch.where(arms[:, 0, 0] == 1, 0.9, 0.1)
        return arms, (torch.rand(n, generator=self.generator) < chance).float()

    def logprobs(self, arms: torch.Tensor) -> torch.Tensor:
        return self.logits.log_softmax(-1)[torch.arange(7), arms]

    def expected_reward(self) -> float:
        return float(0.1 + 0.8 * self.logits[0].detach().softmax(-1)[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_both_learn_the_better_arm(algorithm, seed):
    """95 % of the optimum (0.9) from five seeds."""
    world, n = TwoArms(seed), 64
    for _ in range(60):
        arms, rewards = world.pull(n)
        old, ones = world.logprobs(arms).detach(), torch.ones(n, 1)
        if algorithm == "grpo":
            advantages, _ = compute_group_advantages(rewards, torch.ones(n) > 0, 8, "mean", "std")
            mb = micro_batch(old, advantages[:, None], ones)
        else:
            values = world.value.detach().expand(1, n, 1)
            advantages, returns = gae_of(
                rewards.view(1, n, 1),
                values,
                torch.ones(1, n, 1) > 0,
                torch.ones(1, n) > 0,
                torch.zeros(1, n),
                torch.zeros(n),
                0.99,
                0.95,
            )
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
            mb = micro_batch(old, advantages[0], ones, values[0], returns[0])
        for _ in range(2):
            new = world.logprobs(arms)
            if algorithm == "grpo":
                loss, _ = grpo_loss_of(new, torch.zeros_like(new), mb, float(n), **FLAGS)
            else:
                loss, _ = ppo_loss_of(
                    new,
                    torch.zeros_like(new),
                    world.value.expand(n, 1),
                    mb,
                    float(n),
                    **FLAGS | {"value_clip": 0.2, "huber_delta": 10.0, "vf_coef": 1.0},
                )
            world.optimizer.zero_grad()
            loss.backward()
            world.optimizer.step()
    assert world.expected_reward() >= 0.95 * 0.9
