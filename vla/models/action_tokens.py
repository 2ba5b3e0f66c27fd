"""Converts between token ids, normalised actions and robot units.

OpenVLA writes each action dimension as one of 256 token ids at the end of the text vocabulary. The 256 values of
linspace(-1, 1, 256) cut [-1, 1] into 255 bins, and an id stands for the centre of a bin. The id counts DOWN as the
action goes up: id = last_id + 1 - digitize(action). Statistics (q01, q99) turn normalised actions into robot units.
Source: openvla/openvla, prismatic/vla/action_tokenizer.py and prismatic/extern/hf/modeling_prismatic.py.
"""

import torch

from schemas.policies import ACTION_DIM as ACTION_DIM  # other modules import it from here
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
        """Normalised actions in [-1, 1], float64 [..., 7], of token ids int64 [..., 7].

        The two lowest ids stand for the same centre, because there are 256 ids and 255 bins.
        """
        index = (self.vocab_end - tokens.cpu() - 1).clamp(0, NUM_BINS - 2)
        return self.bin_centers[index]

    def encode(self, normalized: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [..., 7] of normalised actions [..., 7]. Values outside [-1, 1] are clipped."""
        digits = torch.bucketize(normalized.double().clamp(-1.0, 1.0), self.bins, right=True)  # numpy.digitize
        return self.vocab_end - digits

    def soft_targets(self, tokens: torch.Tensor, sigma: float) -> torch.Tensor:
        """The target distribution of imitation for token ids int64 [..., 7], fp32 [..., 7, 256].

        With `sigma` 0 all probability is on the token. Otherwise a Gaussian of `sigma` bins spreads it over the
        neighbours, because a bin next to the right one is nearly as good.

        Two kinds of dimensions keep the token: those outside the mask (the gripper is open or closed) and those that
        never move (q01 = q99). If they were spread, they would be sampled at random without an effect. Reinforcement
        learning would then learn from pure noise in 3 of 7 tokens.
        """
        distance = torch.arange(NUM_BINS, device=tokens.device) - (tokens - self.first_id)[..., None]
        hard = (distance == 0).float()
        if not sigma:
            return hard
        soft = torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)
        is_scale = (self.mask & (self.q99 > self.q01)).to(tokens.device)  # [7]
        return torch.where(is_scale[:, None], soft, hard)

    def unnormalize(self, normalized: torch.Tensor) -> torch.Tensor:
        """Robot units (metres, radians, raw gripper) of normalised actions [..., 7].

        Dimensions outside the mask are unchanged.
        """
        robot_units = 0.5 * (normalized + 1.0) * (self.q99 - self.q01) + self.q01
        return torch.where(self.mask, robot_units, normalized)

    def normalize(self, actions: torch.Tensor) -> torch.Tensor:
        """Normalised actions in [-1, 1], clipped, of robot units [..., 7]. A dimension with q01 = q99 becomes 0."""
        spread = (self.q99 - self.q01).clamp(min=1e-8)
        normalized = (2.0 * (actions.double() - self.q01) / spread - 1.0).clamp(-1.0, 1.0)
        normalized = torch.where(self.q99 > self.q01, normalized, 0.0)
        return torch.where(self.mask, normalized, actions.double())
