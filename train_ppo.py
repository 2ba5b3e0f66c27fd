"""PPO on a vision-language-action model in ManiSkill3: one process per GPU, DeepSpeed ZeRO underneath.

    deepspeed train_ppo.py --config yaml/quickstart_ppo_openvla.yaml                  # one rank per GPU
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train_ppo.py --config yaml/quickstart_ppo_openvla.yaml
    python train_ppo.py --resume runs/my_run --num_iterations 40                  # one rank, goes on where it stopped
    python train_ppo.py --help                                                        # every flag

Every rank simulates its envs, lets the policy act in them and trains on what it saw; ranks meet only in gradients and
in means. `main` reads in the order of an iteration: rollout, advantage, update, log, save, evaluate.

    T decisions per rollout   N envs on this rank   C = chunk_size actions per decision
    D = 7 tokens per action   B decisions in a micro batch

The recipe is RL4VLA's and RLinf's. It departs from them where they are wrong: the policy loss is not 7x (shapes are
asserted in the buffer), advantages are normalised over all ranks, clip and KL metrics mean what their names say, one
seed gives one run.
"""

import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from envs import check_envs, eval_episode_ids, every_instruction, make_envs
from envs.video import VideoWriter
from schemas.flags import (
    AboveOne,
    BelowOne,
    Chunk,
    Count,
    CountOrNone,
    EnvId,
    Envs,
    Episodes,
    EpisodeSteps,
    Finite,
    Fraction,
    Hertz,
    LocalRank,
    LoraAlpha,
    LoraRank,
    Name,
    NonNegative,
    Pixels,
    Positive,
    Processes,
    PromptLength,
    Seed,
    Text,
)
from vla.cli import check_combinations, check_whole_episodes, derive_sizes, parse_args, pick
from vla.distributed import (
    all_reduce_sum,
    normalize,
    print0,
    rank,
    run_main,
    setup_distributed,
    user_errors,
    world_size,
)
from vla.evaluation.episodes import evaluate
from vla.logger import Averages, Logger, check_backends, describe_run, due, mean_over, rows
from vla.models.loading import load_policy
from vla.models.policy import PolicyOutput, VLAPolicy, uniform_noise
from vla.models.value_head import value_errors
from vla.start.checks import check_iterations_left, check_rollout_memory, check_scene_memory, prompt_room, what_applies
from vla.start.launch import launched
from vla.training.checkpoint import begin_run, load_checkpoint, load_critic, open_run, save_checkpoint
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
from vla.training.rollout_buffer import MicroBatch, RolloutBuffer, dealing_generator, minibatches
from vla.training.stages import StageSwitcher, make_rollout_copy, rollout_stage, update_stage
from vla.training.state_critic import StateCritic

# evaluation runs every episode once, to its end
ONE_PER_ID = dict(auto_reset=False, ignore_terminations=False, pipeline_stages=1, first_env=0, privileged=False)


@dataclass
class Args:
    # ---- run
    config: tuple[Text, ...] = ()  # yaml files of flags, the later wins; flags on the command line win over all
    run_dir: Text | None = None  # where everything goes; a new folder (default: runs/<algorithm>_<env_id>_<time>)
    resume: Text | None = None  # run folder to go on with: its own flags, then --config's, then those typed here
    seed: Seed = 0  # everything random is a function of it; two runs with one seed on one machine's CPUs are identical
    num_iterations: Count = 400  # how many times: rollout, advantage, update
    total_timesteps: Count | None = None  # env steps over all ranks; if given, it decides num_iterations
    save_freq: CountOrNone = 40  # checkpoint every so many iterations, and at the end
    keep_checkpoints: CountOrNone = 2  # how many checkpoints stay on disk; 0 keeps all
    eval_freq: CountOrNone = 10  # evaluate every so many iterations, besides the start and the end; 0 = only these two
    # where metrics go besides metrics.jsonl; wandb and swanlab have to be installed by you
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = ("tensorboard",)
    project_name: Name = "solovla"  # of the project at wandb and swanlab
    experiment_name: Name | None = None  # of the run at wandb and swanlab (default: the run folder's name)

    # ---- model
    model_path: Text = "openvla-tiny"  # folder in the published layout, or openvla-tiny, openvla-oft-tiny (random)
    # openvla: one action per decision, its 7 tokens written one by one; openvla_oft: chunk_size actions in one pass
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    unnorm_key: Text = "bridge_orig"  # which of the checkpoint's statistics turn tokens into metres and radians
    image_resize: Literal["tensor", "pil"] = "tensor"  # pictures are resized as in RLinf, or as in OpenVLA
    oft_stop_token: bool = False  # openvla_oft: end in </s>, as moojink's discrete checkpoints; RLinf's do not
    lora_path: Text | None = None  # folder of an adapter to continue; it keeps its own rank, alpha and layers
    merge_lora: bool = False  # add lora_path's adapter into the weights, and train a fresh one on top
    lora_rank: LoraRank = 32  # rank of a fresh adapter; 0 trains the weights themselves
    lora_alpha: LoraAlpha = 32  # scale of a fresh adapter is lora_alpha / lora_rank (RLinf: 32; RL4VLA: 16)
    # what an adapter trains, or rank 0 whole. all: every linear layer (RLinf); llm: the language model's alone,
    # and pictures pass the frozen towers once per rollout
    lora_scope: Literal["all", "llm"] = "all"
    max_prompt_length: PromptLength = 30  # prompts are padded to this many tokens, or to the longest one's
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations; master weights, moments are fp32

    # ---- env
    env_id: EnvId = "PutOnPlateInScene25Main-v3"  # one of the family's 17, or any ManiSkill id with pd_ee_delta_pose
    instruction: Text | None = None  # what the policy is told in an env that is not of the family
    obj_set: Literal["train", "test", "all"] = "train"  # which objects, tables and receptacles episodes are drawn from
    asset_pack: Literal["builtin", "bridge"] = "builtin"  # made by code, or the published meshes and photographs
    asset_dir: Text | None = None  # where the published assets are (`python doctor.py --download`)
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"  # RL4VLA's scene, or RLinf's departures, to compare with its table
    image_size: tuple[Pixels, Pixels] = (640, 480)  # camera width and height; pose and field of view stay
    sim_freq: Hertz = 500  # physics steps per second, control is at 5 Hz; results at different rates do not compare
    # physx_cpu repeats bit for bit; physx_cuda: all envs of a rank in one batch; auto: the GPU where there is one
    sim_backend: Literal["physx_cpu", "physx_cuda", "auto"] = "physx_cpu"
    # who draws what physx_cpu simulates; auto: the GPU where SAPIEN can draw on it
    render_backend: Literal["cpu", "cuda", "auto"] = "auto"
    max_episode_steps: EpisodeSteps = 80  # an episode is cut after this many actions
    auto_reset: bool = True  # start the next episode as soon as one ends; else all reset when an iteration starts
    ignore_terminations: bool = False  # do not end an episode on success
    num_env_workers: Processes = 0  # worker processes per rank that simulate; 0 = in the rank's own process
    # seconds after which a worker that gives no answer is replaced; simulating in the rank's own process, the run ends
    worker_timeout: Positive = 300.0
    pipeline_stages: Literal[1, 2] = 1  # 2: one half of the envs is simulated while the policy acts on the other

    # ---- rollout
    num_envs: Envs = 128  # parallel envs over all ranks
    num_steps: Count = 160  # actions per env and iteration
    chunk_size: Chunk = 1  # actions per decision; openvla has 1, openvla_oft's published models have 8
    temperature: Positive = 1.0  # of sampling in the rollout; log-probabilities in the update use the same
    eval_temperature: NonNegative = 0.6  # of sampling in evaluation; 0 = greedy (published tables use 0.6)
    num_eval_episodes: Episodes = 64  # held-out episodes per evaluation, the same ones every time
    num_eval_envs: Envs = 16  # envs that evaluation runs at once, over all ranks

    # ---- algorithm
    # what the critic reads: the language model's hidden state as published, or the simulator's state (state_critic.py)
    critic: Literal["hidden", "state"] = "hidden"
    critic_epochs: Count = 10  # passes over a rollout of the critic that reads the simulator's state
    gamma: Fraction = 0.99  # discount per action
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    # which episode ends are followed by V(last frame): cut ones; successes too (RLinf, for its published numbers); or
    # none: being late is failure, as success within max_episode_steps counts it (RL4VLA)
    bootstrap: Literal["truncation", "always", "never"] = "truncation"
    norm_adv: bool = True  # normalise advantages, over all ranks
    # unit whose probability ratio is clipped: each token, the 7 of an action together, or a whole chunk
    logprob_level: Literal["token", "action", "chunk"] = "action"
    clip_ratio_low: BelowOne = 0.2  # ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]
    clip_ratio_high: NonNegative = 0.2  # see clip_ratio_low
    dual_clip: AboveOne | None = None  # a bad action pushes with at most dual_clip * |advantage|; None = no limit
    value_clip: Positive | None = 0.2  # largest counted change of a value from its rollout value; None = no limit
    huber_delta: Positive = 10.0  # value errors above it count linearly
    vf_coef: NonNegative = 1.0  # weight of the value loss in the model's gradient; --critic state has a loss of its own
    ent_coef: Finite = 0.0  # weight of the entropy bonus; below 0 it is a penalty, which makes the policy surer
    kl_coef: NonNegative = 0.0  # weight of the KL to the starting policy (its adapter switched off, so LoRA only)
    fan_coef: NonNegative = 0.0  # weight of FAN, the KL to a Gaussian around the mode (published: openvla 1.0, oft 0.1)
    fan_sigma: Positive = 0.3  # its width, where a dimension spans [-1, 1] (published: openvla 0.3, oft 0.2)
    update_epochs: Count = 1  # passes over a rollout
    num_minibatches: Count = 32  # optimizer steps per pass
    critic_warmup_iterations: CountOrNone = 0  # iterations in which only the critic learns, at the start
    target_kl: Positive | None = None  # leave the update after a pass whose approx_kl (over all ranks) exceeds it
    learning_rate: NonNegative = 1e-4  # of the policy
    # of the learning rate; linear and cosine fall to 0 at the end
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    value_learning_rate: NonNegative = 3e-3  # of the critic; constant
    weight_decay: NonNegative = 0.01  # of AdamW
    max_grad_norm: NonNegative = 10.0  # gradients are scaled down to this norm; 0 leaves them as they are

    # ---- system
    micro_batch_size: Count = 8  # decisions per forward and GPU: the memory knob. Out of memory: halve it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    deepspeed_config: Text = "ds_configs/zero3.json"  # ZeRO settings; sizes and rates are not in it
    offload: Literal["none", "stage"] = "none"  # stage: what only the other half of an iteration needs leaves the GPU
    local_rank: LocalRank = -1  # set by the launcher


def has_future(terminations: torch.Tensor, truncations: torch.Tensor, bootstrap: str) -> torch.Tensor:
    """Which ended episodes are followed by V(last frame), bool [N]: see Args.bootstrap."""
    return (truncations & (bootstrap != "never")) | (terminations & (bootstrap == "always"))


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    dones: torch.Tensor,
    final_values: torch.Tensor,
    next_values: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) at action resolution, across the actions of a chunk.

    delta_k = r_k + gamma * V_{k+1} - V_k and A_k = delta_k + gamma * lambda * A_{k+1}, k over executed actions. Where
    the episode ended, V_{k+1} is final_values and the sum stops. A cut episode is not a finished one: with V of its
    last frame there, the time limit does not look like failure (RL4VLA treats it as the end).

    Args:
        rewards, values: [T, N, C]. valid: bool [T, N, C], actions that were executed.
        dones: bool [T, N], the episode ended within the chunk.
        final_values: [T, N], V(last frame) where an ended episode is bootstrapped, else 0.
        next_values: [N], V of the frame after the rollout.

    Returns:
        advantages and returns (= advantages + values), [T, N, C]; 0 where not valid.
    """
    advantages = torch.zeros_like(rewards)
    following, trace = next_values, torch.zeros_like(next_values)  # V_{k+1} and A_{k+1}, [N]
    for t in reversed(range(len(rewards))):
        following = torch.where(dones[t], final_values[t], following)
        trace = torch.where(dones[t], 0.0, trace)
        for c in reversed(range(rewards.shape[2])):
            delta = rewards[t, :, c] + gamma * following - values[t, :, c]
            trace = torch.where(valid[t, :, c], delta + gamma * gae_lambda * trace, trace)
            following = torch.where(valid[t, :, c], values[t, :, c], following)
            advantages[t, :, c] = torch.where(valid[t, :, c], trace, 0.0)
    return advantages, torch.where(valid, advantages + values, 0.0)


def used_advantages(valid: torch.Tensor, logprob_level: str) -> torch.Tensor:
    """Advantages that clipped_surrogate reads, bool [T, N, C]: of all executed actions, or of a chunk's first alone."""
    used = valid.clone()
    if logprob_level == "chunk":
        used[..., 1:] = False
    return used


def clipped_surrogate(
    new_logprobs: torch.Tensor,
    mb: MicroBatch,
    total_weight: float,
    *,
    logprob_level: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (PPO, arXiv 1707.06347, eq. 7), two-sided clip (DAPO, arXiv 2503.14476), dual clip (arXiv
    1912.09729).

    Args:
        new_logprobs: [B, C, D].
        total_weight: the weight of the whole minibatch over all ranks, per rank. DeepSpeed adds up micro batches and
            averages ranks, so what this returns sums up to the minibatch's weighted mean.

    Returns:
        loss and metrics, scalars. The unit whose ratio is clipped is a token, an action (7 tokens) or a chunk (its
        executed actions; its advantage is that of its first action, which holds the rewards of the others). Log ratios
        count up to +-20 and have no gradient beyond: exp overflows at 88, and its gradient is NaN there.
    """
    # [B, C, D]; what was not executed may be anything, and infinity times a weight of 0 is NaN
    log_ratio = torch.where(mb.weights[..., None] > 0, new_logprobs - mb.old_logprobs, 0.0)
    advantages, weights = mb.advantages, mb.weights  # [B, C]
    if logprob_level == "token":
        num_tokens = log_ratio.shape[-1]
        advantages, weights = advantages[..., None], (weights / num_tokens)[..., None].expand_as(log_ratio)  # [B, C, D]
    else:
        log_ratio = log_ratio.sum(dim=-1)  # [B, C]
    if logprob_level == "chunk":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)  # [B, 1]
        advantages, weights = advantages[:, :1], weights.sum(dim=1, keepdim=True)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).sum() / total_weight

    log_ratio = log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    losses = torch.maximum(unclipped, clipped)
    dual_clipped = torch.zeros_like(losses, dtype=torch.bool)
    if dual_clip is not None:  # a bad action whose ratio has exploded pushes with at most dual_clip * |A|
        dual_clipped = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = torch.where(dual_clipped, -dual_clip * advantages, losses)
    policy_loss = mean(losses)
    return policy_loss, {
        "train/actor/policy_loss": policy_loss,
        "train/actor/approx_kl": mean(ratio - 1.0 - log_ratio),  # k3, http://joschu.net/blog/kl-approx.html
        "train/actor/clip_fraction": mean((clipped > unclipped).float()),
        "train/actor/clipped_ratio": mean(clipped_ratio),
        "train/actor/dual_clip_fraction": mean(dual_clipped.float()),
    }


def ppo_loss(
    new: PolicyOutput,
    mb: MicroBatch,
    total_weight: float,
    *,
    surrogate: dict,
    regularizers: dict,
    value_clip: float | None,
    huber_delta: float,
    vf_coef: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """clipped_surrogate + regularization + clipped Huber value loss (the last where vf_coef is not 0).

    Args:
        new: logprobs, entropy [B, C, D] and values [B, C] of the policy as it is now. total_weight: as for
            clipped_surrogate. surrogate, regularizers: the flags of these two.

    Returns:
        loss and metrics, scalars, whose sums over micro batches, averaged over ranks, are means over executed actions.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # [B, C]
        return (x * mb.weights).sum() / total_weight

    policy_loss, metrics = clipped_surrogate(new.logprobs, mb, total_weight, **surrogate)
    penalty, penalties = regularization(new, mb, total_weight, **regularizers)
    loss = policy_loss + penalty
    metrics |= penalties | {"train/loss": loss}
    if not vf_coef:
        return loss, {name: value.detach() for name, value in metrics.items()}
    errors, value_clipped = value_errors(new.values, mb.old_values, mb.returns, value_clip, huber_delta)  # [B, C]
    value_loss = mean(errors)
    loss = loss + vf_coef * value_loss
    metrics |= {
        "train/loss": loss,
        "train/critic/value_loss": value_loss,
        "train/critic/value_clip_ratio": mean(value_clipped.float()),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with user_errors():
        check_combinations(**pick(args, check_combinations))
        launch = launched()
        sizes = derive_sizes(**pick(args, derive_sizes, group_size=1, rank=launch.rank, world_size=launch.world_size))
        if not args.auto_reset:
            check_whole_episodes(**pick(args, check_whole_episodes))
        T, N, first_env = sizes.num_chunks, sizes.local_num_envs, sizes.first_env
        check_backends(args.logger_backends)
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype, args.offload)
        privileged = args.critic == "state"
        world = pick(args, make_envs, num_env_workers=sizes.num_env_workers, first_env=first_env, privileged=privileged)
        eval_world = world | ONE_PER_ID | dict(num_env_workers=sizes.num_eval_env_workers)
        check_envs(args.env_id, N, **world)
        check_envs(args.env_id, sizes.local_num_eval_envs, **eval_world)
        eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)
        told = every_instruction(args.env_id, args.obj_set, args.instruction)
        args.max_prompt_length = prompt_room(args.model_path, told, args.max_prompt_length)
        here = launch.ranks_here
        check_rollout_memory(args.model_path, here * T * N)
        check_scene_memory(
            here * (N + sizes.local_num_eval_envs),
            here * (sizes.num_env_workers + sizes.num_eval_env_workers),
            args.image_size,
            "--num_envs, --num_eval_envs, --num_env_workers and --image_size",
        )
        device = setup_distributed(args.seed)
        default_dir = f"runs/ppo_{args.env_id.replace(':', '.')}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, checkpoint = open_run(args.run_dir, args.resume, default_dir, asdict(args))
        check_iterations_left(checkpoint, sizes.num_iterations, "--num_iterations")
        in_words = sizes.in_words(launch.world_size, args.chunk_size, args.num_env_workers)
        print0(what_applies(**pick(args, what_applies, sizes=in_words)))
        model_flags = dict(dtype=DTYPES[args.dtype], device=device, value_head=False if privileged else None)
        model_flags |= dict(norm_stats=None, cuda_graphs=True)
        policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **model_flags))
        envs = make_envs(args.env_id, N, **world)
        eval_envs = make_envs(args.env_id, sizes.local_num_eval_envs, **eval_world)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config), args.offload)
    engine = build_engine(policy, ds_config, **pick(args, build_engine))
    stages = StageSwitcher(engine, rollout_copy, args.offload)
    guard = NonFiniteGuard(run_dir, rank())
    loss_flags = pick(args, ppo_loss, surrogate=pick(args, clipped_surrogate), regularizers=pick(args, regularization))
    if privileged:
        loss_flags["vf_coef"] = 0.0
    fan_sigma = args.fan_sigma if args.fan_coef else None
    buffer = RolloutBuffer.of(policy, T, N, keeps_reference=args.kl_coef > 0)
    start_iteration, global_step = 0, 0
    with user_errors():
        if checkpoint:
            start_iteration, global_step, env_states = load_checkpoint(engine, checkpoint, first_env, N)
            obs = envs.split(envs.load_state_dict(env_states))
        else:
            obs = envs.split(envs.reset())
        for part in obs:
            policy.preprocess(part)  # instructions that do not fit the prompt end the run here
        critic = None
        if privileged:
            state_size = obs[0]["state"].shape[1]
            critic = StateCritic(T, N, args.chunk_size, state_size, device, args.seed, **pick(args, StateCritic))
            if checkpoint:
                load_critic(critic, checkpoint)
        begin_run(run_dir, checkpoint)
        logger = Logger(
            run_dir,
            rank() == 0,
            sizes.num_iterations,
            start_iteration,
            global_step,
            args.logger_backends,
            **pick(args, Logger),
        )
        preemption = Preemption(engine, run_dir, args.keep_checkpoints, critic)
        logger.describe(describe_run(asdict(args), asdict(sizes), world_size()))

    def value_of(actor: VLAPolicy, obs: dict) -> torch.Tensor:
        """V of observations, fp32 [N]: where an episode was cut, and where the rollout ends."""
        return critic(obs["state"]) if critic else actor.value(actor.prepare(obs, device))[:, 0].float().cpu()

    def run_evaluation(iteration: int) -> bool:
        """The held-out episodes, with whole weights; rank 0 films its first batch. False: this run was asked to end."""
        with logger.timer("eval"), rollout_stage(stages) as actor:
            with logger.video(VideoWriter, iteration) as video:
                means = evaluate(actor, eval_envs, eval_ids, args.eval_temperature, video, preemption)
        if means is not None:
            logger.write_evaluation(iteration, global_step, means)
        return means is not None

    # that of the starting policy, or one that was broken off
    wanted = start_iteration == 0 or due(start_iteration - 1, args.eval_freq, sizes.num_iterations)
    if wanted and logger.lacks_evaluation(start_iteration) and not run_evaluation(start_iteration):
        preemption.exit(
            checkpoint or save_checkpoint(engine, run_dir, 0, 0, envs.state_dict(), args.keep_checkpoints, critic)
        )

    for iteration in range(start_iteration, sizes.num_iterations):
        preemption.snapshot(iteration, global_step, envs.state_dict())
        # (seed, iteration) decides everything random, the same on every rank: resuming needs no generator's state
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        # ------------------------------------------------------------------ rollout: weights are whole, ranks are free
        episodes, next_values = [], torch.zeros(N)
        with logger.timer("rollout"), rollout_stage(stages) as actor:
            if not args.auto_reset and iteration > 0:  # set-up began the first one's episodes, or read them back
                obs = envs.split(envs.reset())
            for t in preemption.until_requested(range(T + 1)):
                noise = uniform_noise(args.num_envs, actor.chunk_size, generator)[first_env:][:N]  # [N, C, D]
                for part, here in enumerate(envs.parts):  # all N envs, or two halves: one is simulated while one acts
                    if t > 0:  # what came of decision t - 1
                        obs[part], rewards, terminations, truncations, infos = envs.step_wait(part)  # [N, C] [N] [N]
                        bootstrapped = has_future(terminations, truncations, args.bootstrap)  # [N]
                        final_values = torch.zeros(len(bootstrapped))
                        if bootstrapped.any():  # infos["ended"]: the envs that final_observation has rows for
                            final_values[infos["ended"]] = value_of(actor, infos["final_observation"])
                        dropped = infos["dropped"]  # [N], lost with a worker: cut before this decision, at its V
                        final_values = final_values * bootstrapped
                        final_values[dropped] = buffer.values[t - 1, here, 0][dropped]
                        buffer.add_outcome(
                            t - 1,
                            here,
                            rewards=rewards,
                            valid=infos["valid"],
                            final_values=final_values,
                            dones=terminations | truncations | dropped,
                        )
                        episodes += rows(infos["episode"])
                        if critic:
                            buffer.values[t - 1, here] = critic.store(t - 1, here, infos["states"])
                    if t == T:
                        next_values[here] = value_of(actor, obs[part])
                        continue
                    inputs = actor.prepare(obs[part], device)
                    tokens, logprobs, values = actor.act(inputs, args.temperature, noise[here])  # [N, C, D] x 2, [N, C]
                    envs.step_async(actor.decode(tokens), part)
                    if critic:  # what it makes of the states within the chunk follows with the outcome
                        values = critic(obs[part]["state"])[:, None].expand_as(values)
                    reference = actor.reference_logprobs(inputs, tokens, args.temperature) if args.kl_coef else None
                    buffer.add_decision(t, here, inputs, tokens, logprobs, values, reference)
        preemption.exit_if_requested()
        env_steps = int(all_reduce_sum(buffer.valid.sum()))  # actions executed, over all ranks
        global_step += env_steps

        # ------------------------------------------------------------------ advantage
        advantages, returns = compute_gae(
            buffer.rewards,
            buffer.values,
            buffer.valid,
            buffer.dones,
            buffer.final_values,
            next_values,
            args.gamma,
            args.gae_lambda,
        )  # [T, N, C] each
        used = used_advantages(buffer.valid, args.logprob_level)  # [T, N, C]
        if args.norm_adv:
            advantages = normalize(advantages, used)  # over all ranks

        # ------------------------------------------------------------------ update: weights sharded, ranks in lock-step
        weights = buffer.valid.float()  # [T, N, C]
        rate = args.learning_rate * decay_at(args.schedule, iteration / sizes.num_iterations)
        # while only the critic learns the policy stands still, but Adam's moments get to know its gradient: scaled by
        # the value loss alone, its first steps would be too long
        engine.optimizer.param_groups[0]["lr"] = 0.0 if iteration < args.critic_warmup_iterations else rate
        dealing = dealing_generator(args.seed, iteration)  # ranks may have drawn unequally much noise by now
        epochs = []
        with logger.timer("update"), update_stage(stages):
            for _ in range(args.update_epochs):
                averages = Averages()
                for total, parts in minibatches(
                    weights, args.num_envs, first_env, args.num_minibatches, args.micro_batch_size, dealing
                ):
                    for number, index in enumerate(parts, 1):
                        mb = buffer.micro_batch(index, advantages, returns, weights, device)
                        new = engine("evaluate", mb.inputs, mb.tokens, args.temperature, fan_sigma)
                        guard.check_ratio(new.logprobs, mb.old_logprobs)
                        loss, metrics = ppo_loss(new, mb, total, **loss_flags)
                        guard.check_gradients(backward(engine, loss, last=number == len(parts)), mb, loss)
                        averages.add(metrics)
                    preemption.exit_if_requested()
                epochs.append(averages.reduce(count=args.num_minibatches))
                if args.target_kl is not None and epochs[-1]["train/actor/approx_kl"] > args.target_kl:
                    break  # a mean over all ranks: they leave together, or ZeRO-3 hangs

        with logger.timer("update"):
            value_metrics = critic.fit(returns, buffer.values, buffer.valid, dealing) if critic else {}

        # ------------------------------------------------------------------ log, evaluate, save
        stopped = due(iteration, args.eval_freq, sizes.num_iterations) and not run_evaluation(iteration + 1)
        metrics = mean_over(epochs) | guard.pop_metrics() | stages.pop_metrics() | buffer.statistics(advantages, used)
        metrics |= value_metrics | {"train/critic/explained_variance": buffer.explained_variance(returns)}
        metrics["train/actor/lr"] = engine.optimizer.param_groups[0]["lr"]
        note = "only the critic learns" if iteration < args.critic_warmup_iterations else ""
        logger.write(iteration + 1, global_step, metrics, episodes, env_steps, note)
        if stopped or due(iteration, args.save_freq, sizes.num_iterations):
            saved = save_checkpoint(
                engine, run_dir, iteration + 1, global_step, envs.state_dict(), args.keep_checkpoints, critic
            )
            if stopped:  # --resume makes the evaluation again
                preemption.exit(saved)

    for opened in (logger, envs, eval_envs):
        opened.close()
    if sizes.num_iterations <= args.critic_warmup_iterations:
        print0(
            "policy      is still the one that it started as: only the critic learns in the first "
            f"{args.critic_warmup_iterations} iterations (--critic_warmup_iterations)"
        )


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
