"""Success on fixed episodes. The training scripts and evaluate.py share this loop.

Every episode has an id. Its actions depend only on its own images and on noise, which is a function of (seed, episode
id, step). So it does not matter which rank, worker or batch runs an episode, except for rounding.

    N envs on this rank   C = chunk_size actions per decision   M episodes
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from schemas import UserError
from vla.distributed import all_gather_lists, print0, rank, world_size
from vla.evaluation.vector_env import VectorEnv
from vla.models.policy import uniform_noise
from vla.text import counted

STATISTICS = ("success_once", "success_at_end", "return", "episode_len", "reward")


class Stop(Protocol):
    """An object that says whether this rank should stop, such as preemption.StopRequest."""

    requested: bool


class NeverStop:
    requested = False


NEVER = NeverStop()


def noise_seed(seed: int, episode_id: int) -> int:
    """The seed of an episode's noise. It has 32 bits, because torch's CPU generator keeps no more of a seed.

    numpy's SeedSequence mixes seed and id. Seed 0 gives the id itself, because the results in results/ were made so.
    """
    return int(np.random.SeedSequence([seed, episode_id]).generate_state(1)[0]) if seed else episode_id % 2**32


class Actor(Protocol):
    """An object that chooses actions: a policy at one temperature, a scripted expert, or one that stays idle."""

    chunk_size: int  # actions per decision

    def begin(self, episode_ids: Sequence[int]) -> None:
        """Called when N episodes start, one per env."""

    def restart(self, env: int) -> None:
        """Called when this env's episode was lost with its worker and has begun again."""

    def act(self, obs: dict, envs: VectorEnv) -> torch.Tensor:
        """obs of the N envs -> actions float32 [N, C, 7], robot units."""


class Watch(Protocol):
    """An object that gets what the policy sees in an evaluation."""

    def add(self, episode_ids: Sequence[int], obs: dict, executed: Sequence[list], returns: torch.Tensor) -> None:
        """Called after a reset and after every decision of N envs, of which the first ones run `episode_ids`.

        executed: the actions so far, a list per env. returns: their rewards so far, float32 [N].
        """


class PolicyActor:
    """A VLAPolicy with whole weights at one temperature (0 = greedy). Error messages call it `name`."""

    def __init__(self, policy, temperature: float, seed: int = 0, name: str = "the policy"):
        self.policy, self.temperature, self.seed, self.name = policy, temperature, seed, name
        self.chunk_size = policy.chunk_size

    def begin(self, episode_ids: Sequence[int]) -> None:
        self.seeds = [noise_seed(self.seed, int(episode_id)) for episode_id in episode_ids]
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def restart(self, env: int) -> None:
        self.generators[env].manual_seed(self.seeds[env])

    def act(self, obs: dict, envs: VectorEnv) -> torch.Tensor:
        noise = torch.cat([uniform_noise(1, self.policy.chunk_size, g) for g in self.generators])  # [N, C, D]
        tokens, logprobs, _ = self.policy.act(self.policy.prepare(obs), self.temperature, noise)
        if not logprobs.isfinite().all():
            raise UserError(
                f"{self.name} gives probabilities that are not finite: use an earlier checkpoint"
            ) from FloatingPointError("NaN among log-probabilities")
        return self.policy.decode(tokens)


def evaluate(
    policy, envs: VectorEnv, episode_ids: list[int], temperature: float, watch: Watch | None = None, stop: Stop = NEVER
) -> list[dict] | None:
    """Run every episode id once, spread over ranks.

    Args:
        policy: whole weights on this rank (rollout_stage).
        envs: vector env with auto_reset off and any number of envs, equally many on all ranks.
        watch: gets what the policy sees.
        stop: looked at before every decision.

    Returns:
        all ranks' episodes in the order of episode_ids, see run_episodes(). If any rank was asked to stop, every rank
        gets None.
    """
    batches = run_episodes(PolicyActor(policy, temperature), envs, episode_ids, watch, stop)
    episodes = [episode for batch in batches for episode in batch]
    if len(episodes) < len(episode_ids):
        return None
    if lost := lost_in_words(episodes):
        print0(f"warning: {lost}")
    return episodes


def mean_statistics(episodes: list[dict]) -> dict[str, float]:
    """The means of success_once, success_at_end, return, episode_len and reward, and num_episodes."""
    means = {name: sum(episode[name] for episode in episodes) / len(episodes) for name in STATISTICS}
    return means | {"num_episodes": float(len(episodes))}


def run_episodes(
    actor: Actor, envs: VectorEnv, episode_ids: list[int], watch: Watch | None = None, stop: Stop = NEVER
) -> Iterator[list[dict]]:
    """Run every episode id once, spread over ranks. All ranks together.

    Args:
        envs: vector env with auto_reset off and equally many envs on every rank.
        watch, stop: see evaluate(). Ranks meet after every batch. If one of them stopped within it, that batch is the
            last one for all.

    Yields:
        all ranks' episodes, batch by batch, in the order of episode_ids and the same on every rank. Episodes that had
        not ended when a rank stopped are left out. A dict has episode_id, the STATISTICS, seconds (its share of the
        batch's seconds) and actions (float32 [episode_len, 7], those that were executed: see replay() and is_lost()).
    """
    at_once = envs.num_envs * world_size()
    for start in range(0, len(episode_ids), at_once):
        began = time.perf_counter()
        ids = episode_ids[start : start + at_once]
        own_ids = ids[rank() :: world_size()]
        batch = run_batch(actor, envs, own_ids, watch, stop) if own_ids else []
        ended = {episode["episode_id"]: episode for episode in all_gather_lists(batch)}
        seconds = (time.perf_counter() - began) / len(ids)
        yield [ended[episode_id] | {"seconds": seconds} for episode_id in ids if episode_id in ended]
        if len(ended) < len(ids):  # the same on every rank
            return


def run_batch(
    actor: Actor, envs: VectorEnv, episode_ids: list[int], watch: Watch | None = None, stop: Stop = NEVER
) -> list[dict]:
    """Run at most envs.num_envs episodes at once. Idle envs repeat the last id and are left out of the result.

    If this rank is asked to stop, the result has only the episodes that have ended.
    """
    if stop.requested:  # a reset takes longer than many steps
        return []
    padded = episode_ids + [episode_ids[-1]] * (envs.num_envs - len(episode_ids))
    actor.begin(padded)
    obs = envs.reset(padded)
    ended: dict[int, dict] = {}
    executed: list[list[np.ndarray]] = [[] for _ in padded]
    returns = torch.zeros(envs.num_envs)
    if watch is not None:
        watch.add(episode_ids, obs, executed, returns)
    while len(ended) < envs.num_envs and not stop.requested:
        actions = torch.as_tensor(actor.act(obs, envs), dtype=torch.float32)  # [N, C, 7]
        obs, rewards, _, _, infos = envs.step(actions)
        for env in (infos["dropped"] | infos["lost"]).nonzero()[:, 0].tolist():  # begun again, or given up
            actor.restart(env)
            returns[env], executed[env] = 0.0, []
        returns += rewards.sum(dim=1)
        for env in range(envs.num_envs):
            executed[env].extend(actions[env][infos["valid"][env]].numpy())
        if watch is not None:
            watch.add(episode_ids, obs, executed, returns)
        for position, env in enumerate(infos["ended"].tolist()):
            statistics = {name: float(infos["episode"][name][position]) for name in STATISTICS}
            actions = np.reshape(executed[env], (-1, 7)).astype(np.float32)
            ended[env] = {"episode_id": int(padded[env])} | statistics | {"actions": actions}
    return [ended[env] for env in range(len(episode_ids)) if env in ended]


class Moment(NamedTuple):
    """N episodes after `step` actions."""

    step: int
    images: np.ndarray  # uint8 [N, H, W, 3]
    instructions: list[str]
    returns: list[float]


def replay(envs: VectorEnv, episodes: list[dict], chunk_size: int = 1, stop: Stop = NEVER) -> Iterator[Moment]:
    """Execute the recorded actions of N = envs.num_envs episodes again. An episode that has ended stays as it is.

    Args:
        episodes: as run_episodes() gives them.
        chunk_size: actions from one moment to the next. There is an image at each of them only.
        stop: looked at before every step. The moments end early if this rank was asked to stop.

    Raises:
        RuntimeError: a worker was lost.

    Warns if an episode has another outcome than it had before.
    """
    obs = envs.reset([episode["episode_id"] for episode in episodes])
    returns = [0.0] * len(episodes)
    longest = max(len(episode["actions"]) for episode in episodes)
    yield Moment(0, np.asarray(obs["image"]), obs["task_description"], returns)
    for step in range(0, longest, chunk_size):
        if stop.requested:
            return
        # an env whose episode has ended ignores its actions
        rows = [np.minimum(range(step, step + chunk_size), len(episode["actions"]) - 1) for episode in episodes]
        actions = np.stack([episode["actions"][row] for episode, row in zip(episodes, rows)])  # [N, C, 7]
        obs, rewards, _, _, infos = envs.step(actions)
        if (infos["dropped"] | infos["lost"]).any():
            raise RuntimeError("a simulation was lost with its worker")
        returns = [total + float(reward) for total, reward in zip(returns, rewards.sum(dim=1))]
        warn_of_differences(envs.env_id, episodes, infos)
        yield Moment(step + chunk_size, np.asarray(obs["image"]), obs["task_description"], returns)


def warn_of_differences(env_id: str, episodes: list[dict], infos: dict) -> None:
    """Warn of episodes that ended in this step with other statistics than they had before."""
    for position, env in enumerate(infos["ended"].tolist()):
        before = {name: episodes[env][name] for name in STATISTICS}
        now = {name: float(infos["episode"][name][position]) for name in STATISTICS}
        if now != before:
            warnings.warn(
                f"episode {episodes[env]['episode_id']} of {env_id} gave {now} in its video, and {before} before: its "
                "simulation is not deterministic on this machine",
                RuntimeWarning,
                stacklevel=3,
            )


def is_lost(episode: dict) -> bool:
    """Whether the episode was given up, because its simulation was lost again and again. It has no actions."""
    return not episode["episode_len"]


def lost_in_words(episodes: list[dict]) -> str:
    """A sentence that names the lost episodes, or ""."""
    ids = [str(episode["episode_id"]) for episode in episodes if is_lost(episode)]
    listed = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    return f"{counted(len(ids), 'episode')} counted as failed, since the simulation was lost: {listed}" if ids else ""


def outcome(episode: dict) -> str:
    return "success" if episode["success_once"] else "failed"
