"""N envs with one reset() and step(), in this process or in worker processes. Shapes: N envs, C actions per decision.

    envs = make_envs("PutOnPlateInScene25Main-v3", 8, image_size=(96, 96), sim_freq=100, num_env_workers=2)
    obs = envs.reset()                                  # {"image": uint8 [N, H, W, 3], "task_description": N str}
    obs, rewards, terminations, truncations, infos = envs.step(actions)                     # actions [N, C, 7]

With pipeline_stages=2 the envs form two half-batches, each with its own workers. The policy acts on one half while the
other is simulated. With pipeline_stages=1 all N envs are one "half". A rollout of T decisions reads the same in both
cases, and gives the same episodes.

    envs.reset()
    for t, half, rows, obs, outcome in envs.pipeline(range(T + 1)):
        if outcome is not None:
            ...                                         # the outcome of decision t - 1 of the envs in `rows`
        if t < T:
            envs.step_async(policy(obs), half)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs import episodes
from envs.local import LocalGroup
from envs.spec import ACTION_DIM, EPISODE_METRICS, REPLAY_KEYS, EnvSpec
from envs.workers import Worker, WorkerGroup
from schemas import UserError
from schemas.flags import hulls_before

# Largest action per dimension. These are the bounds of the family's controller, and no sensible action is beyond them.
# Any gripper value has a meaning (above 0.5 opens).
ACTION_LIMITS = np.array([1.0] * 3 + [np.pi / 2] * 3 + [np.inf])  # m, rad, -
NOT_FINITE = "actions must be finite, so check the policy's outputs"
BEYOND = "one action moves by at most 1 m and turns by at most pi/2 rad per axis, so check the units (unnorm_key)"


class Outcome(NamedTuple):
    """The outcome of a decision of n envs."""

    obs: dict  # after the chunk
    rewards: Tensor  # float32 [n, C]
    terminations: Tensor  # bool [n], events of this step
    truncations: Tensor  # bool [n]
    infos: dict  # see VectorEnv.step


class Turn(NamedTuple):
    """One half-batch that is ready for decision t."""

    t: int
    half: int
    rows: slice  # its envs
    obs: dict  # their latest observation
    outcome: Outcome | None  # of decision t - 1, or None if no step was begun


def _cut(lower: int, upper: int, count: int) -> list[tuple[int, int]]:
    """Cut [lower, upper) into `count` pieces whose sizes differ by at most one. The larger pieces come last.

    Example: _cut(0, 5, 2) is [(0, 2), (2, 5)].
    """
    edges = [lower + (upper - lower) * k // count for k in range(count + 1)]
    return list(itertools.pairwise(edges))


class VectorEnv:
    """N envs, made by `envs.make_envs`. The head of this file shows how to use them. All results are copies."""

    def __init__(
        self,
        spec: EnvSpec,
        num_env_workers: int = 0,
        pipeline_stages: int = 1,
        worker_timeout: float = 300.0,
        beside: VectorEnv | None = None,
    ):
        """Build the envs. beside: envs whose workers simulate these, too.

        Raises:
            ValueError, RuntimeError: settings that cannot work, missing files, or an env that cannot be built.
        """
        spec.check(num_env_workers, pipeline_stages, worker_timeout)
        self._spec = spec
        self.env_id, self.obj_set = spec.env_id, spec.obj_set
        self.num_envs, self.image_size, self.max_episode_steps = spec.num_envs, spec.image_size, spec.max_episode_steps
        self.num_start_states = episodes.num_start_states(spec.env_id, spec.obj_set)
        self.repeats = spec.sim_backend == "physx_cpu"  # the same actions give the same episode, to the last bit
        in_workers = num_env_workers > 0 and spec.sim_backend == "physx_cpu"
        self._cut_into_groups(num_env_workers if in_workers else 0, pipeline_stages)
        self._groups: list[WorkerGroup | LocalGroup] = []
        self._in_flight: set[int] = set()  # halves between step_async and step_wait
        self._started = False
        self._latest: list[dict] = []  # the latest observation of each half
        hosts = beside.workers if in_workers and beside is not None and beside.can_host(spec) else []
        self._guarded(self._open, in_workers, num_env_workers, worker_timeout, hosts)

    def _cut_into_groups(self, num_workers: int, pipeline_stages: int) -> None:
        """Distribute the envs over halves, and each half over its groups. A group is one worker or this process."""
        halves = _cut(0, self.num_envs, pipeline_stages)
        self.halves = [slice(lower, upper) for lower, upper in halves]  # env indices of each half
        self._bounds: list[tuple[int, int]] = []  # env indices of each group
        self._groups_of: list[range] = []  # the groups of each half
        for (lower, upper), (first_worker, end) in zip(halves, _cut(0, num_workers, pipeline_stages)):
            num_groups = max(1, end - first_worker)
            first = len(self._bounds)
            self._bounds += _cut(lower, upper, num_groups)
            self._groups_of.append(range(first, first + num_groups))

    def _open(self, in_workers: bool, num_env_workers: int, worker_timeout: float, hosts: list[Worker]) -> None:
        """Build all groups, in the hosts as long as there are some. Workers build theirs at the same time."""
        for (lower, upper), host in itertools.zip_longest(self._bounds, hosts[: len(self._bounds)]):
            if in_workers:
                group = WorkerGroup(self._spec, lower, upper - lower, worker_timeout, host)
            else:
                group = LocalGroup(self._spec, lower, upper - lower, worker_timeout, max(1, num_env_workers))
            self._groups.append(group)
        for group in self._groups:
            group.built()

    @property
    def workers(self) -> list[Worker]:
        """The workers that simulate these envs. There are none without num_env_workers."""
        return [group.worker for group in self._groups if isinstance(group, WorkerGroup)]

    def can_host(self, spec: EnvSpec) -> bool:
        """Whether a worker of these envs can simulate such envs, too: a process has one kind of hulls."""
        own = self._spec
        return own.hulls == spec.hulls and episodes.in_family(own.env_id) == episodes.in_family(spec.env_id)

    @property
    def num_restarts(self) -> int:
        """The number of times that a worker was replaced because it died, raised or hung."""
        return sum(group.num_restarts for group in self._groups)

    def _guarded(self, function: Callable, *args) -> Any:
        """Call a function. Any error closes the envs, so that no worker and no memory is left behind."""
        try:
            return function(*args)
        except BaseException:
            self.close()
            raise

    def _check_usable(self, method: str, needs_reset: bool) -> None:
        """Raise RuntimeError where the method must not be called now."""
        if not self._groups:
            raise RuntimeError("these envs are closed: make new ones with make_envs().")
        if self._in_flight:
            raise RuntimeError(f"{method}() while half {min(self._in_flight)} is in its step: call step_wait() first.")
        if needs_reset and not self._started:
            raise RuntimeError(f"{method}() before reset(): call reset() first.")

    def _call(self, method: str, per_group: list[tuple] | None = None) -> list:
        """Call the same method on all groups at the same time. Returns their results in order."""

        def run() -> list:
            for k, group in enumerate(self._groups):
                group.start(method, *(per_group[k] if per_group else ()))
            return [group.finish() for group in self._groups]

        return self._guarded(run)

    def _split(self, sequence: list) -> list[tuple]:
        """One item per env -> the arguments of each group."""
        return [(sequence[lower:upper],) for lower, upper in self._bounds]

    # -----------------------------------------------------------------------------------------------------------------

    def reset(self, episode_ids: Sequence[int] | None = None, env_indices: Sequence[int] | None = None) -> dict:
        """Start an episode in every env, or in those of `env_indices` while the other episodes continue.

        Args:
            episode_ids: one int per env that is reset. Envs with the same id start pixel-identical. None takes the next
                id of each env's own training stream.

        Returns:
            the observation of all N envs: image uint8 [N, H, W, 3], task_description (N str), and with `privileged`
            state float32 [N, S].

        Raises:
            ValueError: an index or id is out of range, or their numbers differ.
        """
        self._check_usable("reset", needs_reset=env_indices is not None)
        chosen = list(range(self.num_envs)) if env_indices is None else [int(i) for i in env_indices]
        if len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(self.num_envs)):
            raise ValueError(f"env_indices {chosen} must be distinct and between 0 and {self.num_envs - 1}.")
        if episode_ids is not None:
            episode_ids = [episodes.check_episode_id(self.env_id, self.obj_set, i) for i in episode_ids]
            if len(episode_ids) != len(chosen):
                raise ValueError(
                    f"reset() got {len(episode_ids)} episode ids for {len(chosen)} envs: give one per env."
                )
        id_of = dict(zip(chosen, episode_ids or [None] * len(chosen)))
        per_group = []
        for lower, upper in self._bounds:
            rows = [i for i in range(lower, upper) if i in id_of]
            per_group.append(([id_of[i] for i in rows], [i - lower for i in rows]))
        seen = self._call("reset", per_group)
        self._started = True
        return self._remembered(self._observation(range(len(self._groups)), seen))

    def step(self, actions: Tensor | np.ndarray) -> Outcome:
        """Execute a chunk of C actions in every env whose episode is running.

        Args:
            actions: float [N, C, 7] in robot units: metres, Euler angles (rad), gripper (> 0.5 opens).

        Returns:
            the observation after the chunk, rewards float32 [N, C], terminations and truncations bool [N], which are
            events of this call, and infos:
                valid: bool [N, C], whether the action was executed.
                ended: int64 [M], the envs whose episode ended.
                final_observation: of these M envs.
                episode: the metrics of their episodes, a dict of float32 [M].
                dropped: bool [N]. This env's episode was lost with its worker and does not count. The observation
                    shows the first frame of the next episode, or of the same one if reset() was given ids.
                lost: bool [N]. This env's episode, whose id reset() was given, lost its worker three times and was
                    given up. It is among `ended`, truncated and failed, without actions or rewards.
                states: float32 [N, C, S] before each action, if `privileged` was set.

        Raises:
            ValueError, UserError: actions of another shape, not finite, or beyond ACTION_LIMITS.
        """
        self._check_usable("step", needs_reset=True)
        actions = self._checked(actions, self.num_envs)
        everything = range(len(self._groups))
        self._guarded(self._start_step, everything, actions)
        outcome = self._guarded(self._finish_step, everything)
        self._remembered(outcome.obs)
        return outcome

    def pipeline(self, decisions: Iterable[int]) -> Iterator[Turn]:
        """Turns to decide, in the order of decisions and halves, beginning with the latest observations.

        In a turn you may give the half its actions with step_async(). Its next turn then brings the outcome. So there
        is one decision (t = 0, 1, ...) more than you make. A half without actions rests.
        """
        self._check_usable("pipeline", needs_reset=True)
        for t in decisions:
            for half, rows in enumerate(self.halves):
                outcome = self.step_wait(half) if half in self._in_flight else None
                yield Turn(t, half, rows, self._latest[half], outcome)

    def _remembered(self, obs: dict) -> dict:
        """Keep an observation of all N envs as the latest one of each half, and return it."""
        self._latest = [{key: value[rows] for key, value in obs.items()} for rows in self.halves]
        return obs

    def step_async(self, actions: Tensor | np.ndarray, half: int = 0) -> None:
        """Begin a step of the n envs `halves[half]` with actions [n, C, 7], see step()."""
        if half not in range(len(self.halves)):
            raise ValueError(f"half {half} does not exist: these envs have {len(self.halves)} (pipeline_stages).")
        if half in self._in_flight:
            raise RuntimeError(f"step_async() of half {half} twice: call step_wait({half}) in between.")
        if not self._groups or not self._started:
            self._check_usable("step_async", needs_reset=True)
        rows = self.halves[half]
        actions = self._checked(actions, rows.stop - rows.start)
        self._guarded(self._start_step, self._groups_of[half], actions)
        self._in_flight.add(half)

    def step_wait(self, half: int = 0) -> Outcome:
        """Wait for the step that `step_async` began: step()'s outcome for this half, `ended` counts within it."""
        if half not in self._in_flight:
            raise RuntimeError(f"step_wait({half}) without a step_async() of half {half}.")
        self._in_flight.remove(half)
        outcome = self._guarded(self._finish_step, self._groups_of[half])
        self._latest[half] = outcome.obs
        return outcome

    def _start_step(self, chosen: range, actions: np.ndarray) -> None:
        """Begin a step of the chosen groups with actions float32 [n, C, 7] of their envs."""
        first = self._bounds[chosen[0]][0]
        for k in chosen:
            lower, upper = self._bounds[k]
            self._groups[k].start("step", actions[lower - first : upper - first])

    def _finish_step(self, chosen: range) -> Outcome:
        """Join the results of the chosen groups."""
        results = [self._groups[k].finish() for k in chosen]

        def joined(key: str) -> Tensor:
            return torch.from_numpy(np.concatenate([result[key] for result in results]))

        infos = {name: joined(name) for name in ("valid", "dropped", "lost", "states") if name in results[0]}
        infos |= self._ended(chosen, results)
        obs = self._observation(chosen, results)
        return Outcome(obs, joined("rewards"), joined("terminations"), joined("truncations"), infos)

    def _observation(self, chosen: range, seen: list[dict]) -> dict:
        """The observation of the chosen groups' envs. seen: what each group's `seen()` gave."""
        images = torch.cat([self._groups[k].images for k in chosen])  # [n, h, w, 3], a copy
        obs = {"image": images, "task_description": [text for one in seen for text in one["instructions"]]}
        if self._spec.privileged:
            obs["state"] = torch.from_numpy(np.concatenate([one["state"] for one in seen]))
        return obs

    def _ended(self, chosen: range, results: list[dict]) -> dict:
        """The infos of the M envs whose episode ended in this call."""
        ended = [(k, *one) for k, result in zip(chosen, results) for one in result["ended"]]
        groups, rows, metrics, texts, states = zip(*ended) if ended else [()] * 5  # M entries each
        finals = [self._groups[k].final_images[i : i + 1] for k, i in zip(groups, rows)]
        final = {"image": torch.cat([self._groups[chosen[0]].images[:0], *finals]), "task_description": list(texts)}
        if self._spec.privileged:
            states = np.concatenate([results[0]["state"][:0], *(state[None] for state in states)])
            final["state"] = torch.from_numpy(states)
        first = self._bounds[chosen[0]][0]
        ended = torch.tensor([self._bounds[k][0] - first + i for k, i in zip(groups, rows)], dtype=torch.int64)
        columns = torch.tensor(metrics, dtype=torch.float32).reshape(len(ended), len(EPISODE_METRICS)).unbind(dim=1)
        return {"ended": ended, "final_observation": final, "episode": dict(zip(EPISODE_METRICS, columns))}

    def _checked(self, actions: Tensor | np.ndarray, num_envs: int) -> np.ndarray:
        """The actions as float32 [num_envs, C, 7]. Raises ValueError or UserError, see step()."""
        actions = torch.as_tensor(actions).detach().to("cpu", torch.float32).numpy()
        chunk_size = actions.shape[1] if actions.ndim == 3 else 0
        if chunk_size < 1 or actions.shape != (num_envs, chunk_size, ACTION_DIM):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}: give [num_envs={num_envs}, chunk_size, {ACTION_DIM}]."
            )
        not_finite, beyond = ~np.isfinite(actions), np.abs(actions) > ACTION_LIMITS + 1e-6
        for wrong, remedy in ((not_finite, NOT_FINITE), (beyond, BEYOND)):
            if wrong.any():
                index = tuple(int(i) for i in np.argwhere(wrong)[0])
                raise UserError(f"actions{list(index)} is {actions[index]:g}: {remedy}.")
        return actions

    # -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> list[dict]:
        """The present state of every env: names, instruction, poses, qpos [8] and elapsed_steps.

        Poses are p, q (wxyz) in the world frame.
        """
        self._check_usable("describe", needs_reset=True)
        return [description for group in self._call("describe") for description in group]

    def env_states(self) -> list[dict[str, np.ndarray]]:
        """ManiSkill's state of every env by the path of its entries, such as "actors/object": float32 [n] each.

        Raises:
            ValueError: the envs are a batch on the GPU, which has no such states.
        """
        self._check_usable("env_states", needs_reset=True)
        if self._spec.sim_backend == "physx_cuda":
            raise ValueError(
                "env_states() needs sim_backend='physx_cpu': a batch on the GPU has no states of ManiSkill's."
            )
        return [state for group in self._call("env_states") for state in group]

    def state_dict(self) -> list[dict]:
        """One picklable entry per env. `load_state_dict` continues from it to the last bit, even during an episode.

        An entry knows nothing about ranks or workers. So you can join the entries of all ranks and distribute them to
        another number of ranks.
        """
        self._check_usable("state_dict", needs_reset=False)
        world = {key: vars(self._spec)[key] for key in REPLAY_KEYS}
        return [entry | {"world": world} for group in self._call("state_dict") for entry in group]

    def load_state_dict(self, state: list[dict]) -> dict | None:
        """Continue from an earlier `state_dict()`.

        With sim_backend "physx_cuda" the GPU replays running episodes, which is not exact to the last bit
        (`envs/gpu/simulation.py`).

        Returns:
            the observation of that moment, or None if no episode had begun.

        Raises:
            ValueError: the state is of other envs or of an older version.
        """
        self._check_usable("load_state_dict", needs_reset=False)
        if len(state) != self.num_envs:
            raise ValueError(f"this state holds {len(state)} envs, there are {self.num_envs}: make as many envs.")
        world = {"hulls": None} | state[0]["world"] | hulls_before(state[0]["world"])
        lacking = [key for key in REPLAY_KEYS if key not in world]
        if lacking or "explicit" not in state[0]:
            raise ValueError("this state was saved by an older version of envs, which this one cannot continue.")
        for key in REPLAY_KEYS:
            saved, value = world[key], vars(self._spec)[key]
            if saved != value:
                raise ValueError(
                    f"this state was saved with {key}={saved!r}, these envs have {value!r}: "
                    "make envs with the saved value."
                )
        seen = self._call("load_state_dict", self._split(state))
        self._started = state[0]["episode_id"] is not None
        if not self._started:
            return None
        return self._remembered(self._observation(range(len(self._groups)), seen))

    def close(self) -> None:
        """End all workers. A second call does nothing."""
        groups, self._groups, self._in_flight = self._groups, [], set()
        for group in groups:
            group.close()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
