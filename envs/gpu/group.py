"""The rows of one batched simulation, with the interface of `EnvGroup` in `envs/group.py`.

Differences from EnvGroup, which simulates one env after the other:
- All rows are simulated together. A row whose episode has ended holds still until the other episodes have ended too, or
  until it is reset. Its actions, rewards and images count for nothing, and `describe()` shows its present state.
- A chunk costs one image of all rows, and one more for every step in which an episode ended. The last step costs no
  more where nothing begins afterwards.
- `load_state_dict` begins each episode again and replays what was executed. On the GPU this is not exact to the bit
  (`envs/gpu/simulation.py` says what PhysX promises there). All replays end together, so they take as long as the
  longest one.
- An episode is dropped and reported when the state of its row is no longer finite, like an episode whose worker died.
  The env starts its next episode, or the same one where the caller had given its id. Such an episode is given up after
  three losses (MAX_LOSSES), like one that loses its worker.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from envs import episodes, variants
from envs.gpu.library import check_library
from envs.group import ACTION_DIM, EPISODE_METRICS, EnvSpec, empty_result
from envs.processes import MAX_LOSSES

if TYPE_CHECKING:
    from envs.gpu.simulation import BatchedPutOnPlate
    from envs.gpu.start_states import Settlers


class BatchedGroup:
    """Rows offset .. offset + N - 1 of the vector env."""

    def __init__(
        self,
        spec: EnvSpec,
        offset: int,
        images: np.ndarray,
        final_images: np.ndarray,
        world: BatchedPutOnPlate,
        settlers: Settlers,
    ):
        """images, final_images uint8 [N, H, W, 3]: written here, read by the vector env.

        world and settlers may be any objects with the same methods.
        """
        self.spec = spec
        self.images = images
        self.final_images = final_images
        self.world = world
        self.settlers = settlers
        count = len(images)
        self._env_index = [spec.first_env + offset + i for i in range(count)]  # over all ranks
        self.counters = np.zeros(count, np.int64)  # training episodes taken from each row's stream
        self.episode_ids: list[int | None] = [None] * count
        self.explicit = np.zeros(count, bool)  # the caller gave this episode's id
        self.actions = np.zeros((count, spec.max_episode_steps, ACTION_DIM), np.float32)  # executed, as given
        self.lengths = np.zeros(count, np.int64)  # control steps executed in this episode
        self.running = np.zeros(count, bool)
        self.success = np.zeros(count, bool)  # as of the last step
        self.success_once = np.zeros(count, bool)
        self.returns = np.zeros(count)
        self._losses = np.zeros(count, np.int64)  # of each row since its last finite step
        self._blamed: list[tuple[int | None, int]] = [(None, 0)] * count  # episodes that were lost, and how often

    # ----------------------------------------------------------------------------------------------------- episodes

    def reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        """As EnvGroup's."""
        self._begin(chosen, episode_ids)
        self._show(chosen)
        return self.seen()

    def _begin(self, chosen: list[int], episode_ids: list[int | None]) -> None:
        """Begin episodes in the chosen rows. None takes the next one of a row's own training stream."""
        if not chosen:
            return
        for i, episode_id in zip(chosen, episode_ids):
            self.explicit[i] = episode_id is not None
            if episode_id is None:
                episode_id = self._next_episode_id(i)
                self.counters[i] += 1
            self.episode_ids[i] = episode_id
        starts = [self._start(self.episode_ids[i]) for i in chosen]
        for start in starts:
            self.settlers.ask(start)
        self.world.start_episodes(chosen, starts, [self.settlers.get(start) for start in starts])
        self.lengths[chosen] = 0
        self.returns[chosen] = 0.0
        self.success[chosen] = False
        self.success_once[chosen] = False
        self.running[chosen] = True
        if self.spec.auto_reset:  # the next start state of each row is settled in the meantime
            for i in chosen:
                self.settlers.ask(self._start(self._next_episode_id(i)))

    def _next_episode_id(self, i: int) -> int:
        """The next episode of row i's own training stream."""
        return self.spec.next_episode_id(self._env_index[i], int(self.counters[i]))

    def _start(self, episode_id: int) -> variants.StartState:
        return episodes.start_state(self.spec.env_id, self.spec.obj_set, episode_id, self.spec.protocol)

    def _show(self, chosen: list[int] | np.ndarray) -> None:
        """Render the chosen rows into `images`. The camera draws all rows, but only these are composed and copied."""
        if len(chosen):
            self.images[chosen] = self.world.render_images(torch.as_tensor(chosen)).cpu().numpy()

    def seen(self) -> dict:
        """As EnvGroup's."""
        seen = {"instructions": self.world.instructions}
        if self.spec.privileged:
            seen["state"] = self._states()
        return seen

    def _states(self) -> np.ndarray:
        """The simulator's state and the share of the episode that is over, float32 [N, S]."""
        progress = (self.lengths / self.spec.max_episode_steps).astype(np.float32)
        return np.concatenate([self.world.privileged_states().cpu().numpy(), progress[:, None]], axis=1)

    # ----------------------------------------------------------------------------------------------------- steps

    def step(self, actions: np.ndarray) -> dict:
        """As EnvGroup's, with actions float32 [N, C, 7]."""
        num_rows, chunk_size, _ = actions.shape
        out = empty_result(num_rows, chunk_size)
        if self.spec.privileged:
            out["states"] = np.repeat(self._states()[:, None], chunk_size, axis=1)
        began = self.running.copy()  # rows whose episode was running before the chunk
        shown = np.zeros(num_rows, bool)  # rows whose last image was taken before the end of the chunk
        last_states: list[np.ndarray | None] = [None] * num_rows  # float32 [S] of rows whose episode ended
        for j in range(chunk_size):
            active = self.running.copy()  # rows that execute action j
            if not active.any():
                break
            if self.spec.privileged and j > 0:
                out["states"][active, j] = self._states()[active]
            ended = self._control_step(j, actions[:, j], active, out)
            if not ended.any():
                continue
            self._keep_states(ended, last_states)
            simulation_goes_on = self.running.any() and j + 1 < chunk_size
            if simulation_goes_on:  # the ended rows must be rendered before anything moves on
                self._show(np.flatnonzero(ended))
                shown |= ended
        dropped = out["dropped"]  # rows whose episode was lost in this chunk
        ended = began & ~self.running & ~dropped
        anew = dropped | (ended & self.spec.auto_reset)  # rows in which an episode begins now
        unseen = began & ~shown & ~dropped  # rows whose state at the end of the chunk is to be shown
        first = unseen & ended if anew.any() else unseen  # before anything begins, because that moves ended rows
        self._show(np.flatnonzero(first))
        self._finish(ended, last_states, out)
        self._replace(np.flatnonzero(dropped), out)
        self._show(np.flatnonzero((unseen & ~first) | anew))
        return out | self.seen()

    def _control_step(self, j: int, actions: np.ndarray, active: np.ndarray, out: dict) -> np.ndarray:
        """Execute action j of the chunk, actions [N, 7], in the active rows and write rewards and masks into `out`.

        Returns the rows whose episode ended in this step, bool [N]. Broken rows are not among them.
        """
        out["rewards"][:, j] = self._execute(actions, active)
        out["valid"][:, j] = active
        broken = active & ~self._finite()  # rows whose state is no longer finite
        self._losses[active & ~broken] = 0
        self._drop(broken, out)
        return active & ~self.running & ~broken

    def _keep_states(self, ended: np.ndarray, last_states: list[np.ndarray | None]) -> None:
        """Store the present states of the ended rows, if states are observed at all."""
        if not self.spec.privileged:
            return
        states = self._states()
        for i in np.flatnonzero(ended):
            last_states[i] = states[i]

    def _execute(self, actions: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Simulate one control step of the active rows, actions [N, 7]. The others hold still. Returns rewards [N]."""
        rows = np.flatnonzero(active)
        self.actions[rows, self.lengths[rows]] = actions[rows]
        self.lengths[rows] += 1
        latest = self.actions[np.arange(len(active)), np.maximum(self.lengths - 1, 0)]  # [N, 7]
        commands = np.where(active[:, None], latest, 0)
        commands[:, 6] = np.where(latest[:, 6] > 0.5, 1.0, -1.0)  # gripper: open / close
        rewards, success = self.world.advance(torch.from_numpy(commands.astype(np.float32)))
        rewards = np.where(active, rewards.cpu().numpy(), 0.0)
        self.success = np.where(active, success.cpu().numpy(), self.success)
        self.success_once |= self.success
        self.returns += rewards
        terminated = active & self._terminates()
        self.running = active & ~terminated & (self.lengths < self.spec.max_episode_steps)
        return rewards

    def _terminates(self) -> np.ndarray:
        """Rows in which success ends the episode now, bool [N]."""
        return np.zeros_like(self.success) if self.spec.ignore_terminations else self.success

    def _finite(self) -> np.ndarray:
        """Rows whose state is finite, bool [N]."""
        return self.world.finite().cpu().numpy()

    def _drop(self, broken: np.ndarray, out: dict) -> None:
        """End the episodes of broken rows. Nothing of them counts."""
        if not broken.any():
            return
        out["dropped"] |= broken
        out["rewards"][broken] = 0.0
        out["valid"][broken] = False
        self.running[broken] = False

    def _finish(self, ended: np.ndarray, last_states: list[np.ndarray | None], out: dict) -> None:
        """Report the episodes that ended in this chunk. With auto_reset, begin the next ones."""
        out["terminations"][:] = ended & self._terminates()
        out["truncations"][:] = ended & ~out["terminations"]
        rows, texts = np.flatnonzero(ended), self.world.instructions
        mean_rewards = self.returns / self.lengths.clip(1)
        columns = (self.success_once, self.success, self.returns, self.lengths, mean_rewards)  # EPISODE_METRICS
        for i in rows:
            metrics = tuple(float(column[i]) for column in columns)
            out["ended"].append((int(i), metrics, texts[i], last_states[i]))
        self.final_images[rows] = self.images[rows]
        if self.spec.auto_reset:
            self._begin(rows.tolist(), [None] * len(rows))

    def _replace(self, rows: np.ndarray, out: dict) -> None:
        """Begin new episodes in the place of dropped ones. Raises RuntimeError after too many losses in a row."""
        if not len(rows):
            return
        names = ", ".join(f"{self._env_index[i]} (episode {self.episode_ids[i]})" for i in rows)
        self._losses[rows] += 1
        given_up = [i for i in rows if self.explicit[i] and self._count_loss(i) == MAX_LOSSES]
        self._losses[given_up] = 0
        rows = np.setdiff1d(rows, given_up)
        if self._losses.max() >= MAX_LOSSES:
            raise RuntimeError(
                f"the simulation lost envs {names} {MAX_LOSSES} times in a row: their state is not finite."
            )
        warnings.warn(f"the simulation lost envs {names}: these episodes are dropped.", RuntimeWarning, stacklevel=2)
        self._begin(rows.tolist(), [self.episode_ids[i] if self.explicit[i] else None for i in rows])
        self._give_up(given_up, out)

    def _count_loss(self, i: int) -> int:
        """How often the present episode of row i was lost."""
        episode_id, times = self._blamed[i]
        self._blamed[i] = self.episode_ids[i], times + 1 if episode_id == self.episode_ids[i] else 1
        return self._blamed[i][1]

    def _give_up(self, rows: list[int], out: dict) -> None:
        """Report the episodes of these rows as lost. The rows rest at another start state, or go on with it."""
        self._begin(rows, [None] * len(rows))
        if not self.spec.auto_reset:
            self.counters[rows] -= 1  # it is not played
            self.running[rows] = False
        for i in rows:
            state = self._states()[i] if self.spec.privileged else None
            out["ended"].append((int(i), (0.0,) * len(EPISODE_METRICS), self.world.instructions[i], state))
            out["truncations"][i] = out["lost"][i] = True
            out["dropped"][i] = False
            self.final_images[i] = self.images[i]
            self._blamed[i] = (None, 0)

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
        """Begin each episode again and replay what was executed. A shorter one begins later, so all end together.

        Returns `seen()`, or {} while no episode has begun.
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
    """Build a BatchedGroup and its simulation.

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
    settings = {key: getattr(spec, key) for key in ("obj_set", "asset_pack", "asset_dir", "sim_freq", "protocol")}
    settings["hulls"] = "gpu" if backends[0].startswith("physx_cuda") else spec.hulls  # of the batch, in every pack
    settlers = Settlers(spec.env_id, num_settlers, **settings)  # these processes start while the batch is built
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
