"""Storage and the dealing of minibatches."""

import pytest
import torch

from vla.policy import PolicyInputs
from vla.rollout_buffer import RolloutBuffer, minibatch_indices


def decision(n: int = 2, c: int = 1) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.zeros(n, c, 7, dtype=torch.int64),
        "logprobs": torch.zeros(n, c, 7),
        "values": torch.zeros(n, c),
        "rewards": torch.zeros(n, c),
        "valid": torch.ones(n, c, dtype=torch.bool),
        "dones": torch.zeros(n, dtype=torch.bool),
        "final_values": torch.zeros(n),
    }


def inputs(n: int = 2) -> PolicyInputs:
    return PolicyInputs(
        torch.zeros(n, 8, 8, 3, dtype=torch.uint8), torch.zeros(n, 5, dtype=torch.int64), torch.ones(n, 5) > 0
    )


def test_nothing_is_broadcast_into_the_buffer():
    buffer = RolloutBuffer(3, 2, 1, (8, 8), 5)
    buffer.add(0, inputs(), **decision())
    for name, wrong in (("logprobs", torch.zeros(2, 1, 1)), ("values", torch.zeros(2)), ("dones", torch.zeros(2))):
        with pytest.raises(ValueError, match=name):
            buffer.add(1, inputs(), **decision() | {name: wrong})
    with pytest.raises(ValueError, match="stores"):
        buffer.add(1, inputs(), **{k: v for k, v in decision().items() if k != "rewards"})


def test_micro_batch_picks_decision_t_n():
    buffer = RolloutBuffer(3, 2, 1, (8, 8), 5)
    for t in range(3):
        buffer.add(t, inputs(), **decision() | {"values": torch.tensor([[10.0 * t], [10.0 * t + 1]])})
    mb = buffer.micro_batch(torch.tensor([0, 3, 4]), buffer.values, buffer.values, torch.device("cpu"))
    assert mb.old_values[:, 0].tolist() == [0.0, 11.0, 20.0]
    assert mb.tokens.shape == (3, 1, 7) and mb.inputs.images.shape == (3, 8, 8, 3)


@pytest.mark.parametrize("T, num_envs, M", [(8, 4, 4), (10, 8, 4), (5, 16, 8), (4, 4, 1)])
def test_minibatches_hold_the_same_decisions_on_any_number_of_ranks(T, num_envs, M):
    def minibatches(world: int) -> list[set]:
        local = num_envs // world
        parts = [
            minibatch_indices(T, num_envs, r * local, local, M, torch.Generator().manual_seed(7)) for r in range(world)
        ]
        assert all(part.shape == (M, T * local // M) for part in parts)
        return [
            {(int(i) // local, r * local + int(i) % local) for r, part in enumerate(parts) for i in part[m]}
            for m in range(M)
        ]

    one = minibatches(1)
    assert set().union(*one) == {(t, n) for t in range(T) for n in range(num_envs)}  # each decision once
    assert sum(len(m) for m in one) == T * num_envs
    assert minibatches(2) == one
    other = minibatch_indices(T, num_envs, 0, num_envs, M, torch.Generator().manual_seed(8))
    assert M == 1 or not torch.equal(
        other, minibatch_indices(T, num_envs, 0, num_envs, M, torch.Generator().manual_seed(7))
    )
