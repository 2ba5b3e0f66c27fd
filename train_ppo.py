"""PPO on a vision-language-action model in ManiSkill3, with DeepSpeed ZeRO.

    # one process ("rank") per GPU
    deepspeed train_ppo.py --config yaml/quickstart_ppo_openvla.yaml
    # one rank that resumes a run
    python train_ppo.py --resume runs/my_run --num_iterations 40
    # two ranks on a CPU
    export DS_ACCELERATOR=cpu
    deepspeed --num_gpus 2 train_ppo.py --config yaml/quickstart_ppo_openvla.yaml
    # every flag
    python train_ppo.py --help

Every rank simulates its own envs, acts in them and trains on what it saw. Ranks exchange only gradients and means.
`main` reads in the order of an iteration: rollout, advantage, update, log, save, evaluate.

    T decisions per rollout   N envs on this rank   C = chunk_size actions per decision
    D = 7 tokens per action   B decisions in a micro batch

The recipe is that of RL4VLA and RLinf, with four corrections. The policy loss is not counted 7 times, which the buffer
asserts by shapes. Advantages are normalised over all ranks. Clip and KL metrics measure what their names say. One seed
gives one run.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("train_ppo.py starts: loading packages takes about 10 s", file=sys.stderr, flush=True)

import torch
from torch import Tensor

from envs import check_envs, control_mode, episode_facts, eval_episode_ids, every_instruction, make_envs, remote
from envs.vector import Outcome
from schemas import flags
from vla.backends import check_backends
from vla.cli import Sizes, check_combinations, check_whole_episodes, derive_sizes, parse_args, pick
from vla.distributed import (
    all_reduce_sum,
    at_end,
    normalize,
    rank,
    run_main,
    setup_distributed,
    user_errors,
    world_size,
)
from vla.evaluation.episodes import evaluate, mean_statistics
from vla.evaluation.publish import check_push, push_policy
from vla.evaluation.recording import Recorder
from vla.logger import Averages, Logger, describe_run, due, mean_over, row_dicts
from vla.models.about import world_of
from vla.models.loading import load_policy
from vla.models.policy import PolicyOutput, rollout_noise
from vla.models.value_head import value_errors
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
from vla.training.checkpoint import load_checkpoint, load_critic, save_checkpoint
from vla.training.critics import HiddenCritic, StateCritic
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
from vla.training.rollout_buffer import MicroBatch, RolloutBuffer, minibatches, shuffle_generator
from vla.training.stages import rollout_stage, update_stage

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
    num_envs: flags.Envs = 128
    """Parallel envs over all ranks."""
    learning_rate: flags.NonNegative = 1e-4
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
    lora_rank: flags.LoraRank = 32
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
    auto_reset: bool = True
    """Start the next episode as soon as one ends. Otherwise, all envs reset together at the start of an iteration."""
    ignore_terminations: bool = False
    """Continue an episode after success until its time limit."""
    num_env_workers: flags.Processes = 0
    """Worker processes per rank that simulate the envs. 0 simulates in the rank's own process."""
    worker_timeout: flags.Positive = 300.0
    """Seconds without an answer after which a worker is replaced. Without workers, the run ends instead."""
    pipeline_stages: Literal[1, 2] = 1
    """Parts that a rank's envs are split into. With 2, one half is simulated while the policy acts on the other."""

    # ---- rollout
    num_steps: flags.Count = 160
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
    critic: Literal["hidden", "state"] = "hidden"
    """What the critic reads: the language model's hidden state as published, or the simulator's state."""
    critic_epochs: flags.Count = 10
    """Passes over a rollout for the critic of --critic state."""
    gamma: flags.Fraction = 0.99
    """Discount factor per action."""
    gae_lambda: flags.Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    bootstrap: Literal["truncation", "always", "never"] = "truncation"
    """Episode ends at which the value of the last frame is added: those cut by the time limit (truncation), successes
    too as in RLinf's published numbers (always), or none as in RL4VLA (never). With never, running out of time is a
    failure."""
    norm_adv: bool = True
    """Normalise advantages over all ranks."""
    logprob_level: Literal["token", "action", "chunk"] = "action"
    """Unit whose probability ratio is clipped: a token, the 7 tokens of an action, or a whole chunk."""
    clip_ratio_low: flags.BelowOne = 0.2
    """Lower clip range. Ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]."""
    clip_ratio_high: flags.NonNegative = 0.2
    """Upper clip range. Ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]."""
    dual_clip: flags.AboveOne | None = None
    """Largest policy loss of a bad action, as a multiple of its |advantage|. None sets no limit."""
    value_clip: flags.Positive | None = 0.2
    """Largest change of a value since the rollout that the value loss counts. None sets no limit."""
    huber_delta: flags.Positive = 10.0
    """Value error above which the value loss is linear. Below, it is quadratic."""
    vf_coef: flags.NonNegative = 1.0
    """Weight of the value loss in the model's gradient. The critic of --critic state has a loss of its own."""
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
    critic_warmup_iterations: flags.CountOrNone = 0
    """Iterations at the start in which only the critic learns."""
    target_kl: flags.Positive | None = None
    """Largest approximate KL divergence over all ranks. A pass above it ends its update. None sets no limit."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the policy's learning rate. It falls to 0 at the end with linear and cosine."""
    value_learning_rate: flags.NonNegative = 3e-3
    """Learning rate of the critic. It stays constant."""
    weight_decay: flags.NonNegative = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: flags.NonNegative = 10.0
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


def has_future(terminations: Tensor, truncations: Tensor, bootstrap: str) -> Tensor:
    """Which ended episodes are followed by V(last frame), bool [N]: see Args.bootstrap."""
    if bootstrap == "never":
        return torch.zeros_like(truncations)
    return truncations | terminations if bootstrap == "always" else truncations


def outcome_of_decision(
    outcome: Outcome, decision_values: Tensor, chunk_values: Tensor, value_of: Callable, bootstrap: str
) -> dict[str, Tensor]:
    """What the buffer stores once a decision of n envs was executed: [n, C], and [n] for dones and final_values.

    An episode that was lost with its worker is cut before this decision, and the V of that moment follows it.

    Args:
        decision_values, chunk_values: V of what the policy saw [n], and before each action of the chunk [n, C].
        value_of: V of observations.
    """
    dropped = outcome.infos["dropped"]  # bool [n]
    ended = outcome.infos["ended"]  # int64 [m], the envs that final_observation has rows for
    bootstrapped = has_future(outcome.terminations, outcome.truncations, bootstrap)
    final_values = torch.zeros(len(bootstrapped))
    if bootstrapped.any():
        final_values[ended] = value_of(outcome.infos["final_observation"])
    final_values = torch.where(dropped, decision_values, final_values * bootstrapped)
    dones = outcome.terminations | outcome.truncations | dropped
    executed = {"rewards": outcome.rewards, "valid": outcome.infos["valid"], "values": chunk_values}
    return executed | {"dones": dones, "final_values": final_values}


def compute_gae(buffer: RolloutBuffer, next_values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) at action resolution, across the actions of a chunk.

    delta_k = r_k + gamma * V_{k+1} - V_k and A_k = delta_k + gamma * lambda * A_{k+1}, with k over executed actions.
    Where an episode ended, V_{k+1} is final_values (V of the last frame where it is bootstrapped, else 0) and the sum
    stops. With gamma = lambda = 1, values of 0.5 and 0.75, and a reward of 1 with the second and last action:

    A_2 = 1 + 0 - 0.75 = 0.25 and A_1 = 0 + 0.75 - 0.5 + A_2 = 0.5

    Returns:
        advantages and returns (= advantages + values), [T, N, C]. Both are 0 where not valid.
    """
    rewards, values, valid, dones = buffer.rewards, buffer.values, buffer.valid, buffer.dones
    advantages = torch.zeros_like(rewards)
    following = next_values  # V_{k+1}, [N]: at first that of the frame after the rollout
    trace = torch.zeros_like(next_values)  # A_{k+1}, [N]
    for t in reversed(range(len(rewards))):
        following = torch.where(dones[t], buffer.final_values[t], following)
        trace = torch.where(dones[t], 0.0, trace)
        for c in reversed(range(rewards.shape[2])):
            delta = rewards[t, :, c] + gamma * following - values[t, :, c]
            trace = torch.where(valid[t, :, c], delta + gamma * gae_lambda * trace, trace)
            following = torch.where(valid[t, :, c], values[t, :, c], following)
            advantages[t, :, c] = torch.where(valid[t, :, c], trace, 0.0)
    return advantages, torch.where(valid, advantages + values, 0.0)


def used_advantages(valid: Tensor, logprob_level: str) -> Tensor:
    """Which advantages clipped_surrogate reads, bool [T, N, C]: all executed actions, or only the first of a chunk."""
    used = valid.clone()
    if logprob_level == "chunk":
        used[..., 1:] = False
    return used


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


def ppo_loss(
    new: PolicyOutput, mb: MicroBatch, *, surrogate: dict, regularizers: dict, value_loss: dict, vf_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """clipped_surrogate + regularization + vf_coef * value_errors of the current policy, with the flags of each.

    Returns:
        loss and metrics, scalars: this micro batch's part of the mean over executed actions, see MicroBatch.mean().
    """
    policy_loss, metrics = clipped_surrogate(new.logprobs, mb, **surrogate)
    penalty, penalties = regularization(new, mb, **regularizers)
    metrics |= penalties
    loss = policy_loss + penalty
    if vf_coef:
        errors, moved = value_errors(new.values, mb.old_values, mb.returns, **value_loss)  # [B, C] each
        metrics |= {"train/critic/value_loss": mb.mean(errors), "train/critic/value_clip_ratio": mb.mean(moved.float())}
        loss = loss + vf_coef * metrics["train/critic/value_loss"]
    metrics["train/loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def policy_rate(
    iteration: int, num_iterations: int, *, learning_rate: float, schedule: str, critic_warmup_iterations: int
) -> float:
    """The policy's learning rate in one iteration: 0 while only the critic learns, then what the schedule says.

    At rate 0 Adam's moments learn the scale of the policy's gradient. Otherwise its first steps would be too long.
    """
    if iteration < critic_warmup_iterations:
        return 0.0
    return learning_rate * decay_at(schedule, iteration / num_iterations)


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


def make_state_critic(
    args: Args, sizes: Sizes, obs: dict, device: torch.device, checkpoint: Path | None
) -> StateCritic | None:
    """The critic that reads the simulator's state, as it was in the checkpoint. None with --critic hidden."""
    if args.critic != "state":
        return None
    shape = (sizes.num_chunks, sizes.local_num_envs, args.chunk_size, obs["state"].shape[1])
    critic = StateCritic(*shape, device, args.seed, **pick(args, StateCritic))
    if checkpoint:
        load_critic(critic, checkpoint)
    return critic


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    privileged = args.critic == "state"  # the critic reads the simulator's state
    with user_errors():
        place = placed(args.placement, args.offload, args.rollout_ahead, remote)
        sizes, ds_config, world, eval_world, eval_ids = check_start(args, place, group_size=1, privileged=privileged)
        T, N, first_env = sizes.num_chunks, sizes.local_num_envs, sizes.first_env
        fetch_weights("--model_path", args.model_path, args.lora_path)
        device = setup_distributed(args.seed, place.meet, shares_memory=place.trains)
        make_training, make_eval = (partial(make_envs, args.env_id, **settings) for settings in (world, eval_world))
        pixels = pixels_of(args.model_path, args.image_resize)
        if place.only_simulates:
            return place.simulate(partial(make_training, N), make_eval, pixels)
        default_dir = f"runs/ppo_{args.env_id.replace(':', '.')}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, checkpoint = place.open_run(args.run_dir, args.resume, default_dir, asdict(args))
        deciding = "--num_iterations" if args.total_timesteps is None else "--total_timesteps"
        check_iterations_left(checkpoint, sizes.num_iterations, deciding)
        in_words = place.in_words(sizes.in_words(world_size(), args.chunk_size, args.num_env_workers))
        place.say(what_applies(**pick(args, what_applies, sizes=in_words)))
        model_flags = dict(dtype=DTYPES[args.dtype], device=device, value_head=False if privileged else None)
        world_now = world_of(**pick(args, world_of, control=control_mode(args.env_id)))
        model_flags |= dict(norm_stats=None, cuda_graphs=True, world=world_now)
        policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **model_flags))
        envs = place.envs(partial(make_training, N), policy.pixels, pixels)
        eval_envs, open_envs = place.eval_envs(make_eval, sizes.local_num_eval_envs, envs, policy.pixels)

    build = partial(build_engine, policy, ds_config, **pick(args, build_engine))
    stages = place.stages(policy, build, zero_stage(ds_config), args.offload)
    engine = stages.engine
    guard = StaleGuard(run_dir, rank(), stages) if args.rollout_ahead else NonFiniteGuard(run_dir, rank())
    loss_flags = dict(surrogate=pick(args, clipped_surrogate), regularizers=pick(args, regularization))
    loss_flags |= dict(value_loss=pick(args, value_errors), vf_coef=0.0 if privileged else args.vf_coef)
    fan_sigma = args.fan_sigma if args.fan_coef else None
    seen = RolloutBuffer.of(policy, T, N, keeps_reference=args.kl_coef > 0)
    buffer = seen.for_envs(sizes.trained_envs) if place.assigns else seen  # what this rank trains on
    start_iteration, global_step, own_envs = 0, 0, slice(first_env, first_env + N)
    with user_errors():
        if checkpoint:
            start_iteration, global_step, env_states = load_checkpoint(engine, checkpoint, own_envs, args.num_envs)
        obs = place.shared(envs.load_state_dict(env_states) if checkpoint else envs.reset(), envs)
        policy.preprocess(obs)  # instructions that do not fit the prompt end the run here
        state_critic = make_state_critic(args, sizes, obs, device, checkpoint)
        critic = state_critic or HiddenCritic()
        place.begin_run(run_dir, checkpoint)
        begins = (sizes.num_iterations, start_iteration, global_step)
        logger = Logger(run_dir, rank() == 0 and place.trains, *begins, args.logger_backends, **pick(args, Logger))
        make_stopper = partial(Preemption, engine, run_dir, args.keep_checkpoints, state_critic, logger.close)
        preemption = place.stopper(make_stopper, run_dir, stages)
        ahead = partial(goes_ahead, **pick(args, goes_ahead, num_iterations=sizes.num_iterations))
        assigner = place.assigner(seen, buffer, envs, preemption, stages, critic, ahead)
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
        """Write the checkpoint after so many iterations."""
        return save_checkpoint(
            engine, run_dir, iteration, global_step, envs.state_dict(), args.keep_checkpoints, state_critic
        )

    with logger.timer("eval"):
        place.played(recorder.catch_up, start_iteration)  # the videos that a stopped run still owes
    if place.agreed(logger.owes_evaluation, args.eval_freq) and not run_evaluation(start_iteration):
        preemption.exit(checkpoint or save(0))

    for iteration in range(start_iteration, sizes.num_iterations):
        preemption.snapshot(iteration, global_step, envs.state_dict())
        # ------------------------------------------------------------------ rollout: weights are whole, ranks are free
        episodes, next_values = [], torch.zeros(N)
        decided: list[Tensor] = [torch.empty(0)] * len(envs.halves)  # V of each half's last decision, [n, C]
        # (seed, iteration) decides everything random, the same on every rank: resuming needs no generator's state
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        noise = rollout_noise(T, args.num_envs, own_envs, args.chunk_size, generator)
        with logger.timer("rollout"), rollout_stage(stages) as actor:
            value_of = partial(critic.value, actor)
            if not args.auto_reset and iteration > 0:  # set-up began the first one's episodes, or read them back
                envs.reset()
            for t, half, rows, obs, outcome in envs.pipeline(preemption.until_requested(range(T + 1))):
                if outcome is not None:  # of decision t - 1
                    values = critic.chunk_values(t - 1, rows, outcome.infos, decided[half])  # [n, C]
                    fields = outcome_of_decision(outcome, decided[half][:, 0], values, value_of, args.bootstrap)
                    seen.add_outcome(t - 1, rows, **fields)
                    episodes += row_dicts(outcome.infos["episode"])
                if t == T:
                    next_values[rows] = value_of(obs)
                    continue
                inputs = actor.prepare(obs)
                # tokens and logprobs [n, C, D], own_values [n, C]
                tokens, logprobs, own_values = actor.act(inputs, args.temperature, noise[t, rows])
                envs.step_async(actor.decode(tokens), half)
                decided[half] = critic.decision_values(obs, own_values)
                reference = seen.reference_of(actor, inputs, tokens, args.temperature)
                seen.add_decision(t, rows, inputs, tokens=tokens, logprobs=logprobs, reference_logprobs=reference)
            if assigner is not None:  # other ranks train on what this one saw
                episodes, next_values = assigner.assign(iteration, episodes, next_values)
        if not place.trains:
            evaluate_if_due(iteration)
            continue  # this rank waits for weights
        preemption.exit_if_requested()
        env_steps = int(all_reduce_sum(buffer.valid.sum()))  # actions executed, over all ranks
        global_step += env_steps

        # ------------------------------------------------------------------ advantage
        advantages, returns = compute_gae(buffer, next_values, args.gamma, args.gae_lambda)  # [T, N, C] each
        used = used_advantages(buffer.valid, args.logprob_level)  # [T, N, C]
        if args.norm_adv:
            advantages = normalize(advantages, used)  # over all ranks

        # ------------------------------------------------------------------ update: weights sharded, ranks in lock-step
        weights = buffer.valid.float()  # [T, N, C]
        rate = policy_rate(iteration, sizes.num_iterations, **pick(args, policy_rate))
        engine.optimizer.param_groups[0]["lr"] = rate
        shuffling = shuffle_generator(args.seed, iteration)
        epochs: list[dict[str, float]] = []  # means of each pass
        with logger.timer("update"), update_stage(stages):
            for _ in range(args.update_epochs):
                averages = Averages()
                steps = minibatches(weights, sizes.first_trained, shuffling, **pick(args, minibatches))
                if args.recompute_logprobs and not epochs:
                    buffer.recompute_logprobs(steps, engine, args.temperature)
                for mb in buffer.micro_batches(steps, advantages, returns, weights):
                    new = engine("evaluate", mb.inputs, mb.tokens, args.temperature, fan_sigma)
                    guard.check_ratio(new.logprobs, mb.old_logprobs)
                    loss, metrics = ppo_loss(new, mb, **loss_flags)
                    guard.check_gradients(backward(engine, loss, mb.last), mb, loss)
                    averages.add(metrics)
                    preemption.exit_if_requested(together=mb.last)
                epochs.append(averages.reduce(count=args.num_minibatches))
                if args.target_kl is not None and epochs[-1]["train/actor/approx_kl"] > args.target_kl:
                    break  # a mean over all ranks: they leave together, or ZeRO-3 hangs
            value_metrics = critic.fit(returns, buffer.values, buffer.valid, shuffling)

        # ------------------------------------------------------------------ log, evaluate, save
        stopped = not evaluate_if_due(iteration)
        metrics = mean_over(epochs) | guard.pop_metrics() | stages.pop_metrics() | buffer.statistics(advantages, used)
        metrics |= value_metrics | {"train/critic/explained_variance": buffer.explained_variance(returns)}
        metrics["train/actor/lr"] = rate
        note = "only the critic learns" if iteration < args.critic_warmup_iterations else ""
        logger.write(iteration + 1, global_step, metrics, episodes, env_steps, note)
        if stopped or due(iteration, args.save_freq, sizes.num_iterations):
            saved = save(iteration + 1)
        if stopped:  # --resume makes the evaluation again
            preemption.exit(saved)

    if sizes.num_iterations <= args.critic_warmup_iterations:
        logger.say(
            "policy      is still the one that it started as: only the critic learns in the first "
            f"{args.critic_warmup_iterations} iterations (--critic_warmup_iterations)"
        )
    for opened in (logger, eval_envs, envs, place):
        opened.close()
    if place.trains:
        push_policy(args.push_to_hub, run_dir)


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], __doc__))
