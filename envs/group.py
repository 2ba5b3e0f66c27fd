"""The envs of one process and the settings of all envs. Shapes: C actions per decision.

`EnvGroup` simulates one env after the other, in this process or in a worker (`envs/workers.py`). `envs/vector.py` joins
the groups of all processes.
"""

from __future__ import annotations

import gc
import importlib.util
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from envs import episodes, state_dicts, variants
from envs.registration import CONTROL_FREQ

if TYPE_CHECKING:
    from envs.maniskill_task import ManiSkillTask
    from envs.put_on_plate import PutOnPlateInScene

ACTION_DIM = 7
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
EPISODE_METRICS = ("success_once", "success_at_end", "return", "episode_len", "reward")


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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size[1], self.image_size[0], 3)

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
    (`open_batch` in `envs/gpu/group.py`), so its answer here is not used.

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


@dataclass(frozen=True)
class Position:
    """The place of one env in its stream of episodes. A worker's successor continues from it."""

    counter: int
    episode_id: int | None
    explicit: bool
    running: bool


class EnvSlot:
    """One env and the episode it is in."""

    def __init__(self, env: PutOnPlateInScene | ManiSkillTask, spec: EnvSpec, env_index: int):
        """env_index counts over all ranks."""
        self.env, self.spec, self.env_index = env, spec, env_index
        self.counter = 0  # training episodes taken from this env's stream
        self.episode_id: int | None = None
        self.explicit = False  # the caller gave this episode's id
        self.actions: list[np.ndarray] = []  # executed in this episode, float32 [7] each, as given
        self.running = False

    def begin(self, episode_id: int | None) -> None:
        """Start the given episode, or with None the next one of this env's own training stream."""
        self.explicit = episode_id is not None
        if episode_id is None:
            episode_id = self.spec.next_episode_id(self.env_index, self.counter)
            self.counter += 1
        spec = self.spec
        self.env.start_episode(episodes.start_state(spec.env_id, spec.obj_set, episode_id, spec.protocol))
        self.episode_id, self.actions, self.running = episode_id, [], True
        self.episode_return, self.success_once, self.success = 0.0, False, False

    def execute(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Simulate one control step with action float32 [7]. Returns reward, terminated, truncated (never both)."""
        command = action.copy()
        command[6] = 1.0 if action[6] > 0.5 else -1.0  # gripper: open / close
        reward, self.success = self.env.advance(torch.from_numpy(command[None]))
        self.actions.append(action.copy())
        self.episode_return += reward
        self.success_once |= self.success
        terminated = self.success and not self.spec.ignore_terminations
        truncated = not terminated and len(self.actions) >= self.spec.max_episode_steps
        self.running = not (terminated or truncated)
        return reward, terminated, truncated

    def state(self) -> np.ndarray:
        """The simulator's state and the share of the episode that is over, float32 [S]."""
        progress = len(self.actions) / self.spec.max_episode_steps
        return np.append(self.env.privileged_state(), np.float32(progress))

    def check_finite(self) -> None:
        """Raise RuntimeError where the physics blew up, since neither rewards nor images mean anything then."""
        if not (np.isfinite(self.episode_return) and np.isfinite(self.env.privileged_state()).all()):
            raise RuntimeError(
                f"the simulation of episode {self.episode_id} of {self.spec.env_id} gave numbers that are not finite, "
                f"{len(self.actions)} actions after its start: use num_env_workers, where such an episode is given up."
            )

    def position(self) -> Position:
        return Position(self.counter, self.episode_id, self.explicit, self.running)

    def metrics(self) -> tuple[float, ...]:
        """Values in the order of EPISODE_METRICS."""
        total, length = self.episode_return, float(len(self.actions))
        return float(self.success_once), float(self.success), total, length, total / length


class EnvGroup:
    """The envs of one process: indices offset .. offset + count - 1 of the vector env."""

    def __init__(
        self, spec: EnvSpec, offset: int, images: np.ndarray, final_images: np.ndarray, busy: np.ndarray | None = None
    ):
        """Build the envs. What is written here is read by the vector env.

        Args:
            images, final_images: uint8 [count, H, W, 3].
            busy: int32 [1], 1 + the env that is being simulated. Whoever calls a method sets it to 0 afterwards.
        """
        self.spec = spec
        self.images = images
        self.final_images = final_images
        self.busy = np.zeros(1, np.int32) if busy is None else busy
        first_index = spec.first_env + offset  # over all ranks
        self.slots = [EnvSlot(_build_env(spec), spec, first_index + i) for i in range(len(images))]

    def reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        """Start an episode in the chosen envs. None takes the next one of an env's own stream. Returns `seen()`."""
        for i, episode_id in zip(chosen, episode_ids):
            self.busy[0] = i + 1
            self.slots[i].begin(episode_id)
            self.images[i] = self.slots[i].env.render_image()
        return self.seen()

    def seen(self) -> dict:
        """The rest of an observation besides `images`: all instructions and, with `privileged`, `state` [count, S]."""
        seen = {"instructions": [slot.env.instruction for slot in self.slots]}
        if self.spec.privileged:
            seen["state"] = np.stack([slot.state() for slot in self.slots])
        return seen

    def positions(self) -> list[Position]:
        return [slot.position() for slot in self.slots]

    def step(self, actions: np.ndarray) -> dict:
        """actions float32 [count, C, 7]. Each env runs its chunk until its episode ends. Only last frames are rendered.

        Returns the keys of `empty_result` and of `seen()`, and with `privileged` states [count, C, S] before each
        action.
        """
        count, chunk_size, _ = actions.shape
        out = empty_result(count, chunk_size)
        if self.spec.privileged:
            states = np.stack([slot.state() for slot in self.slots])  # [count, S]
            out["states"] = np.repeat(states[:, None], chunk_size, axis=1)
        for i, slot in enumerate(self.slots):
            if not slot.running:
                continue
            self.busy[0] = i + 1
            self._run_chunk(i, slot, actions[i], out)
            if not slot.running:
                self._end_episode(i, slot, out)
        return out | self.seen()

    def _run_chunk(self, i: int, slot: EnvSlot, actions: np.ndarray, out: dict) -> None:
        """Execute actions [C, 7] in env i until its episode ends, and render its image."""
        for j, action in enumerate(actions):
            if self.spec.privileged and j > 0:
                out["states"][i, j] = slot.state()
            reward, terminated, truncated = slot.execute(action)
            out["rewards"][i, j] = reward
            out["valid"][i, j] = True
            if not slot.running:
                out["terminations"][i] = terminated
                out["truncations"][i] = truncated
                break
        slot.check_finite()
        self.images[i] = slot.env.render_image()

    def _end_episode(self, i: int, slot: EnvSlot, out: dict) -> None:
        """Report the episode that ended in env i. With auto_reset, begin the next one."""
        last_state = slot.state() if self.spec.privileged else None
        out["ended"].append((i, slot.metrics(), slot.env.instruction, last_state))
        self.final_images[i] = self.images[i]
        if self.spec.auto_reset:
            slot.begin(None)
            self.images[i] = slot.env.render_image()

    def take_over(self, positions: list[Position], begin: bool, lost: list[int]) -> dict:
        """Continue for a group whose worker is lost. With `begin`, every env that was in an episode begins one.

        An env then starts the next episode of its stream, or the same one again where the caller had given its id. An
        env at rest stays at rest, and `images` still holds its last image.

        lost: envs whose episode was given up. They rest at another start state, or go on with it under auto_reset.

        Returns `seen()`, or {} while no episode has begun.
        """
        for i, (slot, position) in enumerate(zip(self.slots, positions)):
            slot.counter = position.counter
            self.busy[0] = i + 1
            if i in lost:
                self._begin_another(i, slot)
            elif begin and position.episode_id is not None:
                self._begin_like(i, slot, position)
        return self.seen() if begin and positions[0].episode_id is not None else {}

    def _begin_another(self, i: int, slot: EnvSlot) -> None:
        """Begin an episode of the stream in env i, because its own episode kills workers."""
        slot.begin(None)
        self.images[i] = slot.env.render_image()
        if not self.spec.auto_reset:
            slot.counter -= 1  # it is not played
            slot.running = False

    def _begin_like(self, i: int, slot: EnvSlot, position: Position) -> None:
        """Begin an episode in env i in the place of the one at `position`."""
        same_episode = position.explicit or not position.running
        slot.begin(position.episode_id if same_episode else None)
        slot.explicit, slot.running = position.explicit, position.running
        if slot.running:
            self.images[i] = slot.env.render_image()

    def describe(self) -> list[dict]:
        return [slot.env.describe() | {"elapsed_steps": len(slot.actions)} for slot in self.slots]

    def env_states(self) -> list[dict[str, np.ndarray]]:
        return [state_dicts.arrays(slot.env.get_state_dict()) for slot in self.slots]

    def state_dict(self) -> list[dict]:
        keys = ("counter", "episode_id", "explicit")
        return [
            {key: vars(slot)[key] for key in keys} | {"actions": np.asarray(slot.actions, np.float32)}
            for slot in self.slots
        ]

    def load_state_dict(self, states: list[dict]) -> dict:
        """Begin each episode again and replay its actions. The state afterwards is the same to the last bit.

        Returns `seen()`, or {} while no episode has begun.
        """
        for i, (slot, state) in enumerate(zip(self.slots, states)):
            slot.counter = state["counter"]
            self.busy[0] = i + 1
            if state["episode_id"] is None:
                continue
            slot.begin(state["episode_id"])
            slot.explicit = state["explicit"]
            for action in state["actions"]:
                slot.execute(action)
            self.images[i] = slot.env.render_image()
        return self.seen() if states[0]["episode_id"] is not None else {}

    def close(self) -> None:
        for slot in self.slots:
            slot.env.close()
        self.slots = []


def empty_result(count: int, chunk_size: int) -> dict:
    """The result of a step of `count` envs in which nothing was executed."""
    return {
        "rewards": np.zeros((count, chunk_size), np.float32),
        "valid": np.zeros((count, chunk_size), bool),
        "terminations": np.zeros(count, bool),
        "truncations": np.zeros(count, bool),
        "dropped": np.zeros(count, bool),
        "lost": np.zeros(count, bool),
        "ended": [],  # (index within the group, metrics, instruction, last state or None)
    }


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

    return gym_env.build(
        spec.env_id,
        obj_set=spec.obj_set,
        asset_pack=spec.asset_pack,
        asset_dir=spec.asset_dir,
        image_size=spec.image_size,
        sim_freq=spec.sim_freq,
        protocol=spec.protocol,
        hulls=spec.hulls,
        render_backend=spec.render_backend,
    )
