"""Bins <-> token ids <-> normalised actions <-> robot units.

OpenVLA writes each action dimension as one of 256 token ids at the end of the text vocabulary: [-1, 1] is cut by
linspace(-1, 1, 256), the 255 centres of the gaps are what an id means, and the id counts DOWN as the action goes up:
id = last_id + 1 - digitize(action). Statistics (q01, q99) turn normalised actions into robot units.
Source: openvla/openvla, prismatic/vla/action_tokenizer.py and prismatic/extern/hf/modeling_prismatic.py.
"""

import torch

from schemas.policies import ACTION_DIM as ACTION_DIM  # for whoever asks here
from schemas.policies import NUM_BINS


class ActionTokens:
    """The action vocabulary of one checkpoint.

    Args:
        vocab_end: one past the last action id (32000 for the published models: vocab_size - pad_to_multiple_of).
        norm_stats: {"q01": 7 floats, "q99": 7 floats, "mask": 7 bools, optional (all true)} of one `unnorm_key`.
    """

    def __init__(self, vocab_end: int, norm_stats: dict):
        self.first_id = vocab_end - NUM_BINS
        self.vocab_end = vocab_end
        self.bins = torch.linspace(-1.0, 1.0, NUM_BINS, dtype=torch.float64)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2
        self.q01 = torch.tensor(norm_stats["q01"], dtype=torch.float64)
        self.q99 = torch.tensor(norm_stats["q99"], dtype=torch.float64)
        self.mask = torch.tensor(norm_stats.get("mask", [True] * len(norm_stats["q01"])))
        self.values = self.decode(torch.arange(self.first_id, vocab_end))  # [256] in [-1, 1], in the order of the ids

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 [..., 7] -> normalised actions in [-1, 1], float64 [..., 7].

        The two lowest ids mean the same centre: there are 256 ids and 255 gaps.
        """
        index = (self.vocab_end - tokens.cpu() - 1).clamp(0, NUM_BINS - 2)
        return self.bin_centers[index]

    def encode(self, normalized: torch.Tensor) -> torch.Tensor:
        """normalised actions [..., 7] -> token ids int64 [..., 7]; values outside [-1, 1] are clipped."""
        digits = torch.bucketize(normalized.double().clamp(-1.0, 1.0), self.bins, right=True)  # numpy.digitize
        return self.vocab_end - digits

    def soft_targets(self, tokens: torch.Tensor, sigma: float) -> torch.Tensor:
        """tokens int64 [..., 7] -> what cloning aims at, fp32 [..., 7, 256]: all on the token, or spread over its
        neighbours by a Gaussian of `sigma` bins, since a bin beside the right one is nearly as good.

        Only where bins are a scale: a dimension outside the mask (the gripper, open or shut) and one that never moves
        (q01 = q99) keep the token. Spread, they would be sampled at random to no effect, and reinforcement learning
        would take the draws for decisions: 3 of 7 tokens of pure noise in its gradient.
        """
        distance = torch.arange(NUM_BINS, device=tokens.device) - (tokens - self.first_id)[..., None]
        hard = (distance == 0).float()
        if not sigma:
            return hard
        soft = torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)
        is_scale = (self.mask & (self.q99 > self.q01)).to(tokens.device)  # [7]
        return torch.where(is_scale[:, None], soft, hard)

    def unnormalize(self, normalized: torch.Tensor) -> torch.Tensor:
        """[-1, 1] -> robot units (metres, radians, raw gripper), [..., 7]. Dimensions outside the mask stay as they
        are."""
        robot_units = 0.5 * (normalized + 1.0) * (self.q99 - self.q01) + self.q01
        return torch.where(self.mask, robot_units, normalized)

    def normalize(self, actions: torch.Tensor) -> torch.Tensor:
        """Robot units -> [-1, 1], clipped. A dimension without spread (q01 = q99) becomes 0."""
        spread = (self.q99 - self.q01).clamp(min=1e-8)
        normalized = (2.0 * (actions.double() - self.q01) / spread - 1.0).clamp(-1.0, 1.0)
        normalized = torch.where(self.q99 > self.q01, normalized, 0.0)
        return torch.where(self.mask, normalized, actions.double())
