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
import torch.nn.functional as F

from envs import eval_episode_ids, make_envs
from envs.video import VideoWriter
from vla.checkpoint import load_checkpoint, open_run, save_checkpoint
from vla.cli import check_at_least, derive_sizes, parse_args
from vla.distributed import (
    all_gather_lists,
    all_reduce_max,
    all_reduce_sum,
    checked,
    masked_mean_var,
    masked_min_max,
    rank,
    run_main,
    setup_distributed,
    world_size,
)  # fmt: skip
from vla.engine import DTYPES, StepGuard, backward, build_engine, read_deepspeed_config, zero_stage
from vla.evaluation import evaluate
from vla.logger import Averages, Logger, describe_run, rows
from vla.policy import uniform_noise
from vla.pretrained import load_policy
from vla.rollout_buffer import MicroBatch, RolloutBuffer, minibatch_indices, split_padded
from vla.stages import make_rollout_copy, rollout_stage, update_stage


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
    lora_rank: int = 32
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
    auto_reset: bool = True
    """start the next episode as soon as one ends; otherwise all envs reset together when an iteration starts"""
    ignore_terminations: bool = False
    """do not end an episode on success"""
    num_env_workers: int = 0
    """worker processes per rank that simulate; 0 = in the rank's own process"""

    # ---- rollout
    num_envs: int = 128
    """parallel envs over all ranks"""
    num_steps: int = 160
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
    gamma: float = 0.99
    """discount per action"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    bootstrap: Literal["truncation", "always"] = "truncation"
    """which episode ends are followed by V(last frame): cut ones, or successes too (RLinf, for its published
    numbers)"""
    norm_adv: bool = True
    """normalise advantages, over all ranks"""
    logprob_level: Literal["token", "action", "chunk"] = "action"
    """unit whose probability ratio is clipped: each token, the 7 of an action together, or a whole chunk"""
    clip_ratio_low: float = 0.2
    """ratios are clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]"""
    clip_ratio_high: float = 0.2
    """see clip_ratio_low"""
    dual_clip: float | None = None
    """an action with negative advantage pushes with at most dual_clip * |advantage|; None = no limit"""
    value_clip: float | None = 0.2
    """largest counted change of a value from its rollout value; None = no limit"""
    huber_delta: float = 10.0
    """value errors above it count linearly; at 10 the value loss is half the squared error in practice"""
    vf_coef: float = 1.0
    """weight of the value loss"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    update_epochs: int = 1
    """passes over a rollout"""
    num_minibatches: int = 32
    """optimizer steps per pass"""
    critic_warmup_iterations: int = 0
    """iterations in which only the critic learns, at the start"""
    target_kl: float | None = None
    """leave the update after a pass whose approx_kl (over all ranks) exceeds it"""
    learning_rate: float = 1e-4
    """of the policy; constant"""
    value_learning_rate: float = 3e-3
    """of the critic; constant"""
    weight_decay: float = 0.01
    """of AdamW"""
    max_grad_norm: float = 10.0
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


def ppo_loss(
    new_logprobs: torch.Tensor,
    entropy: torch.Tensor,
    new_values: torch.Tensor,
    mb: MicroBatch,
    total_weight: float,
    *,
    value_clip: float | None,
    huber_delta: float,
    vf_coef: float,
    ent_coef: float,
    policy_coef: float = 1.0,
    **surrogate_flags: str | float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """clipped_surrogate + clipped Huber value loss - entropy bonus.

    Args:
        new_logprobs, entropy: [B, C, D]; new_values: [B, C]. total_weight: as for clipped_surrogate.
        policy_coef: 0 while only the critic learns.

    Returns:
        loss and metrics, scalars, whose sums over micro batches, averaged over ranks, are means over executed actions.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # [B, C]
        return (x * mb.weights).sum() / total_weight

    policy_loss, metrics = clipped_surrogate(new_logprobs, mb, total_weight, **surrogate_flags)
    change = new_values - mb.old_values
    errors = F.huber_loss(new_values, mb.returns, reduction="none", delta=huber_delta)
    value_clipped = torch.zeros_like(change, dtype=torch.bool)
    if value_clip is not None:
        limited = mb.old_values + change.clamp(-value_clip, value_clip)
        errors = torch.maximum(errors, F.huber_loss(limited, mb.returns, reduction="none", delta=huber_delta))
        value_clipped = change.abs() > value_clip
    value_loss, mean_entropy = mean(errors), mean(entropy.mean(dim=-1))
    loss = policy_coef * (policy_loss - ent_coef * mean_entropy) + vf_coef * value_loss
    metrics |= {
        "train/loss": loss,
        "train/critic/value_loss": value_loss,
        "train/entropy_loss": mean_entropy,
        "train/critic/value_clip_ratio": mean(value_clipped.float()),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with checked():
        device = setup_distributed(args.seed)
        sizes = derive_sizes(
            num_envs=args.num_envs, num_steps=args.num_steps, chunk_size=args.chunk_size,
            num_minibatches=args.num_minibatches, micro_batch_size=args.micro_batch_size,
            num_iterations=args.num_iterations, total_timesteps=args.total_timesteps, rank=rank(),
            world_size=world_size(),
        )  # fmt: skip
        check_at_least(1, update_epochs=args.update_epochs, num_eval_episodes=args.num_eval_episodes)
        check_at_least(0, save_freq=args.save_freq, eval_freq=args.eval_freq, keep_checkpoints=args.keep_checkpoints)
        run_dir, checkpoint = open_run(
            args.run_dir, args.resume, default=f"runs/ppo_{args.env_id}_{time.strftime('%Y%m%d_%H%M%S')}"
        )
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype)
        policy = load_policy(
            args.model_path, args.model_type, chunk_size=args.chunk_size, unnorm_key=args.unnorm_key,
            dtype=DTYPES[args.dtype], image_resize=args.image_resize, oft_stop_token=args.oft_stop_token,
            lora_path=args.lora_path, lora_rank=args.lora_rank, lora_alpha=args.lora_alpha,
            lora_scope=args.lora_scope, max_prompt_length=args.max_prompt_length,
            gradient_checkpointing=args.gradient_checkpointing, device=device, seed=args.seed,
        )  # fmt: skip
        world = dict(
            obj_set=args.obj_set, instruction=args.instruction, asset_pack=args.asset_pack, asset_dir=args.asset_dir,
            image_size=args.image_size, sim_freq=args.sim_freq, max_episode_steps=args.max_episode_steps,
            protocol=args.protocol, seed=args.seed,
        )  # fmt: skip
        envs = make_envs(
            args.env_id, sizes.local_num_envs, auto_reset=args.auto_reset, ignore_terminations=args.ignore_terminations,
            num_env_workers=args.num_env_workers, first_env=sizes.first_env, **world,
        )  # fmt: skip
        num_eval_envs = max(1, args.num_eval_envs // world_size())
        eval_envs = make_envs(
            args.env_id, num_eval_envs, num_env_workers=min(args.num_env_workers, num_eval_envs), **world
        )  # fmt: skip
        eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config))
    engine = build_engine(
        policy, ds_config, micro_batch_size=args.micro_batch_size, learning_rate=args.learning_rate,
        value_learning_rate=args.value_learning_rate, weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm,
    )  # fmt: skip
    guard = StepGuard(run_dir, rank())
    T, N, first_env = sizes.num_chunks, sizes.local_num_envs, sizes.first_env
    buffer = RolloutBuffer(
        T, N, policy.chunk_size, policy.image_size, args.max_prompt_length,
        feature_shape=policy.feature_shape() if policy.caches_features else None, feature_dtype=DTYPES[args.dtype],
    )  # fmt: skip
    start_iteration, global_step = 0, 0
    with checked():
        if checkpoint:
            start_iteration, global_step, env_states = load_checkpoint(engine, checkpoint, first_env, N)
            obs = envs.load_state_dict(env_states)
        else:
            obs = envs.reset()
        policy.preprocess(obs)  # instructions that do not fit the prompt end the run here
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
        # (seed, iteration) decides everything random below, the same on every rank: resuming needs no generator state
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        # ------------------------------------------------------------------ rollout: weights are whole, ranks are free
        episodes = []
        with logger.timer("rollout"), rollout_stage(engine, rollout_copy) as actor:
            if not args.auto_reset and (checkpoint or iteration > start_iteration):
                obs = envs.reset()
            inputs = actor.prepare(obs, device)
            for t in range(sizes.num_chunks):
                noise = uniform_noise(args.num_envs, actor.chunk_size, generator)[first_env:][:N]  # [N, C, D]
                tokens, logprobs, values = actor.act(inputs, args.temperature, noise)  # [N, C, D] [N, C, D] [N, C]
                next_obs, rewards, terminations, truncations, infos = envs.step(actor.decode(tokens))  # [N, C] [N] [N]
                bootstrapped = truncations | (terminations & (args.bootstrap == "always"))  # [N]
                final_values = torch.zeros(N)
                if bootstrapped.any():  # infos["ended"]: the envs that final_observation has rows for
                    final_inputs = actor.prepare(infos["final_observation"], device)
                    final_values[infos["ended"]] = actor.value(final_inputs)[:, 0].float().cpu()
                dropped = infos["dropped"]  # [N], lost with a worker: cut before this decision, at V of its frame
                buffer.add(
                    t, inputs, tokens=tokens, logprobs=logprobs, values=values, rewards=rewards, valid=infos["valid"],
                    dones=terminations | truncations | dropped,
                    final_values=torch.where(dropped, values[:, 0].cpu(), final_values * bootstrapped),
                )  # fmt: skip
                episodes += rows(infos["episode"])
                obs, inputs = next_obs, actor.prepare(next_obs, device)
            next_values = actor.value(inputs)[:, 0].cpu()  # [N]
        env_steps = int(all_reduce_sum(buffer.valid.sum()))  # actions executed, over all ranks
        global_step += env_steps

        # ------------------------------------------------------------------ advantage
        advantages, returns = compute_gae(
            buffer.rewards, buffer.values, buffer.valid, buffer.dones, buffer.final_values, next_values,
            args.gamma, args.gae_lambda,
        )  # [T, N, C] each  # fmt: skip
        if args.norm_adv:
            mean, variance = masked_mean_var(advantages, buffer.valid)  # over all ranks
            advantages = (advantages - mean) / (variance**0.5 + 1e-5)

        # ------------------------------------------------------------------ update: weights sharded, ranks in lock-step
        weights = buffer.valid.float()  # [T, N, C]
        warming_up = iteration < args.critic_warmup_iterations
        engine.optimizer.param_groups[0]["lr"] = 0.0 if warming_up else args.learning_rate
        epochs, first_ratio_error = [], None
        with logger.timer("update"), update_stage(engine):
            for _ in range(args.update_epochs):
                averages = Averages()
                minibatches = minibatch_indices(
                    buffer.valid.any(dim=-1), args.num_envs, first_env, args.num_minibatches, generator
                )  # fmt: skip
                totals = all_reduce_sum(torch.stack([weights.flatten(0, 1)[index].sum() for index in minibatches]))
                longest = all_reduce_max(torch.tensor([len(index) for index in minibatches]))
                for index, total, length in zip(minibatches, totals.tolist(), longest.long().tolist()):
                    parts = split_padded(index, args.micro_batch_size, length)  # equally many on every rank
                    for number, part in enumerate(parts):
                        mb = buffer.micro_batch(part, advantages, returns, weights, device)
                        new_logprobs, entropy, new_values = engine(mb.inputs, args.temperature, tokens=mb.tokens)
                        if first_ratio_error is None:  # nothing has been updated yet: every ratio should be 1
                            first_ratio_error = float((new_logprobs.detach() - mb.old_logprobs).expm1().abs().max())
                        loss, metrics = ppo_loss(
                            new_logprobs, entropy, new_values, mb, max(total, 1.0) / world_size(),
                            logprob_level=args.logprob_level, clip_ratio_low=args.clip_ratio_low,
                            clip_ratio_high=args.clip_ratio_high, dual_clip=args.dual_clip, value_clip=args.value_clip,
                            huber_delta=args.huber_delta, vf_coef=args.vf_coef, ent_coef=args.ent_coef,
                            policy_coef=0.0 if warming_up else 1.0,
                        )  # fmt: skip
                        guard.see(backward(engine, loss, last=number + 1 == len(parts)), mb, loss)
                        averages.add(metrics)
                epochs.append(averages.reduce(count=args.num_minibatches))
                if args.target_kl is not None and epochs[-1]["train/actor/approx_kl"] > args.target_kl:
                    break  # a mean over all ranks: they leave together, or ZeRO-3 hangs

        # ------------------------------------------------------------------ log, evaluate, save
        last = iteration + 1 == sizes.num_iterations
        if last or (args.eval_freq and (iteration + 1) % args.eval_freq == 0):
            run_evaluation(iteration + 1)
        metrics = {tag: sum(epoch[tag] for epoch in epochs) / len(epochs) for tag in epochs[0]}
        metrics |= guard.take()
        metrics["train/actor/lr"] = engine.optimizer.param_groups[0]["lr"]
        metrics["train/actor/ratio_first_microbatch_error"] = max(all_gather_lists([first_ratio_error]))
        residual, total = (masked_mean_var(x, buffer.valid)[1] for x in (returns - buffer.values, returns))
        metrics["train/critic/explained_variance"] = 1.0 - residual / total if total > 0 else 0.0
        metrics["rollout/advantages_min"], metrics["rollout/advantages_max"] = masked_min_max(advantages, buffer.valid)
        metrics["rollout/advantages_mean"] = masked_mean_var(advantages, buffer.valid)[0]
        metrics["rollout/rewards"] = masked_mean_var(buffer.rewards, buffer.valid)[0]
        logger.write(iteration + 1, global_step, metrics, all_gather_lists(episodes), env_steps)
        if last or (args.save_freq and (iteration + 1) % args.save_freq == 0):
            save_checkpoint(engine, run_dir, iteration + 1, global_step, envs.state_dict(), args.keep_checkpoints)

    logger.close()
    envs.close()
    eval_envs.close()


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
