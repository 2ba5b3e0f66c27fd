"""N envs behind one reset/step, in this process or in worker processes. Shapes: N envs, C actions per decision.

    envs = make_envs("PutOnPlateInScene25Main-v3", 8, image_size=(96, 96), sim_freq=100, num_env_workers=2)
    obs = envs.reset()                                  # {"image": uint8 [N, H, W, 3], "task_description": N str}
    obs, rewards, terminations, truncations, infos = envs.step(actions)                     # actions [N, C, 7]

A rollout of T decisions reads the same with one half (pipeline_stages=1: all N envs) and with two, each with its own
workers: the policy acts on one half while the other is simulated. Episodes do not depend on it.

    envs.reset()
    for t, half, rows, obs, outcome in envs.pipeline(range(T + 1)):
        if outcome is not None:
            ...                                         # what came of decision t - 1 of the envs in `rows`
        if t < T:
            envs.step_async(policy(obs), half)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from envs import episodes
from envs.group import ACTION_DIM, EPISODE_METRICS, REPLAY_KEYS, EnvSpec
from envs.local import LocalGroup
from envs.workers import WorkerGroup
from schemas import UserError

# what one action may ask for, per dimension: the family's controller takes these as its bounds, and nothing sensible is
# beyond them; any gripper value has a meaning (above 0.5 opens)
ACTION_LIMITS = np.array([1.0] * 3 + [np.pi / 2] * 3 + [np.inf])  # m, rad, -


class Outcome(NamedTuple):
    """What came of a decision of n envs."""

    obs: dict  # after the chunk
    rewards: torch.Tensor  # float32 [n, C]
    terminations: torch.Tensor  # bool [n], events of this step
    truncations: torch.Tensor  # bool [n]
    infos: dict  # see VectorEnv.step


class Turn(NamedTuple):
    """One half-batch whose turn it is to decide."""

    t: int
    half: int
    rows: slice  # its envs
    obs: dict  # what they see
    outcome: Outcome | None  # of decision t - 1; None where none was begun


def _cut(lower: int, upper: int, count: int) -> list[tuple[int, int]]:
    """[lower, upper) in `count` pieces whose sizes differ by one at most, the larger ones last."""
    return [tuple(lower + (upper - lower) * end // count for end in (k, k + 1)) for k in range(count)]


class VectorEnv:
    """See the head of this file; made by `envs.make_envs`. Everything returned is a copy."""

    def __init__(
        self, spec: EnvSpec, num_env_workers: int = 0, pipeline_stages: int = 1, worker_timeout: float = 300.0
    ):
        spec.check(num_env_workers, pipeline_stages, worker_timeout)
        self._spec = spec
        self.num_envs, self.image_size, self.max_episode_steps = spec.num_envs, spec.image_size, spec.max_episode_steps
        self.env_id, self.obj_set = spec.env_id, spec.obj_set
        self.num_start_states = episodes.num_start_states(spec.env_id, spec.obj_set)
        parts = _cut(0, spec.num_envs, pipeline_stages)
        self.parts: list[slice] = [slice(lower, upper) for lower, upper in parts]  # rows of each half-batch
        in_workers = num_env_workers > 0 and spec.sim_backend == "physx_cpu"
        workers = [upper - lower for lower, upper in _cut(0, num_env_workers * in_workers, pipeline_stages)]
        # env indices of each group, and the groups of each part; a group never spans two parts
        self._bounds: list[tuple[int, int]] = []
        self._groups_of: list[range] = []
        for (lower, upper), count in zip(parts, workers):
            first = len(self._bounds)
            self._bounds += _cut(lower, upper, max(1, count))
            self._groups_of.append(range(first, len(self._bounds)))
        self._groups: list = []
        self._in_flight: set[int] = set()  # parts between step_async and step_wait
        self._started = False
        self._latest: list[dict] = []  # what each part saw last
        self._guarded(self._open, in_workers, num_env_workers, worker_timeout)

    def _open(self, in_workers: bool, num_env_workers: int, worker_timeout: float) -> None:
        for lower, upper in self._bounds:
            place = (self._spec, lower, upper - lower)
            self._groups.append(
                WorkerGroup(*place, worker_timeout)
                if in_workers
                else LocalGroup(*place, worker_timeout, max(1, num_env_workers))
            )
        if in_workers:
            for group in self._groups:
                group.built()

    @property
    def num_restarts(self) -> int:
        """How many times a worker was replaced because it died, raised or hung."""
        return sum(group.num_restarts for group in self._groups)

    def _guarded(self, function, *args):
        """Call; whatever goes wrong, no worker and no memory is left behind."""
        try:
            return function(*args)
        except BaseException:
            self.close()
            raise

    def _check_usable(self, what: str, needs_reset: bool) -> None:
        if not self._groups:
            raise RuntimeError("these envs are closed: make new ones with make_envs().")
        if self._in_flight:
            raise RuntimeError(f"{what}() while part {min(self._in_flight)} is in its step: call step_wait() first.")
        if needs_reset and not self._started:
            raise RuntimeError(f"{what}() before reset(): call reset() first.")

    def _call(self, method: str, per_group: list[tuple] | None = None) -> list:
        """The same method on every group, all at once; results in order."""

        def run() -> list:
            for k, group in enumerate(self._groups):
                group.start(method, *(per_group[k] if per_group else ()))
            return [group.finish() for group in self._groups]

        return self._guarded(run)

    def _split(self, sequence) -> list[tuple]:
        return [(sequence[lower:upper],) for lower, upper in self._bounds]

    # -----------------------------------------------------------------------------------------------------------------

    def reset(self, episode_ids=None, env_indices=None) -> dict:
        """Start an episode in every env, or in those of `env_indices` while the others go on with theirs.

        episode_ids: one int per env that is reset (the same id several times: a group that starts pixel-identical);
            None takes the next of each env's own training stream.
        Returns the observation of all N envs.
        """
        self._check_usable("reset", needs_reset=env_indices is not None)
        chosen = list(range(self.num_envs)) if env_indices is None else [int(i) for i in env_indices]
        if len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(self.num_envs)):
            raise ValueError(f"env_indices {chosen} must be distinct and lie between 0 and {self.num_envs - 1}.")
        if episode_ids is not None:
            episode_ids = [episodes.check_episode_id(self.env_id, self.obj_set, i) for i in episode_ids]
            if len(episode_ids) != len(chosen):
                raise ValueError(
                    f"reset() got {len(episode_ids)} episode ids for {len(chosen)} envs: give one per env."
                )
        wanted = dict(zip(chosen, episode_ids or [None] * len(chosen)))
        per_group = []
        for lower, upper in self._bounds:
            rows = [i for i in range(lower, upper) if i in wanted]
            per_group.append(([wanted[i] for i in rows], [i - lower for i in rows]))
        seen = self._call("reset", per_group)
        self._started = True
        return self._remembered(self._observation(range(len(self._groups)), seen))

    def step(self, actions) -> Outcome:
        """Execute a chunk of C actions in every env that is running: step_async on all envs, then step_wait.

        Args: actions float [N, C, 7], torch or numpy, robot units: metres, Euler angles (rad), gripper (> 0.5 opens).
        Returns: obs after the chunk; rewards float32 [N, C]; terminations, truncations bool [N] (events of this call);
            infos: valid bool [N, C], ended int64 [M], final_observation (of those M envs), episode (dict of fp32 [M]),
            states float32 [N, C, S] before each action where `privileged` was asked for,
            dropped bool [N]: this env's episode was lost with its worker and counts for nothing; obs shows the first
            frame of the next one (of the same one again where reset() was given ids).
        """
        self._check_usable("step", needs_reset=True)
        actions = self._checked(actions, self.num_envs)
        everything = range(len(self._groups))
        self._guarded(self._start_step, everything, actions)
        outcome = self._guarded(self._finish_step, everything)
        self._remembered(outcome.obs)
        return outcome

    def pipeline(self, decisions: Iterable[int]) -> Iterator[Turn]:
        """Whose turn it is, decision by decision and half by half, from what the envs saw last.

        A half that you give actions with step_async() is simulated until its next turn, which brings the outcome. A
        half that you give none rests.

        Args:
            decisions: t = 0, 1, ... One more than you decide brings the outcomes of the last one.
        """
        self._check_usable("pipeline", needs_reset=True)
        for t in decisions:
            for half, rows in enumerate(self.parts):
                outcome = self.step_wait(half) if half in self._in_flight else None
                yield Turn(t, half, rows, self._latest[half], outcome)

    def _remembered(self, obs: dict) -> dict:
        """Keep an observation of all N envs as what each part saw last, and return it."""
        self._latest = [{key: value[rows] for key, value in obs.items()} for rows in self.parts]
        return obs

    def step_async(self, actions, part: int = 0) -> None:
        """Begin a step of the envs in rows `parts[part]`; actions [n, C, 7], n of them."""
        if part not in range(len(self.parts)):
            raise ValueError(f"part {part} does not exist: these envs have {len(self.parts)} (pipeline_stages).")
        if part in self._in_flight:
            raise RuntimeError(f"step_async() of part {part} twice: call step_wait({part}) in between.")
        if not self._groups or not self._started:
            self._check_usable("step_async", needs_reset=True)
        rows = self.parts[part]
        actions = self._checked(actions, rows.stop - rows.start)
        self._guarded(self._start_step, self._groups_of[part], actions)
        self._in_flight.add(part)

    def step_wait(self, part: int = 0) -> Outcome:
        """The result of what `step_async` began: as `step`'s, of that part alone (`ended` counts within it)."""
        if part not in self._in_flight:
            raise RuntimeError(f"step_wait({part}) without a step_async() of part {part}.")
        self._in_flight.remove(part)
        outcome = self._guarded(self._finish_step, self._groups_of[part])
        self._latest[part] = outcome.obs
        return outcome

    def _start_step(self, chosen: range, actions: np.ndarray) -> None:
        first = self._bounds[chosen[0]][0]
        for k in chosen:
            lower, upper = self._bounds[k]
            self._groups[k].start("step", actions[lower - first : upper - first])

    def _finish_step(self, chosen: range) -> Outcome:
        results = [self._groups[k].finish() for k in chosen]
        rewards, valid, terminations, truncations, dropped = (
            torch.from_numpy(np.concatenate([result[key] for result in results]))
            for key in ("rewards", "valid", "terminations", "truncations", "dropped")
        )
        infos = {"valid": valid, "dropped": dropped} | self._ended(chosen, results)
        if self._spec.privileged:
            infos["states"] = torch.from_numpy(np.concatenate([result["states"] for result in results]))
        return Outcome(self._observation(chosen, results), rewards, terminations, truncations, infos)

    def _observation(self, chosen: range, seen: list[dict]) -> dict:
        images = np.concatenate([self._groups[k].images for k in chosen])  # [N, H, W, 3], a copy
        texts = [text for part in seen for text in part["instructions"]]
        obs = {"image": torch.from_numpy(images), "task_description": texts}
        if self._spec.privileged:
            obs["state"] = torch.from_numpy(np.concatenate([part["state"] for part in seen]))
        return obs

    def _ended(self, chosen: range, results: list[dict]) -> dict:
        """What infos says about the M envs whose episode ended in this call."""
        indices, metrics, texts, states = [], [], [], []
        images = np.empty((sum(len(result["ended"]) for result in results), *self._spec.image_shape), np.uint8)
        first = self._bounds[chosen[0]][0]
        for k, result in zip(chosen, results):
            for i, values, text, state in result["ended"]:
                images[len(indices)] = self._groups[k].final_images[i]
                indices.append(self._bounds[k][0] - first + i)
                metrics.append(values)
                texts.append(text)
                states.append(state)
        columns = torch.tensor(metrics, dtype=torch.float32).reshape(len(indices), len(EPISODE_METRICS)).unbind(dim=1)
        final_observation = {"image": torch.from_numpy(images), "task_description": texts}
        if self._spec.privileged:
            final_observation["state"] = torch.from_numpy(np.stack(states) if states else results[0]["state"][:0])
        return {
            "ended": torch.tensor(indices, dtype=torch.int64),
            "final_observation": final_observation,
            "episode": dict(zip(EPISODE_METRICS, columns)),
        }

    def _checked(self, actions, num_envs: int) -> np.ndarray:
        """float32 [num_envs, C, 7], or one clear sentence."""
        actions = torch.as_tensor(actions).detach().to("cpu", torch.float32).numpy()
        if actions.ndim != 3 or actions.shape[0] != num_envs or actions.shape[1] < 1 or actions.shape[2] != ACTION_DIM:
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}: give [num_envs={num_envs}, chunk_size, {ACTION_DIM}]."
            )
        if not np.isfinite(actions).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise UserError(
                f"actions{list(index)} is {actions[index]}: actions must be finite, so check the policy's outputs."
            )
        if (beyond := np.abs(actions) > ACTION_LIMITS + 1e-6).any():
            index = tuple(int(i) for i in np.argwhere(beyond)[0])
            raise UserError(
                f"actions{list(index)} is {actions[index]:g}: one action moves by at most 1 m and turns by at most "
                "pi/2 rad per axis, so check the units (unnorm_key)."
            )
        return actions

    # -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> list[dict]:
        """The live state of every env: names, instruction, poses (p, q wxyz, world frame), qpos [8], elapsed_steps."""
        self._check_usable("describe", needs_reset=True)
        return [one for part in self._call("describe") for one in part]

    def state_dict(self) -> list[dict]:
        """One entry per env, picklable: `load_state_dict` continues from it bit for bit, also in mid-episode.

        An entry knows nothing of ranks or workers, so those of all ranks can be put together and dealt out anew.
        """
        self._check_usable("state_dict", needs_reset=False)
        world = {key: vars(self._spec)[key] for key in REPLAY_KEYS}
        return [one | {"world": world} for part in self._call("state_dict") for one in part]

    def load_state_dict(self, state: list[dict]) -> dict | None:
        """Continue where `state` was taken. Returns the observation of that moment, None if before a reset.

        With sim_backend "physx_cuda" episodes under way are replayed on the GPU, not bit for bit
        (`envs/gpu/simulation.py`).
        """
        self._check_usable("load_state_dict", needs_reset=False)
        if len(state) != self.num_envs:
            raise ValueError(f"this state holds {len(state)} envs, there are {self.num_envs}: make as many envs.")
        lacking = [key for key in REPLAY_KEYS if key not in state[0]["world"]]
        if lacking or "explicit" not in state[0]:
            raise ValueError("this state was saved by an older version of envs, which this one can not continue.")
        for key in REPLAY_KEYS:
            saved, value = state[0]["world"][key], vars(self._spec)[key]
            if saved != value:
                raise ValueError(
                    f"this state was saved with {key}={saved!r}, these envs have {value!r}: "
                    "make envs with the saved value."
                )
        seen = self._call("load_state_dict", self._split(state))
        self._started = state[0]["episode_id"] is not None
        return self._remembered(self._observation(range(len(self._groups)), seen)) if self._started else None

    def close(self) -> None:
        """End all workers; safe to call twice."""
        groups, self._groups, self._in_flight = self._groups, [], set()
        for group in groups:
            group.close()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
