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

from envs import eval_episode_ids, make_envs, train_episode_id
from envs.video import VideoWriter
from vla.checkpoint import load_checkpoint, open_run, save_checkpoint
from vla.cli import check_at_least, derive_sizes, parse_args
from vla.distributed import (
    UserError,
    all_gather_lists,
    all_reduce_max,
    all_reduce_sum,
    checked,
    masked_mean_var,
    masked_min_max,
    print0,
    rank,
    run_main,
    setup_distributed,
    world_size,
)  # fmt: skip
from vla.engine import DTYPES, StepGuard, backward, build_engine, read_deepspeed_config, zero_stage
from vla.evaluation import evaluate
from vla.logger import Averages, Logger, describe_run, rows
from vla.policy import VLAPolicy, uniform_noise
from vla.pretrained import load_policy
from vla.rollout_buffer import MicroBatch, RolloutBuffer, minibatch_indices, split_padded
from vla.stages import make_rollout_copy, rollout_stage, update_stage

# what an iteration without update logs as 0
UPDATE_METRICS = """train/loss train/actor/policy_loss train/actor/approx_kl train/actor/clip_fraction
train/actor/clipped_ratio train/actor/dual_clip_fraction train/entropy_loss""".split()


@dataclass
class Args:
    # ---- run
    config: str | None = None
    """yaml file of flags; flags on the command line win over it"""
    run_dir: str | None = None
    """where everything goes; a new folder (default: runs/<algorithm>_<env_id>_<time>)"""
    resume: str | None = None
    """run folder to go on with: its own flags apply, later flags win"""
    seed: int = 0
    """everything random is a function of it; two runs with one seed on one machine are identical"""
    num_iterations: int = 400
    """how many times: rollout, advantage, update"""
    total_timesteps: int | None = None
    """env steps over all ranks; if given, it decides num_iterations"""
    save_freq: int = 40
    """checkpoint every so many iterations, and at the end"""
    keep_checkpoints: int = 2
    """how many checkpoints stay on disk; 0 keeps all"""
    eval_freq: int = 10
    """evaluate every so many iterations, besides the start and the end; 0 = only these two"""
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = ("tensorboard",)
    """where metrics go besides metrics.jsonl; wandb and swanlab have to be installed by you"""

    # ---- model
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    """openvla: one action per decision, 7 tokens written one after the other; openvla_oft: chunk_size actions in one
    bidirectional pass"""
    model_path: str = "openvla-tiny"
    """folder in the published layout, or a tiny preset, openvla-tiny or openvla-oft-tiny (random weights)"""
    unnorm_key: str = "bridge_orig"
    """which of the checkpoint's statistics turn tokens into metres and radians"""
    image_resize: Literal["tensor", "pil"] = "tensor"
    """how camera pictures become the model's: as RLinf resizes tensors, or as OpenVLA's own code does by Pillow"""
    oft_stop_token: bool = False
    """openvla_oft: end the sequence in </s>, as moojink's discrete checkpoints were trained; RLinf's were not"""
    lora_path: str | None = None
    """folder of an adapter to continue; it keeps its own rank, alpha and layers"""
    lora_rank: int = 0
    """rank of a fresh adapter; 0 trains all weights"""
    lora_alpha: int = 32
    """scale of a fresh adapter is lora_alpha / lora_rank (RLinf: 32; RL4VLA: 16)"""
    lora_scope: Literal["all", "llm"] = "all"
    """all: every linear layer (RLinf); llm: the language model's, and what the frozen vision towers make of a picture
    is computed once in the rollout and kept for the update"""
    max_prompt_length: int = 30
    """prompts are padded to this many tokens"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """precision of weights and activations; master weights and moments are fp32 in both"""

    # ---- env
    env_id: str = "PutOnPlateInScene25Main-v3"
    """one of the 17 PutOnPlateInScene25 ids, or any ManiSkill id with an RGB camera and pd_ee_delta_pose"""
    instruction: str | None = None
    """what the policy is told in an env that is not of the family; there each start state has its own"""
    obj_set: Literal["train", "test", "all"] = "train"
    """which objects, tables and receptacles episodes are drawn from"""
    asset_pack: Literal["builtin", "bridge"] = "builtin"
    """builtin: bodies and pictures made by code, nothing to download; bridge: the published meshes and photographs"""
    asset_dir: str | None = None
    """where the published assets are (`python doctor.py --download`); ManiSkill's own folder is looked into as well"""
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"
    """whose scene, where the two differ: RL4VLA's, or RLinf's departures from it, to compare with its table"""
    image_size: tuple[int, int] = (640, 480)
    """camera width and height; pose and field of view stay"""
    sim_freq: int = 500
    """physics steps per second, a multiple of the 5 Hz control; results at different rates do not compare"""
    max_episode_steps: int = 80
    """an episode is cut after this many actions"""
    num_env_workers: int = 0
    """worker processes per rank that simulate; 0 = in the rank's own process"""

    # ---- rollout
    num_envs: int = 256
    """parallel envs over all ranks"""
    num_steps: int = 80
    """actions per env and iteration"""
    chunk_size: int = 1
    """actions per decision; openvla has 1, openvla_oft's published models have 8"""
    temperature: float = 1.0
    """of sampling in the rollout; log-probabilities in the update use the same"""
    eval_temperature: float = 0.6
    """of sampling in evaluation; 0 = greedy (published tables use 0.6)"""
    num_eval_episodes: int = 64
    """held-out episodes per evaluation, the same ones every time"""
    num_eval_envs: int = 16
    """envs that evaluation runs at once, over all ranks"""

    # ---- algorithm
    group_size: int = 8
    """episodes from one start state, compared with each other; all on one rank"""
    grpo_baseline: Literal["mean", "leave_one_out"] = "mean"
    """what a return is compared with: the group's mean, or that of the other members (RLOO)"""
    grpo_scale: Literal["std", "none"] = "std"
    """divide by the group's standard deviation, or not (Dr. GRPO, arXiv 2503.20783)"""
    length_norm: bool = True
    """every episode counts the same (RLinf); otherwise every action does, and long episodes weigh more"""
    dynamic_sampling: bool = False
    """leave groups out of the update whose members all score the same (DAPO, arXiv 2503.14476)"""
    max_resamples: int = 0
    """with dynamic_sampling: roll out up to so many more times to fill the places of such groups"""
    logprob_level: Literal["token", "action", "chunk"] = "token"
    """unit whose probability ratio is clipped: each token, the 7 of an action together, or a whole chunk"""
    clip_ratio_low: float = 0.2
    """ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]"""
    clip_ratio_high: float = 0.28
    """see clip_ratio_low"""
    dual_clip: float | None = None
    """an action with negative advantage pushes with at most dual_clip * |advantage|; None = no limit"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    update_epochs: int = 1
    """passes over a rollout"""
    num_minibatches: int = 32
    """optimizer steps per pass"""
    target_kl: float | None = None
    """leave the update after a pass whose approx_kl (over all ranks) exceeds it"""
    learning_rate: float = 1e-5
    """of the policy; constant"""
    weight_decay: float = 0.01
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""

    # ---- system
    micro_batch_size: int = 8
    """decisions per forward and GPU: the memory knob. Out of memory: halve it; results stay the same"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass, block by block: less memory, a third more time"""
    deepspeed_config: str = "ds_configs/zero3.json"
    """ZeRO settings; sizes and rates are not in it"""
    local_rank: int = -1
    """set by the launcher"""


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
        total_weight: what weighted sums are divided by: the weight of the whole minibatch over all ranks, per rank.
        DeepSpeed
            adds up micro batches and averages ranks, so the sum of what this returns is the minibatch's weighted mean.

    Returns:
        loss and metrics, scalars. The unit whose ratio is clipped is a token, an action (7 tokens) or a chunk (its
        executed
        actions; its advantage is that of its first action, which holds the rewards of the others).
    """
    log_ratio = new_logprobs - mb.old_logprobs  # [B, C, D]
    advantages, weights = mb.advantages, mb.weights  # [B, C]
    if logprob_level == "token":
        num_tokens = log_ratio.shape[-1]
        advantages, weights = advantages[..., None], (weights / num_tokens)[..., None].expand_as(log_ratio)  # [B, C, D]
    else:
        log_ratio = log_ratio.sum(dim=-1)  # [B, C]
    if logprob_level == "chunk":
        log_ratio = (log_ratio * (weights > 0)).sum(dim=1, keepdim=True)  # [B, 1]
        advantages, weights = advantages[:, :1], weights.sum(dim=1, keepdim=True)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).sum() / total_weight

    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    losses = torch.maximum(unclipped, clipped)
    dual_clipped = torch.zeros_like(losses, dtype=torch.bool)
    if dual_clip is not None:  # a bad action whose ratio has exploded pushes with at most dual_clip * |A|
        dual_clipped = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = torch.where(dual_clipped, -dual_clip * advantages, losses)
    policy_loss = mean(losses)
    metrics = {
        "train/actor/policy_loss": policy_loss,
        "train/actor/approx_kl": mean(ratio - 1.0 - log_ratio),  # k3, http://joschu.net/blog/kl-approx.html
        "train/actor/clip_fraction": mean((clipped > unclipped).float()),
        "train/actor/clipped_ratio": mean(clipped_ratio),
        "train/actor/dual_clip_fraction": mean(dual_clipped.float()),
    }
    return policy_loss, metrics


def compute_group_advantages(
    returns: torch.Tensor, group_size: int, baseline: str, scale: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of whole episodes against their group (GRPO, arXiv 2402.03300, section 4.1).

    Args:
        returns: [N], undiscounted sum of rewards up to an episode's end; members of a group are neighbours.
        baseline: "mean", or "leave_one_out": the mean of the other members. scale: "std" (unbiased, + 1e-6 as RLinf)
        or "none".

    Returns:
        advantages [N]; live bool [N / group_size], groups whose members do not all score the same.
    """
    grouped = returns.view(-1, group_size)  # [groups, group_size]
    centered = grouped - grouped.mean(dim=1, keepdim=True)
    live = (grouped.max(dim=1).values - grouped.min(dim=1).values) > 1e-6
    if baseline == "leave_one_out":  # x - mean of the others = (x - mean) * G / (G - 1)
        centered = centered * group_size / (group_size - 1)
    if scale == "std":
        centered = centered / (grouped.std(dim=1, keepdim=True) + 1e-6)
    return (centered * live[:, None]).flatten(), live


def roll_out(
    actor: VLAPolicy,
    envs,
    episode_ids: list[int],
    noise: Iterator[torch.Tensor],
    temperature: float,
    buffer: RolloutBuffer,
    device: torch.device,
) -> list[dict[str, float]]:
    """One episode per env, from given start states, into the buffer; stops when all have ended.

    Args:
        envs: vector env without auto_reset. noise: one [N, C, D] per decision.

    Returns:
        statistics of the N episodes.
    """
    buffer.clear()
    inputs = actor.prepare(envs.reset(episode_ids), device)
    episodes = []
    for t in range(buffer.num_chunks):
        tokens, logprobs, values = actor.act(inputs, temperature, next(noise))  # [N, C, D] [N, C, D] [N, C]
        obs, rewards, terminations, truncations, infos = envs.step(actor.decode(tokens))  # [N, C] [N] [N]
        buffer.add(
            t, inputs, tokens=tokens, logprobs=logprobs, values=values, rewards=rewards, valid=infos["valid"],
            dones=terminations | truncations, final_values=torch.zeros(buffer.num_envs),
        )  # fmt: skip
        buffer.forget(infos["dropped"], before=t)  # lost with a worker: these envs have begun their episode again
        episodes += rows(infos["episode"])
        if len(episodes) == buffer.num_envs:
            break
        inputs = actor.prepare(obs, device)
    return episodes


def episode_weights(valid: torch.Tensor, length_norm: bool) -> torch.Tensor:
    """Weights of executed actions in the loss, [T, N, C], for valid bool [T, N, C].

    With length_norm an action of an episode of L actions weighs 1 / L: the loss is the mean over episodes of the mean
    over their actions (RLinf multiplies by 80 / L, which is the same up to a constant factor).
    """
    lengths = valid.sum(dim=(0, 2)).clamp(min=1)  # [N]
    return valid / lengths[None, :, None] if length_norm else valid.float()


def grpo_loss(
    new_logprobs: torch.Tensor,
    entropy: torch.Tensor,
    mb: MicroBatch,
    total_weight: float,
    *,
    ent_coef: float,
    **surrogate_flags: str | float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """clipped_surrogate - entropy bonus; no critic.

    Args:
        new_logprobs, entropy: [B, C, D]. total_weight: as for clipped_surrogate.

    Returns:
        loss and metrics, scalars, whose sums over micro batches, averaged over ranks, are weighted means over executed
        actions.
    """
    policy_loss, metrics = clipped_surrogate(new_logprobs, mb, total_weight, **surrogate_flags)
    mean_entropy = (entropy.mean(dim=-1) * mb.weights).sum() / total_weight
    loss = policy_loss - ent_coef * mean_entropy
    metrics |= {"train/loss": loss, "train/entropy_loss": mean_entropy}
    return loss, {name: value.detach() for name, value in metrics.items()}


def live_groups(buffer: RolloutBuffer, group_size: int) -> torch.Tensor:
    """bool [groups]: groups whose members do not all score the same."""
    return compute_group_advantages(buffer.rewards.sum(dim=(0, 2)), group_size, "mean", "none")[1]


def fill_dead_groups(buffer: RolloutBuffer, spare: RolloutBuffer, group_size: int) -> None:
    """Put the live groups of a further rollout in the places of dead ones, as far as they go."""
    dead = (~live_groups(buffer, group_size)).nonzero()  # [K, 1]
    live = live_groups(spare, group_size).nonzero()[: len(dead)]  # [K, 1]
    member = torch.arange(group_size)
    buffer.replace(
        (dead[: len(live)] * group_size + member).flatten(), spare, (live * group_size + member).flatten()
    )  # fmt: skip


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with checked():
        device = setup_distributed(args.seed)
        sizes = derive_sizes(
            num_envs=args.num_envs, num_steps=args.num_steps, chunk_size=args.chunk_size,
            num_minibatches=args.num_minibatches, micro_batch_size=args.micro_batch_size,
            group_size=args.group_size, num_iterations=args.num_iterations, total_timesteps=args.total_timesteps,
            rank=rank(), world_size=world_size(),
        )  # fmt: skip
        check_at_least(1, update_epochs=args.update_epochs, num_eval_episodes=args.num_eval_episodes)
        check_at_least(0, save_freq=args.save_freq, eval_freq=args.eval_freq, keep_checkpoints=args.keep_checkpoints)
        run_dir, checkpoint = open_run(
            args.run_dir, args.resume, default=f"runs/grpo_{args.env_id}_{time.strftime('%Y%m%d_%H%M%S')}"
        )
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype)
        policy = load_policy(
            args.model_path, args.model_type, chunk_size=args.chunk_size, unnorm_key=args.unnorm_key,
            dtype=DTYPES[args.dtype], image_resize=args.image_resize, oft_stop_token=args.oft_stop_token,
            lora_path=args.lora_path, lora_rank=args.lora_rank, lora_alpha=args.lora_alpha,
            lora_scope=args.lora_scope, max_prompt_length=args.max_prompt_length,
            gradient_checkpointing=args.gradient_checkpointing, device=device,
            value_head=False, seed=args.seed,
        )  # fmt: skip
        world = dict(
            obj_set=args.obj_set, instruction=args.instruction, asset_pack=args.asset_pack, asset_dir=args.asset_dir,
            image_size=args.image_size, sim_freq=args.sim_freq, max_episode_steps=args.max_episode_steps,
            protocol=args.protocol, seed=args.seed,
        )  # fmt: skip
        if args.group_size < 2:
            raise UserError(
                f"--group_size {args.group_size}: a group of one has nothing to be compared with, use 2 or more"
            )
        envs = make_envs(args.env_id, sizes.local_num_envs, num_env_workers=args.num_env_workers, **world)
        num_eval_envs = max(1, args.num_eval_envs // world_size())
        eval_envs = make_envs(
            args.env_id, num_eval_envs, num_env_workers=min(args.num_env_workers, num_eval_envs), **world
        )  # fmt: skip
        eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config))
    engine = build_engine(
        policy, ds_config, micro_batch_size=args.micro_batch_size, learning_rate=args.learning_rate,
        weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm,
    )  # fmt: skip
    guard = StepGuard(run_dir, rank())
    T, N, first_env = sizes.num_chunks, sizes.local_num_envs, sizes.first_env
    buffer, spare = (
        RolloutBuffer(
            T, N, policy.chunk_size, policy.image_size, args.max_prompt_length,
            feature_shape=policy.feature_shape() if policy.caches_features else None, feature_dtype=DTYPES[args.dtype],
        )
        for _ in range(2)
    )  # fmt: skip
    start_iteration, global_step, iterations_without_signal = 0, 0, 0
    with checked():
        if checkpoint:
            start_iteration, global_step, _ = load_checkpoint(engine, checkpoint, first_env, N)
        policy.preprocess(envs.reset())  # instructions that do not fit the prompt end the run here
        logger = Logger(
            run_dir, rank() == 0, sizes.num_iterations, start_iteration, global_step, backends=args.logger_backends
        )
        logger.describe(describe_run(asdict(args), asdict(sizes), world_size()))

    def run_evaluation(iteration: int) -> None:
        """The held-out episodes, with whole weights; rank 0 films its first batch."""
        with logger.timer("eval"), rollout_stage(engine, rollout_copy) as actor:
            with logger.video(VideoWriter, iteration) as video:
                means = evaluate(actor, eval_envs, eval_ids, args.eval_temperature, video)
        logger.write_evaluation(iteration, global_step, means)

    if not checkpoint:
        run_evaluation(0)

    for iteration in range(start_iteration, sizes.num_iterations):
        # ------------------------------------------------------------------ rollout: weights are whole, ranks are free
        episodes, env_steps = [], 0
        with logger.timer("rollout"), rollout_stage(engine, rollout_copy) as actor:
            for attempt in range(1 + args.max_resamples * args.dynamic_sampling):
                # (seed, iteration, attempt) decides everything random, the same on every rank
                draw = iteration * (1 + args.max_resamples) + attempt
                generator = torch.Generator().manual_seed(args.seed * 1_000_003 + draw)
                noise = (uniform_noise(args.num_envs, actor.chunk_size, generator)[first_env:][:N] for _ in range(T))
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
                if live_groups(buffer, args.group_size).all():
                    break
        env_steps = int(all_reduce_sum(torch.tensor(env_steps)))  # actions executed, over all ranks
        global_step += env_steps

        # ------------------------------------------------------------------ advantage
        returns = buffer.rewards.sum(dim=(0, 2))  # [N]
        scores, live = compute_group_advantages(returns, args.group_size, args.grpo_baseline, args.grpo_scale)
        advantages = scores[None, :, None] * buffer.valid  # [T, N, C]
        kept = live.repeat_interleave(args.group_size) | (not args.dynamic_sampling)  # [N]
        trained_on = buffer.valid & kept[None, :, None]  # [T, N, C]
        weights = episode_weights(trained_on, args.length_norm)  # [T, N, C]
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
        epochs, first_ratio_error = [], None
        dealing = torch.Generator().manual_seed(
            args.seed * 1_000_003 + iteration
        )  # ranks have drawn unequal noise by now
        with logger.timer("update"), update_stage(engine):
            for _ in range(args.update_epochs if num_decisive else 0):  # no signal: not even weight decay
                averages = Averages()
                minibatches = minibatch_indices(
                    trained_on.any(dim=-1), args.num_envs, first_env, args.num_minibatches, dealing
                )  # fmt: skip
                totals = all_reduce_sum(torch.stack([weights.flatten(0, 1)[index].sum() for index in minibatches]))
                longest = all_reduce_max(torch.tensor([len(index) for index in minibatches]))
                for index, total, length in zip(minibatches, totals.tolist(), longest.long().tolist()):
                    parts = split_padded(index, args.micro_batch_size, length)  # equally many on every rank
                    for number, part in enumerate(parts):
                        mb = buffer.micro_batch(part, advantages, advantages, weights, device)
                        new_logprobs, entropy, _ = engine(mb.inputs, args.temperature, tokens=mb.tokens)
                        if first_ratio_error is None:  # nothing has been updated yet: every ratio should be 1
                            first_ratio_error = float((new_logprobs.detach() - mb.old_logprobs).expm1().abs().max())
                        loss, metrics = grpo_loss(
                            new_logprobs, entropy, mb, max(total, 1e-9) / world_size(),
                            logprob_level=args.logprob_level, clip_ratio_low=args.clip_ratio_low,
                            clip_ratio_high=args.clip_ratio_high, dual_clip=args.dual_clip, ent_coef=args.ent_coef,
                        )  # fmt: skip
                        guard.see(backward(engine, loss, last=number + 1 == len(parts)), mb, loss)
                        averages.add(metrics)
                epochs.append(averages.reduce(count=args.num_minibatches))
                if args.target_kl is not None and epochs[-1]["train/actor/approx_kl"] > args.target_kl:
                    break  # a mean over all ranks: they leave together, or ZeRO-3 hangs
        if not epochs:
            print0(f"iteration {iteration + 1}: every group's members scored the same; no weight was changed")

        # ------------------------------------------------------------------ log, evaluate, save
        last = iteration + 1 == sizes.num_iterations
        if last or (args.eval_freq and (iteration + 1) % args.eval_freq == 0):
            run_evaluation(iteration + 1)
        epochs = epochs or [dict.fromkeys(UPDATE_METRICS, 0.0)]
        metrics = {tag: sum(epoch[tag] for epoch in epochs) / len(epochs) for tag in epochs[0]}
        metrics |= guard.take()
        metrics["train/actor/lr"] = engine.optimizer.param_groups[0]["lr"]
        metrics["train/actor/ratio_first_microbatch_error"] = max(all_gather_lists([first_ratio_error or 0.0]))
        metrics["rollout/live_groups"] = live_share
        metrics["rollout/zero_advantage"] = 1.0 - num_decisive / num_decisions
        metrics["rollout/effective_samples"] = num_decisive
        metrics["rollout/advantages_min"], metrics["rollout/advantages_max"] = masked_min_max(advantages, buffer.valid)
        metrics["rollout/advantages_mean"] = masked_mean_var(advantages, buffer.valid)[0]
        metrics["rollout/rewards"] = masked_mean_var(buffer.rewards, buffer.valid)[0]
        logger.write(iteration + 1, global_step, metrics, all_gather_lists(episodes), env_steps)
        if last or (args.save_freq and (iteration + 1) % args.save_freq == 0):
            # every iteration starts with a reset: no env has anything to go on with
            save_checkpoint(engine, run_dir, iteration + 1, global_step, [{}] * N, args.keep_checkpoints)

    logger.close()
    envs.close()
    eval_envs.close()


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
