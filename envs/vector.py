"""N envs behind one reset/step, in this process or in worker processes. Shapes: N envs, C actions per decision.

    envs = make_envs("PutOnPlateInScene25Main-v3", 8, image_size=(96, 96), sim_freq=100, num_env_workers=2)
    obs = envs.reset()                                  # {"image": uint8 [N, H, W, 3], "task_description": N str}
    obs, rewards, terminations, truncations, infos = envs.step(actions)                     # actions [N, C, 7]

A worker is a fresh interpreter that never sees the parent's `__main__` (which imports DeepSpeed), talks over a socket
pair and writes images into an unlinked memory file: it ends when the parent ends, however that happens, and nothing
stays in /dev/shm. It runs `EnvGroup`, the same code that runs in this process with num_env_workers=0.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from envs import variants

ACTION_DIM = 7
CONTROL_FREQ = 5  # Hz
ARM_LIMITS = np.array([1, 1, 1, np.pi / 2, np.pi / 2, np.pi / 2], np.float32)  # the controller's action space
# settings under which replayed actions lead to the same state
REPLAY_KEYS = (
    "env_id", "obj_set", "asset_pack", "sim_freq", "max_episode_steps", "ignore_terminations", "protocol", "seed",
)  # fmt: skip
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size[1], self.image_size[0], 3)

    def check(self, num_env_workers: int) -> None:
        """One clear sentence for anything that cannot work, before the simulator is touched."""
        variants.lookup(self.env_id, self.obj_set)
        for name in ("num_envs", "max_episode_steps", "sim_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= num_env_workers <= self.num_envs:
            raise ValueError(
                f"num_env_workers={num_env_workers} must lie between 0 and num_envs={self.num_envs}: "
                "a worker holds at least one env."
            )
        if self.sim_freq % CONTROL_FREQ:
            raise ValueError(
                f"sim_freq={self.sim_freq} must be a multiple of {CONTROL_FREQ} Hz, the control rate: use 100 or 500."
            )
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be (width, height), both at least 1.")
        variants.check_protocol(self.protocol)
        if self.asset_pack not in variants.ASSET_PACKS:
            raise ValueError(f"unknown asset_pack {self.asset_pack!r}: use one of {', '.join(variants.ASSET_PACKS)}.")


# ---------------------------------------------------------------------------------------------------------------------
# some envs in one process
# ---------------------------------------------------------------------------------------------------------------------


class EnvSlot:
    """One env and the episode it is in."""

    def __init__(self, env, spec: EnvSpec, env_index: int):
        self.env, self.spec, self.env_index = env, spec, env_index  # env_index counts over all ranks
        self.counter = 0  # training episodes taken from this env's stream
        self.episode_id: int | None = None
        self.actions: list[np.ndarray] = []  # executed in this episode, float32 [7] each, as given
        self.running = False

    def next_episode_id(self) -> int:
        total = variants.num_start_states(self.spec.env_id, self.spec.obj_set)
        episode_id = variants.train_episode_id(total, self.spec.seed, self.env_index, self.counter)
        self.counter += 1
        return episode_id

    def begin(self, episode_id: int) -> None:
        start = variants.decode(self.spec.env_id, self.spec.obj_set, episode_id, self.spec.protocol)
        self.env.start_episode(start)
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
    """The envs of one process: indices first_env .. first_env + count - 1 of the vector env."""

    def __init__(self, spec: EnvSpec, offset: int, images: np.ndarray, final_images: np.ndarray):
        """images, final_images uint8 [count, H, W, 3]: written here, read by the vector env."""
        self.spec, self.offset, self.images, self.final_images = spec, offset, images, final_images
        self.slots = [EnvSlot(_build_env(spec), spec, spec.first_env + offset + i) for i in range(len(images))]

    def reset(self, episode_ids: list[int] | None) -> list[str]:
        """Start an episode in every env; None takes the next of each env's own stream. Returns instructions."""
        for i, slot in enumerate(self.slots):
            slot.begin(slot.next_episode_id() if episode_ids is None else episode_ids[i])
            self.images[i] = slot.env.render_image()
        return self.instructions()

    def instructions(self) -> list[str]:
        return [slot.env.instruction for slot in self.slots]

    def step(self, actions: np.ndarray) -> dict:
        """actions float32 [count, C, 7]. Each env runs its chunk until it ends; only last frames are rendered."""
        count, chunk_size, _ = actions.shape
        out = {
            "rewards": np.zeros((count, chunk_size), np.float32),
            "valid": np.zeros((count, chunk_size), bool),
            "terminations": np.zeros(count, bool),
            "truncations": np.zeros(count, bool),
            "ended": [],  # (index within the group, metrics, instruction)
        }
        for i, slot in enumerate(self.slots):
            if slot.running:
                self._run_chunk(i, slot, actions[i], out)
        out["instructions"] = self.instructions()
        return out

    def _run_chunk(self, i: int, slot: EnvSlot, actions: np.ndarray, out: dict) -> None:
        for j, action in enumerate(actions):
            out["rewards"][i, j], out["terminations"][i], out["truncations"][i] = slot.execute(action)
            out["valid"][i, j] = True
            if not slot.running:
                break
        self.images[i] = slot.env.render_image()
        if slot.running:
            return
        out["ended"].append((i, slot.metrics(), slot.env.instruction))
        self.final_images[i] = self.images[i]
        if self.spec.auto_reset:
            slot.begin(slot.next_episode_id())
            self.images[i] = slot.env.render_image()

    def describe(self) -> list[dict]:
        return [slot.env.describe() | {"elapsed_steps": len(slot.actions)} for slot in self.slots]

    def state_dict(self) -> list[dict]:
        keys = ("counter", "episode_id")
        return [
            {key: vars(slot)[key] for key in keys} | {"actions": np.asarray(slot.actions, np.float32)}
            for slot in self.slots
        ]

    def load_state_dict(self, states: list[dict]) -> list[str]:
        """Begin each episode again and replay what was executed: the simulator is a function of that, bit for bit."""
        for i, (slot, state) in enumerate(zip(self.slots, states)):
            slot.counter = state["counter"]
            if state["episode_id"] is None:
                continue
            slot.begin(state["episode_id"])
            for action in state["actions"]:
                slot.execute(action)
            self.images[i] = slot.env.render_image()
        return self.instructions() if states[0]["episode_id"] is not None else []

    def close(self) -> None:
        for slot in self.slots:
            slot.env.close()
        self.slots = []


def _build_env(spec: EnvSpec):
    """One ManiSkill env; the simulator is imported here, not when `envs` is."""
    import sapien

    try:
        sapien.render.RenderSystem(sapien.Device("cpu"))
    except RuntimeError as error:
        raise RuntimeError(
            f"no Vulkan device can render here ({error}); to see what is missing, run `python doctor.py`"
        ) from error
    import envs.put_on_plate as put_on_plate

    return put_on_plate.build(
        spec.env_id,
        obj_set=spec.obj_set,
        asset_pack=spec.asset_pack,
        asset_dir=spec.asset_dir,
        image_size=spec.image_size,
        sim_freq=spec.sim_freq,
        protocol=spec.protocol,
    )


# ---------------------------------------------------------------------------------------------------------------------
# here or elsewhere
# ---------------------------------------------------------------------------------------------------------------------


def _image_arrays(buffer, count: int, spec: EnvSpec) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 [count, H, W, 3] views of one buffer: observations and final observations."""
    both = np.frombuffer(buffer, np.uint8).reshape(2, count, *spec.image_shape)
    return both[0], both[1]


class LocalGroup:
    """An EnvGroup in this process, with a worker's interface."""

    def __init__(self, spec: EnvSpec, offset: int, count: int):
        self.images, self.final_images = _image_arrays(
            bytearray(2 * count * int(np.prod(spec.image_shape))), count, spec
        )
        self._group = EnvGroup(spec, offset, self.images, self.final_images)

    def start(self, method: str, *args) -> None:
        self._result = getattr(self._group, method)(*args)

    def finish(self):
        return self._result

    def close(self) -> None:
        self._group.close()


WORKER_CODE = "import sys; from envs.vector import worker_main; worker_main(int(sys.argv[1]), int(sys.argv[2]))"


class WorkerGroup:
    """An EnvGroup in a process of its own."""

    def __init__(self, spec: EnvSpec, offset: int, count: int):
        self.offset, self.count = offset, count
        size = 2 * count * int(np.prod(spec.image_shape))
        memory_fd = os.memfd_create("solovla_images")  # unlinked from birth: gone when its last holder is
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(memory_fd, size)
            self.images, self.final_images = _image_arrays(mmap.mmap(memory_fd, size), count, spec)
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER_CODE, str(theirs.fileno()), str(memory_fd)],
                pass_fds=(theirs.fileno(), memory_fd),
                stdin=subprocess.DEVNULL,
                env=_worker_environment(),
            )
        finally:
            os.close(memory_fd)
            theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send((asdict(spec), offset, count))

    def start(self, method: str, *args) -> None:
        try:
            self._connection.send((method, args))
        except OSError:
            raise RuntimeError(self._death_notice()) from None

    def finish(self):
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(self._death_notice()) from None
        if kind == "error":
            raise RuntimeError(f"the worker of envs {self.offset} to {self.offset + self.count - 1} failed:\n{value}")
        return value

    def _death_notice(self) -> str:
        code = self._process.wait(timeout=10)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return (
            f"the worker of envs {self.offset} to {self.offset + self.count - 1} (process {self._process.pid}) {how} "
            "without a Python traceback: if that was SIGKILL, memory probably ran out, so use fewer envs."
        )

    def close(self) -> None:
        """Ends the worker; it notices that its socket is closed."""
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _worker_environment() -> dict[str, str]:
    """This environment, with the repository importable, one thread per library and no GPU memory taken by torch."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}


def worker_main(connection_fd: int, memory_fd: int) -> None:
    """A worker's life: build the envs, answer calls, end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the socket
    torch.set_num_threads(1)
    connection = Connection(connection_fd)
    group = None
    try:
        fields, offset, count = connection.recv()
        spec = EnvSpec(**fields)
        memory = mmap.mmap(memory_fd, 2 * count * int(np.prod(spec.image_shape)))
        os.close(memory_fd)
        group = EnvGroup(spec, offset, *_image_arrays(memory, count, spec))
        connection.send(("ok", None))
        while True:
            method, args = connection.recv()
            connection.send(("ok", getattr(group, method)(*args)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the envs, or ended
    except Exception:  # whatever it is, the parent has to hear of it
        connection.send(("error", traceback.format_exc()))
    os._exit(0)  # the driver's own clean-up is slow and of no use to anybody


# ---------------------------------------------------------------------------------------------------------------------
# all envs
# ---------------------------------------------------------------------------------------------------------------------


class VectorEnv:
    """See the head of this file; made by `envs.make_envs`. Everything returned is a copy."""

    def __init__(self, spec: EnvSpec, num_env_workers: int):
        spec.check(num_env_workers)
        self._spec = spec
        self.num_envs, self.image_size, self.max_episode_steps = spec.num_envs, spec.image_size, spec.max_episode_steps
        self.env_id, self.obj_set = spec.env_id, spec.obj_set
        self.num_start_states = variants.num_start_states(spec.env_id, spec.obj_set)
        self._bounds = np.linspace(0, spec.num_envs, max(1, num_env_workers) + 1).astype(int)  # uneven splits allowed
        kind = WorkerGroup if num_env_workers else LocalGroup
        self._groups: list = []
        self._started = False
        self._guarded(self._open, kind)

    def _open(self, kind) -> None:
        for lower, upper in zip(self._bounds[:-1], self._bounds[1:]):
            self._groups.append(kind(self._spec, int(lower), int(upper - lower)))
        if kind is WorkerGroup:
            for group in self._groups:
                group.finish()  # every worker has built its envs

    def _guarded(self, function, *args):
        """Call; whatever goes wrong, no worker and no memory is left behind."""
        try:
            return function(*args)
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, per_group: list[tuple] | None = None) -> list:
        """The same method on every group, all at once; results in order."""
        if not self._groups:
            raise RuntimeError("these envs are closed: make new ones with make_envs().")

        def run() -> list:
            for k, group in enumerate(self._groups):
                group.start(method, *(per_group[k] if per_group else ()))
            return [group.finish() for group in self._groups]

        return self._guarded(run)

    def _split(self, sequence) -> list[tuple]:
        return [(sequence[lower:upper],) for lower, upper in zip(self._bounds[:-1], self._bounds[1:])]

    # -----------------------------------------------------------------------------------------------------------------

    def reset(self, episode_ids=None) -> dict:
        """Start an episode in every env: the given ids (N ints), or the next of each env's own training stream."""
        if episode_ids is not None:
            episode_ids = [variants.check_episode_id(self.env_id, self.obj_set, i) for i in episode_ids]
            if len(episode_ids) != self.num_envs:
                raise ValueError(
                    f"reset() got {len(episode_ids)} episode ids for {self.num_envs} envs: give one per env."
                )
        results = self._call(
            "reset", self._split(episode_ids) if episode_ids is not None else [(None,)] * len(self._groups)
        )
        self._started = True
        return self._observation(results)

    def step(self, actions) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        """Execute a chunk of C actions in every env that is running.

        Args: actions float [N, C, 7], torch or numpy, robot units: metres, Euler angles (rad), gripper (> 0.5 opens).
        Returns: obs after the chunk; rewards float32 [N, C]; terminations, truncations bool [N] (events of this call);
            infos: valid bool [N, C], ended int64 [M], final_observation (of those M envs), episode (dict of fp32 [M]).
        """
        actions = self._checked(actions)
        results = self._call("step", self._split(actions))
        rewards, valid, terminations, truncations = (
            torch.from_numpy(np.concatenate([result[key] for result in results]))
            for key in ("rewards", "valid", "terminations", "truncations")
        )
        obs = self._observation([result["instructions"] for result in results])
        return obs, rewards, terminations, truncations, {"valid": valid} | self._ended(results)

    def _observation(self, instructions: list[list[str]]) -> dict:
        images = np.concatenate([group.images for group in self._groups])  # [N, H, W, 3], a copy
        return {"image": torch.from_numpy(images), "task_description": [text for part in instructions for text in part]}

    def _ended(self, results: list[dict]) -> dict:
        """What infos says about the M envs whose episode ended in this call."""
        indices, metrics, texts = [], [], []
        images = np.empty((sum(len(result["ended"]) for result in results), *self._spec.image_shape), np.uint8)
        for lower, group, result in zip(self._bounds, self._groups, results):
            for i, values, text in result["ended"]:
                images[len(indices)] = group.final_images[i]
                indices.append(int(lower) + i)
                metrics.append(values)
                texts.append(text)
        columns = torch.tensor(metrics, dtype=torch.float32).reshape(len(indices), len(EPISODE_METRICS)).unbind(dim=1)
        return {
            "ended": torch.tensor(indices, dtype=torch.int64),
            "final_observation": {"image": torch.from_numpy(images), "task_description": texts},
            "episode": dict(zip(EPISODE_METRICS, columns)),
        }

    def _checked(self, actions) -> np.ndarray:
        """float32 [N, C, 7], or one clear sentence."""
        if not self._started:
            raise RuntimeError("step() before reset(): call reset() first.")
        actions = torch.as_tensor(actions).detach().to("cpu", torch.float32).numpy()
        if (
            actions.ndim != 3
            or actions.shape[0] != self.num_envs
            or actions.shape[1] < 1
            or actions.shape[2] != ACTION_DIM
        ):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}: give [num_envs={self.num_envs}, chunk_size, {ACTION_DIM}]."
            )
        if not np.isfinite(actions).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise ValueError(
                f"actions{list(index)} is {actions[index]}: actions must be finite, so check the policy's outputs."
            )
        beyond = np.argwhere(np.abs(actions[..., :6]) > ARM_LIMITS)
        if len(beyond):
            index = tuple(int(i) for i in beyond[0])
            raise ValueError(
                f"actions{list(index)} is {actions[index]:g}: the arm takes at most 1 m and pi/2 rad per step, "
                "so check how actions are un-normalised."
            )
        return actions

    # -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> list[dict]:
        """The live state of every env: names, instruction, poses (p, q wxyz, world frame), qpos [8], elapsed_steps."""
        if not self._started:
            raise RuntimeError("describe() before reset(): call reset() first.")
        return [one for part in self._call("describe") for one in part]

    def state_dict(self) -> list[dict]:
        """One entry per env, picklable: `load_state_dict` continues from it bit for bit, also in mid-episode.

        An entry knows nothing of ranks or workers, so those of all ranks can be put together and dealt out anew.
        """
        world = {key: vars(self._spec)[key] for key in REPLAY_KEYS}
        return [one | {"world": world} for part in self._call("state_dict") for one in part]

    def load_state_dict(self, state: list[dict]) -> dict | None:
        """Continue where `state` was taken. Returns the observation of that moment, None if before a reset."""
        if len(state) != self.num_envs:
            raise ValueError(f"this state holds {len(state)} envs, there are {self.num_envs}: make as many envs.")
        for key in REPLAY_KEYS:
            saved, value = state[0]["world"][key], vars(self._spec)[key]
            if saved != value:
                raise ValueError(
                    f"this state was saved with {key}={saved!r}, these envs have {value!r}: "
                    "make envs with the saved value."
                )
        results = self._call("load_state_dict", self._split(state))
        self._started = state[0]["episode_id"] is not None
        return self._observation(results) if self._started else None

    def close(self) -> None:
        """End all workers; safe to call twice."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.close()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
