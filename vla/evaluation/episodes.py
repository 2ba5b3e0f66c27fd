"""Success on fixed episodes. The training scripts and evaluate.py share this loop.

Episodes are named by id; which rank, worker or batch runs one changes nothing but rounding: its actions depend on its
own pixels and on noise that is a function of (seed, episode id, step).

    N envs on this rank   C = chunk_size actions per decision   M episodes
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from schemas import UserError
from vla.distributed import all_gather_lists, rank, world_size
from vla.evaluation.vector_env import VectorEnv
from vla.models.policy import uniform_noise

STATISTICS = ("success_once", "success_at_end", "return", "episode_len", "reward")


class Stop(Protocol):
    """Whatever says that this rank should go no further, such as preemption.StopRequest."""

    asked: bool


class NeverStop:
    asked = False


NEVER = NeverStop()


def noise_seed(seed: int, episode_id: int) -> int:
    """Seed of an episode's noise, 32 bits: torch's CPU generator keeps no more of what it is given.

    numpy's SeedSequence mixes the two. Seed 0 gives the episode id itself, with which the kept results were made.
    """
    return int(np.random.SeedSequence([seed, episode_id]).generate_state(1)[0]) if seed else episode_id % 2**32


class Actor(Protocol):
    """Whatever acts: a policy at one temperature, a scripted expert, nobody."""

    def begin(self, episode_ids: Sequence[int]) -> None:
        """N episodes start, one per env."""

    def restart(self, env: int) -> None:
        """This env's episode was lost with its worker and has begun again."""

    def act(self, obs: dict, envs: VectorEnv) -> torch.Tensor:
        """obs of the N envs -> actions float32 [N, C, 7], robot units."""


class PolicyActor:
    """A VLAPolicy with whole weights at one temperature (0 = greedy). name: what a sentence about it calls it."""

    def __init__(self, policy, temperature: float, seed: int = 0, name: str = "the policy"):
        self.policy, self.temperature, self.seed, self.name = policy, temperature, seed, name
        self.device = next(policy.parameters()).device

    def begin(self, episode_ids: Sequence[int]) -> None:
        self.seeds = [noise_seed(self.seed, int(episode_id)) for episode_id in episode_ids]
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def restart(self, env: int) -> None:
        self.generators[env].manual_seed(self.seeds[env])

    def act(self, obs: dict, envs: VectorEnv) -> torch.Tensor:
        noise = torch.cat([uniform_noise(1, self.policy.chunk_size, g) for g in self.generators])  # [N, C, D]
        tokens, logprobs, _ = self.policy.act(self.policy.prepare(obs, self.device), self.temperature, noise)
        if not logprobs.isfinite().all():
            raise UserError(
                f"{self.name} gives probabilities that are not finite numbers: use an earlier checkpoint"
            ) from FloatingPointError("NaN among log-probabilities")
        return self.policy.decode(tokens)


def evaluate(
    policy, envs: VectorEnv, episode_ids: list[int], temperature: float, video=None, stop: Stop = NEVER
) -> dict[str, float] | None:
    """Run every episode id once, spread over ranks, and average.

    Args:
        policy: whole weights on this rank (rollout_stage).
        envs: vector env with auto_reset off and any number of envs, the same on all ranks.
        video: something with add(images [N, H, W, 3], captions [N][...]), or None; gets this rank's first batch.
        stop: looked at before every decision.

    Returns:
        mean of success_once, success_at_end, return, episode_len, reward, and num_episodes; None on every rank where
        one of them was asked to stop.
    """
    batches = run_episodes(PolicyActor(policy, temperature), envs, episode_ids, video, stop)
    episodes = [episode for batch in batches for episode in batch]
    if len(episodes) < len(episode_ids):
        return None
    means = {name: sum(episode[name] for episode in episodes) / len(episodes) for name in STATISTICS}
    return means | {"num_episodes": float(len(episodes))}


def run_episodes(
    actor: Actor, envs: VectorEnv, episode_ids: list[int], video=None, stop: Stop = NEVER
) -> Iterator[list[dict]]:
    """Run every episode id once, spread over ranks; all ranks together.

    Args:
        envs: vector env with auto_reset off and equally many envs on every rank.
        video, stop: see evaluate(). Ranks meet after every batch: where one of them stopped within it, that batch is
            the last one for all.

    Yields:
        all ranks' episodes, batch by batch as they end, in the order of episode_ids and alike on every rank. Those
        that had not ended when a rank stopped are left out. A dict has episode_id, the STATISTICS, seconds (its share
        of the batch's) and actions (float32 [episode_len, 7], what was executed: see replay()).
    """
    at_once = envs.num_envs * world_size()
    for start in range(0, len(episode_ids), at_once):
        began = time.perf_counter()
        ids = episode_ids[start : start + at_once]
        mine = ids[rank() :: world_size()]
        batch = run_batch(actor, envs, mine, video if start == 0 else None, stop) if mine else []
        ended = {episode["episode_id"]: episode for episode in all_gather_lists(batch)}
        seconds = (time.perf_counter() - began) / len(ids)
        yield [ended[episode_id] | {"seconds": seconds} for episode_id in ids if episode_id in ended]
        if len(ended) < len(ids):  # the same on every rank
            return


def run_batch(actor: Actor, envs: VectorEnv, episode_ids: list[int], video=None, stop: Stop = NEVER) -> list[dict]:
    """At most envs.num_envs episodes at once; envs that have none repeat the last id and are left out of the result.

    Asked to stop, it returns those that have ended.
    """
    if stop.requested:  # a reset takes longer than many steps
        return []
    padded = episode_ids + [episode_ids[-1]] * (envs.num_envs - len(episode_ids))
    actor.begin(padded)
    obs = envs.reset(padded)
    rows: dict[int, dict] = {}
    executed: list[list[np.ndarray]] = [[] for _ in padded]
    returns = torch.zeros(envs.num_envs)
    if video is not None:
        video.add(obs["image"], captions(obs, executed, returns, rows))
    while len(rows) < envs.num_envs and not stop.requested:
        actions = torch.as_tensor(actor.act(obs, envs), dtype=torch.float32)  # [N, C, 7]
        obs, rewards, _, _, infos = envs.step(actions)
        for env in infos["dropped"].nonzero()[:, 0].tolist():  # lost with a worker, and begun again
            actor.restart(env)
            returns[env], executed[env] = 0.0, []
        returns += rewards.sum(dim=1)
        for env in range(envs.num_envs):
            executed[env].extend(actions[env][infos["valid"][env]].numpy())
        for position, env in enumerate(infos["ended"].tolist()):
            statistics = {name: float(infos["episode"][name][position]) for name in STATISTICS}
            rows[env] = {"episode_id": int(padded[env])} | statistics | {"actions": np.stack(executed[env])}
        if video is not None and not stop.requested:  # a signal to all processes ends the one that encodes, too
            video.add(obs["image"], captions(obs, executed, returns, rows))
    return [rows[env] for env in range(len(episode_ids)) if env in rows]


def replay(envs: VectorEnv, episodes: list[dict], videos: list, stop: Stop = NEVER) -> bool:
    """Show at most envs.num_envs episodes again from their actions, every control step of them, one video each.

    Args:
        videos: as in evaluate(), one per episode; each gets one picture per control step, and no more once its
            episode has ended.
        stop: looked at before every step.

    Returns:
        whether all was shown: False where this rank was asked to stop.

    Warns where an episode goes otherwise than it did.
    """
    padded = episodes + [episodes[-1]] * (envs.num_envs - len(episodes))
    obs = envs.reset([episode["episode_id"] for episode in padded])
    returns = [0.0] * len(episodes)
    longest = max(len(episode["actions"]) for episode in episodes)
    for step in range(longest + 1):
        if stop.requested:  # before a picture is added: a signal to all processes ends the one that encodes, too
            return False
        for env, (episode, video) in enumerate(zip(episodes, videos)):
            if step <= len(episode["actions"]):
                lines = [obs["task_description"][env], f"step {step}  return {returns[env]:.2f}"]
                over = step == len(episode["actions"])
                video.add(obs["image"][env : env + 1], [[*lines, outcome(episode)] if over else lines])
        if step == longest:
            return True
        actions = [episode["actions"][min(step, len(episode["actions"]) - 1)] for episode in padded]
        obs, rewards, _, _, infos = envs.step(np.stack(actions)[:, None])  # envs whose episode has ended stay at rest
        returns = [total + float(reward) for total, reward in zip(returns, rewards[:, 0])]
        for position, env in enumerate(infos["ended"].tolist()):
            again = {name: float(infos["episode"][name][position]) for name in STATISTICS}
            if again != {name: padded[env][name] for name in STATISTICS}:
                warnings.warn(
                    f"episode {padded[env]['episode_id']} of {envs.env_id} gave {again} in its video, not what it had "
                    "given before: its simulation is not deterministic here",
                    RuntimeWarning,
                    stacklevel=2,
                )


def outcome(episode: dict) -> str:
    return "success" if episode["success_once"] else "failed"


def captions(obs: dict, executed: list[list], returns: torch.Tensor, rows: dict[int, dict]) -> list[list[str]]:
    """What stands in each tile: instruction, step and return, and the outcome once the episode has ended."""
    lines = []
    for env, text in enumerate(obs["task_description"]):
        end = [outcome(rows[env])] if env in rows else []
        lines.append([text, f"step {len(executed[env])}  return {returns[env]:.2f}", *end])
    return lines
