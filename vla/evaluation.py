"""Success on fixed episodes. The training scripts and evaluate.py share this loop.

Episodes are named by id; which rank, worker or batch runs one changes nothing but rounding: its actions depend on its
own pixels and on noise that is a function of (episode id, step).
"""

import torch

from vla.distributed import all_gather_lists, rank, world_size
from vla.policy import uniform_noise

STATISTICS = ("success_once", "success_at_end", "return", "episode_len", "reward")


def evaluate(policy, envs, episode_ids: list[int], temperature: float, video=None) -> dict[str, float]:
    """Run every episode id once, spread over ranks, and average.

    Args:
        policy: whole weights on this rank (rollout_stage).
        envs: vector env with auto_reset off and any number of envs.
        video: something with add(images [N, H, W, 3], captions [N][...]), or None; gets this rank's first batch.

    Returns:
        mean of success_once, success_at_end, return, episode_len, reward, and num_episodes.
    """
    local_ids = episode_ids[rank() :: world_size()]
    rows = []
    for start in range(0, len(local_ids), envs.num_envs):
        batch = local_ids[start : start + envs.num_envs]
        rows += run_batch(policy, envs, batch, temperature, video if start == 0 else None)
    rows = all_gather_lists(rows)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in STATISTICS}
    return means | {"num_episodes": float(len(rows))}


def run_batch(policy, envs, episode_ids: list[int], temperature: float, video) -> list[dict[str, float]]:
    """At most envs.num_envs episodes at once; envs that have none repeat the last id and are left out of the result."""
    padded = episode_ids + [episode_ids[-1]] * (envs.num_envs - len(episode_ids))
    generators = [torch.Generator().manual_seed(int(episode_id)) for episode_id in padded]
    obs = envs.reset(padded)
    rows: dict[int, dict[str, float]] = {}
    returns = torch.zeros(envs.num_envs)
    steps = 0
    if video is not None:
        video.add(obs["image"], captions(obs, 0, returns, rows))
    while len(rows) < envs.num_envs:
        noise = torch.cat([uniform_noise(1, policy.chunk_size, generator) for generator in generators])  # [N, C, D]
        device = next(policy.parameters()).device
        tokens, _, _ = policy.act(policy.prepare(obs, device), temperature, noise)
        obs, rewards, _, _, infos = envs.step(policy.decode(tokens))
        for env in infos["dropped"].nonzero()[:, 0].tolist():  # lost with a worker, and begun again
            generators[env].manual_seed(int(padded[env]))
            returns[env] = 0.0
        returns += rewards.sum(dim=1)
        steps += policy.chunk_size
        for position, env in enumerate(infos["ended"].tolist()):
            rows[env] = {name: float(infos["episode"][name][position]) for name in STATISTICS}
        if video is not None:
            video.add(obs["image"], captions(obs, steps, returns, rows))
    return [rows[env] for env in range(len(episode_ids))]


def captions(obs: dict, steps: int, returns: torch.Tensor, rows: dict[int, dict[str, float]]) -> list[list[str]]:
    """What stands in each tile: instruction, step and return, and the outcome once the episode has ended."""
    lines = []
    for env, text in enumerate(obs["task_description"]):
        outcome = ["success" if rows[env]["success_once"] else "failed"] if env in rows else []
        lines.append([text, f"step {steps}  return {returns[env]:.2f}", *outcome])
    return lines
