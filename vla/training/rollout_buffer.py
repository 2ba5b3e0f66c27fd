"""One iteration's experience in preallocated tensors. Every shape is checked when something is stored.

    T decisions per rollout   N envs on this rank   C actions per decision   D = 7   L prompt ids   B = T * N decisions

Images are kept once, as uint8 at the model's resolution. If the vision towers are frozen, their features are kept too,
so that the update does not run the towers again. The shape checks rule out silent broadcasting: RL4VLA's buffer stored
one log-probability in seven columns, and so trained with 7 times the policy loss.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from vla.distributed import all_reduce_max, all_reduce_sum, masked_mean_var, masked_min_max, world_size
from vla.models.action_tokens import ACTION_DIM
from vla.models.policy import PolicyInputs, VLAPolicy

# fields that are known only after a decision was executed: a critic on the simulator's state then has all its states
OUTCOME = {"rewards", "valid", "values", "dones", "final_values"}


class MicroBatch(NamedTuple):
    """The input of one forward of the update, on the model's device."""

    inputs: PolicyInputs  # [B, ...]
    tokens: torch.Tensor  # int64 [B, C, D]
    old_logprobs: torch.Tensor  # [B, C, D]
    old_values: torch.Tensor  # [B, C]
    advantages: torch.Tensor  # [B, C]
    returns: torch.Tensor  # [B, C]
    weights: torch.Tensor  # [B, C]: an action's weight in every mean of the loss, 0 if it was not executed
    reference_logprobs: torch.Tensor | None = None  # [B, C, D] of the starting policy


class RolloutBuffer:
    """Storage for T x N decisions on the CPU.

    Args:
        feature_shape: (P, E) of PolicyInputs.features, or None if the towers are trained and no features are kept.
        keeps_reference: whether log-probabilities of the starting policy are stored too.
    """

    def __init__(
        self,
        num_chunks: int,
        num_envs: int,
        chunk_size: int,
        image_size: tuple[int, int],
        prompt_length: int,
        feature_shape: tuple[int, int] | None = None,
        feature_dtype: torch.dtype = torch.float32,
        keeps_reference: bool = False,
    ):
        self.num_chunks, self.num_envs, self.keeps_reference = num_chunks, num_envs, keeps_reference

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(num_chunks, num_envs, *shape, dtype=dtype)

        self.fields = {
            "images": new(*image_size, 3, dtype=torch.uint8),
            "prompt_ids": new(prompt_length, dtype=torch.int64),
            "prompt_mask": new(prompt_length, dtype=torch.bool),
            "tokens": new(chunk_size, ACTION_DIM, dtype=torch.int64),
            "logprobs": new(chunk_size, ACTION_DIM),
            "values": new(chunk_size),
            "rewards": new(chunk_size),
            "valid": new(chunk_size, dtype=torch.bool),
            "dones": new(dtype=torch.bool),
            "final_values": new(),
        }
        if feature_shape is not None:
            self.fields["features"] = new(*feature_shape, dtype=feature_dtype)
        if keeps_reference:
            self.fields["reference_logprobs"] = new(chunk_size, ACTION_DIM)

    @classmethod
    def of(cls, policy: VLAPolicy, num_chunks: int, num_envs: int, keeps_reference: bool = False) -> "RolloutBuffer":
        """A buffer that fits this policy's inputs and outputs."""
        return cls(
            num_chunks,
            num_envs,
            policy.chunk_size,
            policy.image_size,
            policy.max_prompt_length,
            feature_shape=policy.feature_shape() if policy.caches_features else None,
            feature_dtype=next(policy.model.parameters()).dtype,
            keeps_reference=keeps_reference,
        )

    def __getattr__(self, name: str) -> torch.Tensor:  # [T, N, ...]
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def reference_of(
        self, actor: VLAPolicy, inputs: PolicyInputs, tokens: torch.Tensor, temperature: float
    ) -> torch.Tensor | None:
        """Log-probabilities of the starting policy, [n, C, D]. None where this buffer does not keep them."""
        return actor.reference_logprobs(inputs, tokens, temperature) if self.keeps_reference else None

    def add_decision(
        self,
        t: int,
        envs: slice,
        inputs: PolicyInputs,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        reference_logprobs: torch.Tensor | None = None,
    ) -> None:
        """Store decision t of some envs: the policy's inputs and outputs. Shapes and dtypes must be exact."""
        fields = inputs._asdict() | {"tokens": tokens, "logprobs": logprobs}
        fields["reference_logprobs"] = reference_logprobs
        fields = {name: field for name, field in fields.items() if field is not None}
        self._store(t, envs, fields, self.fields.keys() - OUTCOME)

    def add_outcome(self, t: int, envs: slice, **outcome: torch.Tensor) -> None:
        """Store the outcome of decision t: all fields of OUTCOME. Shapes and dtypes must be exact."""
        self._store(t, envs, outcome, OUTCOME)

    def _store(self, t: int, envs: slice, values: dict[str, torch.Tensor], expected: set[str]) -> None:
        if values.keys() != expected:
            raise ValueError(f"the buffer stores {sorted(expected)}, got {sorted(values)}")
        for name, value in values.items():
            slot = self.fields[name][t, envs]
            if value.shape != slot.shape or value.dtype != slot.dtype:
                raise ValueError(
                    f"{name}: the buffer holds {tuple(slot.shape)} {slot.dtype}, got {tuple(value.shape)} {value.dtype}"
                )
            slot.copy_(value)

    def clear(self) -> None:
        """Forget every decision. A decision that is not added again counts as not executed."""
        self.valid.zero_()
        self.dones.zero_()
        self.rewards.zero_()

    def forget(self, envs: slice, lost: torch.Tensor, before: int) -> None:
        """Mark decisions 0 .. before as not executed, for those of the envs that are `lost` (bool, one per env)."""
        for name in ("valid", "dones", "rewards"):
            self.fields[name][: before + 1, envs][:, lost] = 0

    def replace(self, envs: torch.Tensor, other: "RolloutBuffer", other_envs: torch.Tensor) -> None:
        """Overwrite the columns `envs` with the columns `other_envs` (int64 [K]) of another buffer."""
        for name, field in self.fields.items():
            field[:, envs] = other.fields[name][:, other_envs]

    def micro_batch(
        self,
        index: torch.Tensor,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        weights: torch.Tensor,
        device: torch.device,
    ) -> MicroBatch:
        """The decisions `index` (int64 [B], t * N + n) with their advantages, returns and weights, [T, N, C] each.

        An empty index means that this rank has run out of decisions. It then gets decision 0 with weight 0, because
        the other ranks wait for its forward and backward.
        """
        empty = len(index) == 0
        if empty:
            index = torch.zeros(1, dtype=torch.int64)

        def pick(field: torch.Tensor) -> torch.Tensor:
            return field.flatten(0, 1)[index].to(device)

        return MicroBatch(
            PolicyInputs(*(pick(self.fields[name]) if name in self.fields else None for name in PolicyInputs._fields)),
            pick(self.tokens),
            pick(self.logprobs),
            pick(self.values),
            pick(advantages),
            pick(returns),
            pick(weights) * (0.0 if empty else 1.0),
            pick(self.reference_logprobs) if self.keeps_reference else None,
        )

    def micro_batches(
        self,
        steps: Iterable[tuple[float, list[torch.Tensor]]],
        advantages: torch.Tensor,
        returns: torch.Tensor,
        weights: torch.Tensor,
        device: torch.device,
    ) -> Iterator[tuple[MicroBatch, float, bool]]:
        """The micro batches of all optimizer steps, in order.

        Args:
            steps: from minibatches().
            advantages, returns, weights: [T, N, C].

        Yields:
            the micro batch, the weight of its whole minibatch, and whether it is the last one of its optimizer step.
            All ranks reach the last one together.
        """
        for total_weight, parts in steps:
            for number, index in enumerate(parts, 1):
                mb = self.micro_batch(index, advantages, returns, weights, device)
                yield mb, total_weight, number == len(parts)

    def statistics(self, advantages: torch.Tensor, used: torch.Tensor) -> dict[str, float]:
        """Metrics of a rollout, over all ranks.

        Args:
            advantages: [T, N, C].
            used: bool [T, N, C], True for the advantages that the loss reads.
        """
        lowest, highest = masked_min_max(advantages, used)
        return {
            "rollout/advantages_min": lowest,
            "rollout/advantages_max": highest,
            "rollout/advantages_mean": masked_mean_var(advantages, used)[0],
            "rollout/rewards": masked_mean_var(self.rewards, self.valid)[0],
        }

    def explained_variance(self, returns: torch.Tensor) -> float:
        """1 - Var(returns - values) / Var(returns), over executed actions and all ranks. returns: [T, N, C]."""
        residual, total = (masked_mean_var(x, self.valid)[1] for x in (returns - self.values, returns))
        return 1.0 - residual / total if total > 0 else 0.0


def minibatch_block(num_chunks: int, num_minibatches: int) -> int:
    """The smallest number of envs whose decisions together divide evenly by the number of minibatches.

    Five decisions of one env do not divide by 4, those of four envs do: every minibatch gets 5 of the 20.

    >>> minibatch_block(num_chunks=5, num_minibatches=4)
    4
    >>> minibatch_block(num_chunks=8, num_minibatches=4)
    1
    """
    return num_minibatches // math.gcd(num_chunks, num_minibatches)


def minibatch_indices(
    keep: torch.Tensor, num_envs: int, first_env: int, num_minibatches: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Assign a rollout's decisions to minibatches. These are the same minibatches whatever the number of ranks.

    Envs are taken in blocks of minibatch_block() envs. The decisions of a block are shuffled among themselves, and
    every minibatch gets an equal share of those that are kept, to within one decision. A rank holds whole blocks, so a
    minibatch holds the same decisions on 1, 2 or 8 ranks. If all decisions are kept, each rank has equally many.

    Args:
        keep: bool [T, N], True for decisions of this rank's envs that are trained on.
        num_envs: number of envs over all ranks, a multiple of the block.
        first_env: global index of this rank's first env.
        generator: in the same state on every rank.

    Returns:
        num_minibatches tensors, int64 [K], with entries t * N + n. K differs by at most one per block.

    Two decisions of 3 envs, in 2 minibatches: a block is one env. Entries n and 3 + n are the decisions of env n, and
    each minibatch gets one of the two.

    >>> keep = torch.ones(2, 3, dtype=torch.bool)
    >>> parts = minibatch_indices(keep, 3, 0, num_minibatches=2, generator=torch.Generator().manual_seed(1))
    >>> [part.tolist() for part in parts]
    [[3, 1, 2], [0, 4, 5]]

    If decision 0 of env 1 is not trained on, entry 1 is left out.

    >>> keep[0, 1] = False
    >>> parts = minibatch_indices(keep, 3, 0, num_minibatches=2, generator=torch.Generator().manual_seed(1))
    >>> [part.tolist() for part in parts]
    [[3, 2], [0, 4, 5]]
    """
    T, N = keep.shape
    block_size = minibatch_block(T, num_minibatches)
    num_blocks = num_envs // block_size  # over all ranks
    sort_keys = torch.rand(num_blocks, T * block_size, generator=generator)
    offsets = torch.rand(num_blocks, generator=generator).double()  # decide which minibatch gets an odd decision
    shares: list[list[torch.Tensor]] = [[] for _ in range(num_minibatches)]
    for first in range(0, N, block_size):
        block = (first_env + first) // block_size
        kept = keep[:, first : first + block_size].flatten().nonzero()[:, 0]  # [K], t * block_size + n - first
        shuffled = kept[sort_keys[block][kept].argsort()]  # [K]
        place = torch.arange(len(kept)) + offsets[block]  # [K], 0 <= place < K
        minibatch = (place * num_minibatches / max(len(kept), 1)).long()  # [K], 0 .. num_minibatches - 1
        t, n = shuffled // block_size, first + shuffled % block_size  # [K] each
        index = t * N + n  # [K]
        for m in range(num_minibatches):
            shares[m].append(index[minibatch == m])
    return [torch.cat(share) for share in shares]


def shuffle_generator(seed: int, iteration: int) -> torch.Generator:
    """The generator that shuffles decisions into minibatches. It is the same on every rank, whatever else was drawn.

    Noise is seeded with seed * 1_000_003 + iteration. Adding half of 2**32 gives another stream, because torch's
    generator keeps 32 bits of its seed.
    """
    return torch.Generator().manual_seed(2**31 + seed * 1_000_003 + iteration)


def minibatches(
    weights: torch.Tensor,
    num_envs: int,
    first_env: int,
    num_minibatches: int,
    micro_batch_size: int,
    generator: torch.Generator,
) -> list[tuple[float, list[torch.Tensor]]]:
    """For every optimizer step: the number to divide by, and this rank's micro batches. All ranks together.

    Args:
        weights: [T, N, C]. Decisions without a weight are left out.
        num_envs, first_env, num_minibatches, generator: as for minibatch_indices().

    Returns:
        One pair per minibatch. The number is the minibatch's weight over all ranks, divided by the number of ranks
        because DeepSpeed averages over ranks. The list has the indices of each micro batch, and is equally long on
        every rank.
    """
    keep = (weights > 0).any(dim=-1)  # [T, N]
    indices = minibatch_indices(keep, num_envs, first_env, num_minibatches, generator)
    own_totals = torch.stack([weights.flatten(0, 1)[index].sum() for index in indices])  # [num_minibatches]
    totals = all_reduce_sum(own_totals) / world_size()
    longest = all_reduce_max(torch.tensor([len(index) for index in indices])).long()
    return [
        (total or 1.0, split_padded(index, micro_batch_size, length))
        for index, total, length in zip(indices, totals.tolist(), longest.tolist())
    ]


def split_padded(index: torch.Tensor, size: int, longest: int) -> list[torch.Tensor]:
    """Cut index [K] into parts of `size`, and add empty parts until there are as many as for `longest` decisions.

    `longest` is the largest K of any rank, so all ranks get equally many parts.

    >>> [part.tolist() for part in split_padded(torch.tensor([7, 8, 9]), size=2, longest=6)]
    [[7, 8], [9], []]
    """
    return [index[start : start + size] for start in range(0, max(longest, 1), size)]
