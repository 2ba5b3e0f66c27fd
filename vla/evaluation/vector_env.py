"""The vector env as the scripts and the evaluation use it. `envs.vector.VectorEnv` is the one that is there.

`vla` does not import `envs`, so this protocol states what it relies on. Any object with these methods will do. A test
holds `envs.vector.VectorEnv` to it.

    N envs on this rank   C actions per decision   n envs of one half   M envs whose episode ended   S numbers of state
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

# observation after the chunk, rewards float32 [n, C], terminations bool [n], truncations bool [n], infos
Outcome = tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor, dict]
# decision t, half, its rows, their latest observation, the outcome of decision t - 1 or None
Turn = tuple[int, int, slice, dict, Outcome | None]


class VectorEnv(Protocol):
    """N envs of one id.

    An observation is a dict: image uint8 [N, H, W, 3], task_description (N str), and perhaps state float32 [N, S].

    infos is a dict: valid bool [N, C] (executed actions), ended int64 [M], final_observation (of those M envs), episode
    (a dict of float32 [M] per metric), dropped bool [N] (episodes lost with a worker), lost bool [N] (episodes that
    were given up, among `ended`), and perhaps states float32 [N, C, S].
    """

    env_id: str
    num_envs: int
    num_start_states: int
    repeats: bool  # whether the same actions give the same episode, to the last bit
    halves: list[slice]  # env indices of each half-batch, a single one without pipelining

    def reset(self, episode_ids: Sequence[int] | None = None, env_indices: Sequence[int] | None = None) -> dict:
        """Start an episode in all envs, or in `env_indices` only. Returns the observation of all N envs."""

    def step(self, actions: torch.Tensor | np.ndarray) -> Outcome:
        """Execute a chunk of actions, float [N, C, 7] in robot units, in every env whose episode is running."""

    def pipeline(self, decisions: Iterable[int]) -> Iterator[Turn]:
        """Turns to decide, in the order of decisions and halves."""

    def step_async(self, actions: torch.Tensor | np.ndarray, half: int = 0) -> None:
        """Begin a step of one half, actions [n, C, 7]. The half's next turn has the outcome."""

    def state_dict(self) -> list[dict]:
        """One picklable entry per env, with its present episode."""

    def load_state_dict(self, state: list[dict]) -> dict | None:
        """Continue from a `state_dict()`. Returns the observation of that moment, or None before the first reset."""

    def close(self) -> None:
        """End all workers."""

    def __enter__(self) -> VectorEnv: ...

    def __exit__(self, *exc_info) -> None: ...
