"""GRPO on a vision-language-action model in ManiSkill3: one process per GPU, DeepSpeed ZeRO underneath.

    deepspeed train_grpo.py --config yaml/quickstart_grpo_openvla.yaml                  # one rank per GPU
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train_grpo.py --config yaml/quickstart_grpo_openvla.yaml
    python train_grpo.py --resume runs/my_run --num_iterations 40                  # one rank, goes on where it stopped
    python train_grpo.py --help                                                        # every flag

The same iteration as train_ppo.py without a critic: all members of a group start from one episode id, and an
episode's advantage is how its return compares with its group's. A group whose members all score the same teaches
nothing.

    T decisions per rollout   N envs on this rank   C = chunk_size actions per decision
    D = 7 tokens per action   B decisions in a micro batch

It departs from RLinf where that wastes work or misreports: an env that has succeeded is not simulated any more, steps
after the end of an episode never reach the update, groups stay on one rank by assertion, metrics have one definition
for PPO and GRPO.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from envs import check_envs, eval_episode_ids, every_instruction, make_envs, train_episode_id
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
    GroupSize,
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
from vla.distributed import all_reduce_sum, print0, rank, run_main, setup_distributed, user_errors, world_size
from vla.evaluation.episodes import evaluate
from vla.logger import Averages, Logger, check_backends, describe_run, due, mean_over, rows
from vla.models.loading import load_policy
from vla.models.policy import PolicyOutput, VLAPolicy, uniform_noise
from vla.start.checks import check_iterations_left, check_rollout_memory, check_scene_memory, prompt_room, what_applies
from vla.start.launch import launched
from vla.training.checkpoint import begin_run, load_checkpoint, open_run, save_checkpoint
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

# what an iteration without update logs as 0
UPDATE_METRICS = """train/loss train/actor/policy_loss train/actor/approx_kl train/actor/clip_fraction
train/actor/clipped_ratio train/actor/dual_clip_fraction train/entropy_loss""".split()


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
    lora_rank: LoraRank = 0  # rank of a fresh adapter; 0 trains the weights themselves
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
    num_env_workers: Processes = 0  # worker processes per rank that simulate; 0 = in the rank's own process
    # seconds after which a worker that gives no answer is replaced; simulating in the rank's own process, the run ends
    worker_timeout: Positive = 300.0
    pipeline_stages: Literal[1, 2] = 1  # 2: one half of the envs is simulated while the policy acts on the other

    # ---- rollout
    num_envs: Envs = 256  # parallel envs over all ranks
    num_steps: Count = 80  # actions per env and iteration
    chunk_size: Chunk = 1  # actions per decision; openvla has 1, openvla_oft's published models have 8
    temperature: Positive = 1.0  # of sampling in the rollout; log-probabilities in the update use the same
    eval_temperature: NonNegative = 0.6  # of sampling in evaluation; 0 = greedy (published tables use 0.6)
    num_eval_episodes: Episodes = 64  # held-out episodes per evaluation, the same ones every time
    num_eval_envs: Envs = 16  # envs that evaluation runs at once, over all ranks

    # ---- algorithm
    group_size: GroupSize = 8  # episodes from one start state, compared with each other; all on one rank
    # what a return is compared with: the group's mean, or that of the other members (RLOO)
    grpo_baseline: Literal["mean", "leave_one_out"] = "mean"
    grpo_scale: Literal["std", "none"] = "std"  # divide by the group's deviation, or not (Dr. GRPO, arXiv 2503.20783)
    length_norm: bool = True  # every episode counts the same (RLinf); otherwise every action does
    dynamic_sampling: bool = False  # leave groups out whose members all score the same (DAPO, arXiv 2503.14476)
    max_resamples: CountOrNone = 0  # with dynamic_sampling: roll out up to so many more times to fill their places
    # unit whose probability ratio is clipped: each token, the 7 of an action together, or a whole chunk
    logprob_level: Literal["token", "action", "chunk"] = "token"
    clip_ratio_low: BelowOne = 0.2  # ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]
    clip_ratio_high: NonNegative = 0.28  # see clip_ratio_low
    dual_clip: AboveOne | None = None  # a bad action pushes with at most dual_clip * |advantage|; None = no limit
    ent_coef: Finite = 0.0  # weight of the entropy bonus; below 0 it is a penalty, which makes the policy surer
    kl_coef: NonNegative = 0.0  # weight of the KL to the starting policy (its adapter switched off, so LoRA only)
    fan_coef: NonNegative = 0.0  # weight of FAN, the KL to a Gaussian around the mode (published: openvla 1.0, oft 0.1)
    fan_sigma: Positive = 0.3  # its width, where a dimension spans [-1, 1] (published: openvla 0.3, oft 0.2)
    update_epochs: Count = 1  # passes over a rollout
    num_minibatches: Count = 32  # optimizer steps per pass
    target_kl: Positive | None = None  # leave the update after a pass whose approx_kl (over all ranks) exceeds it
    learning_rate: NonNegative = 1e-5  # of the policy
    # of the learning rate; linear and cosine fall to 0 at the end
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegative = 0.01  # of AdamW
    max_grad_norm: NonNegative = 1.0  # gradients are scaled down to this norm; 0 leaves them as they are

    # ---- system
    micro_batch_size: Count = 8  # decisions per forward and GPU: the memory knob. Out of memory: halve it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    deepspeed_config: Text = "ds_configs/zero3.json"  # ZeRO settings; sizes and rates are not in it
    offload: Literal["none", "stage"] = "none"  # stage: what only the other half of an iteration needs leaves the GPU
    local_rank: LocalRank = -1  # set by the launcher


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


def compare(grouped: torch.Tensor, baseline: str, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of whole episodes against their group (GRPO, arXiv 2402.03300, section 4.1).

    Args:
        grouped: [groups, K], returns of each group's K members.
        baseline: "mean", or "leave_one_out": the mean of the other members. scale: "std" (unbiased, + 1e-6 as RLinf)
        or "none".

    Returns:
        advantages [groups, K]; live bool [groups], groups whose members do not all score the same.
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
    returns: torch.Tensor, ended: torch.Tensor, group_size: int, baseline: str, scale: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """compare() within groups of episodes that ended.

    Args:
        returns: [N], undiscounted sum of rewards up to an episode's end; members of a group are neighbours.
        ended: bool [N]. An episode that did not (begun anew when its worker was lost, too late to end) has no score:
            its advantage is 0, and the others are compared without it.

    Returns:
        advantages [N]; live bool [N / group_size].
    """
    grouped, ended = returns.view(-1, group_size), ended.view(-1, group_size)
    advantages, live = compare(grouped, baseline, scale)
    for group in (~ended.all(dim=1)).nonzero()[:, 0].tolist():
        members, advantages[group] = ended[group], 0.0
        (advantages[group, members],), (live[group],) = compare(grouped[group, members][None], baseline, scale)
    return advantages.flatten(), live


def roll_out(
    actor: VLAPolicy,
    envs,
    episode_ids: list[int],
    noise: Iterator[torch.Tensor],
    temperature: float,
    buffer: RolloutBuffer,
    device: torch.device,
) -> list[dict[str, float]]:
    """One episode per env, from given start states, into the buffer; an env whose episode has ended rests.

    Args:
        envs: vector env without auto_reset. noise: one [N, C, D] per decision.

    Returns:
        statistics of the episodes that ended: N, but for those that were begun anew after a lost worker, too late.
    """
    buffer.clear()
    obs = envs.split(envs.reset(episode_ids))
    episodes, to_end = [], [here.stop - here.start for here in envs.parts]
    for t, draw in enumerate(noise):
        for part, here in enumerate(envs.parts):  # all N envs, or two halves: one is simulated while one acts
            if t > 0 and to_end[part]:  # what came of decision t - 1
                obs[part], rewards, terminations, truncations, infos = envs.step_wait(part)  # [N, C] [N] [N]
                dones = terminations | truncations
                nothing = torch.zeros(len(dones))  # no critic
                buffer.add_outcome(
                    t - 1, here, rewards=rewards, valid=infos["valid"], dones=dones, final_values=nothing
                )
                buffer.forget(here, infos["dropped"], before=t - 1)  # lost with a worker: they have begun again
                episodes += rows(infos["episode"])
                to_end[part] -= len(infos["ended"])
            if t < buffer.num_chunks and to_end[part]:
                inputs = actor.prepare(obs[part], device)
                tokens, logprobs, values = actor.act(inputs, temperature, draw[here])  # [N, C, D] [N, C, D] [N, C]
                envs.step_async(actor.decode(tokens), part)
                reference = actor.reference_logprobs(inputs, tokens, temperature) if buffer.keeps_reference else None
                buffer.add_decision(t, here, inputs, tokens, logprobs, values, reference)
    return episodes


def episode_weights(valid: torch.Tensor, length_norm: bool) -> torch.Tensor:
    """Weights of executed actions in the loss, [T, N, C], for valid bool [T, N, C].

    With length_norm an action of an episode of L actions weighs 1 / L: the loss is the mean over episodes of the mean
    over their actions (RLinf multiplies by 80 / L, which is the same up to a constant factor).
    """
    lengths = valid.sum(dim=(0, 2)).clamp(min=1)  # [N]
    return valid / lengths[None, :, None] if length_norm else valid.float()


def grpo_loss(
    new: PolicyOutput, mb: MicroBatch, total_weight: float, *, surrogate: dict, regularizers: dict
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """clipped_surrogate + regularization; no critic.

    Args:
        new: logprobs and entropy [B, C, D] of the policy as it is now. total_weight: as for clipped_surrogate.
            surrogate, regularizers: the flags of these two.

    Returns:
        loss and metrics, scalars, whose sums over micro batches, averaged over ranks, are weighted means over executed
        actions.
    """
    policy_loss, metrics = clipped_surrogate(new.logprobs, mb, total_weight, **surrogate)
    penalty, penalties = regularization(new, mb, total_weight, **regularizers)
    loss = policy_loss + penalty
    metrics |= penalties | {"train/loss": loss}
    return loss, {name: value.detach() for name, value in metrics.items()}


def live_groups(buffer: RolloutBuffer, group_size: int) -> torch.Tensor:
    """bool [groups]: groups whose members do not all score the same."""
    returns, ended = buffer.rewards.sum(dim=(0, 2)), buffer.dones.any(dim=0)  # [N]
    return compute_group_advantages(returns, ended, group_size, "mean", "none")[1]


def fill_dead_groups(buffer: RolloutBuffer, spare: RolloutBuffer, group_size: int) -> None:
    """Put the live groups of a further rollout in the places of dead ones, as far as they go."""
    dead = (~live_groups(buffer, group_size)).nonzero()  # [K, 1]
    live = live_groups(spare, group_size).nonzero()[: len(dead)]  # [K, 1]
    member = torch.arange(group_size)
    buffer.replace((dead[: len(live)] * group_size + member).flatten(), spare, (live * group_size + member).flatten())


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with user_errors():
        check_combinations(**pick(args, check_combinations))
        launch = launched()
        sizes = derive_sizes(**pick(args, derive_sizes, rank=launch.rank, world_size=launch.world_size))
        check_whole_episodes(**pick(args, check_whole_episodes))
        T, N, first_env = sizes.num_chunks, sizes.local_num_envs, sizes.first_env
        check_backends(args.logger_backends)
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype, args.offload)
        rests = dict(auto_reset=False, ignore_terminations=False)  # an env whose episode has ended
        world = pick(args, make_envs, num_env_workers=sizes.num_env_workers, first_env=0, privileged=False, **rests)
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
        default_dir = f"runs/grpo_{args.env_id.replace(':', '.')}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, checkpoint = open_run(args.run_dir, args.resume, default_dir, asdict(args))
        check_iterations_left(checkpoint, sizes.num_iterations, "--num_iterations")
        in_words = sizes.in_words(launch.world_size, args.chunk_size, args.num_env_workers)
        print0(what_applies(**pick(args, what_applies, sizes=in_words)))
        model_flags = dict(dtype=DTYPES[args.dtype], device=device, value_head=False)
        model_flags |= dict(norm_stats=None, cuda_graphs=True)
        policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **model_flags))
        envs = make_envs(args.env_id, N, **world)
        eval_envs = make_envs(args.env_id, sizes.local_num_eval_envs, **eval_world)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config), args.offload)
    engine = build_engine(policy, ds_config, **pick(args, build_engine, value_learning_rate=None))
    stages = StageSwitcher(engine, rollout_copy, args.offload)
    guard = NonFiniteGuard(run_dir, rank())
    loss_flags = dict(surrogate=pick(args, clipped_surrogate), regularizers=pick(args, regularization))
    fan_sigma = args.fan_sigma if args.fan_coef else None
    buffer, spare = (RolloutBuffer.of(policy, T, N, keeps_reference=args.kl_coef > 0) for _ in range(2))
    start_iteration, global_step, iterations_without_signal = 0, 0, 0
    with user_errors():
        if checkpoint:
            start_iteration, global_step, _ = load_checkpoint(engine, checkpoint, first_env, N)
        policy.preprocess(envs.reset())  # instructions that do not fit the prompt end the run here
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
        preemption = Preemption(engine, run_dir, args.keep_checkpoints)
        logger.describe(describe_run(asdict(args), asdict(sizes), world_size()))

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
        preemption.exit(checkpoint or save_checkpoint(engine, run_dir, 0, 0, [{}] * N, args.keep_checkpoints))

    for iteration in range(start_iteration, sizes.num_iterations):
        preemption.snapshot(iteration, global_step, [{}] * N)
        # ------------------------------------------------------------------ rollout: weights are whole, ranks are free
        episodes, env_steps = [], 0
        with logger.timer("rollout"), rollout_stage(stages) as actor:
            for attempt in range(1 + args.max_resamples * args.dynamic_sampling):
                # (seed, iteration, attempt) decides everything random, the same on every rank
                draw = iteration * (1 + args.max_resamples) + attempt
                generator = torch.Generator().manual_seed(args.seed * 1_000_003 + draw)
                noise = (
                    uniform_noise(args.num_envs, actor.chunk_size, generator)[first_env:][:N]
                    for _ in preemption.until_requested(range(T + 1))
                )
                groups = range(first_env // args.group_size, (first_env + N) // args.group_size)
                ids = [train_episode_id(envs.num_start_states, args.seed, group, draw) for group in groups]
                ids = [episode_id for episode_id in ids for _ in range(args.group_size)]
                rolled = buffer if attempt == 0 else spare
                episodes += roll_out(actor, envs, ids, noise, args.temperature, rolled, device)
                env_steps += int(rolled.valid.sum())
                if attempt == 0:
                    first_live = live_groups(buffer, args.group_size)
                else:
                    fill_dead_groups(buffer, spare, args.group_size)
                if preemption.requested or live_groups(buffer, args.group_size).all():
                    break
        preemption.exit_if_requested()
        env_steps = int(all_reduce_sum(torch.tensor(env_steps)))  # actions executed, over all ranks
        global_step += env_steps

        # ------------------------------------------------------------------ advantage
        returns, ended = buffer.rewards.sum(dim=(0, 2)), buffer.dones.any(dim=0)  # [N]
        scores, live = compute_group_advantages(returns, ended, args.group_size, args.grpo_baseline, args.grpo_scale)
        advantages = scores[None, :, None] * buffer.valid  # [T, N, C]
        kept = ended & (live.repeat_interleave(args.group_size) | (not args.dynamic_sampling))  # [N]
        weights = episode_weights(buffer.valid & kept[None, :, None], args.length_norm)  # [T, N, C]
        decisive = (advantages != 0).any(dim=-1)  # [T, N], decisions that a gradient comes from
        num_live, num_decisive, num_decisions = all_reduce_sum(
            torch.stack([first_live.sum(), decisive.sum(), buffer.valid.any(dim=-1).sum()])
        ).tolist()
        live_share = num_live * args.group_size / args.num_envs
        iterations_without_signal = iterations_without_signal + 1 if live_share < 0.1 else 0
        if iterations_without_signal and iterations_without_signal % 5 == 0:
            print0(
                f"WARNING: for {iterations_without_signal} iterations fewer than 10 % of groups had members with "
                "different returns, and equal groups teach nothing: start from a better policy, or raise --group_size"
            )

        # ------------------------------------------------------------------ update: weights sharded, ranks in lock-step
        epochs = []
        dealing = dealing_generator(args.seed, iteration)  # ranks may have drawn unequally much noise by now
        decay = decay_at(args.schedule, iteration / sizes.num_iterations)
        engine.optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        with logger.timer("update"), update_stage(stages):
            for _ in range(args.update_epochs if num_decisive else 0):  # no signal: not even weight decay
                averages = Averages()
                for total, parts in minibatches(
                    weights, args.num_envs, first_env, args.num_minibatches, args.micro_batch_size, dealing
                ):
                    for number, index in enumerate(parts, 1):
                        mb = buffer.micro_batch(index, advantages, advantages, weights, device)
                        new = engine("evaluate", mb.inputs, mb.tokens, args.temperature, fan_sigma)
                        guard.check_ratio(new.logprobs, mb.old_logprobs)
                        loss, metrics = grpo_loss(new, mb, total, **loss_flags)
                        guard.check_gradients(backward(engine, loss, last=number == len(parts)), mb, loss)
                        averages.add(metrics)
                    preemption.exit_if_requested()
                epochs.append(averages.reduce(count=args.num_minibatches))
                if args.target_kl is not None and epochs[-1]["train/actor/approx_kl"] > args.target_kl:
                    break  # a mean over all ranks: they leave together, or ZeRO-3 hangs
        if not epochs:
            print0(f"iteration {iteration + 1}: every group's members scored the same; no weight was changed")
            epochs = [dict.fromkeys(UPDATE_METRICS, 0.0)]

        # ------------------------------------------------------------------ log, evaluate, save
        stopped = due(iteration, args.eval_freq, sizes.num_iterations) and not run_evaluation(iteration + 1)
        metrics = mean_over(epochs) | guard.pop_metrics() | stages.pop_metrics()
        metrics |= buffer.statistics(advantages, buffer.valid)
        metrics["train/actor/lr"] = engine.optimizer.param_groups[0]["lr"]
        metrics["rollout/live_groups"] = live_share
        metrics["rollout/zero_advantage"] = 1.0 - num_decisive / num_decisions
        metrics["rollout/effective_samples"] = num_decisive
        logger.write(iteration + 1, global_step, metrics, episodes, env_steps)
        if stopped or due(iteration, args.save_freq, sizes.num_iterations):
            # every iteration starts with a reset: no env has anything to go on with
            saved = save_checkpoint(engine, run_dir, iteration + 1, global_step, [{}] * N, args.keep_checkpoints)
            if stopped:  # --resume makes the evaluation again
                preemption.exit(saved)

    for opened in (logger, envs, eval_envs):
        opened.close()


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
