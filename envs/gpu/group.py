"""The rows of one batched simulation behind the interface of `envs/group.py`'s EnvGroup; bookkeeping by arrays.

What is different from EnvGroup, which simulates one env after the other:
- All rows are simulated together. A row whose episode has ended holds still until the others have ended too or it is
  reset; its actions, rewards and pictures count for nothing, and `describe()` shows where it is now.
- A chunk costs one picture of all rows, and one more for every step but the last in which an episode ended.
- `load_state_dict` begins each episode again and replays what was executed, on the GPU to within what PhysX promises
  there (`envs/gpu/simulation.py`), so not bit for bit. All replays end together, so they take as long as the longest.
- Where the state of a row stops being finite numbers, its episode is dropped and reported, as that of a worker which
  died is; the env starts its next episode (or the same one where the caller had given its id).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from envs import episodes
from envs.group import ACTION_DIM, EnvSpec, empty_result
from envs.processes import MAX_LOSSES


class BatchedGroup:
    """Rows offset .. offset + N - 1 of the vector env."""

    def __init__(self, spec: EnvSpec, offset: int, images: np.ndarray, final_images: np.ndarray, world, settlers):
        """images, final_images uint8 [N, H, W, 3]: written here, read by the vector env.

        world: `BatchedPutOnPlate` or what has its methods; settlers: `Settlers` or what has its `ask` and `get`.
        """
        self.spec, self.images, self.final_images, self.world, self.settlers = (
            spec,
            images,
            final_images,
            world,
            settlers,
        )
        count = len(images)
        self._env_index = [spec.first_env + offset + i for i in range(count)]  # over all ranks
        self.counters = np.zeros(count, np.int64)  # training episodes taken from each row's stream
        self.episode_ids: list[int | None] = [None] * count
        self.explicit = np.zeros(count, bool)  # the caller gave this episode's id
        self.actions = np.zeros((count, spec.max_episode_steps, ACTION_DIM), np.float32)  # executed, as given
        self.lengths = np.zeros(count, np.int64)
        self.running, self.success, self.success_once = (np.zeros(count, bool) for _ in range(3))
        self.returns = np.zeros(count)
        self._losses = np.zeros(count, np.int64)  # in a row, without a step between

    # ----------------------------------------------------------------------------------------------------- episodes

    def reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        """As EnvGroup's."""
        self._begin(chosen, episode_ids)
        self._show(chosen)
        return self.seen()

    def _begin(self, chosen: list[int], episode_ids: list[int | None]) -> None:
        """Episodes in some rows; None takes the next of a row's own training stream."""
        if not chosen:
            return
        for i, episode_id in zip(chosen, episode_ids):
            self.explicit[i] = episode_id is not None
            if episode_id is None:
                episode_id = self.spec.next_episode_id(self._env_index[i], int(self.counters[i]))
                self.counters[i] += 1
            self.episode_ids[i] = episode_id
        starts = [self._start(self.episode_ids[i]) for i in chosen]
        for start in starts:
            self.settlers.ask(start)
        self.world.start_episodes(chosen, starts, [self.settlers.get(start) for start in starts])
        self.lengths[chosen], self.returns[chosen] = 0, 0.0
        self.success[chosen] = self.success_once[chosen] = False
        self.running[chosen] = True
        if self.spec.auto_reset:  # what each row will want next is settled meanwhile
            for i in chosen:
                self.settlers.ask(self._start(self.spec.next_episode_id(self._env_index[i], int(self.counters[i]))))

    def _start(self, episode_id: int):
        return episodes.start_state(self.spec.env_id, self.spec.obj_set, episode_id, self.spec.protocol)

    def _show(self, chosen) -> None:
        """The present pictures of some rows into `images`."""
        if len(chosen):
            rows = torch.as_tensor(chosen)
            pictures = self.world.render_images()
            self.images[chosen] = pictures[rows.to(pictures.device)].cpu().numpy()

    def seen(self) -> dict:
        """As EnvGroup's."""
        said = {"instructions": self.world.instructions}
        return said | {"state": self._states()} if self.spec.privileged else said

    def _states(self) -> np.ndarray:
        """What the simulator knows and how much of the episode is over, float32 [N, S]."""
        progress = (self.lengths / self.spec.max_episode_steps).astype(np.float32)
        return np.concatenate([self.world.privileged_states().cpu().numpy(), progress[:, None]], axis=1)

    # ----------------------------------------------------------------------------------------------------- steps

    def step(self, actions: np.ndarray) -> dict:
        """As EnvGroup's; actions float32 [N, C, 7]."""
        out = empty_result(*actions.shape[:2])
        if self.spec.privileged:
            out["states"] = np.repeat(self._states()[:, None], actions.shape[1], axis=1)
        began, last = self.running.copy(), [None] * len(self.running)  # last: states in which episodes ended
        shown = np.zeros(len(began), bool)  # pictures taken when an episode ended in the midst of the chunk
        for j in range(actions.shape[1]):
            active = self.running.copy()
            if not active.any():
                break
            if self.spec.privileged and j > 0:
                out["states"][active, j] = self._states()[active]
            out["rewards"][:, j], out["valid"][:, j] = self._execute(actions[:, j], active), active
            broken = active & ~self._finite()
            self._losses[active & ~broken] = 0
            self._drop(broken, out)
            ended = active & ~self.running & ~broken
            if self.spec.privileged and ended.any():
                states = self._states()
                for i in np.flatnonzero(ended):
                    last[i] = states[i]
            if ended.any() and self.running.any() and j + 1 < actions.shape[1]:
                self._show(np.flatnonzero(ended))
                shown |= ended
        self._show(np.flatnonzero(began & ~shown & ~out["dropped"]))
        self._finish(began & ~self.running & ~out["dropped"], last, out)
        self._replace(np.flatnonzero(out["dropped"]))
        return out | self.seen()

    def _execute(self, actions: np.ndarray, active: np.ndarray) -> np.ndarray:
        """One control step of the active rows, actions [N, 7]; the others hold still. Returns rewards [N]."""
        rows = np.flatnonzero(active)
        self.actions[rows, self.lengths[rows]] = actions[rows]
        self.lengths[rows] += 1
        last = self.actions[np.arange(len(active)), np.maximum(self.lengths - 1, 0)]
        commands = np.where(active[:, None], last, 0)
        commands[:, 6] = np.where(last[:, 6] > 0.5, 1.0, -1.0)  # gripper: open / close
        rewards, success = self.world.advance(torch.from_numpy(commands.astype(np.float32)))
        rewards = np.where(active, rewards.cpu().numpy(), 0.0)
        self.success = np.where(active, success.cpu().numpy(), self.success)
        self.success_once |= self.success
        self.returns += rewards
        terminated = active & self.success & (not self.spec.ignore_terminations)
        self.running = active & ~terminated & (self.lengths < self.spec.max_episode_steps)
        return rewards

    def _finite(self) -> np.ndarray:
        return self.world.finite().cpu().numpy()

    def _drop(self, broken: np.ndarray, out: dict) -> None:
        """Episodes whose state is no numbers any more count for nothing."""
        if not broken.any():
            return
        out["dropped"] |= broken
        out["rewards"][broken], out["valid"][broken] = 0.0, False
        self.running[broken] = False

    def _finish(self, ended: np.ndarray, last: list, out: dict) -> None:
        """Report episodes that ended in this chunk, `last` their last states; with auto_reset, begin the next ones."""
        out["terminations"][:] = ended & self.success & (not self.spec.ignore_terminations)
        out["truncations"][:] = ended & ~out["terminations"]
        rows, texts = np.flatnonzero(ended), self.world.instructions
        columns = (self.success_once, self.success, self.returns, self.lengths, self.returns / self.lengths.clip(1))
        out["ended"] = [(int(i), tuple(float(column[i]) for column in columns), texts[i], last[i]) for i in rows]
        self.final_images[rows] = self.images[rows]
        if self.spec.auto_reset:
            self._begin(rows.tolist(), [None] * len(rows))
            self._show(rows)

    def _replace(self, rows: np.ndarray) -> None:
        """New episodes in the place of dropped ones."""
        if not len(rows):
            return
        names = ", ".join(f"{self._env_index[i]} (episode {self.episode_ids[i]})" for i in rows)
        self._losses[rows] += 1
        if self._losses.max() >= MAX_LOSSES:
            raise RuntimeError(
                f"{MAX_LOSSES} times in a row the simulation lost envs {names}: their state is no number."
            )
        warnings.warn(f"the simulation lost envs {names}: these episodes are dropped.", RuntimeWarning, stacklevel=2)
        self._begin(rows.tolist(), [self.episode_ids[i] if self.explicit[i] else None for i in rows])
        self._show(rows)

    # ----------------------------------------------------------------------------------------------------- state

    def describe(self) -> list[dict]:
        states = self.world.describe()
        return [state | {"elapsed_steps": int(length)} for state, length in zip(states, self.lengths)]

    def state_dict(self) -> list[dict]:
        return [
            {
                "counter": int(self.counters[i]),
                "episode_id": episode_id,
                "explicit": bool(self.explicit[i]),
                "actions": self.actions[i, : self.lengths[i]].copy(),
            }
            for i, episode_id in enumerate(self.episode_ids)
        ]

    def load_state_dict(self, states: list[dict]) -> dict:
        """Begin each episode again and replay what was executed; a shorter one begins later, so all end together.

        Returns `seen()`, once there is something to see.
        """
        self.counters[:] = [state["counter"] for state in states]
        if states[0]["episode_id"] is None:
            return {}
        lengths = np.array([len(state["actions"]) for state in states])
        longest = int(lengths.max())
        replayed = np.zeros((longest, len(states), ACTION_DIM), np.float32)
        for i, state in enumerate(states):
            replayed[longest - lengths[i] :, i] = np.reshape(state["actions"], (-1, ACTION_DIM))
        self.running[:] = False
        for t in range(longest + 1):
            rows = np.flatnonzero(lengths == longest - t)
            self._begin(rows.tolist(), [states[i]["episode_id"] for i in rows])
            if t < longest:
                self._execute(replayed[t], lengths >= longest - t)
        self.explicit[:] = [state["explicit"] for state in states]
        self._show(np.arange(len(states)))
        return self.seen()

    def close(self) -> None:
        self.settlers.close()
        self.world.close()


def open_batch(
    spec: EnvSpec,
    offset: int,
    images: np.ndarray,
    final_images: np.ndarray,
    num_settlers: int,
    backends: tuple[str, str] | None = None,
) -> BatchedGroup:
    """A BatchedGroup and its simulation, on this process's CUDA device unless `backends` (sim, render) says else."""
    from envs.gpu.simulation import BatchedPutOnPlate
    from envs.gpu.start_states import Settlers

    if backends is None:
        device = torch.cuda.current_device()
        backends = f"physx_cuda:{device}", f"sapien_cuda:{device}"
    settings = {key: getattr(spec, key) for key in ("obj_set", "asset_pack", "asset_dir", "sim_freq", "protocol")}
    settlers = Settlers(spec.env_id, num_settlers, **settings)  # they start while the batch is built
    try:
        world = BatchedPutOnPlate(
            spec.env_id,
            len(images),
            image_size=spec.image_size,
            sim_backend=backends[0],
            render_backend=backends[1],
            **settings,
        )
    except BaseException:
        settlers.close()
        raise
    return BatchedGroup(spec, offset, images, final_images, world, settlers)
