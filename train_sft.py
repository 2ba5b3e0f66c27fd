"""Behaviour cloning of demonstrations: makes the warm-up policy that PPO and GRPO start from.

    python collect_demos.py --config yaml/demos_tiny.yaml --output demos/tiny
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train_sft.py --config yaml/sft_tiny_openvlaoft.yaml
    deepspeed train_sft.py --config yaml/sft_warmup_openvlaoft.yaml --demos demos/main
    python train_sft.py --help                                                        # every flag

An update is one optimizer step on `batch_size` decisions; an iteration is `updates_per_iteration` of them, one line of
metrics. Which decisions, in which order, and how their pictures are augmented is a function of the seed and the update,
on any number of ranks.

    B decisions in a micro batch   C = chunk_size actions per decision   D = 7 tokens per action
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from envs import eval_episode_ids, make_envs
from envs.demonstrations import Demos
from envs.video import VideoWriter
from vla import augmentation
from vla.checkpoint import load_checkpoint, open_run, save_checkpoint
from vla.cli import check_at_least, parse_args
from vla.distributed import UserError, checked, rank, run_main, setup_distributed, world_size
from vla.engine import DTYPES, StepGuard, backward, build_engine, read_deepspeed_config, zero_stage
from vla.evaluation import evaluate
from vla.logger import Averages, Logger, describe_run
from vla.policy import PolicyInputs, VLAPolicy
from vla.pretrained import load_policy
from vla.stages import make_rollout_copy, rollout_stage, update_stage

MAX_CLIPPED = 0.1  # share of a dimension's labels that the statistics may cut off


@dataclass
class Args:
    # ---- run
    config: str | None = None  # yaml file of flags; flags on the command line win over it
    run_dir: str | None = None  # where everything goes; a new folder (default: runs/<algorithm>_<env_id>_<time>)
    resume: str | None = None  # run folder to go on with: its own flags apply, later flags win
    seed: int = 0  # everything random is a function of it; two runs with one seed on one machine are identical
    num_updates: int = 2000  # optimizer steps
    updates_per_iteration: int = 50  # optimizer steps per line of metrics
    save_freq: int = 40  # checkpoint every so many iterations, and at the end
    keep_checkpoints: int = 2  # how many checkpoints stay on disk; 0 keeps all
    eval_freq: int = 10  # evaluate every so many iterations, besides the start and the end; 0 = only these two
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = ("tensorboard",)
    export_dir: str | None = None  # new folder for the final policy alone, an adapter merged in, with a card

    # ---- model
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    model_path: str = "openvla-tiny"
    unnorm_key: str = "bridge_orig"
    image_resize: Literal["tensor", "pil"] = "tensor"
    oft_stop_token: bool = False
    lora_path: str | None = None
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_scope: Literal["all", "llm"] = "all"
    max_prompt_length: int = 30
    chunk_size: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    # ---- demonstrations
    demos: str = "demos"  # folder that collect_demos.py made
    image_aug: bool = True  # random crops and colours
    label_sigma: float = 0.0  # a target token is spread over its neighbours by a Gaussian of so many bins; 0 = not

    # ---- env of the evaluation
    env_id: str = "PutOnPlateInScene25Main-v3"
    obj_set: Literal["train", "test", "all"] = "train"
    asset_pack: Literal["builtin", "bridge"] = "builtin"
    asset_dir: str | None = None
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"
    image_size: tuple[int, int] = (640, 480)
    sim_freq: int = 500
    max_episode_steps: int = 80
    num_env_workers: int = 0
    eval_temperature: float = 0.6
    num_eval_episodes: int = 64
    num_eval_envs: int = 16

    # ---- cloning
    batch_size: int = 32  # decisions per optimizer step, over all ranks
    learning_rate: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate; cosine falls to zero at the end
    warmup_updates: int = 0  # in which the learning rate rises to learning_rate
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    # ---- system
    micro_batch_size: int = 8
    gradient_checkpointing: bool = False
    deepspeed_config: str = "ds_configs/zero3.json"
    local_rank: int = -1


class CloneBatch(NamedTuple):
    """What one forward reads, on the model's device."""

    inputs: PolicyInputs  # [B, ...]
    tokens: torch.Tensor  # int64 [B, C, D]: the labels as tokens
    labels: torch.Tensor  # fp32 [B, C, D]: the labels, normalised to [-1, 1]
    weights: torch.Tensor  # [B, C]: 0 past the end of an episode


def learning_rate_at(update: int, num_updates: int, learning_rate: float, schedule: str, warmup_updates: int) -> float:
    """The rate of update 0 .. num_updates - 1: rises linearly, then stays or falls along half a cosine."""
    if update < warmup_updates:
        return learning_rate * (update + 1) / (warmup_updates + 1)
    if schedule == "constant":
        return learning_rate
    progress = (update - warmup_updates) / max(num_updates - warmup_updates, 1)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def batch_indices(update: int, num_samples: int, batch_size: int, seed: int) -> torch.Tensor:
    """The samples of one update, int64 [batch_size]: every pass over the data is shuffled anew, a rest is left out."""
    per_pass = num_samples // batch_size
    number, position = divmod(update, per_pass)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(num_samples, generator=generator)[position * batch_size : (position + 1) * batch_size]


def clone_loss(
    losses: torch.Tensor, predicted: torch.Tensor, batch: CloneBatch, decoded: torch.Tensor, total_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross entropy of the tokens, and how far greedy actions are from the labels.

    Args:
        losses, predicted: [B, C, D], of VLAPolicy.clone(). decoded: [B, C, D], `predicted` normalised to [-1, 1].
        total_weight: sum of weights of the whole batch over all ranks, per rank; what this returns then sums up to the
            batch's mean over micro batches, averaged over ranks.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # [B, C, D]
        return (x.mean(dim=-1) * batch.weights).sum() / total_weight

    loss = mean(losses)
    metrics = {
        "train/loss": loss.detach(),
        "train/token_accuracy": mean((predicted == batch.tokens).float()),
        "train/action_l1": mean((decoded - batch.labels).abs()),
    }
    return loss, metrics


def check_labels(policy: VLAPolicy, demos: Demos, unnorm_key: str) -> None:
    """Raises ValueError where the policy's statistics cut off what the demonstrations do."""
    labels, tokens = torch.from_numpy(demos.labels).double(), policy.action_tokens
    span = 0.05 * (tokens.q99 - tokens.q01)  # quantiles leave out 1 % on either side by themselves
    outside = ((labels < tokens.q01 - span) | (labels > tokens.q99 + span)) & tokens.mask  # [M, 7]
    share, axis = outside.double().mean(dim=0).max(dim=0)
    if share > MAX_CLIPPED:
        raise ValueError(
            f"{share:.0%} of the demonstrations' actions are out of range in dimension {int(axis)} of --unnorm_key "
            f"{unnorm_key}: use their own statistics ({', '.join(demos.statistics)}) or smaller expert steps"
        )


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with checked():
        device = setup_distributed(args.seed)
        check_at_least(
            1, num_updates=args.num_updates, updates_per_iteration=args.updates_per_iteration,
            batch_size=args.batch_size, micro_batch_size=args.micro_batch_size,
            num_eval_episodes=args.num_eval_episodes,
        )  # fmt: skip
        check_at_least(0, save_freq=args.save_freq, eval_freq=args.eval_freq, keep_checkpoints=args.keep_checkpoints)
        if args.num_updates % args.updates_per_iteration:
            raise UserError(
                f"--num_updates {args.num_updates} is not a multiple of --updates_per_iteration "
                f"{args.updates_per_iteration}"
            )
        if args.batch_size % world_size():
            raise UserError(f"--batch_size {args.batch_size} is not divisible by {world_size()} ranks")
        if args.export_dir and Path(args.export_dir).exists() and any(Path(args.export_dir).iterdir()):
            raise UserError(f"--export_dir {args.export_dir} exists already: remove it or name another folder")
        run_dir, checkpoint = open_run(
            args.run_dir, args.resume, default=f"runs/sft_{args.env_id}_{time.strftime('%Y%m%d_%H%M%S')}"
        )
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype)
        demos = Demos(Path(args.demos))
        demos.check_world(
            env_id=args.env_id, asset_pack=args.asset_pack, protocol=args.protocol, image_size=args.image_size,
            sim_freq=args.sim_freq,
        )  # fmt: skip
        if len(demos) < args.batch_size:
            raise UserError(f"--demos {args.demos} has {len(demos)} steps, fewer than --batch_size {args.batch_size}")
        policy = load_policy(
            args.model_path, args.model_type, chunk_size=args.chunk_size, unnorm_key=args.unnorm_key,
            norm_stats=demos.statistics, dtype=DTYPES[args.dtype], image_resize=args.image_resize,
            oft_stop_token=args.oft_stop_token, lora_path=args.lora_path, lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha, lora_scope=args.lora_scope, max_prompt_length=args.max_prompt_length,
            gradient_checkpointing=args.gradient_checkpointing, value_head=False, device=device, seed=args.seed,
        )  # fmt: skip
        check_labels(policy, demos, args.unnorm_key)
        num_eval_envs = max(1, args.num_eval_envs // world_size())
        eval_envs = make_envs(
            args.env_id, num_eval_envs, obj_set=args.obj_set, asset_pack=args.asset_pack, asset_dir=args.asset_dir,
            image_size=args.image_size, sim_freq=args.sim_freq, max_episode_steps=args.max_episode_steps,
            protocol=args.protocol, seed=args.seed, num_env_workers=min(args.num_env_workers, num_eval_envs),
        )  # fmt: skip
        eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config))
    engine = build_engine(
        policy, ds_config, micro_batch_size=args.micro_batch_size, learning_rate=args.learning_rate,
        weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm,
    )  # fmt: skip
    guard = StepGuard(run_dir, rank())
    num_iterations = args.num_updates // args.updates_per_iteration
    local_batch_size = args.batch_size // world_size()
    start_iteration, num_seen = 0, 0  # num_seen: decisions trained on, over all ranks
    with checked():
        if checkpoint:
            start_iteration, num_seen, _ = load_checkpoint(engine, checkpoint, 0, 0)
        logger = Logger(run_dir, rank() == 0, num_iterations, start_iteration, num_seen, backends=args.logger_backends)
        sizes = {"num_iterations": num_iterations, "local_batch_size": local_batch_size, "num_samples": len(demos)}
        logger.describe(describe_run(asdict(args), sizes, world_size()))

    def run_evaluation(iteration: int) -> dict[str, float]:
        """The held-out episodes, with whole weights; rank 0 films its first batch."""
        with logger.timer("eval"), rollout_stage(engine, rollout_copy) as actor:
            with logger.video(VideoWriter, iteration) as video:
                means = evaluate(actor, eval_envs, eval_ids, args.eval_temperature, video)
        logger.write_evaluation(iteration, num_seen, means)
        return means

    def micro_batch(index: torch.Tensor, draws: torch.Tensor) -> CloneBatch:
        """Samples [B] and what augments them [B, 6], read from the file."""
        obs = {"image": torch.from_numpy(demos.images(index.tolist()))}
        obs["task_description"] = [demos.instructions[i] for i in index]
        inputs = policy.preprocess(obs)
        if args.image_aug:
            inputs = inputs._replace(images=augmentation.augment(inputs.images, draws))
        labels, valid = (torch.from_numpy(x) for x in demos.chunks(index, args.chunk_size))
        labels = policy.action_tokens.normalize(labels)
        tokens = policy.action_tokens.encode(labels)
        return CloneBatch(inputs.to(device), *(x.to(device) for x in (tokens, labels.float(), valid.float())))

    if not checkpoint:
        run_evaluation(0)

    for iteration in range(start_iteration, num_iterations):
        averages = Averages()
        with logger.timer("update"), update_stage(engine):
            first = iteration * args.updates_per_iteration
            for update in range(first, first + args.updates_per_iteration):
                rate = learning_rate_at(
                    update, args.num_updates, args.learning_rate, args.schedule, args.warmup_updates
                )
                engine.optimizer.param_groups[0]["lr"] = rate
                index = batch_indices(update, len(demos), args.batch_size, args.seed)
                total = float(demos.chunks(index, args.chunk_size)[1].sum()) / world_size()
                draws = augmentation.draw(args.batch_size, torch.Generator().manual_seed(args.seed + 7919 * update))
                local = slice(rank() * local_batch_size, (rank() + 1) * local_batch_size)
                parts = list(zip(index[local].split(args.micro_batch_size), draws[local].split(args.micro_batch_size)))
                for number, part in enumerate(parts, start=1):
                    batch = micro_batch(*part)
                    losses, predicted = engine(batch.inputs, tokens=batch.tokens, label_sigma=args.label_sigma)
                    decoded = policy.action_tokens.decode(predicted).float().to(device)
                    loss, metrics = clone_loss(losses, predicted, batch, decoded, total)
                    guard.see(backward(engine, loss, last=number == len(parts)), batch, loss)
                    averages.add(metrics)
        num_seen += args.updates_per_iteration * args.batch_size

        last = iteration + 1 == num_iterations
        if last or (args.eval_freq and (iteration + 1) % args.eval_freq == 0):
            means = run_evaluation(iteration + 1)
        metrics = averages.reduce(count=args.updates_per_iteration) | guard.take()
        metrics["train/actor/lr"] = rate
        logger.write(iteration + 1, num_seen, metrics, [], 0)
        if last or (args.save_freq and (iteration + 1) % args.save_freq == 0):
            save_checkpoint(engine, run_dir, iteration + 1, num_seen, [], args.keep_checkpoints)

    logger.close()
    eval_envs.close()


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
