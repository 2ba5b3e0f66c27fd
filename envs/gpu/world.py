"""The rows of one batch on the GPU as a world of `EnvGroup` (`envs/world.py`), whose start states settle elsewhere.

Images stay on the GPU. A row whose state is no longer finite can begin another episode beside the other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from envs.gpu.library import check_library
from envs.spec import EnvSpec
from envs.variants import StartState

if TYPE_CHECKING:
    from envs.gpu.simulation import BatchedPutOnPlate
    from envs.gpu.start_states import Settlers


class BatchWorld:
    """A simulation of N rows and the processes that settle start states for it."""

    def __init__(self, simulation: BatchedPutOnPlate, settlers: Settlers):
        """Both may be any objects with the same methods."""
        self.simulation, self.settlers = simulation, settlers
        self.device = simulation.device
        self._grips: np.ndarray | None = None  # the rows' latest gripper commands

    @property
    def instructions(self) -> list[str]:
        return self.simulation.instructions

    def begin(self, rows: list[int], starts: list[StartState]) -> None:
        if rows:
            self.expect(starts)
            self.simulation.start_episodes(rows, starts, [self.settlers.get(start) for start in starts])

    def expect(self, starts: list[StartState]) -> None:
        """The settlers settle these start states in the meantime."""
        for start in starts:
            self.settlers.ask(start)

    def advance(self, actions: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that are not active hold still, and what they hold."""
        grips = actions[:, 6] if self._grips is None else np.where(active, actions[:, 6], self._grips)
        self._grips = grips
        commands = np.concatenate([np.where(active[:, None], actions[:, :6], 0), grips[:, None]], axis=1)
        rewards, success = self.simulation.advance(torch.from_numpy(commands))
        finite = self.simulation.finite() & rewards.isfinite()
        return rewards.cpu().numpy(), success.cpu().numpy(), finite.cpu().numpy()

    def images(self, rows: np.ndarray) -> torch.Tensor:
        """The camera draws all rows, but only these are composed."""
        return self.simulation.render_images(torch.from_numpy(rows))

    def states(self) -> np.ndarray:
        return self.simulation.privileged_states().cpu().numpy()

    def describe(self) -> list[dict]:
        return self.simulation.describe()

    def close(self) -> None:
        self.settlers.close()
        self.simulation.close()


def open_batch(spec: EnvSpec, count: int, num_settlers: int, backends: tuple[str, str] | None = None) -> BatchWorld:
    """Build a simulation of `count` rows, and start its settlers.

    backends: of simulation and rendering, as ManiSkill names them. The default is this process's CUDA device.

    Raises:
        RuntimeError: PhysX's library for GPUs is missing, or an env cannot be built.
    """
    from envs.gpu.simulation import BatchedPutOnPlate
    from envs.gpu.start_states import Settlers

    if backends is None:
        check_library()
        device = torch.cuda.current_device()
        backends = f"physx_cuda:{device}", f"sapien_cuda:{device}"
    settings = spec.scene
    if backends[0].startswith("physx_cuda"):
        settings["hulls"] = "gpu"  # of the batch, in every pack
    settlers = Settlers(spec.env_id, num_settlers, **settings)  # these processes start while the batch is built
    try:
        simulation = BatchedPutOnPlate(
            spec.env_id,
            count,
            image_size=spec.image_size,
            sim_backend=backends[0],
            render_backend=backends[1],
            **settings,
        )
    except BaseException:
        settlers.close()
        raise
    return BatchWorld(simulation, settlers)
