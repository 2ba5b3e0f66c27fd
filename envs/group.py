"""The envs of one process: what is simulated where, one env after the other. Shapes: C actions per decision.

`EnvGroup` runs in this process or in a worker (`envs/workers.py`); `envs/vector.py` puts groups together.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from envs import episodes, variants

ACTION_DIM = 7
CONTROL_FREQ = 5  # Hz, of the PutOnPlateInScene25 family; other envs have their own
# settings under which replayed actions lead to the same state
REPLAY_KEYS = (
    "env_id",
    "obj_set",
    "asset_pack",
    "sim_freq",
    "max_episode_steps",
    "ignore_terminations",
    "protocol",
    "seed",
    "instruction",
    "sim_backend",
)
SIM_BACKENDS = ("physx_cpu", "physx_cuda", "auto")
RENDER_BACKENDS = ("cpu", "cuda", "auto")
EPISODE_METRICS = ("success_once", "success_at_end", "return", "episode_len", "reward")


@dataclass(frozen=True)
class EnvSpec:
    """Everything that decides what the envs do; plain data, so it can be sent to a worker and kept in a checkpoint."""

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
    render_backend: str = "cpu"  # or "cuda:0", "cuda:1", ...: who draws what physx_cpu simulates
    privileged: bool = False  # observations also hold the simulator's state

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size[1], self.image_size[0], 3)

    def check(self, num_env_workers: int, pipeline_stages: int, worker_timeout: float) -> None:
        """One clear sentence for anything that cannot work, before the simulator is touched."""
        episodes.check_env_id(self.env_id, self.obj_set, self.instruction)
        for name in ("num_envs", "max_episode_steps", "sim_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= num_env_workers <= self.num_envs:
            raise ValueError(
                f"num_env_workers={num_env_workers} must lie between 0 and num_envs={self.num_envs}: "
                "a worker holds at least one env."
            )
        if pipeline_stages not in (1, 2):
            raise ValueError(f"pipeline_stages={pipeline_stages} must be 1, or 2 for two half-batches.")
        if self.num_envs < pipeline_stages or 0 < num_env_workers < pipeline_stages:
            raise ValueError(
                f"pipeline_stages={pipeline_stages} wants at least {pipeline_stages} envs and as many workers: "
                f"num_envs={self.num_envs}, num_env_workers={num_env_workers} are too few."
            )
        if not worker_timeout > 0:
            raise ValueError(f"worker_timeout={worker_timeout} must be more than 0 seconds.")
        if self.sim_freq % CONTROL_FREQ:
            raise ValueError(
                f"sim_freq={self.sim_freq} must be a multiple of {CONTROL_FREQ} Hz, the control rate: use 100 or 500."
            )
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be (width, height), both at least 1.")
        chosen = (self.asset_pack, self.asset_dir, self.protocol)
        if not episodes.in_family(self.env_id) and chosen != ("builtin", None, "rl4vla"):
            raise ValueError(
                f"asset_pack, asset_dir and protocol are choices of the {episodes.FAMILY} family: "
                f"leave them out for {self.env_id}."
            )
        if self.sim_backend == "physx_cuda":
            self._check_batch(pipeline_stages)
        variants.check_protocol(self.protocol)
        if self.asset_pack not in variants.ASSET_PACKS:
            raise ValueError(f"unknown asset_pack {self.asset_pack!r}: use one of {', '.join(variants.ASSET_PACKS)}.")

    def _check_batch(self, pipeline_stages: int) -> None:
        """What only the batched simulation on the GPU asks for."""
        if not torch.cuda.is_available():
            raise ValueError(
                "sim_backend='physx_cuda' needs a CUDA device, and torch sees none here: use sim_backend='physx_cpu' "
                "with num_env_workers, or run `python doctor.py`."
            )
        if not episodes.in_family(self.env_id):
            raise ValueError(
                f"sim_backend='physx_cuda' is for the {episodes.FAMILY} family: use 'physx_cpu' for {self.env_id}."
            )
        if pipeline_stages != 1:
            raise ValueError(
                f"pipeline_stages={pipeline_stages} is for worker processes: with sim_backend='physx_cuda' all envs "
                "are simulated together, so leave it at 1."
            )

    def next_episode_id(self, env_index: int, counter: int) -> int:
        """Training episode number `counter` of global env `env_index`."""
        return variants.train_episode_id(
            episodes.num_start_states(self.env_id, self.obj_set), self.seed, env_index, counter
        )


def resolve_backend(sim_backend: str, env_id: str, pipeline_stages: int) -> str:
    """physx_cpu or physx_cuda; "auto" is the GPU where there is one that can do it. One clear sentence otherwise."""
    if sim_backend not in SIM_BACKENDS:
        raise ValueError(f"unknown sim_backend {sim_backend!r}: use one of {', '.join(SIM_BACKENDS)}.")
    if sim_backend != "auto":
        return sim_backend
    able = torch.cuda.is_available() and episodes.in_family(env_id) and pipeline_stages == 1
    return "physx_cuda" if able else "physx_cpu"


def check_module(env_id: str) -> None:
    """One sentence where "module:Id" names a module that is not there. Nothing is imported."""
    module = env_id.rpartition(":")[0]
    if module and importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ValueError(f"env_id {env_id!r}: there is no module {module}; put the folder that has it on PYTHONPATH.")


def check_render_backend(render_backend: str, sim_backend: str = "physx_cpu") -> None:
    """One sentence for a choice that is none, or that needs a GPU which is not there."""
    if render_backend not in RENDER_BACKENDS:
        raise ValueError(f"unknown render_backend {render_backend!r}: use one of {', '.join(RENDER_BACKENDS)}.")
    if render_backend == "cuda" and sim_backend != "physx_cuda" and not torch.cuda.is_available():
        raise ValueError(
            "render_backend='cuda' needs a CUDA device, and torch sees none here: use render_backend='cpu', or run "
            "`python doctor.py`."
        )


def resolve_render_backend(render_backend: str, sim_backend: str = "physx_cpu") -> str:
    """cpu, or this process's CUDA device as "cuda:0"; "auto" is the second where SAPIEN can draw on it. A batch on the
    GPU has no choice: `batched_group.open_batch` draws it there."""
    check_render_backend(render_backend, sim_backend)
    if sim_backend == "physx_cuda" or render_backend == "cpu" or not torch.cuda.is_available():
        return "cpu"
    import sapien

    device = f"cuda:{torch.cuda.current_device()}"
    try:
        sapien.render.RenderSystem(sapien.Device(device))
    except RuntimeError as error:
        reason = f"SAPIEN can not draw on {device} ({error}): the machine lacks NVIDIA's Vulkan driver or hides it"
        if render_backend == "cuda":
            raise ValueError(f"render_backend='cuda': {reason}; run `python doctor.py`.") from error
        warnings.warn(f"pictures are drawn by the CPU, which is slow: {reason}.", RuntimeWarning, stacklevel=3)
        return "cpu"
    return device


@dataclass(frozen=True)
class Position:
    """Where one env stands in its stream of episodes: what a worker's successor has to know."""

    counter: int
    episode_id: int | None
    explicit: bool
    running: bool


class EnvSlot:
    """One env and the episode it is in."""

    def __init__(self, env, spec: EnvSpec, env_index: int):
        self.env, self.spec, self.env_index = env, spec, env_index  # env_index counts over all ranks
        self.counter = 0  # training episodes taken from this env's stream
        self.episode_id: int | None = None
        self.explicit = False  # the caller gave this episode's id
        self.actions: list[np.ndarray] = []  # executed in this episode, float32 [7] each, as given
        self.running = False

    def begin(self, episode_id: int | None) -> None:
        """The given episode, or with None the next of this env's own training stream."""
        self.explicit = episode_id is not None
        if episode_id is None:
            episode_id = self.spec.next_episode_id(self.env_index, self.counter)
            self.counter += 1
        self.env.start_episode(
            episodes.start_state(self.spec.env_id, self.spec.obj_set, episode_id, self.spec.protocol)
        )
        self.episode_id, self.actions, self.running = episode_id, [], True
        self.episode_return, self.success_once, self.success = 0.0, False, False

    def execute(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """One control step. Returns reward, terminated, truncated (never both)."""
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
        """What the simulator knows and how much of the episode is over, float32 [S]."""
        progress = len(self.actions) / self.spec.max_episode_steps
        return np.append(self.env.privileged_state(), np.float32(progress))

    def position(self) -> Position:
        return Position(self.counter, self.episode_id, self.explicit, self.running)

    def metrics(self) -> tuple[float, ...]:
        """In the order of EPISODE_METRICS."""
        length = len(self.actions)
        return (
            float(self.success_once),
            float(self.success),
            self.episode_return,
            float(length),
            self.episode_return / length,
        )


class EnvGroup:
    """The envs of one process: indices offset .. offset + count - 1 of the vector env."""

    def __init__(self, spec: EnvSpec, offset: int, images: np.ndarray, final_images: np.ndarray):
        """images, final_images uint8 [count, H, W, 3]: written here, read by the vector env."""
        self.spec, self.offset, self.images, self.final_images = spec, offset, images, final_images
        self.slots = [EnvSlot(_build_env(spec), spec, spec.first_env + offset + i) for i in range(len(images))]

    def reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        """Start an episode in the chosen envs; None takes the next of an env's own stream. Returns `seen()`."""
        for i, episode_id in zip(chosen, episode_ids):
            self.slots[i].begin(episode_id)
            self.images[i] = self.slots[i].env.render_image()
        return self.seen()

    def seen(self) -> dict:
        """What belongs to an observation besides `images`: all instructions and, where asked for, states [count, S]."""
        said = {"instructions": [slot.env.instruction for slot in self.slots]}
        return said | {"state": np.stack([slot.state() for slot in self.slots])} if self.spec.privileged else said

    def positions(self) -> list[Position]:
        return [slot.position() for slot in self.slots]

    def step(self, actions: np.ndarray) -> dict:
        """actions float32 [count, C, 7]. Each env runs its chunk until it ends; only last frames are rendered."""
        out = empty_result(*actions.shape[:2])
        if self.spec.privileged:
            out["states"] = np.stack([np.repeat(slot.state()[None], actions.shape[1], axis=0) for slot in self.slots])
        for i, slot in enumerate(self.slots):
            if slot.running:
                self._run_chunk(i, slot, actions[i], out)
        return out | self.seen()

    def _run_chunk(self, i: int, slot: EnvSlot, actions: np.ndarray, out: dict) -> None:
        for j, action in enumerate(actions):
            if self.spec.privileged and j > 0:
                out["states"][i, j] = slot.state()
            out["rewards"][i, j], out["terminations"][i], out["truncations"][i] = slot.execute(action)
            out["valid"][i, j] = True
            if not slot.running:
                break
        self.images[i] = slot.env.render_image()
        if slot.running:
            return
        out["ended"].append((i, slot.metrics(), slot.env.instruction, slot.state() if self.spec.privileged else None))
        self.final_images[i] = self.images[i]
        if self.spec.auto_reset:
            slot.begin(None)
            self.images[i] = slot.env.render_image()

    def take_over(self, positions: list[Position], begin: bool) -> dict:
        """Stand in for a group that is gone. With `begin`, each episode that was under way is given up.

        An env then starts the next episode of its stream, or the same one again where the caller had given its id. An
        env that rested goes on resting, and `images` still holds its last picture. Returns `seen()`, once there is
        something to see.
        """
        for i, (slot, position) in enumerate(zip(self.slots, positions)):
            slot.counter = position.counter
            if not begin or position.episode_id is None:
                continue
            keep = position.explicit or not position.running
            slot.begin(position.episode_id if keep else None)
            slot.explicit, slot.running = position.explicit, position.running
            if slot.running:
                self.images[i] = slot.env.render_image()
        return self.seen() if begin and positions[0].episode_id is not None else {}

    def describe(self) -> list[dict]:
        return [slot.env.describe() | {"elapsed_steps": len(slot.actions)} for slot in self.slots]

    def state_dict(self) -> list[dict]:
        keys = ("counter", "episode_id", "explicit")
        return [
            {key: vars(slot)[key] for key in keys} | {"actions": np.asarray(slot.actions, np.float32)}
            for slot in self.slots
        ]

    def load_state_dict(self, states: list[dict]) -> dict:
        """Begin each episode again and replay what was executed: the simulator is a function of that, bit for bit.

        Returns `seen()`, once there is something to see.
        """
        for i, (slot, state) in enumerate(zip(self.slots, states)):
            slot.counter = state["counter"]
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
    """What a step of `count` envs returns in which nothing was executed."""
    return {
        "rewards": np.zeros((count, chunk_size), np.float32),
        "valid": np.zeros((count, chunk_size), bool),
        "terminations": np.zeros(count, bool),
        "truncations": np.zeros(count, bool),
        "dropped": np.zeros(count, bool),
        "ended": [],  # (index within the group, metrics, instruction, last state or None)
    }


def _build_env(spec: EnvSpec):
    """One ManiSkill env; the simulator is imported here, not when `envs` is."""
    import sapien

    try:
        sapien.render.RenderSystem(sapien.Device(spec.render_backend))
    except RuntimeError as error:
        raise RuntimeError(
            f"no Vulkan device can render here ({error}); to see what is missing, run `python doctor.py`"
        ) from error
    if not episodes.in_family(spec.env_id):
        import envs.maniskill_task as maniskill_task

        return maniskill_task.ManiSkillTask(spec.env_id, spec.instruction, spec.image_size, spec.render_backend)
    import envs.put_on_plate as put_on_plate

    return put_on_plate.build(
        spec.env_id,
        obj_set=spec.obj_set,
        asset_pack=spec.asset_pack,
        asset_dir=spec.asset_dir,
        image_size=spec.image_size,
        sim_freq=spec.sim_freq,
        protocol=spec.protocol,
        render_backend=spec.render_backend,
    )
