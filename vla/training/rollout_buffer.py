"""One iteration's experience in preallocated tensors. Every shape is checked when something is stored.

    T decisions per rollout   N envs on this rank   C actions per decision   D = 7   L prompt ids   B = T * N decisions

Images are kept once, as uint8 at the model's resolution. If the vision towers are frozen, their features are kept too,
so that the update does not run the towers again. The shape checks rule out silent broadcasting: RL4VLA's buffer stored
one log-probability in seven columns, and so trained with 7 times the policy loss.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from vla.distributed import Engine, all_reduce_max, all_reduce_sum, masked_mean_var, masked_min_max, world_size
from vla.models.action_tokens import ACTION_DIM
from vla.models.policy import PolicyInputs, VLAPolicy

# an optimizer step: the weight of its minibatch over all ranks, divided by their number because DeepSpeed averages over
# ranks, and the indices of this rank's micro batches, equally many on every rank
Step = tuple[float, list[Tensor]]
# fields that are known only after a decision was executed: a critic on the simulator's state then has all its states
OUTCOME = {"rewards", "valid", "values", "dones", "final_values"}


class MicroBatch(NamedTuple):
    """The input of one forward of the update, on the model's device."""

    inputs: PolicyInputs  # [B, ...]
    tokens: Tensor  # int64 [B, C, D]
    old_logprobs: Tensor  # [B, C, D]
    old_values: Tensor  # [B, C]
    advantages: Tensor  # [B, C]
    returns: Tensor  # [B, C]
    weights: Tensor  # [B, C]: an action's weight in every mean of the loss, 0 if it was not executed
    reference_logprobs: Tensor | None  # [B, C, D] of the starting policy
    total_weight: float  # of the whole minibatch over all ranks, divided by their number
    last: bool  # whether it is the last one of its optimizer step

    def mean(self, x: Tensor) -> Tensor:
        """Part of the minibatch's weighted mean of x [B, C]: DeepSpeed adds up the parts, and averages over ranks."""
        return (x * self.weights).sum() / self.total_weight


class RolloutBuffer:
    """Storage for T x N decisions on the CPU.

    Args:
        feature_shape: (P, E) of PolicyInputs.features, or None if the towers are trained and no features are kept.
        keeps_reference: whether log-probabilities of the starting policy are stored too.
        device: where micro batches go.
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
        device: torch.device | str = "cpu",
    ):
        self.num_chunks, self.num_envs, self.keeps_reference = num_chunks, num_envs, keeps_reference
        self.device = device

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
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
            device=policy.device,
        )

    def for_envs(self, num_envs: int) -> "RolloutBuffer":
        """A buffer with the same fields for other envs, without features, which are too large to send."""
        other = copy.copy(self)
        other.num_envs = num_envs
        kept = {name: field for name, field in self.fields.items() if name != "features"}
        other.fields = {name: field.new_zeros(len(field), num_envs, *field.shape[2:]) for name, field in kept.items()}
        return other

    def __getattr__(self, name: str) -> Tensor:  # [T, N, ...]
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def reference_of(self, actor: VLAPolicy, inputs: PolicyInputs, tokens: Tensor, temperature: float) -> Tensor | None:
        """Log-probabilities of the starting policy, [n, C, D]. None where this buffer does not keep them."""
        return actor.reference_logprobs(inputs, tokens, temperature) if self.keeps_reference else None

    def add_decision(self, t: int, envs: slice | Tensor, inputs: PolicyInputs, **outputs: Tensor | None) -> None:
        """Store decision t of some envs: the policy's inputs, tokens, logprobs and reference_logprobs, or None."""
        fields = {name: field for name, field in (inputs._asdict() | outputs).items() if field is not None}
        self._store(t, envs, fields, self.fields.keys() - OUTCOME)

    def add_outcome(self, t: int, envs: slice, **outcome: Tensor) -> None:
        """Store the outcome of decision t: all fields of OUTCOME."""
        self._store(t, envs, outcome, OUTCOME)

    def _store(self, t: int, envs: slice | Tensor, values: dict[str, Tensor], expected: set[str]) -> None:
        if values.keys() != expected:
            raise ValueError(f"the buffer stores {sorted(expected)}, got {sorted(values)}")
        for name, value in values.items():
            slot = self.fields[name][t, envs]
            if value.shape != slot.shape or value.dtype != slot.dtype:
                raise ValueError(
                    f"{name}: the buffer holds {tuple(slot.shape)} {slot.dtype}, got {tuple(value.shape)} {value.dtype}"
                )
            self.fields[name][t, envs] = value.cpu()

    def clear(self) -> None:
        """Forget every decision. A decision that is not added again counts as not executed."""
        self.valid.zero_()
        self.dones.zero_()
        self.rewards.zero_()

    def forget(self, envs: slice, lost: Tensor, before: int) -> None:
        """Mark decisions 0 .. before as not executed, for those of the envs that are `lost` (bool, one per env)."""
        for name in ("valid", "dones", "rewards"):
            self.fields[name][: before + 1, envs][:, lost] = 0

    def replace(self, envs: Tensor, other: "RolloutBuffer", other_envs: Tensor) -> None:
        """Overwrite the columns `envs` with the columns `other_envs` (int64 [K]) of another buffer."""
        for name, field in self.fields.items():
            field[:, envs] = other.fields[name][:, other_envs]

    def micro_batch(
        self, index: Tensor, advantages: Tensor, returns: Tensor, weights: Tensor, total_weight: float, last: bool
    ) -> MicroBatch:
        """The decisions `index` (int64 [B], t * N + n), with their advantages, returns and weights [T, N, C].

        An empty index means that this rank has run out of decisions. It then gets decision 0 with weight 0, because
        the other ranks wait for its forward and backward.
        """
        if len(index) == 0:
            index, weights = torch.zeros(1, dtype=torch.int64), torch.zeros_like(weights)

        def pick(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.flatten(0, 1)[index].to(self.device)

        inputs = PolicyInputs(*(pick(self.fields.get(name)) for name in PolicyInputs._fields))
        reference = self.fields.get("reference_logprobs")
        fields = (self.tokens, self.logprobs, self.values, advantages, returns, weights, reference)
        return MicroBatch(inputs, *(pick(field) for field in fields), total_weight, last)

    def micro_batches(
        self, steps: Iterable[Step], advantages: Tensor, returns: Tensor, weights: Tensor
    ) -> Iterator[MicroBatch]:
        """The micro batches of all optimizer steps, in order. All ranks reach the last one of a step together."""
        for total_weight, parts in steps:
            for number, index in enumerate(parts, 1):
                yield self.micro_batch(index, advantages, returns, weights, total_weight, number == len(parts))

    @torch.no_grad()
    def recompute_logprobs(self, steps: Iterable[Step], engine: Engine, temperature: float) -> None:
        """Replace log-probabilities by those of the engine, in the micro batches of a pass. All ranks together.

        The rollout computes them in other batches, token by token or in one pass, and so with kernels that round
        differently. With bf16 weights that moves ratios away from 1 before any step. These have the update's shapes.
        """
        unused = torch.zeros_like(self.logprobs[..., 0])  # [T, N, C]
        for mb, index in zip(
            self.micro_batches(steps, unused, unused, unused), (index for _, parts in steps for index in parts)
        ):
            logprobs = engine("evaluate", mb.inputs, mb.tokens, temperature).logprobs  # [B, C, D]
            self.logprobs.flatten(0, 1)[index] = logprobs[: len(index)].to(self.logprobs)

    def statistics(self, advantages: Tensor, used: Tensor) -> dict[str, float]:
        """Metrics of a rollout, over all ranks. used: bool [T, N, C], the advantages [T, N, C] that the loss reads."""
        lowest, highest = masked_min_max(advantages, used)
        return {
            "rollout/advantages_min": lowest,
            "rollout/advantages_max": highest,
            "rollout/advantages_mean": masked_mean_var(advantages, used)[0],
            "rollout/rewards": masked_mean_var(self.rewards, self.valid)[0],
        }

    def explained_variance(self, returns: Tensor) -> float:
        """1 - Var(returns - values) / Var(returns), over executed actions and all ranks. returns: [T, N, C]."""
        residual, total = (masked_mean_var(x, self.valid)[1] for x in (returns - self.values, returns))
        return 1.0 - residual / total if total > 0 else 0.0


def minibatch_block(num_chunks: int, num_minibatches: int) -> int:
    """The smallest number of envs whose decisions together divide evenly by the number of minibatches.

    >>> minibatch_block(num_chunks=5, num_minibatches=4)  # 4 envs have 20 decisions: every minibatch gets 5
    4
    """
    return num_minibatches // math.gcd(num_chunks, num_minibatches)


def minibatch_indices(
    keep: Tensor, num_envs: int, first_env: int, num_minibatches: int, generator: Generator
) -> list[Tensor]:
    """Assign a rollout's decisions to minibatches, which hold the same decisions on any number of ranks.

    Every block of minibatch_block() envs is shuffled by itself, and gives every minibatch an equal share of its kept
    decisions, to within one. A rank holds whole blocks. If all decisions are kept, ranks have equally many.

    Args:
        keep: bool [T, N], True for decisions of this rank's envs that are trained on.
        num_envs, first_env: number of envs over all ranks, a multiple of the block, and index of this rank's first one.
        generator: in the same state on every rank.

    Returns:
        num_minibatches tensors, int64 [K], with entries t * N + n.

    Two decisions of 3 envs in 2 minibatches: each gets one of n and 3 + n, the decisions of env n. Entry 1 is not kept.

    >>> keep, generator = torch.tensor([[True, False, True], [True, True, True]]), torch.Generator().manual_seed(1)
    >>> [part.tolist() for part in minibatch_indices(keep, 3, 0, num_minibatches=2, generator=generator)]
    [[3, 2], [0, 4, 5]]
    """
    T, N = keep.shape
    block_size = minibatch_block(T, num_minibatches)
    num_blocks = num_envs // block_size  # over all ranks
    sort_keys = torch.rand(num_blocks, T * block_size, generator=generator)
    offsets = torch.rand(num_blocks, generator=generator).double()  # decide which minibatch gets an odd decision
    indices, assigned = [], []  # of each block of this rank
    for first in range(0, N, block_size):
        block = (first_env + first) // block_size
        kept = keep[:, first : first + block_size].flatten().nonzero()[:, 0]  # [K], t * block_size + n - first
        shuffled = kept[sort_keys[block][kept].argsort()]  # [K]
        t, n = shuffled // block_size, first + shuffled % block_size  # [K] each
        indices.append(t * N + n)
        place = torch.arange(len(kept)) + offsets[block]  # [K], 0 <= place < K
        assigned.append((place * num_minibatches / max(len(kept), 1)).long())  # [K], 0 .. num_minibatches - 1
    index, minibatch = torch.cat(indices), torch.cat(assigned)
    return [index[minibatch == m] for m in range(num_minibatches)]


def shuffle_generator(seed: int, iteration: int) -> Generator:
    """The generator that shuffles decisions into minibatches. It is the same on every rank, whatever else was drawn.

    Noise is seeded with seed * 1_000_003 + iteration. Half of 2**32 more is another stream: 32 bits of a seed count.
    """
    return torch.Generator().manual_seed(2**31 + seed * 1_000_003 + iteration)


def minibatches(
    weights: Tensor, first_env: int, generator: Generator, *, num_envs: int, num_minibatches: int, micro_batch_size: int
) -> list[Step]:
    """The optimizer steps of a pass. Decisions without a weight [T, N, C] are left out. All ranks together."""
    keep = (weights > 0).any(dim=-1)  # [T, N]
    indices = minibatch_indices(keep, num_envs, first_env, num_minibatches, generator)
    own_totals = torch.stack([weights.flatten(0, 1)[index].sum() for index in indices])  # [num_minibatches]
    totals = all_reduce_sum(own_totals) / world_size()
    longest = all_reduce_max(torch.tensor([len(index) for index in indices])).long()
    return [
        (total or 1.0, split_padded(index, micro_batch_size, length))
        for index, total, length in zip(indices, totals.tolist(), longest.tolist())
    ]


def only_teaching(steps: list[Step], teaching: Tensor, *, micro_batch_size: int) -> list[Step]:
    """The same steps without decisions that have no gradient. The others keep their weights. All ranks together.

    teaching: bool [T, N], the decisions that have one.
    """
    indices = [torch.cat(parts) for _, parts in steps]
    lean = [index[teaching.flatten()[index]] for index in indices]
    longest = all_reduce_max(torch.tensor([len(index) for index in lean])).long()
    return [
        (total, split_padded(index, micro_batch_size, length))
        for (total, _), index, length in zip(steps, lean, longest.tolist())
    ]


def split_padded(index: Tensor, size: int, longest: int) -> list[Tensor]:
    """Cut index [K] into parts of `size`, with as many empty ones as any rank's `longest` index needs more.

    >>> [part.tolist() for part in split_padded(torch.tensor([7, 8, 9]), size=2, longest=6)]
    [[7, 8], [9], []]
    """
    return [index[start : start + size] for start in range(0, max(longest, 1), size)]
