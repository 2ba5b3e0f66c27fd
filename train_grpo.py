"""GRPO on a vision-language-action model in ManiSkill3, with DeepSpeed ZeRO.

    # one process ("rank") per GPU
    deepspeed train_grpo.py --config yaml/quickstart_grpo_openvla.yaml
    # one rank that resumes a run
    python train_grpo.py --resume runs/my_run --num_iterations 40
    # two ranks on a CPU
    export DS_ACCELERATOR=cpu
    deepspeed --num_gpus 2 train_grpo.py --config yaml/quickstart_grpo_openvla.yaml
    # every flag
    python train_grpo.py --help

The iteration is that of train_ppo.py without a critic. All members of a group start from one episode id. The advantage
of an episode is how its return compares with those of its group. A group whose members all score the same teaches
nothing.

    T decisions per rollout   N envs on this rank   C = chunk_size actions per decision
    D = 7 tokens per action   B decisions in a micro batch

It differs from RLinf in five points. An env that has succeeded is not simulated any more, and the policy stops acting
in it. Steps after the end of an episode never reach the update, and decisions without a gradient do not either. A
group stays on one rank, which is checked. Metrics are defined as for PPO.
"""

import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("train_grpo.py starts: loading packages takes about 10 s", file=sys.stderr, flush=True)

import torch
from torch import Tensor

from envs import (
    check_envs,
    control_mode,
    episode_facts,
    eval_episode_ids,
    every_instruction,
    make_envs,
    remote,
    train_episode_id,
)
from envs.vector import VectorEnv
from schemas import flags
from vla.backends import check_backends
from vla.cli import Sizes, check_combinations, check_whole_episodes, derive_sizes, parse_args, pick
from vla.distributed import all_reduce_sum, at_end, print0, rank, run_main, setup_distributed, user_errors, world_size
from vla.evaluation.episodes import evaluate, mean_statistics
from vla.evaluation.publish import check_push, push_policy
from vla.evaluation.recording import Recorder
from vla.logger import Averages, Logger, describe_run, due, mean_over, row_dicts
from vla.models.about import world_of
from vla.models.loading import load_policy
from vla.models.policy import PolicyOutput, VLAPolicy, rollout_noise
from vla.placement.assignment import goes_ahead
from vla.placement.place import Apart, Together, placed
from vla.placement.weights import StaleGuard
from vla.start.checks import (
    check_iterations_left,
    check_rollout_memory,
    check_scene_memory,
    fetch_weights,
    pixels_of,
    prompt_room,
    what_applies,
)
from vla.start.launch import launched
from vla.training.checkpoint import load_checkpoint, save_checkpoint
from vla.training.engine import (
    DTYPES,
    NonFiniteGuard,
    backward,
    build_engine,
    decay_at,
    read_deepspeed_config,
    zero_stage,
)
from vla.training.preemption import Preemption
from vla.training.regularization import regularization
from vla.training.rollout_buffer import MicroBatch, RolloutBuffer, minibatches, only_teaching, shuffle_generator
from vla.training.stages import rollout_stage, update_stage

LOSSES = ("train/loss", "train/actor/policy_loss")
# what an iteration without update logs as 0
UPDATE_METRICS = """train/loss train/actor/policy_loss train/actor/approx_kl train/actor/clip_fraction
train/actor/clipped_ratio train/actor/dual_clip_fraction train/entropy_loss""".split()


# evaluation runs every episode once, to its end
ONE_PER_ID = dict(auto_reset=False, ignore_terminations=False, pipeline_stages=1, first_env=0, privileged=False)


@dataclass
class Args:
    # ---- most used
    config: tuple[flags.Text, ...] = ()
    """Yaml files of flags. A later file wins over an earlier one, and the command line wins over all."""
    resume: flags.Text | None = None
    """Run folder to continue. Its own flags apply first, then those of --config, then those on the command line."""
    run_dir: flags.Text | None = None
    """New folder for everything that the run writes. Without it, runs/<algorithm>_<env_id>_<time> is made."""
    seed: flags.Seed = 0
    """Seed of everything random. Two runs with one seed on one machine's CPUs are identical."""
    num_iterations: flags.Count = 400
    """Number of iterations. Each one is a rollout, its advantages and an update."""
    env_id: flags.EnvId = "PutOnPlateInScene25Main-v3"
    """Env: one of the 17 PutOnPlateInScene25 ids, or any ManiSkill id with the control mode pd_ee_delta_pose."""
    model_path: flags.Text = "openvla-tiny"
    """Model folder in the published layout, a model on the Hugging Face Hub (name or name@revision), or random weights:
    openvla-tiny or openvla-oft-tiny."""
    num_envs: flags.Envs = 256
    """Parallel envs over all ranks."""
    learning_rate: flags.NonNegative = 1e-5
    """Learning rate of the policy."""
    micro_batch_size: flags.Count = 8
    """Decisions per forward pass and GPU. Halve it when memory runs out. It does not change what is learned."""

    # ---- run
    total_timesteps: flags.Count | None = None
    """Env steps over all ranks. If given, it decides the number of iterations instead of --num_iterations."""
    save_freq: flags.CountOrNone = 40
    """Iterations between two checkpoints. The last iteration is always saved, and 0 saves only that one."""
    keep_checkpoints: flags.CountOrNone = 2
    """Number of newest checkpoints that stay on disk. 0 keeps all."""
    eval_freq: flags.CountOrNone = 10
    """Iterations between two evaluations. The start and the end are always evaluated, and 0 evaluates only there."""
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = ("tensorboard",)
    """Loggers that get the metrics besides metrics.jsonl. You install wandb and swanlab yourself."""
    project_name: flags.Name = "solovla"
    """Project at wandb and swanlab."""
    experiment_name: flags.Name | None = None
    """Name of the run at wandb and swanlab. Without it, the run folder's name is used."""
    push_to_hub: flags.Text | None = None
    """Model on the Hugging Face Hub, such as your-name/my-policy, that gets the final policy and its card after the
    run. A new one is private."""

    # ---- model
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    """Model family: openvla (writes the 7 tokens of one action one by one) or openvla_oft (predicts a chunk of actions
    in one pass). A folder that SoloVLA wrote knows it."""
    unnorm_key: flags.Text = "bridge_orig"
    """Name of the checkpoint's action statistics, which turn tokens into metres and radians."""
    image_resize: Literal["tensor", "pil"] = "tensor"
    """How camera images are resized: tensor as in RLinf, pil as in OpenVLA."""
    oft_stop_token: bool = False
    """End the sequence of openvla_oft in </s>, as moojink's discrete checkpoints need. Those of RLinf do not."""
    lora_path: flags.Text | None = None
    """LoRA adapter to load, a folder or a name on the Hub. It keeps its own rank, alpha and layers."""
    merge_lora: bool = False
    """Merge the adapter of --lora_path into the weights, and train a fresh adapter on top."""
    lora_rank: flags.LoraRank = 0
    """Rank of a fresh LoRA adapter. 0 trains the weights themselves."""
    lora_alpha: flags.LoraAlpha = 32
    """Numerator of a fresh adapter's scale, lora_alpha / lora_rank. RLinf uses 32, RL4VLA 16."""
    lora_scope: Literal["all", "llm"] = "all"
    """What is trained, by an adapter or (with rank 0) whole: every linear layer as in RLinf (all), or only the language
    model (llm). With llm, the frozen vision towers see each image once per rollout."""
    max_prompt_length: flags.PromptLength = 30
    """Tokens that prompts are padded to. A task with a longer prompt raises it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of weights and activations. Master weights and optimizer moments are always float32."""

    # ---- env
    instruction: flags.Text | None = None
    """Instruction for the policy in an env outside the PutOnPlateInScene25 family."""
    reward_mode: Literal["sparse", "dense", "normalized_dense"] | None = None
    """ManiSkill's reward in an env outside the PutOnPlateInScene25 family. Without it, such an env pays 1 when the task
    becomes solved and -1 when it is undone."""
    obj_set: Literal["train", "test", "all"] = "train"
    """Objects, tables and receptacles of the episodes: those of training, the unseen ones (test), or both (all)."""
    asset_pack: Literal["builtin", "bridge"] = "builtin"
    """Meshes and textures: made by code (builtin), or the published meshes and photographs (bridge)."""
    asset_dir: flags.Text | None = None
    """Folder of the published assets, or the data set RLinf/maniskill_assets, which is fetched from the Hub. Without
    it, they are in ManiSkill's folder (`python doctor.py --download`)."""
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"
    """Rules of the scene: those of RL4VLA, or RLinf's version of them to compare with RLinf's published table."""
    hulls: Literal["gpu", "cpu"] = "gpu"
    """Convex hulls of the published meshes: those of PhysX's GPU simulation, as in published results, or of its CPU
    simulation. They decide how bodies roll and lie. The builtin pack has no meshes."""
    image_size: tuple[flags.Pixels, flags.Pixels] = (640, 480)
    """Width and height of the camera image in pixels. The camera's pose and field of view stay the same."""
    sim_freq: flags.Hertz = 500
    """Physics steps per second, a multiple of 5. Control runs at 5 Hz. Results at different rates do not compare."""
    sim_backend: Literal["physx_cpu", "physx_cuda", "auto"] = "physx_cpu"
    """Simulator: physx_cpu repeats bit for bit. physx_cuda, one batch per rank on the GPU, is experimental: it was not
    run on a GPU yet. auto is physx_cuda where there is a GPU."""
    render_backend: Literal["cpu", "cuda", "auto"] = "auto"
    """Device that renders images for physx_cpu: cpu, cuda, or auto (the GPU if SAPIEN can render on it)."""
    max_episode_steps: flags.EpisodeSteps = 80
    """Time limit of an episode in actions."""
    num_env_workers: flags.Processes = 0
    """Worker processes per rank that simulate the envs. 0 simulates in the rank's own process."""
    worker_timeout: flags.Positive = 300.0
    """Seconds without an answer after which a worker is replaced. Without workers, the run ends instead."""
    pipeline_stages: Literal[1, 2] = 1
    """Parts that a rank's envs are split into. With 2, one half is simulated while the policy acts on the other."""

    # ---- rollout
    num_steps: flags.Count = 80
    """Actions per env and iteration."""
    chunk_size: flags.Chunk = 1
    """Actions per decision: 1 for openvla, 8 for the published openvla_oft models."""
    temperature: flags.Positive = 1.0
    """Sampling temperature in the rollout. The update computes log-probabilities at the same temperature."""
    eval_temperature: flags.NonNegative = 0.6
    """Sampling temperature in evaluation. 0 is greedy. Published tables use 0.6."""
    num_eval_episodes: flags.Episodes = 64
    """Held-out episodes per evaluation, the same ones every time."""
    num_eval_envs: flags.Envs = 16
    """Envs that evaluation runs at once, over all ranks."""
    video_episodes: flags.CountOrNone = 8
    """Held-out episodes of every evaluation that become videos, the same ones every time. 0 records nothing."""
    video_size: tuple[flags.Pixels, flags.Pixels] = (480, 360)
    """Width and height of the videos' images. What the policy saw is inset, unless it is at least that large."""

    # ---- algorithm
    group_size: flags.GroupSize = 8
    """Episodes from one start state that are compared with each other. They all run on one rank."""
    grpo_baseline: Literal["mean", "leave_one_out"] = "mean"
    """Return that an episode is compared with: the mean of its group, or of the other members (RLOO)."""
    grpo_scale: Literal["std", "none"] = "std"
    """Divisor of the advantages: the standard deviation of the group, or none as in Dr. GRPO (arXiv 2503.20783)."""
    length_norm: bool = True
    """Weight every episode equally, as in RLinf. Otherwise, every action weighs the same."""
    dynamic_sampling: bool = False
    """Leave out groups whose members all score the same, as in DAPO (arXiv 2503.14476)."""
    max_resamples: flags.CountOrNone = 0
    """Extra rollouts that may fill the places of groups that --dynamic_sampling left out."""
    logprob_level: Literal["token", "action", "chunk"] = "token"
    """Unit whose probability ratio is clipped: a token, the 7 tokens of an action, or a whole chunk."""
    clip_ratio_low: flags.BelowOne = 0.2
    """Lower clip range. Ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]."""
    clip_ratio_high: flags.NonNegative = 0.28
    """Upper clip range. Ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]."""
    dual_clip: flags.AboveOne | None = None
    """Largest policy loss of a bad action, as a multiple of its |advantage|. None sets no limit."""
    ent_coef: flags.Finite = 0.0
    """Weight of the entropy bonus. A negative weight is an entropy penalty."""
    kl_coef: flags.NonNegative = 0.0
    """Weight of the KL divergence to the starting policy (the adapter switched off). It needs LoRA."""
    fan_coef: flags.NonNegative = 0.0
    """Weight of FAN, the KL to a Gaussian around the policy's mode. Published: 1.0 (openvla), 0.1 (openvla_oft)."""
    fan_sigma: flags.Positive = 0.3
    """Deviation of FAN's Gaussian where a dimension spans [-1, 1]. Published: 0.3 (openvla), 0.2 (openvla_oft)."""
    update_epochs: flags.Count = 1
    """Passes over a rollout in one update."""
    num_minibatches: flags.Count = 32
    """Optimizer steps per pass."""
    recompute_logprobs: bool = False
    """Take old log-probabilities from the update's own micro batches, before its first step, and not from the rollout.
    It costs a forward pass. Use it where train/actor/ratio_first_microbatch_std is above 0.01."""
    target_kl: flags.Positive | None = None
    """Largest approximate KL divergence over all ranks. A pass above it ends its update. None sets no limit."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the policy's learning rate. It falls to 0 at the end with linear and cosine."""
    weight_decay: flags.NonNegative = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: flags.NonNegative = 1.0
    """Largest gradient norm. Larger gradients are scaled down to it. 0 sets no limit."""

    # ---- system
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. It saves memory and takes a third more time."""
    deepspeed_config: flags.Text = "ds_configs/zero3.json"
    """DeepSpeed file with the ZeRO settings. It holds no batch sizes and no learning rates."""
    offload: Literal["none", "stage"] = "none"
    """What leaves the GPU's memory: nothing, or with stage whatever only the other half of an iteration needs."""
    placement: flags.NonEmpty[flags.Text] = ("env,rollout,actor=all",)
    """Which ranks simulate (env), act (rollout) and train (actor), such as env=0-3 rollout=4-7 actor=all, hybrid, or
    apart. All forms are in docs/placements.md."""
    rollout_ahead: Literal[0, 1] = 0
    """Updates that the weights of a rollout may be old. With 1, ranks that only act (--placement) make the next rollout
    while others train. No recipe uses it."""
    local_rank: flags.LocalRank = -1
    """Number of this rank on its machine. The launcher sets it."""


def surrogate_units(
    log_ratio: Tensor, advantages: Tensor, weights: Tensor, logprob_level: str
) -> tuple[Tensor, Tensor, Tensor]:
    """log_ratio [B, C, D] of tokens, advantages and weights [B, C] -> those of the units whose ratio is clipped.

    A unit is a token [B, C, D], an action [B, C] (its 7 tokens) or a chunk [B, 1] (its executed actions). A chunk's
    advantage is that of its first action, which holds the rewards of the others.
    """
    if logprob_level == "token":
        token_weights = weights / log_ratio.shape[-1]
        return log_ratio, advantages[..., None].expand_as(log_ratio), token_weights[..., None].expand_as(log_ratio)
    action_log_ratio = log_ratio.sum(dim=-1)  # [B, C]
    if logprob_level == "action":
        return action_log_ratio, advantages, weights
    return action_log_ratio.sum(dim=1, keepdim=True), advantages[:, :1], weights.sum(dim=1, keepdim=True)


def clipped_surrogate(
    new_logprobs: Tensor,  # [B, C, D]
    mb: MicroBatch,
    *,
    logprob_level: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a two-sided clip (DAPO, arXiv 2503.14476) and a dual clip
    (arXiv 1912.09729).

    Log ratios count up to +-20 and have no gradient beyond. exp overflows at 88, and its gradient is NaN there.

    Returns:
        loss and metrics, scalars: this micro batch's part of the mean over units, see MicroBatch.mean().
    """
    executed = mb.weights[..., None] > 0  # an infinite ratio times a weight of 0 is NaN
    token_log_ratio = torch.where(executed, new_logprobs - mb.old_logprobs, 0.0)  # [B, C, D]
    unit_log_ratio, advantages, weights = surrogate_units(token_log_ratio, mb.advantages, mb.weights, logprob_level)

    def mean(x: Tensor) -> Tensor:  # over units
        return (x * weights).sum() / mb.total_weight

    log_ratio = unit_log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * clipped_ratio
    losses = torch.maximum(unclipped_loss, clipped_loss)
    # a bad action whose ratio has exploded pushes with at most dual_clip * |A|
    limit = torch.inf if dual_clip is None else -dual_clip * advantages
    dual_clipped = (advantages < 0) & (losses > limit)
    policy_loss = mean(torch.where(dual_clipped, limit, losses))
    return policy_loss, {
        "train/actor/policy_loss": policy_loss,
        "train/actor/approx_kl": mean(ratio - 1.0 - log_ratio),  # k3, http://joschu.net/blog/kl-approx.html
        "train/actor/clip_fraction": mean((clipped_loss > unclipped_loss).float()),
        "train/actor/clipped_ratio": mean(clipped_ratio),
        "train/actor/dual_clip_fraction": mean(dual_clipped.float()),
    }


def compare(grouped: Tensor, baseline: str, scale: str) -> tuple[Tensor, Tensor]:
    """Advantages of whole episodes within their group (GRPO, arXiv 2402.03300, section 4.1).

    Args:
        grouped: [groups, K], returns of each group's K members.
        baseline: "mean", or "leave_one_out" for the mean of the other members.
        scale: "std" (unbiased, plus 1e-6 as in RLinf) or "none".

    Returns:
        advantages [groups, K], and bool [groups]: the live groups, whose members do not all score the same.

    >>> compare(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "mean", "none")
    (tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]]), tensor([ True, False]))
    """
    K = grouped.shape[1]
    if K < 2:
        return torch.zeros_like(grouped), torch.zeros(len(grouped), dtype=torch.bool)
    centered = grouped - grouped.mean(dim=1, keepdim=True)
    live = (grouped.max(dim=1).values - grouped.min(dim=1).values) > 1e-6
    if baseline == "leave_one_out":  # x - mean of the others = (x - mean) * K / (K - 1)
        centered = centered * K / (K - 1)
    if scale == "std":
        centered = centered / (grouped.std(dim=1, keepdim=True) + 1e-6)
    return centered * live[:, None], live


def compute_group_advantages(
    returns: Tensor, ended: Tensor, group_size: int, baseline: str, scale: str
) -> tuple[Tensor, Tensor]:
    """compare() within groups of episodes that ended.

    An episode that did not end has no score: its worker was lost, and it began again too late. Its advantage is 0, and
    the others are compared without it.

    Args:
        returns: [N], undiscounted sum of rewards up to an episode's end. Members of a group are neighbours.
        ended: bool [N].

    Returns:
        advantages [N], and bool [N / group_size]: the live groups.
    """
    grouped, ended = returns.view(-1, group_size), ended.view(-1, group_size)  # [groups, group_size]
    advantages, live = compare(grouped, baseline, scale)
    incomplete = (~ended.all(dim=1)).nonzero()[:, 0]  # groups that lost a member
    for group in incomplete.tolist():
        members = ended[group]  # bool [group_size]
        of_members, live_members = compare(grouped[group, members][None], baseline, scale)
        advantages[group] = 0.0
        advantages[group, members] = of_members[0]
        live[group] = live_members[0]
    return advantages.flatten(), live


def rows_to_act(running: Tensor) -> Tensor:
    """The rows of a half that the policy acts in, int64 [k]: the running ones, and a few resting ones.

    k is a quarter of all rows, or two, three or four quarters, so a GPU needs at most four recorded graphs.

    >>> rows_to_act(torch.tensor([False, True, False, True, True, False, False, False])).tolist()
    [0, 1, 3, 4]
    """
    quarter = math.ceil(len(running) / 4)
    size = min(len(running), quarter * math.ceil(int(running.sum()) / quarter))
    return running.int().argsort(descending=True, stable=True)[:size].sort().values


def rollout(
    actor: VLAPolicy,
    envs: VectorEnv,
    episode_ids: list[int],
    decisions: Iterable[int],
    noise: Tensor,
    temperature: float,
    buffer: RolloutBuffer,
) -> list[dict[str, float]]:
    """Play one episode per env, from given start states, into the buffer. An env whose episode has ended rests, and
    the policy does not act in it (rows_to_act).

    Args:
        envs: without auto_reset. decisions: 0 .. T, one more than are made. noise: [T, N, C, D].

    Returns:
        statistics of the episodes that ended. A lost worker's episodes begin again, perhaps too late to end.
    """
    buffer.clear()
    envs.reset(episode_ids)
    episodes = []
    running = [torch.ones(rows.stop - rows.start, dtype=torch.bool) for rows in envs.halves]  # bool [n] of each half
    # all N envs have their turn, or one half of them while the other is simulated
    for t, half, rows, obs, outcome in envs.pipeline(decisions):
        if outcome is not None:  # of decision t - 1
            no_values = torch.zeros_like(outcome.rewards)  # [n, C], since there is no critic
            buffer.add_outcome(
                t - 1,
                rows,
                rewards=outcome.rewards,
                valid=outcome.infos["valid"],
                values=no_values,
                dones=outcome.terminations | outcome.truncations,
                final_values=no_values[:, 0],
            )
            lost = outcome.infos["dropped"] | outcome.infos["lost"]  # with a worker: begun again, or given up
            buffer.forget(rows, lost, before=t - 1)
            episodes += row_dicts(outcome.infos["episode"])
            running[half][outcome.infos["ended"]] = False
        if t < buffer.num_chunks and running[half].any():
            chosen = rows_to_act(running[half])  # [k]
            inputs = actor.prepare(rows_of(obs, chosen))
            tokens, logprobs, _ = actor.act(inputs, temperature, noise[t, rows][chosen])  # [k, C, D] each
            actions = torch.zeros(noise[t, rows].shape)  # [n, C, D], those of a resting env do nothing
            actions[chosen] = actor.decode(tokens).to(actions)
            envs.step_async(actions, half)
            reference = buffer.reference_of(actor, inputs, tokens, temperature)
            acted = rows.start + chosen
            buffer.add_decision(t, acted, inputs, tokens=tokens, logprobs=logprobs, reference_logprobs=reference)
    return episodes


def rows_of(obs: dict, chosen: Tensor) -> dict:
    """The chosen rows, int64 [k], of an observation."""
    texts = obs["task_description"]
    return {"image": obs["image"][chosen], "task_description": [texts[row] for row in chosen.tolist()]}


def episode_weights(valid: Tensor, length_norm: bool) -> Tensor:
    """Weights of executed actions in the loss, [T, N, C], for valid bool [T, N, C].

    With length_norm an action of an episode of L actions weighs 1 / L. The loss is then the mean over episodes of the
    mean over their actions. RLinf multiplies by 80 / L, which is the same up to a constant factor.
    """
    lengths = valid.sum(dim=(0, 2)).clamp(min=1)  # [N]
    return valid / lengths[None, :, None] if length_norm else valid.float()


def grpo_loss(
    new: PolicyOutput, mb: MicroBatch, *, surrogate: dict, regularizers: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """clipped_surrogate + regularization of the current policy, with the flags of each. There is no critic.

    Returns:
        loss and metrics, scalars: this micro batch's part of the mean over executed actions, see MicroBatch.mean().
    """
    policy_loss, metrics = clipped_surrogate(new.logprobs, mb, **surrogate)
    penalty, penalties = regularization(new, mb, **regularizers)
    loss = policy_loss + penalty
    metrics |= penalties | {"train/loss": loss}
    return loss, {name: value.detach() for name, value in metrics.items()}


def teaching_decisions(
    advantages: Tensor, weights: Tensor, *, ent_coef: float, kl_coef: float, fan_coef: float
) -> Tensor:
    """The decisions that a gradient comes from, bool [T, N], for advantages and weights [T, N, C].

    An advantage of 0 has none. With a penalty every decision has one.
    """
    with_gradient = weights > 0 if ent_coef or kl_coef or fan_coef else (weights > 0) & (advantages != 0)
    return with_gradient.any(dim=-1)


def means_of_trained(metrics: dict[str, float], share: float) -> dict[str, float]:
    """Metrics as means over what was trained on, which has this share of the weight. Losses stay as they are."""
    return {name: value if name in LOSSES else value / share for name, value in metrics.items()}


def live_groups(buffer: RolloutBuffer, group_size: int) -> Tensor:
    """Which groups have members that do not all score the same, bool [groups]."""
    returns, ended = buffer.rewards.sum(dim=(0, 2)), buffer.dones.any(dim=0)  # [N]
    return compute_group_advantages(returns, ended, group_size, "mean", "none")[1]


def fill_dead_groups(buffer: RolloutBuffer, spare: RolloutBuffer, group_size: int) -> None:
    """Replace dead groups by the live groups of a further rollout, as many as there are."""
    dead = (~live_groups(buffer, group_size)).nonzero()  # [K, 1]
    live = live_groups(spare, group_size).nonzero()  # [L, 1]
    num_replaced = min(len(dead), len(live))
    members = torch.arange(group_size)
    replaced = dead[:num_replaced] * group_size + members  # [num_replaced, group_size], envs
    replacing = live[:num_replaced] * group_size + members
    buffer.replace(replaced.flatten(), spare, replacing.flatten())


def count_without_signal(iterations: int, live_share: float) -> int:
    """Count the iterations in a row in which fewer than 10 % of groups were live, and warn every five of them.

    Args:
        iterations: up to the last one. live_share: of this one.
    """
    iterations = iterations + 1 if live_share < 0.1 else 0
    if iterations and iterations % 5 == 0:
        print0(
            f"WARNING: for {iterations} iterations fewer than 10 % of groups had members with different returns. "
            "Equal groups teach nothing: start from a better policy, or raise --group_size"
        )
    return iterations


def check_start(
    args: Args, place: Together | Apart, group_size: int, **of_world: bool
) -> tuple[Sizes, dict, dict, dict, list[int]]:
    """Refuse what cannot work, within seconds: nothing here needs a process group, a model or a simulator.

    Args:
        of_world: arguments of make_envs() that no flag gives.

    Returns:
        this rank's sizes, DeepSpeed's config, arguments of make_envs() for training and for evaluation, and the ids of
        the held-out episodes.
    """
    check_combinations(**pick(args, check_combinations))
    launch = launched()
    ranks = dict(rank=launch.rank, world_size=launch.world_size)
    sizes = place.sizes(**pick(args, derive_sizes, group_size=group_size, **ranks))
    check_backends(args.logger_backends)
    check_push(args.push_to_hub)
    ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype, args.offload)
    places = dict(num_env_workers=sizes.num_env_workers, first_env=sizes.first_env)
    world = pick(args, make_envs, **places, **of_world)
    eval_world = world | ONE_PER_ID | dict(num_env_workers=sizes.num_eval_env_workers)
    if not world["auto_reset"]:
        check_whole_episodes(**pick(args, check_whole_episodes))
    if place.simulates:
        check_envs(args.env_id, sizes.local_num_envs, **world)
        check_envs(args.env_id, sizes.local_num_eval_envs, **eval_world)
    instructions = every_instruction(args.env_id, args.obj_set, args.instruction)
    args.max_prompt_length = prompt_room(args.model_path, instructions, args.max_prompt_length)
    check_rollout_memory(args.model_path, place.here("rollout", launch) * sizes.num_chunks * sizes.local_num_envs)
    simulating = place.here("env", launch)
    check_scene_memory(
        simulating * (sizes.local_num_envs + sizes.local_num_eval_envs),
        simulating * max(sizes.num_env_workers, sizes.num_eval_env_workers),
        args.image_size,
        "--num_envs, --num_eval_envs, --num_env_workers and --image_size",
    )
    eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)
    return sizes, ds_config, world, eval_world, eval_ids


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    rests = dict(privileged=False, auto_reset=False, ignore_terminations=False)  # an env whose episode has ended
    with user_errors():
        place = placed(args.placement, args.offload, args.rollout_ahead, remote)
        sizes, ds_config, world, eval_world, eval_ids = check_start(args, place, args.group_size, **rests)
        T, N, first_env = sizes.num_chunks, sizes.local_num_envs, sizes.first_env
        fetch_weights("--model_path", args.model_path, args.lora_path)
        device = setup_distributed(args.seed, place.meet, shares_memory=place.trains)
        make_training, make_eval = (partial(make_envs, args.env_id, **settings) for settings in (world, eval_world))
        pixels = pixels_of(args.model_path, args.image_resize)
        if place.only_simulates:
            return place.simulate(partial(make_training, N), make_eval, pixels)
        default_dir = f"runs/grpo_{args.env_id.replace(':', '.')}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, checkpoint = place.open_run(args.run_dir, args.resume, default_dir, asdict(args))
        deciding = "--num_iterations" if args.total_timesteps is None else "--total_timesteps"
        check_iterations_left(checkpoint, sizes.num_iterations, deciding)
        in_words = place.in_words(sizes.in_words(world_size(), args.chunk_size, args.num_env_workers))
        place.say(what_applies(**pick(args, what_applies, sizes=in_words)))
        model_flags = dict(dtype=DTYPES[args.dtype], device=device, value_head=False)
        world_now = world_of(**pick(args, world_of, control=control_mode(args.env_id)))
        model_flags |= dict(norm_stats=None, cuda_graphs=True, world=world_now)
        policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **model_flags))
        envs = place.envs(partial(make_training, N), policy.pixels, pixels)
        eval_envs, open_envs = place.eval_envs(make_eval, sizes.local_num_eval_envs, envs, policy.pixels)

    build = partial(build_engine, policy, ds_config, **pick(args, build_engine, value_learning_rate=None))
    stages = place.stages(policy, build, zero_stage(ds_config), args.offload)
    engine = stages.engine
    guard = StaleGuard(run_dir, rank(), stages) if args.rollout_ahead else NonFiniteGuard(run_dir, rank())
    loss_flags = dict(surrogate=pick(args, clipped_surrogate), regularizers=pick(args, regularization))
    fan_sigma = args.fan_sigma if args.fan_coef else None
    seen, spare = (RolloutBuffer.of(policy, T, N, keeps_reference=args.kl_coef > 0) for _ in range(2))
    buffer = seen.for_envs(sizes.trained_envs) if place.assigns else seen  # what this rank trains on
    max_resamples = args.max_resamples if args.dynamic_sampling else 0
    my_envs = slice(first_env, first_env + N)
    my_groups = range(first_env // args.group_size, (first_env + N) // args.group_size)
    no_states: list[dict] = [{}] * sizes.trained_envs  # every iteration starts with a reset
    start_iteration, global_step, iterations_without_signal = 0, 0, 0
    with user_errors():
        if checkpoint:
            start_iteration, global_step, _ = load_checkpoint(engine, checkpoint, my_envs, args.num_envs)
        policy.preprocess(place.shared(envs.reset(), envs))  # instructions that do not fit the prompt end the run here
        place.begin_run(run_dir, checkpoint)
        logger = Logger(
            run_dir,
            rank() == 0 and place.trains,
            sizes.num_iterations,
            start_iteration,
            global_step,
            args.logger_backends,
            **pick(args, Logger),
        )
        make_stopper = partial(Preemption, engine, run_dir, args.keep_checkpoints, say=logger.close)
        preemption = place.stopper(make_stopper, run_dir, stages)
        ahead = partial(goes_ahead, **pick(args, goes_ahead, num_iterations=sizes.num_iterations))
        assigner = place.assigner(seen, buffer, envs, preemption, stages, None, ahead)
        facts = episode_facts(args.env_id, args.obj_set, eval_ids, args.instruction)
        recorder = Recorder(run_dir, eval_envs, open_envs, facts, preemption, **pick(args, Recorder))
        logger.describe(describe_run(asdict(args), asdict(sizes), place.ranks, asdict(Args()), place.roles))
        at_end(place.end)

    def run_evaluation(iteration: int) -> bool:
        """Run the held-out episodes with whole weights, and record a few of them. False: the run was asked to end."""
        with logger.timer("eval"):
            watch = recorder.watch()
            with rollout_stage(stages) as actor:
                asked = (actor, eval_envs, eval_ids, args.eval_temperature, watch, preemption)
                episodes = place.played(evaluate, *asked)
            if episodes is not None:
                place.played(recorder.keep, iteration, episodes)
                logger.write_evaluation(iteration, global_step, mean_statistics(episodes))
                place.played(recorder.record, iteration, episodes, watch)
                logger.show_videos(iteration, global_step)
        return episodes is not None

    def evaluate_if_due(iteration: int) -> bool:
        """run_evaluation() after this iteration, if --eval_freq says so. False: the run was asked to end."""
        return not due(iteration, args.eval_freq, sizes.num_iterations) or run_evaluation(iteration + 1)

    def save(iteration: int) -> Path:
        """Every iteration starts with a reset, so no env has a state to continue from."""
        return save_checkpoint(engine, run_dir, iteration, global_step, no_states, args.keep_checkpoints)

    with logger.timer("eval"):
        place.played(recorder.catch_up, start_iteration)  # the videos that a stopped run still owes
    if place.agreed(logger.owes_evaluation, args.eval_freq) and not run_evaluation(start_iteration):
        preemption.exit(checkpoint or save(0))

    for iteration in range(start_iteration, sizes.num_iterations):
        preemption.snapshot(iteration, global_step, no_states)
        # ------------------------------------------------------------------ rollout: weights are whole, ranks are free
        episodes, env_steps = [], torch.zeros(N, dtype=torch.int64)  # [N], actions executed
        first_live = torch.zeros(N, dtype=torch.bool)  # [N], envs in groups that were live at once
        with logger.timer("rollout"), rollout_stage(stages) as actor:
            for attempt in range(1 + max_resamples) if place.acts else ():
                # (seed, iteration, attempt) decides everything random, the same on every rank
                draw = iteration * (1 + args.max_resamples) + attempt
                generator = torch.Generator().manual_seed(args.seed * 1_000_003 + draw)
                noise = rollout_noise(T, args.num_envs, my_envs, args.chunk_size, generator)
                starts = [train_episode_id(envs.num_start_states, args.seed, group, draw) for group in my_groups]
                ids = [episode_id for episode_id in starts for _ in range(args.group_size)]
                rolled = seen if attempt == 0 else spare
                decisions = preemption.until_requested(range(T + 1))
                episodes += rollout(actor, envs, ids, decisions, noise, args.temperature, rolled)
                env_steps += rolled.valid.sum(dim=(0, 2))
                if attempt == 0:
                    first_live = live_groups(seen, args.group_size).repeat_interleave(args.group_size)
                else:
                    fill_dead_groups(seen, spare, args.group_size)
                if preemption.requested or live_groups(seen, args.group_size).all():
                    break
            if assigner is not None:  # other ranks train on what this one saw
                episodes, env_steps, first_live = assigner.assign(iteration, episodes, env_steps, first_live)
        if not place.trains:
            evaluate_if_due(iteration)
            continue  # this rank waits for weights
        preemption.exit_if_requested()
        env_steps = int(all_reduce_sum(env_steps.sum()))  # actions executed, over all ranks
        global_step += env_steps

        # ------------------------------------------------------------------ advantage
        returns, ended = buffer.rewards.sum(dim=(0, 2)), buffer.dones.any(dim=0)  # [N]
        scores, live = compute_group_advantages(returns, ended, args.group_size, args.grpo_baseline, args.grpo_scale)
        advantages = scores[None, :, None] * buffer.valid  # [T, N, C]
        kept = ended & live.repeat_interleave(args.group_size) if args.dynamic_sampling else ended  # [N]
        weights = episode_weights(buffer.valid & kept[None, :, None], args.length_norm)  # [T, N, C]
        decisive = (advantages != 0).any(dim=-1)  # [T, N], decisions that a gradient comes from
        num_live, num_decisive, num_decisions = all_reduce_sum(
            torch.stack([first_live.sum() // args.group_size, decisive.sum(), buffer.valid.any(dim=-1).sum()])
        ).tolist()
        teaching = teaching_decisions(advantages, weights, **pick(args, teaching_decisions))  # [T, N]
        of_trained, of_all = all_reduce_sum(torch.stack([weights[teaching].sum(), weights.sum()])).tolist()
        live_share = num_live * args.group_size / args.num_envs
        iterations_without_signal = count_without_signal(iterations_without_signal, live_share)

        # ------------------------------------------------------------------ update: weights sharded, ranks in lock-step
        rate = args.learning_rate * decay_at(args.schedule, iteration / sizes.num_iterations)
        engine.optimizer.param_groups[0]["lr"] = rate
        shuffling = shuffle_generator(args.seed, iteration)
        num_epochs = args.update_epochs if num_decisive else 0  # no signal: not even weight decay
        epochs = []
        with logger.timer("update"), update_stage(stages):
            for _ in range(num_epochs):
                averages = Averages()
                steps = minibatches(weights, sizes.first_trained, shuffling, **pick(args, minibatches))
                steps = only_teaching(steps, teaching, **pick(args, only_teaching))
                if args.recompute_logprobs and not epochs:
                    buffer.recompute_logprobs(steps, engine, args.temperature)
                for mb in buffer.micro_batches(steps, advantages, advantages, weights):
                    new = engine("evaluate", mb.inputs, mb.tokens, args.temperature, fan_sigma)
                    guard.check_ratio(new.logprobs, mb.old_logprobs)
                    loss, metrics = grpo_loss(new, mb, **loss_flags)
                    guard.check_gradients(backward(engine, loss, mb.last), mb, loss)
                    averages.add(metrics)
                    preemption.exit_if_requested(together=mb.last)
                means = averages.reduce(count=args.num_minibatches)
                epochs.append(means_of_trained(means, of_trained / of_all))
                if args.target_kl is not None and epochs[-1]["train/actor/approx_kl"] > args.target_kl:
                    break  # a mean over all ranks: they leave together, or ZeRO-3 hangs
        if not epochs:
            print0(f"iteration {iteration + 1}: all members of every group scored the same, so no weight was changed")
            epochs = [dict.fromkeys(UPDATE_METRICS, 0.0)]

        # ------------------------------------------------------------------ log, evaluate, save
        stopped = not evaluate_if_due(iteration)
        metrics = mean_over(epochs) | guard.pop_metrics() | stages.pop_metrics()
        metrics |= buffer.statistics(advantages, buffer.valid)
        metrics["train/actor/lr"] = rate
        metrics["rollout/live_groups"] = live_share
        metrics["rollout/zero_advantage"] = 1.0 - num_decisive / num_decisions
        metrics["rollout/effective_samples"] = num_decisive
        logger.write(iteration + 1, global_step, metrics, episodes, env_steps)
        if stopped or due(iteration, args.save_freq, sizes.num_iterations):
            saved = save(iteration + 1)
        if stopped:  # --resume makes the evaluation again
            preemption.exit(saved)

    for opened in (logger, eval_envs, envs, place):
        opened.close()
    if place.trains:
        push_policy(args.push_to_hub, run_dir)


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], __doc__))
