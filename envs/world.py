"""What a group of envs simulates: the interface `World`, and one scene after the other on the CPU.

The other world is a batch on the GPU (`envs/gpu/world.py`). `EnvGroup` in `envs/group.py` keeps the books of either.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from envs import episodes, state_dicts, variants
from envs.spec import EnvSpec

if TYPE_CHECKING:
    from envs.maniskill_task import ManiSkillTask
    from envs.put_on_plate import PutOnPlateInScene


class World(Protocol):
    """N rows, one env each, that know nothing of streams of episodes, chunks and time limits."""

    device: torch.device  # of the images
    instructions: list[str]  # of all rows

    def begin(self, rows: list[int], starts: list[variants.StartState | int]) -> None:
        """Begin these episodes in some rows. The episodes of the other rows continue."""

    def expect(self, starts: list[variants.StartState | int]) -> None:
        """These episodes begin soon, so they can be prepared."""

    def advance(self, actions: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Simulate a control step of the active rows, bool [N], with actions float32 [N, 7], gripper 1 or -1.

        Returns:
            rewards float64 [N], success bool [N], and whether reward and state are finite, bool [N]. What is said of
            rows that are not active means nothing.

        Raises:
            RuntimeError: numbers are not finite, and a row cannot begin another episode here after that.
        """

    def images(self, rows: np.ndarray) -> torch.Tensor:
        """The cameras' present images of some rows: uint8 [R, H, W, 3]. The other rows are not disturbed."""

    def states(self) -> np.ndarray:
        """The simulator's states, float32 [N, S - 1]."""

    def describe(self) -> list[dict]:
        """The present state of every row, as plain data."""

    def close(self) -> None: ...


class SceneWorld:
    """Envs with a scene of their own, simulated one after the other in this process."""

    device = torch.device("cpu")

    def __init__(self, spec: EnvSpec, count: int, busy: np.ndarray | None = None):
        """Build the envs.

        busy: int32 [1], 1 + the env that is being simulated. Whoever calls a method sets it to 0 afterwards.
        """
        self.busy = np.zeros(1, np.int32) if busy is None else busy
        self.envs = [_build_env(spec) for _ in range(count)]
        self._env_id, self._starts, self._steps = spec.env_id, [None] * count, [0] * count

    @property
    def instructions(self) -> list[str]:
        return [env.instruction for env in self.envs]

    def begin(self, rows: list[int], starts: list[variants.StartState | int]) -> None:
        for i, start in zip(rows, starts):
            self.busy[0] = i + 1
            self.envs[i].start_episode(start)
            self._starts[i], self._steps[i] = start, 0

    def expect(self, starts: list[variants.StartState | int]) -> None:
        pass

    def advance(self, actions: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rewards, success = np.zeros(len(active)), np.zeros(len(active), bool)
        for i in np.flatnonzero(active):
            self.busy[0] = i + 1
            rewards[i], success[i] = self.envs[i].advance(torch.from_numpy(actions[i : i + 1]))
            self._steps[i] += 1
            if not (np.isfinite(rewards[i]) and np.isfinite(self.envs[i].privileged_state()).all()):
                start = self._starts[i]
                raise RuntimeError(
                    f"the simulation of episode {getattr(start, 'episode_id', start)} of {self._env_id} gave numbers "
                    f"that are not finite, {self._steps[i]} actions after its start: use num_env_workers, where such "
                    "an episode is given up."
                )
        return rewards, success, active

    def images(self, rows: np.ndarray) -> torch.Tensor:
        drawn = []
        for i in rows:
            self.busy[0] = i + 1
            drawn.append(self.envs[i].render_image())
        return torch.from_numpy(np.stack(drawn))

    def states(self) -> np.ndarray:
        return np.stack([env.privileged_state() for env in self.envs])

    def describe(self) -> list[dict]:
        return [env.describe() for env in self.envs]

    def env_states(self) -> list[dict[str, np.ndarray]]:
        """ManiSkill's states by the path of their entries."""
        return [state_dicts.arrays(env.get_state_dict()) for env in self.envs]

    def close(self) -> None:
        for env in self.envs:
            env.close()
        self.envs = []


def _keep_imports() -> None:
    """Take what is there before the first env out of garbage collections. Later garbage is found as before.

    ManiSkill makes one whenever it builds or clears a scene. Beside DeepSpeed and transformers, each took 0.15 s.
    """
    if not gc.get_freeze_count():
        import mani_skill.envs  # noqa: F401

        gc.freeze()


def _build_env(spec: EnvSpec) -> PutOnPlateInScene | ManiSkillTask:
    """Make one ManiSkill env. The simulator is imported here, not together with `envs`."""
    import sapien

    _keep_imports()
    try:
        sapien.render.RenderSystem(sapien.Device(spec.render_backend))
    except RuntimeError as error:
        raise RuntimeError(
            f"no Vulkan device can render here ({error}): to see what is missing, run `python doctor.py`"
        ) from error
    if not episodes.in_family(spec.env_id):
        import envs.maniskill_task as maniskill_task

        return maniskill_task.ManiSkillTask(
            spec.env_id, spec.instruction, spec.image_size, spec.render_backend, spec.reward_mode
        )
    import envs.gym_env as gym_env

    return gym_env.build(spec.env_id, image_size=spec.image_size, render_backend=spec.render_backend, **spec.scene)
