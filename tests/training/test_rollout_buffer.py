"""Storage of a rollout, and how its decisions are assigned to minibatches."""

from unittest.mock import Mock

import pytest
import torch

from vla.models.policy import PolicyInputs, uniform_noise
from vla.training.engine import NonFiniteGuard
from vla.training.rollout_buffer import RolloutBuffer, minibatch_indices, minibatches, shuffle_generator, split_padded

ALL = slice(0, 2)


def decision(n: int = 2, c: int = 1) -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(n, c, 7, dtype=torch.int64), "logprobs": torch.zeros(n, c, 7)}


def outcome(n: int = 2, c: int = 1) -> dict[str, torch.Tensor]:
    return {
        "rewards": torch.zeros(n, c),
        "valid": torch.ones(n, c, dtype=torch.bool),
        "values": torch.zeros(n, c),
        "dones": torch.zeros(n, dtype=torch.bool),
        "final_values": torch.zeros(n),
    }


def inputs(n: int = 2) -> PolicyInputs:
    return PolicyInputs(
        torch.zeros(n, 8, 8, 3, dtype=torch.uint8), torch.zeros(n, 5, dtype=torch.int64), torch.ones(n, 5) > 0
    )


def test_nothing_is_broadcast_into_the_buffer():
    buffer = RolloutBuffer(3, 2, 1, (8, 8), 5)
    buffer.add_decision(0, ALL, inputs(), **decision())
    buffer.add_outcome(0, ALL, **outcome())
    with pytest.raises(ValueError, match="logprobs"):
        buffer.add_decision(1, ALL, inputs(), **decision() | {"logprobs": torch.zeros(2, 1, 1)})
    for name in ("dones", "values"):
        with pytest.raises(ValueError, match=name):
            buffer.add_outcome(1, ALL, **outcome() | {name: torch.zeros(2)})
    with pytest.raises(ValueError, match="stores"):
        buffer.add_outcome(1, ALL, **{k: v for k, v in outcome().items() if k != "rewards"})
    with pytest.raises(ValueError, match="stores"):  # nobody asked for a reference
        buffer.add_decision(1, ALL, inputs(), **decision(), reference_logprobs=torch.zeros(2, 1, 7))


def test_halves_are_stored_where_they_belong():
    buffer = RolloutBuffer(1, 3, 1, (8, 8), 5, keeps_reference=True)
    for here, size in ((slice(0, 1), 1), (slice(1, 3), 2)):
        values = torch.arange(here.start, here.stop).float()[:, None]
        buffer.add_decision(
            0, here, inputs(size), **decision(size), reference_logprobs=torch.full((size, 1, 7), float(size))
        )
        buffer.add_outcome(0, here, **outcome(size) | {"values": values, "rewards": values + 10})
    assert buffer.values[0, :, 0].tolist() == [0, 1, 2] and buffer.rewards[0, :, 0].tolist() == [10, 11, 12]
    mb = buffer.micro_batch(torch.arange(3), *[buffer.values] * 3, 1.0, True)
    assert mb.reference_logprobs[:, 0, 0].tolist() == [1, 2, 2]


def test_recomputed_log_probabilities_are_those_of_the_updates_micro_batches():
    """With a stand-in for an engine whose results depend on the batch. This rank has run out in the last step."""
    buffer = RolloutBuffer(2, 2, 1, (8, 8), 5)
    for t in range(2):
        numbers = torch.tensor([2 * t, 2 * t + 1])[:, None, None].expand(2, 1, 7)  # t * N + n
        buffer.add_decision(t, ALL, inputs(), **decision() | {"tokens": numbers})
        buffer.add_outcome(t, ALL, **outcome())
    buffer.logprobs.fill_(-9.0)
    none, batches = torch.tensor([], dtype=torch.int64), []
    steps = [(1.0, [torch.tensor([3, 0]), torch.tensor([2])]), (1.0, [none])]

    def engine(mode, inputs, tokens, temperature):
        assert (mode, temperature, torch.is_grad_enabled()) == ("evaluate", 0.7, False)
        batches.append(len(tokens))
        return Mock(logprobs=-tokens - len(tokens) / 10)

    buffer.recompute_logprobs(steps, engine, 0.7)
    assert batches == [2, 1, 1]  # the last one keeps this rank in step
    expected = [-0.2, -9.0, -2.1, -3.2]  # decision 1 is in no minibatch
    assert torch.allclose(buffer.logprobs.flatten(0, 1)[:, 0, 0], torch.tensor(expected))


def test_micro_batch_picks_decision_t_n():
    buffer = RolloutBuffer(3, 2, 1, (8, 8), 5)
    for t in range(3):
        buffer.add_decision(t, ALL, inputs(), **decision())
        buffer.add_outcome(t, ALL, **outcome() | {"values": torch.tensor([[10.0 * t], [10.0 * t + 1]])})
    mb = buffer.micro_batch(torch.tensor([0, 3, 4]), *[buffer.values] * 3, 1.0, True)
    assert mb.old_values[:, 0].tolist() == [0.0, 11.0, 20.0]
    assert mb.tokens.shape == (3, 1, 7) and mb.inputs.images.shape == (3, 8, 8, 3)


def test_a_lost_episode_is_forgotten_up_to_where_it_was_lost():
    buffer = RolloutBuffer(3, 2, 1, (8, 8), 5)
    for t in range(3):
        buffer.add_outcome(t, ALL, **outcome() | {"rewards": torch.ones(2, 1)})
    buffer.forget(slice(1, 2), torch.tensor([True]), before=1)
    assert buffer.valid[..., 0].tolist() == [[True, False], [True, False], [True, True]]
    assert buffer.rewards.sum() == 4


def test_a_rank_without_decisions_takes_part_with_weight_0():
    buffer = RolloutBuffer(3, 2, 1, (8, 8), 5)
    parts = split_padded(torch.arange(5), 2, longest=9)
    assert [len(part) for part in parts] == [2, 2, 1, 0, 0]
    mb = buffer.micro_batch(parts[3], *[torch.ones(3, 2, 1)] * 3, 1.0, True)
    assert mb.weights.tolist() == [[0.0]] and mb.tokens.shape == (1, 1, 7)
    assert [len(part) for part in split_padded(torch.arange(0), 4, longest=0)] == [0]


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("T, num_envs, M", [(8, 4, 4), (10, 8, 4), (5, 16, 8), (4, 4, 1)])
def test_minibatches_hold_the_same_decisions_on_any_number_of_ranks(T, num_envs, M, drop):
    keep = torch.rand(T, num_envs, generator=torch.Generator().manual_seed(1)) >= drop

    def minibatches(world: int, seed: int = 7) -> list[set]:
        local, dealt = num_envs // world, [set() for _ in range(M)]
        for rank in range(world):
            first = rank * local
            parts = minibatch_indices(
                keep[:, first : first + local], num_envs, first, M, torch.Generator().manual_seed(seed)
            )
            if drop == 0.0:
                assert {len(part) for part in parts} == {T * local // M}  # ZeRO-3 ranks have equal work
            for m, part in enumerate(parts):
                dealt[m] |= {(int(i) // local, first + int(i) % local) for i in part}
        return dealt

    one = minibatches(1)
    assert set().union(*one) == {(int(t), int(n)) for t, n in keep.nonzero()}  # each kept decision
    assert sum(len(m) for m in one) == int(keep.sum())  # once
    assert max(len(m) for m in one) - min(len(m) for m in one) <= num_envs
    assert minibatches(2) == one
    assert M == 1 or minibatches(1, seed=8) != one


def test_minibatches_are_shuffled_with_a_stream_that_no_noise_comes_from():
    """Neither that of the same iteration, a near one or a near seed; and no two iterations shuffle alike."""
    shuffles = [shuffle_generator(seed, iteration) for seed in (0, 1, 7) for iteration in (0, 1, 2, 399)]
    noises = [torch.Generator().manual_seed(seed * 1_000_003 + i) for seed in (0, 1, 7) for i in (0, 1, 2, 399)]
    streams = {tuple(uniform_noise(1, 1, generator).flatten().tolist()) for generator in shuffles + noises}
    assert len(streams) == len(shuffles) + len(noises)
    again = shuffle_generator(1, 2)
    assert torch.equal(torch.rand(9, generator=again), torch.rand(9, generator=shuffle_generator(1, 2)))


def test_statistics_are_of_the_advantages_that_the_loss_reads():
    buffer = RolloutBuffer(1, 2, 2, (8, 8), 5)
    buffer.valid[:] = True
    advantages, used = torch.tensor([[[1.0, 50.0], [-1.0, 70.0]]]), torch.tensor([[[True, False], [True, False]]])
    found = buffer.statistics(advantages, used)
    assert [found[f"rollout/advantages_{name}"] for name in ("min", "mean", "max")] == [-1.0, 0.0, 1.0]


def test_micro_batches_end_with_their_optimizer_step():
    """Every decision comes once, with the weight of its own minibatch, and only a step's last part is marked."""
    buffer = RolloutBuffer(4, 2, 1, (8, 8), 5)
    buffer.tokens[...] = torch.arange(8).view(4, 2, 1, 1).expand(4, 2, 1, 7)
    weights = torch.ones(4, 2, 1)
    sizes = dict(num_envs=2, num_minibatches=2, micro_batch_size=3)
    steps = minibatches(weights, 0, torch.Generator().manual_seed(0), **sizes)
    zeros = torch.zeros(4, 2, 1)
    found = list(buffer.micro_batches(steps, zeros, zeros, weights))
    assert [(len(mb.tokens), mb.total_weight, mb.last) for mb in found] == [(3, 4.0, False), (1, 4.0, True)] * 2
    assert sorted(token for mb in found for token in mb.tokens[:, 0, 0].tolist()) == list(range(8))


def test_a_reference_is_asked_for_only_where_it_is_kept():
    class Actor:
        def reference_logprobs(self, inputs, tokens, temperature):
            return tokens * temperature

    kept = RolloutBuffer(1, 2, 1, (8, 8), 5, keeps_reference=True)
    assert kept.reference_of(Actor(), inputs(), torch.ones(2), 0.5).tolist() == [0.5, 0.5]
    assert RolloutBuffer(1, 2, 1, (8, 8), 5).reference_of(None, inputs(), torch.ones(2), 0.5) is None


def test_the_first_ratios_are_told_by_mean_spread_and_the_farthest(tmp_path):
    """Ratios of 1.1, 0.9 and 1.03 before the first step; those of later micro batches do not count."""
    guard = NonFiniteGuard(tmp_path, rank=0)
    ratios = torch.tensor([1.1, 0.9, 1.03], requires_grad=True)
    guard.check_ratio(ratios.log(), torch.zeros(3))
    guard.check_ratio(torch.ones(3), torch.zeros(3))
    metrics = guard.pop_metrics()
    assert metrics["train/actor/ratio_first_microbatch_error"] == pytest.approx(0.1, abs=1e-6)
    assert metrics["train/actor/ratio_first_microbatch_mean"] == pytest.approx(1.01, abs=1e-6)
    assert metrics["train/actor/ratio_first_microbatch_std"] == pytest.approx(float(ratios.detach().std()), abs=1e-6)
    again = guard.pop_metrics()  # an iteration that trained on nothing
    assert again["train/actor/ratio_first_microbatch_error"] == again["train/actor/ratio_first_microbatch_std"] == 0.0
