"""The books of the envs of one process: which episode each is in, what it executed, what came of it.

`EnvGroup` keeps them for any world (`envs/world.py`), in the rank's process or in a worker (`envs/workers.py`).
`envs/vector.py` joins the groups of all processes. Shapes: N envs in this group, C actions per decision, S numbers of
state.

All envs take a step before any takes the next one. An env whose episode has ended executes nothing until it is reset,
and under auto_reset until the chunk is over. In a batch on the GPU it holds still meanwhile, which `describe()` shows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from envs.spec import ACTION_DIM, EPISODE_METRICS, MAX_LOSSES, EnvSpec
from envs.world import World
from schemas.pixels import resize


@dataclass(frozen=True)
class Position:
    """The place of one env in its stream of episodes. A worker's successor continues from it."""

    counter: int
    episode_id: int | None
    explicit: bool
    running: bool


class EnvGroup:
    """The envs of one process: indices offset .. offset + N - 1 of the vector env."""

    def __init__(self, spec: EnvSpec, offset: int, world: World, images: torch.Tensor):
        """images: uint8 [2, N, h, w, 3] on the world's device, latest images and last ones of episodes that ended.

        They are written here and read by the vector env.
        """
        self.spec, self.world = spec, world
        self.images, self.final_images = images
        count = len(self.images)
        self._env_index = [spec.first_env + offset + i for i in range(count)]  # over all ranks
        self.counters = np.zeros(count, np.int64)  # training episodes taken from each env's stream
        self.episode_ids: list[int | None] = [None] * count
        self.explicit = np.zeros(count, bool)  # the caller gave this episode's id
        self.actions = np.zeros((count, spec.max_episode_steps, ACTION_DIM), np.float32)  # executed, as given
        self.lengths = np.zeros(count, np.int64)  # control steps executed in this episode
        self.running = np.zeros(count, bool)
        self.success = np.zeros(count, bool)  # as of the last step
        self.success_once = np.zeros(count, bool)
        self.returns = np.zeros(count)
        self._losses = np.zeros(count, np.int64)  # of each env since its last finite step
        self._blamed: list[tuple[int | None, int]] = [(None, 0)] * count  # episodes that were lost, and how often

    # ----------------------------------------------------------------------------------------------------- episodes

    def reset(self, episode_ids: list[int | None], chosen: list[int]) -> dict:
        """Begin an episode in the chosen envs. None takes the next one of an env's own stream. Returns `seen()`."""
        self._begin(chosen, episode_ids)
        self._show(chosen)
        return self.seen()

    def _begin(self, chosen: list[int], episode_ids: list[int | None]) -> None:
        """Begin episodes in the chosen envs. Nothing is drawn."""
        for i, episode_id in zip(chosen, episode_ids):
            self.explicit[i] = episode_id is not None
            self.episode_ids[i] = self._next_episode_id(i) if episode_id is None else episode_id
            self.counters[i] += episode_id is None
        self.world.begin(chosen, [self.spec.start_state(self.episode_ids[i]) for i in chosen])
        self.lengths[chosen] = self.returns[chosen] = self.success[chosen] = self.success_once[chosen] = 0
        self.running[chosen] = True
        if self.spec.auto_reset:
            self.world.expect([self.spec.start_state(self._next_episode_id(i)) for i in chosen])

    def _next_episode_id(self, i: int) -> int:
        """The next episode of env i's own training stream."""
        return self.spec.next_episode_id(self._env_index[i], int(self.counters[i]))

    def _show(self, chosen: list[int] | np.ndarray) -> None:
        """Draw the chosen envs. A list of indices or a mask bool [N]."""
        rows = np.arange(len(self.images))[chosen]
        if len(rows):
            images = self.world.images(rows)
            self.images[rows] = images if self.spec.pixels is None else resize(images, *self.spec.pixels)

    def seen(self) -> dict:
        """The rest of an observation besides `images`: all instructions and, with `privileged`, `state` [N, S]."""
        return {"instructions": self.world.instructions} | ({"state": self._states()} if self.spec.privileged else {})

    def _states(self) -> np.ndarray:
        """The simulator's states and the share of the episodes that is over, float32 [N, S]."""
        progress = (self.lengths / self.spec.max_episode_steps).astype(np.float32)
        return np.concatenate([self.world.states(), progress[:, None]], axis=1)

    # ----------------------------------------------------------------------------------------------------- steps

    def step(self, actions: np.ndarray) -> dict:
        """actions float32 [N, C, 7]. Each env runs its chunk until its episode ends. Only last frames are drawn.

        Returns the keys of `empty_result` and of `seen()`, and with `privileged` states [N, C, S] before each action.
        """
        count, chunk_size, _ = actions.shape
        out = empty_result(count, chunk_size)
        if self.spec.privileged:
            out["states"] = np.repeat(self._states()[:, None], chunk_size, axis=1)
        unseen = self.running.copy()  # envs that have moved since they were drawn
        last_states = dict.fromkeys(range(count))  # with `privileged`, of envs whose episode ended
        for j in range(chunk_size):
            active = self.running.copy()  # envs that execute action j
            if not active.any():
                break
            if self.spec.privileged and j > 0:
                out["states"][active, j] = self._states()[active]
            out["rewards"][:, j], valid = self._execute(actions[:, j], active)
            out["valid"][:, j], out["dropped"] = valid, out["dropped"] | (active & ~valid)
            ended = valid & ~self.running
            if self.spec.privileged and ended.any():
                last_states |= zip(np.flatnonzero(ended).tolist(), self._states()[ended])
            if j + 1 < chunk_size and self.running.any():  # before the others go on, because a batch moves as a whole
                self._show(ended)
                unseen &= ~ended
        self._finish(unseen, last_states, out)
        return out | self.seen()

    def _execute(self, actions: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Simulate one control step of the active envs, actions [N, 7]. The others hold still.

        Returns rewards [N], and the active envs whose numbers are finite, bool [N].
        """
        self.actions[active, self.lengths[active]] = actions[active]
        self.lengths += active
        commands = actions.copy()
        commands[:, 6] = np.where(actions[:, 6] > 0.5, 1.0, -1.0)  # gripper: open / close
        rewards, success, finite = self.world.advance(commands, active)
        valid = active & finite
        rewards = np.where(valid, rewards, 0.0)
        self.returns += rewards
        self.success = np.where(valid, success, self.success)
        self.success_once |= self.success
        self._losses[valid] = 0
        solved = self.success & (not self.spec.ignore_terminations)
        self.running = valid & ~solved & (self.lengths < self.spec.max_episode_steps)
        return rewards, valid

    def _finish(self, unseen: np.ndarray, last_states: dict[int, np.ndarray | None], out: dict) -> None:
        """Report the episodes that ended in a chunk, begin the next ones, and draw what is unseen, bool [N]."""
        dropped = out["dropped"].copy()
        ended = out["valid"].any(axis=1) & ~self.running & ~dropped
        out["terminations"] = ended & self.success & (not self.spec.ignore_terminations)
        out["truncations"] = ended & ~out["terminations"]
        unseen &= ~dropped
        anew = dropped | (ended & self.spec.auto_reset)
        last = unseen & ended if anew.any() else unseen  # what begins moves a batch, so last images come first
        self._show(last)
        rows, texts = np.flatnonzero(ended), self.world.instructions
        self.final_images[rows] = self.images[rows]
        columns = (self.success_once, self.success, self.returns, self.lengths, self.returns / self.lengths.clip(1))
        out["ended"] += [(i, tuple(float(x[i]) for x in columns), texts[i], last_states[i]) for i in rows.tolist()]
        if self.spec.auto_reset:
            self._begin(rows.tolist(), [None] * len(rows))
        if dropped.any():
            self._replace(np.flatnonzero(dropped), out)
        self._show((unseen & ~last) | anew)

    # ----------------------------------------------------------------------------------------------------- losses

    def _replace(self, rows: np.ndarray, out: dict) -> None:
        """Begin episodes in the place of dropped ones, of whose chunk nothing counts.

        Raises:
            RuntimeError: too many losses in a row.
        """
        out["rewards"][rows], out["valid"][rows] = 0.0, False
        names = ", ".join(f"{self._env_index[i]} (episode {self.episode_ids[i]})" for i in rows)
        self._losses[rows] += 1
        given_up = [int(i) for i in rows if self.explicit[i] and self._count_loss(i) == MAX_LOSSES]
        self._losses[given_up] = 0
        rows = np.setdiff1d(rows, given_up).tolist()
        if self._losses.max() >= MAX_LOSSES:
            raise RuntimeError(
                f"the simulation lost envs {names} {MAX_LOSSES} times in a row: their state is not finite."
            )
        warnings.warn(f"the simulation lost envs {names}: these episodes are dropped.", RuntimeWarning, stacklevel=2)
        self._begin(rows, [self.episode_ids[i] if self.explicit[i] else None for i in rows])
        self._begin_others(given_up)
        for i in given_up:
            state = self._states()[i] if self.spec.privileged else None
            out["ended"].append((i, (0.0,) * len(EPISODE_METRICS), self.world.instructions[i], state))
            out["truncations"][i] = out["lost"][i] = True
            out["dropped"][i] = False
            self.final_images[i] = self.images[i]
            self._blamed[i] = (None, 0)

    def _count_loss(self, i: int) -> int:
        """How often the present episode of env i was lost."""
        episode_id, times = self._blamed[i]
        self._blamed[i] = self.episode_ids[i], times + 1 if episode_id == self.episode_ids[i] else 1
        return self._blamed[i][1]

    def _begin_others(self, rows: list[int]) -> None:
        """Begin episodes of the streams in place of episodes that were given up. Without auto_reset they are at rest.

        Nothing is drawn.
        """
        self._begin(rows, [None] * len(rows))
        if not self.spec.auto_reset:
            self.counters[rows] -= 1  # they are not played
            self.running[rows] = False

    def take_over(self, positions: list[Position], begin: bool, lost: list[int]) -> dict:
        """Continue for a group whose worker is lost. With `begin`, every env that was in an episode begins one.

        An env then starts the next episode of its stream, or the same one again where the caller had given its id. An
        env at rest stays at rest, and `images` still holds its last image.

        lost: envs whose episode was given up. They rest at another start state, or go on with it under auto_reset.

        Returns `seen()`, or {} while no episode has begun.
        """
        self.counters[:] = [position.counter for position in positions]
        begin = begin and positions[0].episode_id is not None
        rows = [i for i in range(len(positions)) if begin and i not in lost]
        self._begin_others(lost)
        same = [positions[i].explicit or not positions[i].running for i in rows]
        self._begin(rows, [positions[i].episode_id if again else None for i, again in zip(rows, same)])
        for i in rows:
            self.explicit[i], self.running[i] = positions[i].explicit, positions[i].running
        self._show([*lost, *(i for i in rows if self.running[i])])
        return self.seen() if begin else {}

    def positions(self) -> list[Position]:
        books = zip(self.counters.tolist(), self.episode_ids, self.explicit.tolist(), self.running.tolist())
        return [Position(*entry) for entry in books]

    # ----------------------------------------------------------------------------------------------------- state

    def describe(self) -> list[dict]:
        return [one | {"elapsed_steps": int(length)} for one, length in zip(self.world.describe(), self.lengths)]

    def env_states(self) -> list[dict[str, np.ndarray]]:
        return self.world.env_states()

    def state_dict(self) -> list[dict]:
        books = zip(self.counters.tolist(), self.episode_ids, self.explicit.tolist(), self.actions, self.lengths)
        return [
            {"counter": counter, "episode_id": episode_id, "explicit": explicit, "actions": actions[:length].copy()}
            for counter, episode_id, explicit, actions, length in books
        ]

    def load_state_dict(self, states: list[dict]) -> dict:
        """Begin each episode again and replay its actions. Scenes of their own are then the same to the last bit.

        A shorter episode begins later, so all end together. This takes a batch as long as the longest one. On a GPU it
        is not exact (`envs/gpu/simulation.py` says what PhysX promises there).

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
            rows = np.flatnonzero(lengths == longest - t).tolist()
            self._begin(rows, [states[i]["episode_id"] for i in rows])
            if t < longest:
                self._execute(replayed[t], lengths >= longest - t)
        self.explicit[:] = [state["explicit"] for state in states]
        self._show(np.arange(len(states)))
        return self.seen()

    def close(self) -> None:
        self.world.close()


def empty_result(count: int, chunk_size: int) -> dict:
    """The result of a step of `count` envs in which nothing was executed."""
    flags = {name: np.zeros(count, bool) for name in ("terminations", "truncations", "dropped", "lost")}
    return flags | {
        "rewards": np.zeros((count, chunk_size), np.float32),
        "valid": np.zeros((count, chunk_size), bool),
        "ended": [],  # (index within the group, metrics, instruction, last state or None)
    }
