"""The settings of all envs, checked before the simulator is loaded."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch

from envs import episodes, variants
from envs.registration import CONTROL_FREQ
from schemas.pixels import Pixels

ACTION_DIM = 7
EPISODE_METRICS = ("success_once", "success_at_end", "return", "episode_len", "reward")
MAX_LOSSES = 3  # of one worker or one env of a batch, without a successful step between them
# settings under which replayed actions lead to the same state
REPLAY_KEYS = (
    "env_id",
    "obj_set",
    "asset_pack",
    "sim_freq",
    "max_episode_steps",
    "ignore_terminations",
    "protocol",
    "hulls",
    "seed",
    "instruction",
    "sim_backend",
)
SIM_BACKENDS = ("physx_cpu", "physx_cuda", "auto")
RENDER_BACKENDS = ("cpu", "cuda", "auto")
REWARD_MODES = ("sparse", "dense", "normalized_dense")


@dataclass(frozen=True)
class EnvSpec:
    """Everything that decides what the envs do. It is plain data, so it can be sent to a worker."""

    env_id: str
    num_envs: int
    obj_set: str
    asset_pack: str
    asset_dir: str | None
    image_size: tuple[int, int]  # width, height
    sim_freq: int
    max_episode_steps: int
    auto_reset: bool
    ignore_terminations: bool
    protocol: str
    seed: int
    first_env: int
    instruction: str | None = None
    sim_backend: str = "physx_cpu"  # or "physx_cuda"
    render_backend: str = "cpu"  # or "cuda:0", "cuda:1", ...: what renders the images of physx_cpu
    privileged: bool = False  # observations also hold the simulator's state
    reward_mode: str | None = None  # ManiSkill's, in an env that is not of the family
    hulls: str | None = None  # "gpu" or "cpu" where the asset pack has meshes, else None
    pixels: Pixels | None = None  # how observations are made of the camera's images. None leaves these as they are

    @property
    def scene(self) -> dict:
        """What a scene of the family is made of, as keyword arguments of its env."""
        names = ("obj_set", "asset_pack", "asset_dir", "sim_freq", "protocol", "hulls")
        return {name: getattr(self, name) for name in names}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of the images in observations."""
        height, width = self.pixels.size if self.pixels else self.image_size[::-1]
        return height, width, 3

    def check(self, num_env_workers: int, pipeline_stages: int, worker_timeout: float) -> None:
        """Raise ValueError for anything that cannot work, before the simulator is loaded."""
        episodes.check_env_id(self.env_id, self.obj_set, self.instruction)
        for name in ("num_envs", "max_episode_steps", "sim_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        self._check_processes(num_env_workers, pipeline_stages, worker_timeout)
        self._check_simulation()
        self._check_reward_mode()
        if self.sim_backend == "physx_cuda":
            self._check_batch(pipeline_stages)
        variants.check_protocol(self.protocol)
        if self.hulls not in (None, "gpu", "cpu"):
            raise ValueError(f"unknown hulls {self.hulls!r}: use gpu or cpu.")
        if self.asset_pack not in variants.ASSET_PACKS:
            raise ValueError(f"unknown asset_pack {self.asset_pack!r}: use one of {', '.join(variants.ASSET_PACKS)}.")

    def _check_processes(self, num_env_workers: int, pipeline_stages: int, worker_timeout: float) -> None:
        """Numbers of workers and half-batches, and the workers' time limit."""
        if not 0 <= num_env_workers <= self.num_envs:
            raise ValueError(
                f"num_env_workers={num_env_workers} must be between 0 and num_envs={self.num_envs}: "
                "a worker holds at least one env."
            )
        if pipeline_stages not in (1, 2):
            raise ValueError(f"pipeline_stages={pipeline_stages} must be 1, or 2 for two half-batches.")
        if self.num_envs < pipeline_stages or 0 < num_env_workers < pipeline_stages:
            raise ValueError(
                f"pipeline_stages={pipeline_stages} needs at least {pipeline_stages} envs and as many workers: "
                f"num_envs={self.num_envs}, num_env_workers={num_env_workers} are too few."
            )
        if not worker_timeout > 0:
            raise ValueError(f"worker_timeout={worker_timeout} must be more than 0 seconds.")

    def _check_simulation(self) -> None:
        """Rates, image size, and settings that only the family has."""
        if self.sim_freq % CONTROL_FREQ:
            raise ValueError(
                f"sim_freq={self.sim_freq} must be a multiple of {CONTROL_FREQ} Hz, the control rate: use 100 or 500."
            )
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be (width, height), both at least 1.")
        family_settings = (self.asset_pack, self.asset_dir, self.protocol)
        if not episodes.in_family(self.env_id) and family_settings != ("builtin", None, "rl4vla"):
            raise ValueError(
                f"only the {episodes.FAMILY} family has asset_pack, asset_dir and protocol: "
                f"leave them out for {self.env_id}."
            )

    def _check_reward_mode(self) -> None:
        if self.reward_mode is None:
            return
        if episodes.in_family(self.env_id):
            raise ValueError(f"{self.env_id} has a reward of its own: leave reward_mode={self.reward_mode!r} out.")
        if self.reward_mode not in REWARD_MODES:
            raise ValueError(f"unknown reward_mode {self.reward_mode!r}: use one of {', '.join(REWARD_MODES)}.")

    def _check_batch(self, pipeline_stages: int) -> None:
        """Conditions of the batched simulation on the GPU."""
        if not torch.cuda.is_available():
            raise ValueError(
                "sim_backend='physx_cuda' needs a CUDA device, and torch finds none here: use sim_backend='physx_cpu' "
                "with num_env_workers, or run `python doctor.py`."
            )
        if not episodes.in_family(self.env_id):
            raise ValueError(
                f"sim_backend='physx_cuda' is for the {episodes.FAMILY} family: use 'physx_cpu' for {self.env_id}."
            )
        if self.hulls == "cpu":
            raise ValueError(
                "sim_backend='physx_cuda' simulates with the GPU's hulls: leave hulls='cpu' out, or use 'physx_cpu'."
            )
        if pipeline_stages != 1:
            raise ValueError(
                f"pipeline_stages={pipeline_stages} is for worker processes: with sim_backend='physx_cuda' all envs "
                "are simulated together, so leave it at 1."
            )

    def next_episode_id(self, env_index: int, counter: int) -> int:
        """Training episode number `counter` of env `env_index`, counted over all ranks."""
        return variants.train_episode_id(
            episodes.num_start_states(self.env_id, self.obj_set), self.seed, env_index, counter
        )

    def start_state(self, episode_id: int) -> variants.StartState | int:
        """What an episode begins with, see `episodes.start_state`."""
        return episodes.start_state(self.env_id, self.obj_set, episode_id, self.protocol)


def resolve_backend(sim_backend: str, env_id: str, pipeline_stages: int) -> str:
    """Turn "auto" into "physx_cuda" where this GPU can simulate these envs, and into "physx_cpu" elsewhere.

    Raises:
        ValueError: there is no such backend.
    """
    if sim_backend not in SIM_BACKENDS:
        raise ValueError(f"unknown sim_backend {sim_backend!r}: use one of {', '.join(SIM_BACKENDS)}.")
    if sim_backend != "auto":
        return sim_backend
    gpu_can_simulate = torch.cuda.is_available() and episodes.in_family(env_id) and pipeline_stages == 1
    return "physx_cuda" if gpu_can_simulate else "physx_cpu"


def check_module(env_id: str) -> None:
    """Raise ValueError where "module:Id" names a module that does not exist. Nothing is imported."""
    module = env_id.rpartition(":")[0]
    if module and importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ValueError(f"env_id {env_id!r}: there is no module {module}, so add its folder to PYTHONPATH.")


def check_render_backend(render_backend: str, sim_backend: str = "physx_cpu") -> None:
    """Raise ValueError for a backend that does not exist, or that needs a missing GPU."""
    if render_backend not in RENDER_BACKENDS:
        raise ValueError(f"unknown render_backend {render_backend!r}: use one of {', '.join(RENDER_BACKENDS)}.")
    if render_backend == "cuda" and sim_backend != "physx_cuda" and not torch.cuda.is_available():
        raise ValueError(
            "render_backend='cuda' needs a CUDA device, and torch finds none here: use render_backend='cpu', or run "
            "`python doctor.py`."
        )


def resolve_render_backend(render_backend: str, sim_backend: str = "physx_cpu") -> str:
    """Turn "auto" and "cuda" into a device: "cpu", or this process's CUDA device such as "cuda:0".

    "auto" is the GPU where SAPIEN can render on it. A batch on the GPU is always rendered there
    (`open_batch` in `envs/gpu/world.py`), so its answer here is not used.

    Raises:
        ValueError: the backend does not exist, or SAPIEN cannot render on the GPU that was asked for.
    """
    check_render_backend(render_backend, sim_backend)
    if sim_backend == "physx_cuda" or render_backend == "cpu" or not torch.cuda.is_available():
        return "cpu"
    import sapien

    device = f"cuda:{torch.cuda.current_device()}"
    try:
        sapien.render.RenderSystem(sapien.Device(device))
    except RuntimeError as error:
        reason = f"SAPIEN cannot render on {device} ({error}): NVIDIA's Vulkan driver is missing or hidden"
        if render_backend == "cuda":
            raise ValueError(f"render_backend='cuda': {reason}, so run `python doctor.py`.") from error
        warnings.warn(f"the CPU renders the images, which is slow: {reason}.", RuntimeWarning, stacklevel=3)
        return "cpu"
    return device
